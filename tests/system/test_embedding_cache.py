"""Runs with `embedding_cache`: the figures are the same, no frame is read twice, and nothing is out of date."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_clip_folder
from PIL import Image
from safetensors.torch import load_file
from spread import spread

from adaclip_finetune.config import load_config
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.training import frozen
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.trainer import TrialResult, fit, run_trial

Project = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_pictures")
FROZEN = {"freeze_clip": True, "coef_lr": 1.0, "no_output": True}
LOCKED = {"freeze_clip": False, "peft": {"method": "full", "config": {"towers": "text"}}}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of each video is appended when its frames are read, and not only tried."""
    names: list[str] = []
    whole = FrameFolder.read

    def read(store: FrameFolder, video_id: str, indices: Any) -> Any:
        names.extend([video_id] if len(indices) > 1 else [])
        return whole(store, video_id, indices)

    monkeypatch.setattr(FrameFolder, "read", read)
    return names


def trial(settings: Project) -> TrialResult:
    config = load_config(None, settings)
    return run_trial(config, RunFolder(config), lambda *_: None)


def assert_same(one: TrialResult, other: TrialResult) -> None:
    assert one.best.as_dict() == other.best.as_dict() and one.best_epoch == other.best_epoch
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_policy": False},
        {"policy_backbone": "clip", "sim_header": "seqTransf"},
        {"policy_backbone": "frozen_clip", "reuse_scores": True},
        {"policy_backbone": "mobilenet_v2", "policy_weights": "random", "freeze_cnn": True, "num_frm": 3},
        {"frame_agg": "qscore", "num_frm_subset": 4},
        {"grad_cache_chunk": 2, "warmup_epochs": 1, "num_workers": 2},
        {**LOCKED, "tower": {"method": "change"}},
        {"peft": {"method": "lora", "config": {"towers": "text"}}, "freeze_clip": False, "policy_backbone": "clip"},
        {"tower": {"method": "change"}, "use_policy": False},
    ],
    ids=lambda settings: " ".join(map(str, settings)) or "Hard-Top-k",
)
def test_a_run_finds_the_same_and_reads_each_video_once(
    settings: Project, project: Project, reads: list[str], tmp_path: Path
) -> None:
    given = {**project, **FROZEN, **settings}
    plain = trial(given)
    reads.clear()
    cached = {**given, "embedding_cache": str(tmp_path)}
    assert_same(plain, trial(cached))
    if not given["num_workers"]:
        assert sorted(reads) == sorted({f"video{number}" for number in range(12)})
    reads.clear()
    assert_same(plain, trial(cached))
    assert not reads


