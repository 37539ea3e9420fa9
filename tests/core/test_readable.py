"""Unreadable videos are found beforehand, named and counted; no evaluation gets smaller without a message."""

import json
from pathlib import Path
from typing import Any

import pytest
from media import write_frames, write_video

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.readable import UnreadableVideos, find_unreadable, listing, short_videos
from adaclip_finetune.data.splits import evaluation_split, train_split
from adaclip_finetune.data.video.folder import VideoFolder

ALL = ["good", "gone", "empty", "short", "gap", "first", "later"]
UNREADABLE = ["gone", "empty", "gap", "first"]


def make_config(frames_dir: Path, **values: Any) -> Config:
    settings = {"frames_dir": str(frames_dir), "num_frm": 4, "top_k": 2, "concat_captions": "indep-all"}
    return load_config(None, settings | values)


def make_annotation(folder: Path, *video_ids: str) -> str:
    path = folder / "annot.json"
    path.write_text(json.dumps({video_id: {"sentences": [f"{video_id} one", "two"]} for video_id in video_ids}))
    return str(path)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Sound videos: good (6 frames), short (3). Others: empty, gap, first and later (that frame is damaged)."""
    folder = tmp_path / "frames"
    for video_id, count in {"good": 6, "short": 3, "gap": 4, "first": 4, "later": 5}.items():
        write_frames(folder / video_id, count)
    (folder / "empty").mkdir()
    (folder / "gap/image_00002.jpg").unlink()
    (folder / "first/image_00001.jpg").write_bytes(b"")
    (folder / "later/image_00005.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("num_workers", [0, 3])
def test_find_unreadable(frames: Path, num_workers: int) -> None:
    store = FrameFolder(frames, "image_{:05d}.jpg")
    reasons = find_unreadable(store, ALL, num_workers)
    assert list(reasons) == UNREADABLE
    assert str(frames / "gone") in reasons["gone"] and "image_00002.jpg" in reasons["gap"]
    assert short_videos(store, ["good", "short"], 4) == ["short"]
    (frames / "later/frame_times.json").write_text("[0]")
    assert list(find_unreadable(store, ["good", "later"], num_workers)) == ["later"]


def test_find_unreadable_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", 5)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.mp4").write_text("hello")
    reasons = find_unreadable(VideoFolder(tmp_path), ["good", "empty", "notes", "gone"], 2)
    assert list(reasons) == ["empty", "notes", "gone"]


def test_listing_shows_twenty() -> None:
    lines = listing({f"v{i}": "gone" for i in range(25)}).splitlines()
    assert len(lines) == 21 and lines[0] == "  v0: gone" and "5" in lines[-1]


def test_training_leaves_unreadable_videos_out(frames: Path) -> None:
    config, annotation = make_config(frames), make_annotation(frames.parent, *ALL)
    split = train_split(config, annotation)
    assert [entry.video_id for entry in split.entries] == ["good", "good", "short", "short", "later", "later"]
    assert list(split.left_out) == UNREADABLE
    split = train_split(make_config(frames, data_subset=2), annotation)  # counts all videos of the annotation
    assert {entry.video_id for entry in split.entries} == {"good"} and list(split.left_out) == ["gone"]
    with pytest.raises(UnreadableVideos):
        train_split(config, make_annotation(frames.parent, "gone", "gap"))


def test_missing_videos_never_shrink_an_evaluation_silently(frames: Path) -> None:
    annotation = make_annotation(frames.parent, *ALL)
    with pytest.raises(UnreadableVideos, match="4 of 7") as caught:
        evaluation_split(make_config(frames), annotation)
    assert list(caught.value.reasons) == UNREADABLE
    assert all(name in str(caught.value) for name in [*UNREADABLE, "--skip_missing"])
    split = evaluation_split(config := make_config(frames, skip_missing=True), annotation)
    assert split.queries.video_ids == ["good", "short", "later"] and split.num_listed == 7
    assert split.queries.texts == ["good one", "two", "short one", "two", "later one", "two"]
    assert split.queries.video_of_text.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(split.left_out) == UNREADABLE
    with pytest.raises(UnreadableVideos, match="2 of 2"):
        evaluation_split(config, make_annotation(frames.parent, "gone", "gap"))
