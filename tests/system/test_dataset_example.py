"""The example data is what its README says and what its script makes; the tiny CLIP knows it, but not too well."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open

from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.batches import BatchPlan
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.training.measure import neighbours
from adaclip_finetune.training.session import open_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import leaks
import make_dataset_example as maker
import pretrain_tiny_clip as pretraining
import shapes_clips
import shapes_world as world
from shapes_stills import Stills

DATA = Path(__file__).resolve().parents[2] / "dataset_example"
EVENTS = json.loads((DATA / "events.json").read_text())
STORE = VideoFolder(DATA / "videos", {})


@pytest.fixture(scope="module")
def annotations():
    return {split: load_annotations(DATA / f"{split}.json") for split in ("train", "val", "test")}


def test_every_video_of_every_split_is_there_and_in_one_split(annotations):
    assert {split: len(videos) for split, videos in annotations.items()} == {"train": 600, "val": 150, "test": 250}
    names = [video.video_id for videos in annotations.values() for video in videos]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(path.stem for path in (DATA / "videos").iterdir()) == sorted(EVENTS["videos"])
    assert all(EVENTS["videos"][v.video_id]["split"] == split for split, vs in annotations.items() for v in vs)


def test_no_caption_belongs_to_two_videos(annotations):
    videos = [video for split in annotations.values() for video in split]
    captions = Counter(sentence for video in videos for sentence in set(video.sentences))
    assert max(captions.values()) == 1
    assert {len(video.sentences) for video in videos} == {1, 2, 3, 4, 5}


def test_events_take_a_quarter_of_the_frames_at_all_places():
    starts = [event["event"][0] for event in EVENTS["videos"].values()]
    ends = [event["event"][1] for event in EVENTS["videos"].values()]
    assert min(starts) == 0 and max(ends) == EVENTS["frames"]
    assert all(4 * (end - start) <= EVENTS["frames"] for start, end in zip(starts, ends, strict=True))
    assert all(n >= 200 for n in np.histogram(starts, bins=(0, 1, 18, 36, 49))[0]), "each slot about as often"


def test_similar_captions_put_most_reversed_pairs_into_one_batch(annotations):
    config = load_config(
        DATA.parent / "cfgs" / "demo.json",
        {"similar_captions": 2, "similar_share": 1, "clip_weights": f"{DATA}/tiny_clip"},
    )
    entries = train_entries(annotations["train"], "indep-one")
    shares = {}
    for name, found in {"similar": neighbours(open_model(config), entries), "random": None}.items():
        batches = [
            [entries[row].video_id for row in batch]
            for batch in BatchPlan((len(entries),), 0, neighbours=found).epoch(0, 16)
        ]
        partners = [EVENTS["videos"][video]["reversed_of"] in batch for batch in batches for video in batch]
        shares[name] = sum(partners) / 168
    assert shares["similar"] > 0.75 and shares["random"] < 0.1


def test_more_than_a_quarter_needs_order_in_reversed_pairs_within_a_split(annotations):
    for videos in annotations.values():
        tags = {video.video_id: EVENTS["videos"][video.video_id] for video in videos}
        ordered = [name for name, tag in tags.items() if tag["needs_order"]]
        assert 0.27 < len(ordered) / len(videos) < 0.3
        assert sum(len(v.sentences) for v in videos if tags[v.video_id]["needs_order"]) >= 0.25 * sum(
            len(v.sentences) for v in videos
        )
        tag = ("order",)
        assert all(v.tags == ((tag,) * len(v.sentences) if v.video_id in ordered else None) for v in videos)
        for name in ordered:
            partner = tags[name]["reversed_of"]
            assert tags[partner]["reversed_of"] == name
            assert tags[partner]["action"] == world.REVERSED[tags[name]["action"]]


def test_clips_are_h264_of_the_stated_size():
    for name in list(EVENTS["videos"])[::50]:
        assert STORE.count(name) == EVENTS["frames"]
        assert STORE.read(name, [0, 47]).shape == (2, world.SIZE, world.SIZE, 3)
        assert b"avc1" in (DATA / "videos" / f"{name}.mp4").read_bytes()


def test_the_format_example_shows_the_keys_and_names_real_videos():
    videos = load_annotations(DATA / "dataset.json")
    entries = json.loads((DATA / "dataset.json").read_text())
    assert {key for entry in entries.values() for key in entry} == {
        "sentences",
        "tags",
        "extension",
        "timestamps",
        "duration",
    }
    assert all((DATA / "videos" / f"{video.video_id}.mp4").is_file() for video in videos)
    timed = next(video for video in videos if video.timestamps)
    seconds = [frame / EVENTS["frames_a_second"] for frame in EVENTS["videos"][timed.video_id]["event"]]
    assert timed.timestamps[0] == pytest.approx(seconds)


def test_the_committed_data_is_what_the_script_makes(tmp_path):
    splits = maker.plan(EVENTS["seed"])
    maker.write_json(tmp_path / "events.json", maker.events(splits), seed=0, frames=48, frames_a_second=12)
    assert (tmp_path / "events.json").read_text() == (DATA / "events.json").read_text()
    for split, planned in splits.items():
        maker.write_json(tmp_path / split, {clip.name: maker.annotation(clip) for clip in planned})
        assert (tmp_path / split).read_text() == (DATA / f"{split}.json").read_text()
    clips = [clip for split in splits.values() for clip in split]
    for number in (0, 999):
        name, seed = clips[number].name, [EVENTS["seed"], 1, number]
        frames, again = (maker.draw(clips[number], np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(frames, again)
        maker.encode(tmp_path / f"{name}.mp4", frames)
        # Another encoder, or another processor, may choose other bytes, but not another picture.
        for store in (STORE, VideoFolder(tmp_path, {})):
            shown = store.read(name, list(range(48)))
            assert np.abs(shown.astype(int) - frames).mean() < 6


def test_more_pairs_that_need_order_leave_the_other_splits_as_they_are():
    splits = maker.plan(EVENTS["seed"], order_pairs=20)
    further = {name: splits.pop(name) for name in ("order", "order_val")}
    assert splits == maker.plan(EVENTS["seed"])
    told = {sentence for clips in splits.values() for clip in clips for sentence in clip.sentences}
    for more in further.values():
        assert len(more) == 40 and all(clip.event.needs_order for clip in more)
        by_name = {clip.name: clip for clip in more}
        assert all(by_name[clip.reversed_of].event == clip.event.backwards() for clip in more)
        sentences = {sentence for clip in more for sentence in clip.sentences}
        assert not told & sentences
        told |= sentences


def test_filler_is_drawn_like_events():
    clips = [clip for split in maker.plan(0).values() for clip in split]
    fillers = [filler for clip in clips for filler in clip.fillers]
    for share in (
        lambda scene: scene.actor.colour,
        lambda scene: scene.other.shape,
        lambda scene: scene.actor.size,
        lambda scene: scene.needs_order,
    ):
        events, others = (Counter(map(share, scenes)) for scenes in ([clip.event for clip in clips], fillers))
        for value, count in events.items():
            assert count / len(clips) == pytest.approx(others[value] / len(fillers), abs=0.06), value
    lengths = [frames for clip in clips for frames in clip.filler_frames]
    assert np.mean(lengths) == maker.EVENT_FRAMES


def test_both_lights_hold_the_same_grey_levels():
    for seed in range(5):
        stage, elsewhere = (
            world.lights(1, np.array([on]), np.random.default_rng(seed)).reshape(-1, 3) for on in (True, False)
        )
        np.testing.assert_allclose(np.sort(stage, axis=0), np.sort(elsewhere, axis=0), atol=1e-3)
        centre = world.lights(1, np.array([True]), np.random.default_rng(seed))[0, 24:40, 24:40]
        assert centre.mean() > stage.mean()


def test_an_ordered_scene_backwards_is_its_partner_frame_by_frame():
    rng = np.random.default_rng(0)
    for action in world.ORDERED_ACTIONS:
        scene = world.random_scene(rng, (action,))
        layout = world.random_layout(scene, rng)
        assert scene.backwards().backwards() == scene
        forward, backward = (set(told(one)) for one in (scene, scene.backwards()))
        assert len(forward) >= 3 and not forward & backward
        for t in (0.0, 0.25, 0.75, 1.0):
            assert world.sprites(scene, layout, t) == world.sprites(scene.backwards(), layout, 1 - t)


def told(scene: world.Scene) -> list[str]:
    """Return every sentence of clips and of stills that tells the scene, in the words of stills."""
    templates = shapes_clips.TEMPLATES[scene.action] + world.TEMPLATES.get(scene.action, ())
    return [world.tell(template, scene.actor, scene.other) for template in templates]


def test_clips_use_words_that_stills_never_use() -> None:
    rng = np.random.default_rng(0)
    seen = {word for caption in Stills(rng, 8).batch(4000)[1] for word in caption.split()}
    for old, new in shapes_clips.OTHER_WORDS.items():
        assert old in seen and new not in seen
    assert not seen & {"before", "after", "then", "collides", "orbits"}


def test_pretraining_writes_what_open_clip_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "BATCH", 8)
    monkeypatch.setattr(pretraining, "THREADS", 1)
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny_clip.py", "--out", str(tmp_path), "--steps", "20"])
    pretraining.main()
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    assert type(model) is open_clip.CLIP
    config = (tmp_path / "open_clip_config.json").read_text()
    assert config == (DATA / "tiny_clip" / "open_clip_config.json").read_text()


def test_short_text_encoding_of_pretraining_equals_the_towers_own(tiny):
    tokens = open_clip.SimpleTokenizer(context_length=tiny.context_length)(["a small red ring", "two large blue stars"])
    with torch.no_grad():
        torch.testing.assert_close(pretraining.encode_text(tiny, tokens), tiny.encode_text(tokens))


def test_a_grown_clip_has_more_blocks_and_the_same_outputs(tiny):
    grown = open_clip.CLIP(**pretraining.with_blocks(6, 4)).eval()
    pretraining.grow(grown, tiny.state_dict())
    assert len(grown.visual.transformer.resblocks) == 6 and len(grown.transformer.resblocks) == 4
    images, tokens = torch.randn(2, 3, 64, 64), open_clip.SimpleTokenizer(context_length=48)(["a small red ring"])
    with torch.no_grad():
        torch.testing.assert_close(grown.encode_image(images), tiny.encode_image(images))
        torch.testing.assert_close(grown.encode_text(tokens), tiny.encode_text(tokens))


@pytest.fixture(scope="module")
def tiny():
    return open_clip.create_model(f"local-dir:{DATA / 'tiny_clip'}").eval()


def test_the_tiny_clip_is_small_and_an_openai_clip_in_float16(tiny):
    assert type(tiny) is open_clip.CLIP
    assert tiny.token_embedding.weight.shape == (49408, 64)
    path = DATA / "tiny_clip" / "open_clip_model.safetensors"
    assert path.stat().st_size <= 10e6
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    everything = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert everything <= 20e6


def test_captions_fit_the_tower(annotations, tiny):
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    longest = max(
        int((tokenizer([sentence])[0] != 0).sum())
        for videos in annotations.values()
        for video in videos
        for sentence in video.sentences
    )
    assert longest <= 32 <= tiny.context_length, "max_txt_len of the demo"


def test_zero_shot_is_above_chance_and_the_events_own_frames_far_above_it():
    uniform, event = (
        leaks.zero_shot(DATA, f"4 {frames}, mean") for frames in ("uniform frames", "frames of the event")
    )
    assert (uniform == 1).mean() >= 3 / len(uniform), "three times chance"
    assert 0.2 <= (event == 1).mean() <= 0.35, "the gap that finetuning has to close"


@pytest.mark.slow
def test_neither_colours_nor_the_average_frame_give_the_answer_away():
    rows = {split: leaks.features(DATA, split, every=6) for split in ("train", "val", "test")}
    captions = {split: leaks.first_sentences(DATA, split) for split in rows}
    found = {
        kind: float((leaks.probe({split: rows[split][kind] for split in rows}, captions) == 1).mean())
        for kind in rows["test"]
    }
    for kind, share in found.items():
        if "whole clip" in kind:
            assert share <= 0.06, kind
            # The same probe on the event alone: it would see the answer if it were there.
            assert found[kind.replace("whole clip", "event alone")] > 2 * share, kind