def test_what_changes_vectors_is_encoded_again(
    project: Project, reads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, clip = tmp_path / "frames", tmp_path / "clip"
    shutil.copytree(project["frames_dir"], frames)
    write_clip_folder(clip, seed=1)
    given = {
        **project,
        **FROZEN,
        "embedding_cache": str(tmp_path / "cache"),
        "num_epochs": 1,
        "frames_dir": str(frames),
    }

    def encoded(**changed: Any) -> list[str]:
        reads.clear()
        trial({**given, **changed})
        return sorted(set(reads))

    everything = encoded()
    assert len(everything) == 12 and encoded() == []
    Image.fromarray(np.zeros((36, 40, 3), np.uint8)).save(frames / "video3" / "image_00002.jpg")
    assert encoded() == ["video3"]
    assert encoded(learning_rate=1e-4, seed=1, batch_size=3) == []
    for change in (
        {"clip_weights": str(clip)},
        {"num_frm": 5},
        {"segment_sampling": True},
        {"resize": "stretch"},
        {"policy_backbone": "clip"},
        {"rescale_size": 6},
        {"precision": "bf16"},
    ):
        assert encoded(**change) == everything, change
        assert encoded(**change) == [], change
    assert "12 videos were encoded" in capsys.readouterr().out


def test_a_damaged_record_is_named(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {**project, **FROZEN, "embedding_cache": str(tmp_path), "num_epochs": 1}
    trial(given)
    records = sorted(tmp_path.rglob("*.safetensors"))
    assert len(records) == 12
    for record in records:
        record.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"safetensors.*delete it and resume"):
        trial(given)


def test_videos_that_change_during_a_run_are_left_out(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(project["frames_dir"], frames)
    given = {
        **project,
        **FROZEN,
        "embedding_cache": str(tmp_path / "cache"),
        "num_epochs": 1,
        "frames_dir": str(frames),
    }
    whole = frozen.encode_frames

    def then_touch(*arguments: Any) -> int:
        count = whole(*arguments)
        (frames / "video9" / "image_00001.jpg").touch()
        return count

    monkeypatch.setattr(frozen, "encode_frames", then_touch)
    trial(given)
    out = capsys.readouterr().out
    assert "left out of their batches" in out and "video9" in out and "has changed" in out


def run(settings: Project) -> None:
    fit(load_config(None, settings))


def test_two_processes_find_what_one_does(project: Project, tmp_path: Path) -> None:
    given = {**project, **FROZEN, "no_output": False, "embedding_cache": str(tmp_path / "cache")}
    assert spread(run, 2, tmp_path / "log", {**given, "output_dir": str(tmp_path / "two")}) == [0, 0]
    run({**given, "embedding_cache": None, "output_dir": str(tmp_path / "one")})
    one, two = (next((tmp_path / where / "tiny").iterdir()) / "best.safetensors" for where in ("one", "two"))
    torch.testing.assert_close(load_file(one), load_file(two), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"freeze_clip": False}, "towers text"),
        ({**LOCKED, "peft": [{"method": "lora", "config": {"towers": "text"}}, {"method": "bitfit"}]}, "towers text"),
        ({"tower": {"method": "global_local"}}, "per_frame"),
        ({"policy_backbone": "mobilenet_v2", "policy_weights": "random"}, "freeze_cnn"),
        ({"sampling": "random"}, "uniform"),
        ({"augmentation": "crop_flip"}, "crop_flip"),
        ({"train_annot": "captions.jsonl"}, "captions.jsonl"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_from_step_to_step_is_refused(settings: Project, named: str, project: Project) -> None:
    with pytest.raises(UserError, match=f"embedding_cache.*{named}"):
        load_config(None, {**project, **FROZEN, "embedding_cache": "cache", **settings})


def test_a_part_of_the_image_tower_that_learns_is_named(project: Project) -> None:
    lora = {"method": "lora", "config": {"towers": "text", "keep_module_keywords": ["visual.proj"]}}
    with pytest.raises(UserError, match=r"embedding_cache.*its proj learns.*keep_module_keywords"):
        trial({**project, **FROZEN, "embedding_cache": "cache", "freeze_clip": False, "peft": lora})


def test_a_stamp_follows_the_file_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.mp4").write_bytes(b"x")
    store = VideoFiles(tmp_path, {"a": "deep/a.mp4"})
    first = store.stamp("a")
    assert first == store.stamp("a")
    (tmp_path / "deep" / "a.mp4").write_bytes(b"xy")
    assert store.stamp("a") != first
    with pytest.raises(FrameError, match=r"deep/b\.mp4"):
        VideoFiles(tmp_path, {"b": "deep/b.mp4"}).stamp("b")


def test_a_frame_that_an_older_one_replaced_is_noticed(tmp_path: Path) -> None:
    """It has the same size, and neither the newest frame nor the folder changes with it."""
    store, folder = FrameFolder(tmp_path, "{:06d}.jpg"), tmp_path / "a"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"{number:06d}.jpg").write_bytes(bytes([number]))
    first = store.stamp("a")
    (folder / "000002.jpg").write_bytes(b"x")
    os.utime(folder / "000002.jpg", (1e9, 1e9))
    assert store.stamp("a") != first
