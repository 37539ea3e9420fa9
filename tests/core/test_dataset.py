"""The content and order of batches, which neither workers nor broken videos change."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media import index_of, write_frames, write_video
from torch import Tensor

from adaclip_finetune.config import ADAPTATIONS, OBJECTIVES, PEFT, TASKS, TOWERS, Config, load_config
from adaclip_finetune.data.dataset import GalleryDataset, TrainBatch, TrainDataset, VideoReader, collate
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.loader import GalleryLoader, TrainLoader, epoch_batches, updates_per_epoch
from adaclip_finetune.data.preprocess import ImageSpec, Views, to_square
from adaclip_finetune.data.queries import TrainEntry
from adaclip_finetune.data.video.folder import VideoFolder

TEMPLATE = "image_{:05d}.jpg"
IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize_mode="squash")
GREY = ImageSpec(10, (0.0,), (1.0,), resize_mode="squash", grey=True)
VIEWS = Views(IMAGE, GREY)
COUNTS = {"a": 9, "b": 3, "c": 12, "d": 6, "e": 7}


def make_config(**values: Any) -> Config:
    defaults = {
        "num_frm": 4, "top_k": 2, "sampling": "random", "num_workers": 0, "max_txt_len": 7, "val_batch_size": 2,
    }  # fmt: skip
    return load_config(None, defaults | values)


def tokenize(texts: Sequence[str], max_len: int) -> Tensor:
    """Return the bytes of each text, so that tests can read it back."""
    ids = torch.zeros(len(texts), max_len, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text.encode()))[:max_len]
    return ids


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for video_id, count in COUNTS.items():
        write_frames(folder / video_id, count)
    return folder


def make_entries() -> list[TrainEntry]:
    return [TrainEntry(video_id, tuple(f"{video_id}{i}" for i in range(3))) for video_id in COUNTS]


def make_train_loader(store: FrameStore, **values: Any) -> TrainLoader:
    config = make_config(**values)
    return TrainLoader(TrainDataset(make_entries(), VideoReader(store, config, VIEWS)), config, tokenize)


def as_lists(batches: Any) -> list[Any]:
    return [
        (b.videos.video_ids, b.token_ids.tolist(), b.videos.frame_indices.tolist(), b.videos.frames.sum().item())
        for b in batches
    ]


def test_the_content_of_a_batch(frames: Path) -> None:
    store = FrameFolder(frames, TEMPLATE)
    batch = next(make_train_loader(store).epoch(0, batch_size=5))
    assert isinstance(batch, TrainBatch)
    videos = batch.videos
    assert videos.frames.shape == (5, 4, 3, 32, 32) and videos.frames.dtype == torch.uint8
    assert videos.policy_frames is not None and videos.policy_frames.shape == (5, 4, 1, 10, 10)
    assert videos.frame_mask.dtype == torch.bool and videos.frame_mask.all()
    assert sorted(videos.video_ids) == list(COUNTS) and len(videos) == 5
    assert batch.token_ids.shape == (5, 7)
    for row, video_id in enumerate(videos.video_ids):
        indices = videos.frame_indices[row].tolist()
        pixels = store.read(video_id, indices)
        assert [index_of(frame) for frame in pixels] == indices == sorted(indices)
        assert np.array_equal(videos.frames[row], to_square(pixels, IMAGE))
        assert np.array_equal(videos.policy_frames[row], to_square(pixels, GREY))
        assert chr(batch.token_ids[row, 0]) == video_id


def test_frames_outside_the_subset_are_blank(frames: Path) -> None:
    config = make_config(sampling="uniform", num_frm_subset=3)
    videos = collate([VideoReader(FrameFolder(frames, TEMPLATE), config, VIEWS).read("c")]).videos
    assert videos is not None and videos.policy_frames is not None
    assert videos.frame_indices.tolist() == [[0, 3, 6, -1]]
    assert videos.frame_mask.tolist() == [[True, True, True, False]]
    assert videos.frames[0, :3].any() and not videos.frames[0, 3].any() and not videos.policy_frames[0, 3].any()


def test_a_short_video_repeats_frames(frames: Path) -> None:
    loader = make_train_loader(FrameFolder(frames, TEMPLATE), num_frm=8)
    for batch in loader.epoch(0, batch_size=2):
        for video_id, indices in zip(batch.videos.video_ids, batch.videos.frame_indices.tolist(), strict=True):
            assert len(set(indices)) == min(8, COUNTS[video_id])
    assert not loader.failed


def test_batches_do_not_depend_on_workers(frames: Path) -> None:
    store = FrameFolder(frames, TEMPLATE)
    plain = make_train_loader(store)
    by_epoch = [as_lists(plain.epoch(epoch, batch_size=2)) for epoch in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    for num_workers in (1, 2):
        loader = make_train_loader(store, num_workers=num_workers)
        for epoch in (2, 0, 0, 1):  # any order, the same workers all the time
            assert as_lists(loader.epoch(epoch, batch_size=2)) == by_epoch[epoch]
        assert as_lists(loader.epoch(1, batch_size=2, start=1)) == by_epoch[1][1:]
        next(loader.epoch(0, batch_size=2))  # abandoned with batches on their way
        assert as_lists(loader.epoch(2, batch_size=2)) == by_epoch[2]
    assert as_lists(make_train_loader(store, seed=1).epoch(0, batch_size=2)) != by_epoch[0]


def test_draws_of_an_entry_do_not_depend_on_its_batch(frames: Path) -> None:
    loader = make_train_loader(FrameFolder(frames, TEMPLATE))

    def rows(batch_size: int) -> dict[str, Any]:
        return {
            video_id: (batch.token_ids[row].tolist(), batch.videos.frame_indices[row].tolist())
            for batch in loader.epoch(4, batch_size)
            for row, video_id in enumerate(batch.videos.video_ids)
        }

    assert rows(2) == rows(3) == rows(5)


def test_loading_does_not_move_the_random_state_of_the_model(frames: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_train_loader(FrameFolder(frames, TEMPLATE)).epoch(0, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_videos_in_worker_processes(tmp_path: Path) -> None:
    """Forked ones, and spawned ones, which get the dataset by pickle."""
    for video_id, count in COUNTS.items():
        write_video(tmp_path / f"{video_id}.mp4", count)
    store = VideoFolder(tmp_path)
    plain = make_train_loader(store)
    expected = as_lists(plain.epoch(0, batch_size=3))
    assert as_lists(make_train_loader(store, num_workers=1).epoch(0, batch_size=3)) == expected
    item, copied = plain.dataset[0, 2], pickle.loads(pickle.dumps(plain.dataset))[0, 2]
    assert np.array_equal(item.frames, copied.frames) and item.text == copied.text  # type: ignore[union-attr]


def test_every_config_reaches_worker_processes() -> None:
    tables = {"peft": PEFT, "tower": TOWERS, "objective": OBJECTIVES, "task": TASKS, "adaptation": ADAPTATIONS}
    for section, table in tables.items():
        for method in table:
            config = make_config(num_epochs=3, **{section: {"method": method}})
            assert pickle.loads(pickle.dumps(config)) == config, method


def test_a_batch_larger_than_the_data_is_one_batch(frames: Path) -> None:
    loader = make_train_loader(FrameFolder(frames, TEMPLATE))
    batches = list(loader.epoch(0, batch_size=500))
    assert updates_per_epoch(5, 500, 1) == len(batches) == 1 and len(batches[0].videos) == 5


@settings(deadline=None)
@given(num_entries=st.integers(1, 200), batch_size=st.integers(1, 60), epoch=st.integers(0, 3))
def test_epoch_batches(num_entries: int, batch_size: int, epoch: int) -> None:
    batches = epoch_batches(num_entries, batch_size, seed=3, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(num_entries))
    sizes = [len(batch) for batch in batches]
    if num_entries > 1 and batch_size > 1:
        assert min(sizes) >= 2
    assert max(sizes) <= (batch_size if batch_size != 2 else 3)
    if batch_size != 2:
        assert len(batches) == -(-num_entries // batch_size)
    assert batches == epoch_batches(num_entries, batch_size, seed=3, epoch=epoch)
    if num_entries > 50:
        assert len({tuple(epoch_batches(num_entries, 500, seed, epoch)[0]) for seed in range(3)}) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_corrupt_jpeg_neither_ends_nor_changes_training(frames: Path, tmp_path: Path, num_workers: int) -> None:
    """The video is left out by name; every other row is what it would have been."""
    for video_id, count in COUNTS.items():
        folder = write_frames(tmp_path / video_id, count)
    (tmp_path / "c" / TEMPLATE.format(1)).write_bytes((folder / TEMPLATE.format(1)).read_bytes()[:500])
    sound = make_train_loader(FrameFolder(frames, TEMPLATE), sampling="uniform")
    broken = make_train_loader(FrameFolder(tmp_path, TEMPLATE), sampling="uniform", num_workers=num_workers)
    for whole, rest in zip(sound.epoch(0, 3), broken.epoch(0, 3), strict=True):
        kept = [row for row, video_id in enumerate(whole.videos.video_ids) if video_id != "c"]
        assert rest.videos.video_ids == [whole.videos.video_ids[row] for row in kept]
        assert torch.equal(rest.videos.frames, whole.videos.frames[kept])
        assert torch.equal(rest.token_ids, whole.token_ids[kept])
        assert torch.equal(rest.noise, whole.noise[kept])
    assert list(broken.failed) == ["c"] and "image_00001.jpg: cannot be decoded" in broken.failed["c"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_a_readable_video_is_blank(tmp_path: Path, num_workers: int) -> None:
    for video_id, count in COUNTS.items():
        write_frames(tmp_path / video_id, count)
    store = FrameFolder(tmp_path, TEMPLATE)
    loader = make_train_loader(store, num_workers=num_workers)
    list(loader.epoch(0, batch_size=2))
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(b"")
    for batch in loader.epoch(1, batch_size=2):
        assert len(batch) == 0 and batch.videos.frames.shape[0] == len(batch.token_ids) == len(batch.noise) == 1
        assert not batch.videos.frames.any() and not batch.videos.frame_mask.any()
    failed = loader.take_failed()
    assert failed.keys() == COUNTS.keys() and all("image_0000" in reason for reason in failed.values())
    assert loader.take_failed() == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_gallery(frames: Path, num_workers: int) -> None:
    config = make_config(num_workers=num_workers)
    reader = VideoReader(FrameFolder(frames, TEMPLATE), config, VIEWS)
    loader = GalleryLoader(GalleryDataset(list(COUNTS), reader), config)
    assert len(loader) == 3
    for numbers, expected in (([0, 1, 2], ["ab", "cd", "e"]), ([2, 0], ["e", "ab"]), ([], []), ([1], ["cd"])):
        batches = [collated.videos for collated in loader.read(numbers)]
        assert ["".join(batch.video_ids) for batch in batches if batch] == expected
    (collated,) = loader.read([0])
    assert collated.videos is not None
    assert collated.videos.frame_indices[0].tolist() == [0, 2, 4, 6]  # never random, even if `sampling` is
    loader.close()
    config = make_config(val_batch_size=500, num_frm=256)  # bounded in frames, too
    loader = GalleryLoader(GalleryDataset(list(COUNTS), VideoReader(reader.store, config, VIEWS)), config)
    assert [len(collated.videos or []) for collated in loader.read(range(len(loader)))] == [2, 2, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_frames_that_fail_in_evaluation_come_with_their_batch(tmp_path: Path, num_workers: int) -> None:
    for video_id, count in COUNTS.items():
        write_frames(tmp_path / video_id, count)
    for video_id in "bd":
        (tmp_path / video_id / TEMPLATE.format(1)).write_bytes(b"")
    config = make_config(num_workers=num_workers)
    loader = GalleryLoader(
        GalleryDataset(list(COUNTS), VideoReader(FrameFolder(tmp_path, TEMPLATE), config, VIEWS)), config
    )
    found = [(c.videos.video_ids if c.videos else [], [e.video_id for e in c.failures]) for c in loader.read(range(3))]
    assert found == [(["a"], ["b"]), (["c"], ["d"]), (["e"], [])]
    loader.close()


def test_moving_a_batch_keeps_its_names(frames: Path) -> None:
    reader = VideoReader(FrameFolder(frames, TEMPLATE), make_config(), Views(IMAGE))
    videos = collate([reader.read("a"), reader.read("b")]).videos
    assert videos is not None
    moved = videos.to("meta", non_blocking=True)
    assert moved.frames.is_meta and moved.frame_mask.is_meta and moved.frame_indices.is_meta
    assert moved.policy_frames is None and moved.video_ids == ["a", "b"]
