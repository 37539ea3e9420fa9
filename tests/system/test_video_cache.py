"""What is known of videos outlives a run, saves every scan that it can, and is never needed."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from forked import context
from media import index_of, write_video

from adaclip_finetune.data.readable import find_unreadable
from adaclip_finetune.data.video import cache as index_cache
from adaclip_finetune.data.video import folder as video_folder
from adaclip_finetune.data.video.cache import pack_index, unpack_index
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import KeyFrame, VideoIndex, index_video

VIDEOS = {"a.mp4": 30, "b.mkv": 20, "deep/c.1.webm": 10, "d.avi": 12}  # the last one tells no places of frames
IDS = ["a", "b", "deep/c.1", "d"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are scanned from now on."""
    names: list[str] = []

    def counted(path: Path) -> VideoIndex:
        names.append(path.name)
        return index_video(path)

    monkeypatch.setattr(video_folder, "index_video", counted)
    return names


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for name, count in VIDEOS.items():
        codec, options = ("libvpx", {"cpu-used": "8"}) if name.endswith("webm") else ("libx264", {})
        write_video(folder / name, count, codec, **options)
    return folder


def run(folder: Path, ids: list[str] = IDS) -> dict[str, int]:
    """What a run asks for before it begins."""
    store = VideoFolder(folder)
    assert not find_unreadable(store, ids, num_workers=2)
    for video_id in ids:
        wanted = [store.count(video_id) - 1, 0, 5]
        assert [index_of(frame) for frame in store.read(video_id, wanted)] == wanted
    return {video_id: store.count(video_id) for video_id in ids}


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_the_second_run_scans_nothing(cache: Path, videos: Path, scanned: list[str]) -> None:
    counts = run(videos)
    assert counts == dict(zip(IDS, VIDEOS.values(), strict=True))
    assert sorted(scanned) == ["a.mp4", "b.mkv", "c.1.webm", "d.avi"]
    assert len(files(cache)) == 1
    scanned.clear()
    content = files(cache)[0].read_bytes()
    assert run(videos) == counts and scanned == []
    assert files(cache)[0].read_bytes() == content
    linked = videos.with_name("link")
    linked.symlink_to(videos)
    assert run(linked) == counts and scanned == []


def test_changed_and_added_files_are_scanned_again(cache: Path, videos: Path, scanned: list[str]) -> None:
    run(videos)
    scanned.clear()
    write_video(videos / "a.mp4", 25)
    write_video(videos / "e.mp4", 15)
    seen = (videos / "b.mkv").stat()
    os.utime(videos / "b.mkv", ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))  # same content, but who knows
    assert run(videos, [*IDS, "e"]) == {"a": 25, "b": 20, "deep/c.1": 10, "d": 12, "e": 15}
    assert sorted(scanned) == ["a.mp4", "b.mkv", "e.mp4"]
    scanned.clear()
    run(videos, [*IDS, "e"])
    assert scanned == []


def test_splits_of_a_folder_add_up(cache: Path, videos: Path, scanned: list[str]) -> None:
    for ids in (["a", "b"], ["deep/c.1"], ["b", "d"]):
        run(videos, ids)
    assert sorted(scanned) == ["a.mp4", "b.mkv", "c.1.webm", "d.avi"]
    scanned.clear()
    run(videos)
    assert scanned == [] and len(files(cache)) == 1


def test_videos_that_are_gone_are_dropped(cache: Path, videos: Path, scanned: list[str]) -> None:
    run(videos)
    (videos / "b.mkv").unlink()
    shutil.rmtree(videos / "deep")
    assert b"b.mkv" in files(cache)[0].read_bytes()  # nothing new to be kept
    write_video(videos / "e.mp4", 15)
    run(videos, ["e"])
    content = files(cache)[0].read_bytes()
    assert [name in content for name in (b"b.mkv", b"c.1.webm", b"a.mp4", b"d.avi", b"e.mp4")] == [False] * 2 + [
        True
    ] * 3
    scanned.clear()
    run(videos, ["a", "d", "e"])
    assert scanned == []


def test_folders_do_not_share(cache: Path, videos: Path, scanned: list[str]) -> None:
    run(videos)
    other = shutil.copytree(videos, videos.with_name("other"))  # copies times, too
    run(other)
    assert len(scanned) == 2 * len(VIDEOS) and len(files(cache)) == 2


