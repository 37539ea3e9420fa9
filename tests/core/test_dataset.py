"""The content and order of batches. What worker processes could change about them is in system/test_loader_workers."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import (
    COUNTS,
    GREY,
    IMAGE,
    as_lists,
    make_config,
    make_gallery_loader,
    make_reader,
    make_train_loader,
    write_store,
)
from media import index_of

from adaclip_finetune.config import ADAPTATIONS, CAPTIONERS, OBJECTIVES, PEFT, TASKS, TOWERS
from adaclip_finetune.data.dataset import collate
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.preprocess import draw_crop_flip, to_square
from adaclip_finetune.data.sampling import generator


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameFolder:
    return write_store(tmp_path_factory.mktemp("frames"))


def test_the_content_of_a_batch(store: FrameFolder) -> None:
    """A batch larger than the data holds all of it."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    (batch,) = make_train_loader(store).epoch(0, batch_size=500)
    assert torch.equal(torch.get_rng_state(), state), "loading moves the random state of the model"
    videos = batch.videos
    assert videos.frames.shape == (5, 4, 3, 32, 32) and videos.frames.dtype == torch.uint8
    assert videos.policy_frames is not None and videos.policy_frames.shape == (5, 4, 1, 10, 10)
    assert videos.frame_mask.dtype == torch.bool and videos.frame_mask.all()
    assert sorted(videos.video_ids) == list(COUNTS) and batch.token_ids.shape == (5, 7)
    for row, video_id in enumerate(videos.video_ids):
        indices = videos.frame_indices[row].tolist()
        pixels = store.read(video_id, indices)
        assert [index_of(frame) for frame in pixels] == indices == sorted(indices)
        assert len(set(indices)) == min(4, COUNTS[video_id])  # a short video repeats frames
        assert np.array_equal(videos.frames[row], to_square(pixels, IMAGE))
        assert np.array_equal(videos.policy_frames[row], to_square(pixels, GREY))
        assert chr(batch.token_ids[row, 0]) == video_id
    moved = videos.to("meta")
    assert moved.frames.is_meta and moved.frame_mask.is_meta and moved.video_ids == videos.video_ids


def test_class_names_are_put_into_templates_that_each_epoch_draws(store: FrameFolder, tmp_path: Path) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("\n".join(f"{letter}{{}}" for letter in "pqrs"))
    settings = {"templates": str(templates), "train_templates": True}
    named = {"task": {"method": "classification", "config": settings}}

    def texts(epoch: int, start: int = 0, **values: Any) -> dict[str, str]:
        loader = make_train_loader(store, **values)
        loader.dataset.entries = [replace(entry, labelled=entry.video_id != "e") for entry in loader.dataset.entries]
        found = {}
        for batch in loader.epoch(epoch, batch_size=2, start=start):
            # Captions stay the class names, by which pairs of one class are no negatives of each other.
            assert [caption[0] for caption in batch.captions] == batch.videos.video_ids
            read = [bytes(row).rstrip(b"\0").decode() for row in batch.token_ids.tolist()]
            assert all(text.endswith(caption) for text, caption in zip(read, batch.captions, strict=True))
            found |= dict(zip(batch.videos.video_ids, read, strict=True))
        return found

    epochs = [texts(epoch, **named) for epoch in range(6)]
    assert {text[0] for found in epochs for name, text in found.items() if name != "e"} == set("pqrs")
    assert len({tuple(sorted(found.items())) for found in epochs}) == 6
    assert all(len(found["e"]) == 2 for found in epochs), "what is not labelled names no class"
    assert texts(3, **named) == epochs[3] and texts(3, start=1, **named).items() < epochs[3].items()
    assert texts(3, **named, seed=1) != epochs[3]
    assert {text[1:] for name, text in epochs[3].items() if name != "e"} == {
        text for name, text in texts(3).items() if name != "e"
    }, "templates are drawn apart from captions"


def test_frames_outside_the_subset_are_blank(store: FrameFolder) -> None:
    videos = collate([make_reader(store, sampling="uniform", num_frm_subset=3).read("c")]).videos
    assert videos is not None and videos.policy_frames is not None
    assert videos.frame_indices.tolist() == [[0, 3, 6, -1]]
    assert videos.frame_mask.tolist() == [[True, True, True, False]]
    assert videos.frames[0, :3].any() and not videos.frames[0, 3].any() and not videos.policy_frames[0, 3].any()


def test_draws_of_an_entry_depend_on_seed_and_epoch_but_not_on_its_batch(store: FrameFolder) -> None:
    def rows(epoch: int, batch_size: int, **values: Any) -> dict[str, Any]:
        return {
            video_id: (batch.token_ids[row].tolist(), batch.videos.frame_indices[row].tolist())
            for batch in make_train_loader(store, **values).epoch(epoch, batch_size)
            for row, video_id in enumerate(batch.videos.video_ids)
        }

    assert rows(4, 2) == rows(4, 3) == rows(4, 5)
    assert rows(4, 2) != rows(3, 2) and rows(4, 2) != rows(4, 2, seed=1)


