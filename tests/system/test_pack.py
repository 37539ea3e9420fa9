"""Packs: the same frames as in the folders, after kills, in forks and threads, under any name."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
from media import index_of, write_frames

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data.frame_folder import FRAME_TIMES
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.packed_frames import PACK_KEY, PackedFrames, image_key, video_key
from adaclip_finetune.data.readable import find_unreadable
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import Lock

TEMPLATE = "image_{:05d}.jpg"
COUNTS = {"a": 9, "b": 3, "deep/er/c": 12, "deep/d.1": 6, "e": 7}


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    for video_id, count in COUNTS.items():
        write_frames(tmp_path / "frames" / video_id, count)
    return tmp_path / "frames"


@pytest.fixture
def packed(frames: Path, tmp_path: Path) -> Path:
    assert run(frames, tmp_path / "data.lmdb") == 0
    return tmp_path / "data.lmdb"


def run(frames: Path, output: Path, *words: object) -> int:
    return main(["pack", str(frames), "-o", str(output), *map(str, words)])


def values(path: Path) -> dict[bytes, bytes]:
    """Return all that the file holds, read without the store (from a copy: LMDB opens no file twice)."""
    copy = shutil.copy(path, path.with_suffix(".copy"))
    with lmdb.open(str(copy), subdir=False, readonly=True, lock=False) as environment, environment.begin() as reading:
        found = {bytes(key): bytes(value) for key, value in reading.cursor()}
    Path(copy).unlink()
    return found


def change(path: Path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), subdir=False, lock=False) as environment, environment.begin(write=True) as writing:
        writing.put(key, value)


def read_all(store: PackedFrames) -> bool:
    """Return whether each frame is the one that it should be."""
    return all(
        [index_of(frame) for frame in store.read(video_id, range(count))] == list(range(count))
        for video_id, count in COUNTS.items()
    )


# ---- what is in a pack ----


def test_every_image_is_kept_to_the_byte(frames: Path, packed: Path) -> None:
    held = values(packed)
    for video_id, count in COUNTS.items():
        assert json.loads(held.pop(video_key(video_id))) == {"images": count}
        for index in range(count):
            assert held.pop(image_key(video_id, index)) == (frames / video_id / TEMPLATE.format(index + 1)).read_bytes()
    assert held.keys() == {PACK_KEY}
    store = open_store(load_config(None, {"frames_dir": str(packed), "img_tmpl": "other_{}.jpg"}), [])
    assert isinstance(store, PackedFrames) and read_all(store)
    assert {path.name for path in packed.parent.iterdir()} == {"frames", "data.lmdb"}


# ---- which videos are packed ----


def test_annotations_choose_the_videos(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, videos in {"train": ["deep/er/c.mp4", "a"], "val": ["a", "b", "gone"]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({video: {"sentences": ["x"]} for video in videos}))
    annotations = ("--annot", tmp_path / "train.json", "--annot", tmp_path / "val.json")
    assert run(frames, tmp_path / "p.lmdb", *annotations) == 1
    told = capsys.readouterr().out
    assert "3 videos" in told and "1 could not be packed:\n  gone: " in told
    store = PackedFrames(tmp_path / "p.lmdb")
    assert list(find_unreadable(store, list(COUNTS), 1)) == ["deep/d.1", "e"]
    assert store.count("deep/er/c") == store.count("deep/er/c.mp4") == 12


def test_what_is_not_whole_is_told_and_the_others_are_packed(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_frames(frames / "gap", 4) / TEMPLATE.format(2)).unlink()
    (frames / "none").mkdir()
    (write_frames(frames / "text", 3) / TEMPLATE.format(3)).write_text("no image")
    (write_frames(frames / "dangling", 3) / TEMPLATE.format(1)).unlink()
    (frames / "dangling" / TEMPLATE.format(1)).symlink_to("nowhere")
    write_frames(frames / ".extraction/half", 2)
    (frames / "circle").symlink_to(frames)
    (frames / "itself").symlink_to("itself")
    (frames / "again").symlink_to(frames / "a")
    (frames / "back\\slash").symlink_to(frames / "a")
    (frames / "b" / FRAME_TIMES).write_text("[0, 0.5, 4.25]")
    (frames / "e" / FRAME_TIMES).write_text("[0]")
    assert run(frames, tmp_path / "p.lmdb") == 1
    told = dict(
        line.strip().split(": ", 1) for line in capsys.readouterr().out.partition("packed:\n")[2].strip().splitlines()
    )
    assert told.keys() == {"gap", "none", "text", "dangling", r"back\slash", "e"}
    assert "image_00002.jpg is missing" in told["gap"] and "image_00003.jpg: is not an image" in told["text"]
    assert FRAME_TIMES in told["e"]
    assert len(values(tmp_path / "p.lmdb")) == 30 + 4 + 1 + 10, "something of a failed video is left"
    store = PackedFrames(tmp_path / "p.lmdb")
    times = store.times("b")
    assert times is not None and times.dtype == np.float64 and times.tolist() == [0, 0.5, 4.25]
    assert store.times("again") is None and store.count("again") == COUNTS["a"]


def test_a_name_that_is_longer_than_a_key_is_reported(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(frames / "/".join(["語" * 70] * 3), 1)
    assert run(frames, tmp_path / "p.lmdb") == 1
    assert "too long" in capsys.readouterr().out and read_all(PackedFrames(tmp_path / "p.lmdb"))


# ---- a pack that is there ----


def test_new_videos_are_added_and_old_ones_stay_until_overwritten(
    frames: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, before = PackedFrames(packed), values(packed)
    old = reader.read("a", [1])
    write_frames(frames / "new", 2)
    shutil.copy(frames / "a" / TEMPLATE.format(1), frames / "a" / TEMPLATE.format(2))
    del reader
    assert run(frames, packed) == 0
    assert "6 videos (5 of them were there already)" in capsys.readouterr().out
    after = values(packed)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 3
    reader = PackedFrames(packed)
    assert run(frames, packed, "--overwrite") == 0
    assert np.array_equal(reader.read("a", [1]), old), "a reader keeps the pack that it opened"
    assert index_of(PackedFrames(packed).read("a", [1])[0]) == 0
    assert {path.name for path in packed.parent.iterdir()} == {"frames", "data.lmdb"}
    shutil.rmtree(frames)
    (frames / "empty").mkdir(parents=True)
    assert run(frames, packed, "--overwrite") == 2
    assert PackedFrames(packed).count("new") == 2, "an old pack is kept where no new one can be made"


@pytest.mark.parametrize(
    ("output", "frames_dir", "words", "said"),
    [
        ("p.lmdb", "nowhere", [], ["nowhere"]),
        ("p", "frames", [], [".lmdb"]),
        ("folder.lmdb", "frames", ["--overwrite"], ["folder.lmdb", "is a file"]),
        ("text.lmdb", "frames", [], ["text.lmdb", "not a pack of frames"]),
        ("other.lmdb", "frames", [], ["other.lmdb", "not a pack of frames"]),
        ("locked.lmdb", "frames", [], ["locked.lmdb", f"process {os.getpid()}"]),
        ("p.lmdb", "frames/a", [], ["image_00001.jpg", "folder above"]),
        ("p.lmdb", "folder.lmdb", [], ["no folders"]),
        ("p.lmdb", "frames", ["--img_tmpl", "x{}.jpg"], ["none of 5 videos could be packed:\n  a: "]),
        ("p.lmdb", "frames", ["--annot", "no.json"], ["no.json"]),
        ("text.lmdb/p.lmdb", "frames", [], ["text.lmdb"]),
        (f"{'x' * 257}.lmdb", "frames", [], ["too long"]),
    ],
)  # fmt: skip
def test_what_is_refused(
    frames: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    frames_dir: str,
    words: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(frames.parent)
    Path("folder.lmdb").mkdir()
    Path("text.lmdb").write_text("hello")
    change(Path("other.lmdb"), b"key", b"value")
    lock = Lock(Path(".locked.lmdb.lock"), Path("locked.lmdb"))
    lock.take()
    there = sorted(path.name for path in Path().iterdir())
    assert run(Path(frames_dir), Path(output), *words) == 2
    told = capsys.readouterr().err
    assert all(fact in told for fact in said), told
    assert sorted(path.name for path in Path().iterdir()) == there
    lock.release()
    assert Path("text.lmdb").read_text() == "hello" and values(Path("other.lmdb")) == {b"key": b"value"}


# ---- interrupted and damaged ----

KILLED = """
import os, signal, sys
from pathlib import Path
from adaclip_finetune.cli import main
original, seen = Path.read_bytes, []
def killing(path):
    seen.append(path)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path)
