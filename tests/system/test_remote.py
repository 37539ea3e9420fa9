"""Videos in object storage: indexed, searched and served by URL."""

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from indexing import index
from media import write_video
from serving import running, write_clip, write_one
from storage import s3_server

from adaclip_finetune.cli import main
from adaclip_finetune.data.video import remote
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.index import index_video
from adaclip_finetune.data.video.remote import RemotePath, path_of
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.stored import read_index

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a b.mp4", 20)
    write_video(folder / "deep" / "ü.mkv", 30)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as files:
        yield files


@pytest.fixture
def bucket(s3: Any, clips: Path) -> str:
    """Return the URL of a folder with the clips and a few other files."""
    if s3.exists("bucket/videos"):
        s3.rm("bucket/videos", recursive=True)
    s3.put(str(clips), "bucket/videos", recursive=True)
    s3.pipe({"bucket/videos/notes.txt": b"x", "bucket/videos/.hidden.mp4": b"x", "bucket/videos/bad.mp4": b"no"})
    return "s3://bucket/videos"


@pytest.fixture
def memory(clips: Path) -> Iterator[RemotePath]:
    """Return the folder of the clips in fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    for path in filter(Path.is_file, clips.rglob("*")):
        files.pipe(f"/videos/{path.relative_to(clips).as_posix()}", path.read_bytes())
    yield RemotePath("memory://videos")
    files.rm("/videos", recursive=True)


def vectors(folder: Path) -> dict[str, list[float]]:
    return {video.row["id"]: video.vector.tolist() for video in read_index(folder).videos()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_is_indexed_and_searched(
    run: Path, bucket: str, s3: Any, clips: Path, tmp_path: Path, workers: int, capsys: Capsys
) -> None:
    """The vectors are those of the files on disk, and the same command updates the index."""
    flags = ("--moments", "--window", "0.6", "--num_workers", str(workers))
    assert index(run, bucket, *flags, output=tmp_path / "i") == 1
    told = capsys.readouterr()
    assert "1 other file passed over: notes.txt" in told.out and f"bad.mp4: {bucket}/bad.mp4: " in told.err
    assert index(run, clips, *flags, output=tmp_path / "local") == 0
    assert vectors(tmp_path / "i") == vectors(tmp_path / "local")
    urls = [f"{bucket}/a b.mp4", f"{bucket}/deep/ü.mkv"]
    assert [str(video.path) for video in VideoIndex.load(tmp_path / "i").videos] == urls
    capsys.readouterr()
    assert main(["search", str(tmp_path / "i"), "a red thing", "--json"]) == 0
    assert sorted(hit["path"] for hit in json.loads(capsys.readouterr().out)["hits"]) == urls
    time.sleep(1)  # S3 counts in seconds
    s3.put_file(str(clips / "deep" / "ü.mkv"), "bucket/videos/a b.mp4")
    s3.rm_file("bucket/videos/bad.mp4")
    assert index(run, bucket, *flags, output=tmp_path / "i") == 0
    assert "0 embedded, 1 with the bytes of another, 1 unchanged" in capsys.readouterr().out
    assert vectors(tmp_path / "i")["a b.mp4"] == vectors(tmp_path / "local")["deep/ü.mkv"]


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("s3://nowhere/videos", "no such file"),
        ("s3://bucket/empty", ""),
        ("nonesuch://a/b", "nonesuch"),
        ("gs://a/b", "gcsfs"),
    ],
)
def test_what_cannot_be_listed_is_refused(
    s3: Any, run: Path, tmp_path: Path, url: str, fact: str, capsys: Capsys
) -> None:
    assert index(run, url, output=tmp_path / "i") == 2
    told = capsys.readouterr().err
    assert url in told and fact in told and not (tmp_path / "i").exists()


def test_only_ranges_are_read(memory: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of a file that was scanned before needs its group of pictures, and no block is read twice."""
    local, path = write_video(tmp_path / "long.mp4", 200), memory / "long.mp4"
    fsspec.filesystem("memory").pipe("/videos/long.mp4", local.read_bytes())
    asked: list[tuple[int, int]] = []
    read_range = RemotePath.read_range

    def noted(path: RemotePath, start: int, end: int) -> bytes:
        asked.append((start, end))
        return read_range(path, start, end)

    monkeypatch.setattr(RemotePath, "read_range", noted)
    monkeypatch.setattr(remote, "_BLOCK", 8192)
    remote._block.cache_clear()
    size = local.stat().st_size
    scanned = index_video(path)
    assert sum(end - start for start, end in asked) == size, "each block once"
    remote._block.cache_clear()
    asked.clear()
    np.testing.assert_array_equal(read_frames(path, scanned, [99]), read_frames(local, scanned, [99]))
    assert 0 < sum(end - start for start, end in asked) < size / 2


def test_a_url_is_a_path(memory: RemotePath) -> None:
    path = memory / "deep" / "ü.mkv"
    assert (str(path), path.name, path.suffix) == ("memory://videos/deep/ü.mkv", "ü.mkv", ".mkv")
    assert str(path.parent) == "memory://videos/deep" and path.relative_to(memory).as_posix() == "deep/ü.mkv"
    assert pickle.loads(pickle.dumps(path)) == path and path_of(str(path)) == path
    assert path.is_file() and not (memory / "none.mp4").is_file()
    with pytest.raises(FileNotFoundError):
        (memory / "none.mp4").stat()
    assert path_of("file:///a/b") == Path("/a/b") and path_of("/a/b://c") == Path("/a/b://c")


def test_errors_of_the_storage_are_those_of_a_file(memory: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the connection was closed")

    stored = fsspec.filesystem("memory")
    monkeypatch.setattr(type(stored), "cat_file", fails)
    remote._block.cache_clear()
    with pytest.raises(Exception, match="connection was closed") as caught:
        index_video(memory / "a b.mp4")
    assert type(caught.value).__name__ == "BrokenVideo"


def test_videos_are_passed_on_to_the_browser(tmp_path: Path) -> None:
    """Whole or in ranges, while they are as they were indexed; a moment cannot be cut."""
    content = write_clip(tmp_path / "a.mp4").read_bytes()
    path, files = RemotePath("memory://served/a.mp4"), fsspec.filesystem("memory")
    files.pipe("/served/a.mp4", content)
    size = len(content)
    with running(write_one(tmp_path, path)) as server:  # type: ignore[arg-type]
        (found,) = server.found()
        assert found["path"] == "memory://served/a.mp4"
        whole = server.ask(found["video"])
        assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "video/mp4")
        assert whole.headers["accept-ranges"] == "bytes"
        for asked, start, end in [("0-", 0, size), ("10-19", 10, 20), ("-5", size - 5, size), ("7-99999999", 7, size)]:
            part = server.ask(found["video"], Range=f"bytes={asked}")
            assert (part.status, part.body) == (206, content[start:end])
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert server.ask(found["video"], Range=f"bytes={size}-").status == 416
        for odd in ("bytes=-", "bytes=1-2,4-5", "lines=1-2", "bytes=x"):
            assert server.ask(found["video"], Range=odd).body == content
        assert server.ask(found["frames"][0]["picture"]).status == 200
        cut = server.ask(found["video"].replace("/file", "/clip?start=0&end=1"))
        assert cut.status == 404 and "not on this machine" in cut.json["detail"]
        files.pipe("/served/a.mp4", content + b"\0")
        assert server.ask(found["video"]).status == 404
        files.rm("/served/a.mp4")
        assert server.ask(found["video"]).status == 404