@pytest.mark.parametrize("version", ["FORMAT", "FFmpeg"])
def test_another_version_scans_anew(
    cache: Path, videos: Path, scanned: list[str], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(videos)
    if version == "FORMAT":
        monkeypatch.setattr(index_cache, "FORMAT", 0)
    else:
        monkeypatch.setattr(index_cache.av, "ffmpeg_version_info", "0.1")
    scanned.clear()
    run(videos)
    assert len(scanned) == len(VIDEOS)


def test_fault_a_damaged_cache_is_a_missing_one(cache: Path, videos: Path, scanned: list[str]) -> None:
    counts = run(videos)
    path = files(cache)[0]
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for content in (
        b"",
        whole[:10],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"\0",
        bytes(flipped),
        b"\x80" * 999,
    ):
        path.write_bytes(content)
        scanned.clear()
        assert run(videos) == counts and len(scanned) == len(VIDEOS)
        assert path.read_bytes() == whole or len(path.read_bytes()) == len(whole)  # mended, perhaps in another order


@pytest.mark.parametrize("obstacle", ["a file", "a folder", "not absolute", "no home"])
def test_fault_no_cache_is_no_error(
    cache: Path, videos: Path, scanned: list[str], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, who may write everywhere, a cache that cannot be written is one whose place is taken."""
    if obstacle == "a file":
        cache.write_text("taken")
    elif obstacle == "a folder":
        run(videos)
        path = files(cache)[0]
        path.unlink()
        (path / "taken").mkdir(parents=True)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "cache" if obstacle == "not absolute" else "")
        monkeypatch.chdir(videos.parent)
        monkeypatch.setenv("HOME", str(videos / "a.mp4"))
        if obstacle == "no home":
            monkeypatch.setattr(index_cache.Path, "home", no_home)
    for _ in range(2):
        scanned.clear()
        run(videos)
        assert len(scanned) == len(VIDEOS)
    assert cache.read_text() == "taken" if obstacle == "a file" else files(cache) == []
    assert sorted(path.name for path in videos.iterdir()) == ["a.mp4", "b.mkv", "d.avi", "deep"]


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_only_what_can_be_read_is_remembered(cache: Path, videos: Path, scanned: list[str]) -> None:
    """A file that fails today may have been on its way: it is tried again."""
    whole = (videos / "a.mp4").read_bytes()
    (videos / "a.mp4").write_bytes(whole[:1000])
    for _ in range(2):
        assert list(find_unreadable(VideoFolder(videos), IDS, 0)) == ["a"]
    assert scanned.count("a.mp4") == 2 and scanned.count("b.mkv") == 1
    (videos / "a.mp4").write_bytes(whole)
    assert run(videos)["a"] == 30


def test_several_processes_at_once(cache: Path, videos: Path, scanned: list[str]) -> None:
    """What one writes over is scanned again; a mixture is never read."""
    barrier = context().Barrier(4)
    processes = [context().Process(target=scan_at_once, args=(videos, number, barrier)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(files(cache)) == 1
    run(videos)
    assert len(scanned) < len(VIDEOS)
    scanned.clear()
    run(videos)
    assert scanned == []


def scan_at_once(videos: Path, number: int, barrier: "multiprocessing.synchronize.Barrier") -> None:
    os.environ["XDG_CACHE_HOME"] = str(videos.parent / "cache")
    for start in range(8):
        store = VideoFolder(videos)
        store.count(IDS[(number + start) % len(IDS)])
        barrier.wait(30)
        store.remember()


def test_workers_get_what_is_known(cache: Path, videos: Path, scanned: list[str]) -> None:
    store = VideoFolder(videos)
    find_unreadable(store, IDS, 0)
    shutil.rmtree(cache)
    scanned.clear()
    copy: VideoFolder = pickle.loads(pickle.dumps(store))
    assert [copy.count(video_id) for video_id in IDS] == list(VIDEOS.values()) and scanned == []


def test_workers_get_only_what_they_need(cache: Path, videos: Path) -> None:
    run(videos)
    store = VideoFolder(videos)
    assert store.count("a") == 30
    content = pickle.dumps(store)
    assert pack_index(index_video(videos / "a.mp4")) in content
    assert pack_index(index_video(videos / "b.mkv")) not in content


@pytest.mark.parametrize("frames", [0, 1, 500])
def test_packing_loses_nothing(frames: int) -> None:
    random = np.random.default_rng(frames)
    pts = np.sort(random.choice(2**62, frames, replace=False)) - 2**61
    keys = tuple(KeyFrame(*random.integers(-(2**60), 2**60, 3).tolist()) for _ in range(frames // 3))
    by_packets = VideoIndex(frames, pts, random.permutation(frames), keys)
    for index in (by_packets, VideoIndex(frames, shown=pts), VideoIndex(frames)):
        packed = pack_index(index)
        again = unpack_index(packed)
        assert (again.num_frames, again.keys) == (index.num_frames, index.keys)
        assert (again.pts is None) == (index.pts is None) == (again.position is None)
        if index.pts is not None:
            assert np.array_equal(again.pts, index.pts) and again.pts.dtype == np.int64
            assert np.array_equal(again.position, index.position)
        assert (again.shown is None) == (index.shown is None)
        if index.shown is not None:
            assert again.shown is not None and again.shown.dtype == np.int64
            assert np.array_equal(again.shown, index.shown)


def test_small_for_real_videos(shared: Path) -> None:
    path = min((shared / "data/panda70m/videos").glob("*.mp4"))
    index = index_video(path)
    assert index.pts is not None and index.num_frames > 100
    assert len(pack_index(index)) < 200