def test_a_clip_is_augmented_in_training_only_and_anew_in_each_epoch(store: FrameFolder) -> None:
    given = {"augmentation": "crop_flip", "sampling": "uniform", "num_frm": 2}
    plain, reader = make_reader(store, sampling="uniform", num_frm=2), make_reader(store, **given)
    whole = plain.read("c")
    assert np.array_equal(reader.read("c").frames, whole.frames)
    seen = set()
    for epoch in range(8):
        drawn, again = (reader.read("c", generator("frames", 0, epoch)) for _ in range(2))
        assert np.array_equal(drawn.frames, again.frames) and drawn.indices.tolist() == whole.indices.tolist()
        part = draw_crop_flip(66, 130, generator("frames", 0, epoch))
        pixels = store.read("c", drawn.indices.tolist())
        assert drawn.policy_frames is not None
        assert np.array_equal(drawn.frames, to_square(pixels, IMAGE, part))  # one part for all frames and views
        assert np.array_equal(drawn.policy_frames, to_square(pixels, GREY, part))
        seen.add(drawn.frames.tobytes())
    assert len(seen) == 8


def test_auxiliary_captions_reach_the_objective_that_uses_them(store: FrameFolder) -> None:
    for loss, used in (("v_s", False), ("v_sc", True)):
        objective = {"method": "auxiliary_captions", "config": {"loss": loss}}
        (batch,) = make_train_loader(store, "ace", objective=objective).epoch(0, batch_size=5)
        assert (batch.auxiliary_ids is not None) == (batch.has_auxiliary is not None) == used
    for part in (batch, batch.rows(2, 4)):
        names, ids, has = part.videos.video_ids, part.auxiliary_ids, part.has_auxiliary
        assert ids is not None and has is not None
        assert {name for name, one in zip(names, has, strict=True) if one} == {*names} & {*"ace"}
        texts = [bytes(row.tolist()).rstrip(b"\0").decode() for row in ids]
        assert texts == [f"also {name}" if name in "ace" else "" for name in names]


def test_an_epoch_goes_on_in_the_middle(store: FrameFolder) -> None:
    whole = as_lists(make_train_loader(store).epoch(1, batch_size=2))
    assert as_lists(make_train_loader(store).epoch(1, batch_size=2, start=1)) == whole[1:]


def test_every_config_reaches_worker_processes() -> None:
    tables = {"peft": PEFT, "tower": TOWERS, "captioner": CAPTIONERS, "objective": OBJECTIVES, "task": TASKS}
    speaking = {"captioner": {"method": "mlp"}, "concat_captions": "indep-one", "resume": "run"}
    for section, table in {**tables, "adaptation": ADAPTATIONS}.items():
        for method in table:
            config = make_config(**{"num_epochs": 3, "do_inference": True, **speaking, section: {"method": method}})
            assert pickle.loads(pickle.dumps(config)) == config, method


def test_a_batch_without_a_readable_video_is_blank(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    loader = make_train_loader(store, "a", objective={"method": "auxiliary_captions"})
    list(loader.epoch(0, batch_size=2))
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(b"")
    for batch in loader.epoch(1, batch_size=2):
        assert len(batch) == 0 and batch.videos.frames.shape[0] == len(batch.token_ids) == len(batch.noise) == 1
        assert not batch.videos.frames.any() and not batch.videos.frame_mask.any()
        assert batch.auxiliary_ids is not None and batch.auxiliary_ids.shape == batch.token_ids.shape
        assert batch.has_auxiliary is not None and batch.has_auxiliary.tolist() == [False]
    failed = loader.take_failed()
    assert failed.keys() == COUNTS.keys() and all("image_0000" in reason for reason in failed.values())
    assert loader.take_failed() == {}


def test_gallery_batches_by_number(store: FrameFolder) -> None:
    loader = make_gallery_loader(store)
    assert len(loader) == 3
    for numbers, expected in (([0, 1, 2], ["ab", "cd", "e"]), ([2, 0], ["e", "ab"]), ([], []), ([1], ["cd"])):
        batches = [collated.videos for collated in loader.read(numbers)]
        assert ["".join(batch.video_ids) for batch in batches if batch] == expected
    (collated,) = loader.read([0])
    assert collated.videos is not None
    assert collated.videos.frame_indices[0].tolist() == [0, 2, 4, 6]  # never random, even if `sampling` is
    loader = make_gallery_loader(store, val_batch_size=500, num_frm=256)  # bounded in frames, too
    assert [len(collated.videos or []) for collated in loader.read(range(len(loader)))] == [2, 2, 1]