Path.read_bytes = killing
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("image", "whole"), [(2, 0), (18, 2)])
def test_killed_and_gone_on_with(frames: Path, packed: Path, tmp_path: Path, image: int, whole: int) -> None:
    output = tmp_path / "killed.lmdb"
    words = [str(image), "pack", str(frames), "-o", str(output)]
    assert subprocess.run([sys.executable, "-c", KILLED, *words], timeout=60).returncode == -signal.SIGKILL
    assert sum(video_key(video_id) in values(output) for video_id in COUNTS) == whole
    assert run(frames, output) == 0
    assert values(output) == values(packed)


def test_what_is_not_a_pack(packed: Path, tmp_path: Path) -> None:
    wrong = {"empty": b"", "text": b"hello" * 4000, "half": packed.read_bytes()[: 1 << 16]}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    change(tmp_path / "foreign", b"key", b"value")
    reasons = {"nowhere": "No such file", "foreign": "not a pack", "half": "cut off"}
    for name in ("nowhere", "empty", "text", "foreign", "half", "frames"):
        with pytest.raises(UserError, match=f"{name}: .*{reasons.get(name, 'adaclip pack')}"):
            PackedFrames(tmp_path / name)


def test_an_image_that_is_not_there_is_named(packed: Path) -> None:
    change(packed, video_key("b"), b'{"images": 4}')
    with pytest.raises(FrameError, match=r"b: .*data\.lmdb: image 4") as caught:
        PackedFrames(packed).read("b", [0, 3])
    assert caught.value.kind == "damaged"


# ---- many readers ----


def test_several_stores_in_forks_and_threads(packed: Path) -> None:
    """Two splits name one pack; processes forked from theirs, and from those, read it in threads."""
    stores = [PackedFrames(packed), PackedFrames(packed.parent / "." / packed.name)]
    stores.append(pickle.loads(pickle.dumps(stores[0])))
    fork = multiprocessing.get_context("fork")

    def check(deeper: int) -> None:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read_all, stores * 2))
        if deeper:
            children = [fork.Process(target=check, args=(deeper - 1,)) for _ in range(2)]
            for child in children:
                child.start()
            for child in children:
                child.join(60)
            assert [child.exitcode for child in children] == [0, 0]

    check(2)


def test_the_file_is_closed_with_the_last_store(packed: Path) -> None:
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir()))
    for _ in range(20):
        one, other = PackedFrames(packed), PackedFrames(packed)
        assert one.count("a") == other.count("a") == COUNTS["a"]
    del one, other
    assert len(list(handles.iterdir())) == before
