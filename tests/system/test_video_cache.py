"""The cache of frame places and times outlives a run, spares it scanning videos again, and is never needed."""

import os
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from media import index_of, write_video

from adaclip_finetune.data.readable import find_unreadable
from adaclip_finetune.data.video import index as video_index
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import FrameIndex, index_video, pack_index, unpack_index

VIDEOS = {"a.mp4": 30, "b.mkv": 20, "deep/c.1.webm": 10, "d.avi": 12}  # the last one tells no places of frames
IDS = ["a", "b", "deep/c.1", "d"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of its own, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/adaclip-finetune/videos"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are scanned from now on."""
    names: list[str] = []

    def counted(path: Path) -> FrameIndex:
        names.append(path.name)
        return index_video(path)

    monkeypatch.setattr(video_index, "index_video", counted)
    return names


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for name, count in VIDEOS.items():
        codec, options = ("libvpx", {"cpu-used": "8"}) if name.endswith("webm") else ("libx264", {})
        write_video(folder / name, count, codec, **options)
    return folder


@pytest.fixture
def videos(tmp_path: Path, originals: Path) -> Path:
    return shutil.copytree(originals, tmp_path / "videos")


def run(folder: Path, ids: list[str] = IDS) -> dict[str, int]:
    """Do what a run does before it begins."""
    store = VideoFolder(folder)
    assert not find_unreadable(store, ids, num_workers=2)
    for video_id in ids:
        wanted = [store.count(video_id) - 1, 0, 5]
        assert [index_of(frame) for frame in store.read(video_id, wanted)] == wanted
    return {video_id: store.count(video_id) for video_id in ids}


def test_a_video_is_scanned_once_until_it_changes(
    cache: Path, videos: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = run(videos, ["a", "b"]) | run(videos)  # splits of a folder add up
    assert counts == dict(zip(IDS, VIDEOS.values(), strict=True))
    assert sorted(scanned) == ["a.mp4", "b.mkv", "c.1.webm", "d.avi"]
    linked = videos.with_name("link")
    linked.symlink_to(videos)
    scanned.clear()
    assert run(videos) == run(linked) == counts and scanned == []
    write_video(videos / "a.mp4", 25)
    seen = (videos / "b.mkv").stat()
    os.utime(videos / "b.mkv", ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))  # the content might be another
    assert run(videos) == counts | {"a": 25}
    assert sorted(scanned) == ["a.mp4", "b.mkv"]
    monkeypatch.setattr(av, "ffmpeg_version_info", "0.1")
    for expected in (len(VIDEOS), 0):
        scanned.clear()
        run(videos)
        assert len(scanned) == expected


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_cache_is_mended(cache: Path, videos: Path, scanned: list[str], damage: str) -> None:
    counts = run(videos)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x80" * 999}[damage])
    for expected in (len(VIDEOS), 0):
        scanned.clear()
        assert run(videos) == counts and len(scanned) == expected


@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_a_run_needs_no_cache(
    cache: Path, videos: Path, scanned: list[str], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere: a cache that cannot be written is one whose place is taken."""
    if obstacle == "a file":
        cache.parents[1].write_text("taken")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(videos / "a.mp4"))
    run(videos)
    run(videos)
    assert len(scanned) == 2 * len(VIDEOS)


def test_videos_that_cannot_be_read_are_tried_again(cache: Path, videos: Path, scanned: list[str]) -> None:
    """They may still have been on their way."""
    whole = (videos / "a.mp4").read_bytes()
    (videos / "a.mp4").write_bytes(whole[:1000])
    assert list(find_unreadable(VideoFolder(videos), IDS, 0)) == ["a"]
    (videos / "a.mp4").write_bytes(whole)
    assert run(videos)["a"] == 30 and scanned.count("a.mp4") == 2 and scanned.count("b.mkv") == 1


def test_workers_get_what_they_need_and_no_more(cache: Path, videos: Path, scanned: list[str]) -> None:
    run(videos)
    store = VideoFolder(videos)
    assert store.count("a") == 30
    content = pickle.dumps(store)
    assert pack_index(index_video(videos / "a.mp4")) in content
    assert pack_index(index_video(videos / "b.mkv")) not in content
    shutil.rmtree(cache)
    scanned.clear()
    assert pickle.loads(content).count("a") == 30 and scanned == []


@pytest.mark.parametrize("frames", [1, 2, 500])
def test_packing_loses_nothing(frames: int) -> None:
    random = np.random.default_rng(frames)
    pts = np.sort(random.choice(2**62, frames, replace=False)) - 2**61
    for index in (
        FrameIndex(frames, pts, pts[::3], 1 / 90000, -0.021, 25.0, 3.2),
        FrameIndex(frames, pts, tick=0.001),
        FrameIndex(frames),
    ):
        again = unpack_index(pack_index(index))
        for name, value in vars(index).items():
            assert np.array_equal(getattr(again, name), value, equal_nan=isinstance(value, float)), name
