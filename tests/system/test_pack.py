"""Packs: the same frames as in the folder, through kills, full disks, damage, forks and names meant to break them."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from media import index_of, write_frames
from torch import Tensor

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data import pack_writer
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.pack import CONTENTS, Pack, sealed
from adaclip_finetune.data.packed_frames import PackedFrames
from adaclip_finetune.data.preprocess import ImageSpec, Views
from adaclip_finetune.data.queries import TrainEntry
from adaclip_finetune.data.readable import find_unreadable
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock

ROOT = Path(__file__).parents[2]
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


def in_a_process(frames: Path, output: Path, before: str = "", *words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after the Python in `before`."""
    code = f"import sys; from adaclip_finetune.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pack", frames, "-o", output, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def values(path: Path) -> dict[bytes, bytes]:
    """All that the file holds, read without the store (from a copy: LMDB opens no file twice)."""
    copy = shutil.copy(path, path.with_suffix(".copy"))
    with lmdb.open(str(copy), subdir=False, readonly=True, lock=False) as environment, environment.begin() as reading:
        found = {bytes(key): bytes(value) for key, value in reading.cursor()}
    Path(copy).unlink()
    return found


def change(path: Path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), subdir=False, lock=False) as environment, environment.begin(write=True) as writing:
        writing.put(key, value)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- what is in it ----


def test_every_image_is_kept_to_the_byte(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "data.lmdb"
    assert run(frames, packed) == 0
    store = Pack(packed)
    for video_id, count in COUNTS.items():
        files = [(frames / video_id / TEMPLATE.format(number)).read_bytes() for number in range(1, count + 1)]
        assert store.images(video_id, range(count)) == files
    size = sum(path.stat().st_size for path in frames.rglob("*.jpg"))
    assert (store.contents.videos, store.contents.images, store.contents.size) == (5, 37, size)
    assert f"{packed}: 5 videos, 37 images of {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert len(values(packed)) == 37 + 5 + 1 and not hidden(packed.parent)


def test_it_reads_as_the_folder_does(frames: Path, packed: Path) -> None:
    config = load_config(None, {"frames_dir": str(packed), "img_tmpl": "other_{}.jpg"})
    store, folder = open_store(config, []), FrameFolder(frames, TEMPLATE)
    assert isinstance(store, PackedFrames)
    for video_id, count in COUNTS.items():
        assert store.count(video_id) == folder.count(video_id) == count
        for indices in ([0, 2, 1], [2, 2, 0], [1]):
            found = store.read(video_id, indices)
            assert np.array_equal(found, folder.read(video_id, indices))
            assert [index_of(frame) for frame in found] == indices
    with pytest.raises(FrameError, match=r"nowhere: .*data\.lmdb: holds no video of this name") as caught:
        store.count("nowhere")
    assert caught.value.kind == "missing"


def test_other_images_under_other_names(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames/v", 3, suffix="png")
    for number, path in enumerate(sorted((tmp_path / "frames/v").iterdir()), start=1):
        path.rename(path.with_name(f"{number}+frame.png"))
    assert run(tmp_path / "frames", tmp_path / "p.lmdb", "--img_tmpl", "{}+frame.png") == 0
    store = PackedFrames(tmp_path / "p.lmdb")
    assert store.count("v") == 3 and index_of(store.read("v", [2])[0]) == 2


def batches(store: FrameStore, num_workers: int) -> list[Any]:
    def tokenize(texts: Sequence[str], length: int) -> Tensor:
        return torch.tensor([[len(text)] * length for text in texts])

    settings = {"num_frm": 4, "top_k": 2, "sampling": "random", "policy_backbone": "raw", "num_workers": num_workers}
    config = load_config(None, settings)
    grey = ImageSpec(config.rescale_size, (0.0,), (1.0,), resize_mode="squash", grey=True)
    reader = VideoReader(store, config, Views(ImageSpec(32, (0.5,) * 3, (0.25,) * 3), grey))
    loader = TrainLoader(TrainDataset([TrainEntry(name, (name,)) for name in COUNTS], reader), config, tokenize)
    with closing(loader):
        found = [batch.videos for epoch in (0, 1) for batch in loader.epoch(epoch, 2)]
        assert not loader.failed
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_are_the_same_to_the_bit(frames: Path, packed: Path, num_workers: int) -> None:
    from_folder, from_pack = batches(FrameFolder(frames, TEMPLATE), 0), batches(PackedFrames(packed), num_workers)
    assert len(from_folder) == len(from_pack) == 4
    for one, other in zip(from_folder, from_pack, strict=True):
        assert one.video_ids == other.video_ids
        for name in ("frames", "policy_frames", "frame_mask", "frame_indices"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_run_has_the_same_figures(project: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for picture in ("trainer.draw_curves", "outcome.draw_frame_usage"):  # seconds, and tested elsewhere
        monkeypatch.setattr(f"adaclip_finetune.training.{picture}", lambda *_: None)
    assert run(Path(project["frames_dir"]), tmp_path / "data.lmdb") == 0
    figures = []
    for frames_dir in (project["frames_dir"], str(tmp_path / "data.lmdb")):
        output = tmp_path / f"from {Path(frames_dir).name}"
        settings = tmp_path / "settings.json"
        paths = {"frames_dir": frames_dir, "output_dir": str(output), "tensorboard_dir": str(output)}
        settings.write_text(json.dumps({**project, **paths, "num_epochs": 1}))
        assert main(["train", "--config", str(settings)]) == 0
        found = json.loads(next(output.rglob("metrics.json")).read_text())
        figures.append(found)
    assert figures[0] == figures[1] and "R@1" in json.dumps(figures[0])


# ---- which videos ----


def test_annotations_choose_the_videos(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, videos in {"train": ["deep/er/c", "a"], "val": ["a", "b", "gone"]}.items():
        content = {video: {"sentences": ["x"]} for video in videos}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    annotations = ("--annot", tmp_path / "train.json", "--annot", tmp_path / "val.json")
    assert run(frames, tmp_path / "p.lmdb", *annotations) == 1
    told = capsys.readouterr().out
    assert "3 videos" in told and "1 could not be packed:\n  gone: " in told and "No such file" in told
    contents = Pack(tmp_path / "p.lmdb").contents
    assert (contents.videos, contents.images) == (3, 24)


def test_what_is_not_whole_is_told_and_the_others_are_packed(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_frames(frames / "gap", 4) / TEMPLATE.format(2)).unlink()
    (frames / "none").mkdir()
    (write_frames(frames / "text", 3) / TEMPLATE.format(3)).write_text("no image")
    (write_frames(frames / "zero", 3) / TEMPLATE.format(1)).write_bytes(b"")
    (write_frames(frames / "dangling", 3) / TEMPLATE.format(1)).unlink()
    (frames / "dangling" / TEMPLATE.format(1)).symlink_to("nowhere")
    write_frames(frames / ".extraction/half", 2)
    (frames / "circle").symlink_to(frames)
    assert run(frames, tmp_path / "p.lmdb") == 1
    told = dict(
        line.strip().split(": ", 1) for line in capsys.readouterr().out.partition("packed:\n")[2].strip().splitlines()
    )
    assert told.keys() == {"gap", "none", "text", "zero", "dangling"}
    assert told["gap"].endswith("image_00002.jpg is missing, though image_00004.jpg is there")
    assert told["none"].endswith("holds no file named like image_00001.jpg")
    assert told["text"].endswith("image_00003.jpg: is no image")
    assert told["zero"].endswith("image_00001.jpg: is no image")
    assert told["dangling"].endswith("No such file or directory")
    assert Pack(tmp_path / "p.lmdb").contents.videos == len(COUNTS)
    assert len(values(tmp_path / "p.lmdb")) == 37 + 5 + 1, "something of a failed video is left"


def test_the_same_folder_under_two_names_is_two_videos(frames: Path, tmp_path: Path) -> None:
    (frames / "again").symlink_to(frames / "a")
    assert run(frames, tmp_path / "p.lmdb") == 0
    assert PackedFrames(tmp_path / "p.lmdb").count("again") == COUNTS["a"]


HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "; touch canary",
    "$(touch canary)",
    "-rf",
    "two\nlines",
    "日本語 é",
    "x.jpg",
    "%05d",
]


def test_a_folder_that_cannot_be_listed(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scandir(path: Path, original: Any = os.scandir) -> Any:
        if Path(path).name in forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    forbidden = {"b"}
    assert run(frames, tmp_path / "p.lmdb") == 1
    assert f"1 could not be packed:\n  b: {frames / 'b'}: Permission denied\n" in capsys.readouterr().out
    forbidden = {"frames"}
    assert run(frames, tmp_path / "q.lmdb") == 2
    assert f"{frames}: Permission denied" in capsys.readouterr().err


def test_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in names, were they run, would leave something in the current directory."""
    names = [*HOSTILE, "é" * 60 + "/" + "語" * 80]
    for number, name in enumerate(names, start=1):
        write_frames(tmp_path / "frames" / name, number)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(tmp_path / "frames", tmp_path / "-o; x.lmdb") == 0
    store = PackedFrames(tmp_path / "-o; x.lmdb")
    for number, name in enumerate(names, start=1):
        assert store.count(name) == number and index_of(store.read(name, [number - 1])[0]) == number - 1
    assert not list((tmp_path / "here").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"-o; x.lmdb", "frames", "here"}


def test_a_pack_whose_name_is_no_text(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / os.fsdecode(b"\xff.lmdb")
    try:
        packed.touch()
        packed.unlink()
    except OSError:
        pytest.skip("this file system takes no such name")
    assert run(frames, packed) == 0
    assert r"\udcff.lmdb: 5 videos" in capsys.readouterr().out
    assert read_all(PackedFrames(packed))
    assert run(frames, tmp_path / f"{'x' * 257}.lmdb") == 2
    assert "too long" in capsys.readouterr().err


def test_links_that_cannot_be_followed(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None hides the others, at the top or below."""
    for folder in (frames, frames / "deep"):
        (folder / "circle").symlink_to("circle")
        (folder / "nothing").symlink_to("nowhere")
    assert run(frames, tmp_path / "p.lmdb") == 0
    assert "5 videos, 37 images" in capsys.readouterr().out
    image = frames / "b" / TEMPLATE.format(1)
    image.unlink()
    image.symlink_to(image.name)
    assert run(frames, tmp_path / "q.lmdb") == 1
    told = capsys.readouterr().out
    assert "1 could not be packed:\n  b: " in told and "image_00001.jpg: Too many levels of symbolic links" in told


def test_a_link_behind_a_closed_folder_is_told(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may look into any: the entry is made up."""

    class Closed:
        name = "closed"

        def is_dir(self) -> bool:
            raise PermissionError(13, "Permission denied", "closed")

    original = os.scandir

    @contextmanager
    def scandir(path: Path) -> Iterator[list[Any]]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        with original(path) as entries:
            yield [*entries, Closed()] if Path(path).name == "deep" else list(entries)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run(frames, tmp_path / "p.lmdb") == 1
    told = capsys.readouterr().out
    assert "5 videos" in told and f"1 could not be packed:\n  deep/closed: {frames / 'deep/closed'}: Permission" in told


def test_names_longer_than_a_key(tmp_path: Path) -> None:
    names = ["/".join(["語" * 70] * 4 + [last]) for last in ("x", "y")]
    for count, name in enumerate(names, start=2):
        assert len(name.encode()) > 800
        write_frames(tmp_path / "frames" / name, count)
    assert run(tmp_path / "frames", tmp_path / "p.lmdb") == 0
    assert [PackedFrames(tmp_path / "p.lmdb").count(name) for name in names] == [2, 3]


def test_a_name_that_no_annotation_can_hold(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        shutil.copytree(frames / "a", frames / os.fsdecode(b"\xff"))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert run(frames, tmp_path / "p.lmdb") == 1
    assert r"\udcff: " in (told := capsys.readouterr().out) and "no annotation could name it" in told


# ---- a pack that is there ----


def test_a_pack_that_is_there_is_left_alone(frames: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = packed.stat()
    assert run(frames, packed) == 0
    assert "holds them already: 5 videos, nothing to do" in capsys.readouterr().out
    write_frames(frames / "new", 2)
    shutil.copy(frames / "a" / TEMPLATE.format(1), frames / "a" / TEMPLATE.format(2))
    assert run(frames, packed) == 2
    told = capsys.readouterr().err
    assert "of 6 videos it lacks 1, and 1 have changed since (new, …): --overwrite packs all of them anew" in told
    assert (packed.stat().st_ino, packed.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_a_pack_holds_beyond_the_folder_is_told(
    frames: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(frames / "b")
    capsys.readouterr()
    assert run(frames, packed) == 0
    assert "already: 4 videos, nothing to do; it holds 1 besides them" in capsys.readouterr().out


def test_overwriting_leaves_readers_what_they_read(frames: Path, packed: Path) -> None:
    reader = Pack(packed)
    old = reader.images("a", [1])
    shutil.copy(frames / "a" / TEMPLATE.format(1), frames / "a" / TEMPLATE.format(2))
    assert run(frames, packed, "--overwrite") == 0
    assert reader.images("a", [1]) == old != Pack(packed).images("a", [1]) == reader.images("a", [0])


def test_only_one_packs(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / ".data.lmdb.part"
    work.mkdir()
    lock = FolderLock(work)
    lock.take()
    assert run(frames, tmp_path / "data.lmdb") == 2
    assert "is being written by process" in capsys.readouterr().err
    lock.release()
    assert run(frames, tmp_path / "data.lmdb") == 0


def test_a_full_disk_lets_no_second_one_in(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / ".data.lmdb.part"
    work.mkdir()
    FolderLock(work).take()

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert run(frames, tmp_path / "data.lmdb") == 2
    assert [path.name for path in work.iterdir()] == ["lock.json"]
    assert run(frames, tmp_path / "data.lmdb") == 2
    assert capsys.readouterr().err.count("is being written by process") == 2


@pytest.mark.parametrize(
    ("output", "frames_dir", "words", "said"),
    [
        ("p.lmdb", "nowhere", [], "nowhere: there is no such folder"),
        ("p", "frames", [], "p: the name of a pack ends in .lmdb"),
        ("folder.lmdb", "frames", ["--overwrite"], "folder.lmdb: is a folder"),
        ("text.lmdb", "frames", [], "text.lmdb: is no pack of frames; adaclip pack makes one"),
        ("p.lmdb", "frames/a", [], "holds images itself (image_00001.jpg): give the folder above it"),
        ("p.lmdb", "folder.lmdb", [], "there are no folders in it"),
        ("p.lmdb", "frames", ["--img_tmpl", "x"], "img_tmpl"),
        ("p.lmdb", "frames", ["--img_tmpl", "x{}.jpg"], "none of 5 videos could be packed:\n  a: "),
        ("p.lmdb", "frames", ["--annot", "no.json"], "no.json"),
        ("text.lmdb/p.lmdb", "frames", [], "text.lmdb"),
    ],
)  # fmt: skip
def test_what_is_refused(
    frames: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    frames_dir: str,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(frames.parent)
    Path("folder.lmdb").mkdir()
    Path("text.lmdb").write_text("hello")
    assert run(Path(frames_dir), Path(output), *words) == 2
    assert said in capsys.readouterr().err
    assert not Path("p.lmdb").exists() and Path("text.lmdb").read_text() == "hello"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("FRAMES_DIR", "--annot", "--img_tmpl", "image_{:05d}.jpg", "--overwrite"))


# ---- interrupted ----

KILLED = """
import os, signal
from {module} import {owner} as owner
original, calls = owner.{name}, []
def killing(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
owner.{name} = killing
from adaclip_finetune.data import pack_writer
pack_writer.TRANSACTION = 40000
"""
WRITER = {"module": "adaclip_finetune.data.pack_writer", "owner": "PackWriter"}


@pytest.mark.parametrize(
    "place",
    [
        {**WRITER, "name": "_put", "call": 2},
        {**WRITER, "name": "_put", "call": 34},
        {**WRITER, "name": "_flush", "call": 2},
        {**WRITER, "name": "_strays", "call": 1},
        {"module": "pathlib", "owner": "Path", "name": "replace", "call": 1},
    ],
)
def test_killed_and_gone_on_with(frames: Path, tmp_path: Path, place: dict[str, Any]) -> None:
    output, whole = tmp_path / "data.lmdb", tmp_path / "whole.lmdb"
    assert run(frames, whole) == 0
    done = in_a_process(frames, output, KILLED.format(**place))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists() and hidden(tmp_path) == [".data.lmdb.part"]
    shutil.rmtree(frames / "b")
    shutil.copy(frames / "a" / TEMPLATE.format(1), frames / "a" / TEMPLATE.format(2))
    (frames / "deep/er/c" / TEMPLATE.format(12)).unlink()
    assert run(frames, output) == 0
    assert not hidden(tmp_path)
    assert run(frames, whole, "--overwrite") == 0
    assert values(output) == values(whole)


def test_what_was_packed_is_not_read_again(frames: Path, tmp_path: Path) -> None:
    done = in_a_process(frames, tmp_path / "p.lmdb", KILLED.format(**WRITER, name="_strays", call=1))
    assert done.returncode == -signal.SIGKILL
    unread = "from pathlib import Path\nPath.read_bytes = None"
    done = in_a_process(frames, tmp_path / "p.lmdb", unread)
    assert done.returncode == 0 and "5 videos (5 of them earlier), 37 images" in done.stdout, done.stderr


def test_a_disk_that_is_really_full(frames: Path, tmp_path: Path) -> None:
    """A file system of 100 KB, in a name space of its own; made larger, the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    spaces = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=100k none "$1"'
    try:
        if subprocess.run([*spaces, mount, "sh", disk], capture_output=True).returncode:
            pytest.skip("this machine lets us mount nothing")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    code = (
        "import sys; from adaclip_finetune.cli import main; from adaclip_finetune.data import pack_writer\n"
        "pack_writer.TRANSACTION = 20000; sys.exit(main(sys.argv[1:]))"
    )
    tool = '"$2" -c "$3" pack "$4" -o "$1/p.lmdb"'
    script = f'{mount} && {{ {tool}; echo "code $?"; ls -A "$1"; mount -o remount,size=9m none "$1"; {tool}; }}'
    done = subprocess.run(
        [*spaces, script, "sh", disk, sys.executable, code, frames], cwd=ROOT, capture_output=True, text=True
    )
    assert " MB are free there). What was packed until then stays" in done.stderr  # LMDB calls it an I/O error
    assert "code 2\n.p.lmdb.part\n" in done.stdout
    assert done.returncode == 0 and "5 videos (" in done.stdout and " of them earlier)" in done.stdout, done.stderr


def test_the_map_grows(frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_writer, "ROOM", 1 << 16)
    assert run(frames, tmp_path / "p.lmdb") == 0
    assert (tmp_path / "p.lmdb").stat().st_size > 2 << 16
    assert read_all(PackedFrames(tmp_path / "p.lmdb"))


def test_a_damaged_part_is_told(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / ".p.lmdb.part/p.lmdb"
    assert run(frames, tmp_path / "p.lmdb") == 0
    content = (tmp_path / "p.lmdb").read_bytes()
    part.parent.mkdir()
    for damaged in (content[: len(content) // 2], b"hello" * 5000):
        part.write_bytes(damaged)
        assert run(frames, tmp_path / "p.lmdb", "--overwrite") == 2
        assert "left by a run that did not finish, and is damaged: delete it and run" in capsys.readouterr().err


# ---- damage ----


def test_a_damaged_image_is_named_and_the_others_are_read(frames: Path, packed: Path) -> None:
    image = (frames / "e" / TEMPLATE.format(2)).read_bytes()
    content = bytearray(packed.read_bytes())
    content[content.rindex(image) + len(image) // 2] ^= 1  # of the last video
    packed.write_bytes(content)
    store = PackedFrames(packed)
    with pytest.raises(FrameError, match=r"e: .*data\.lmdb: image_00002\.jpg is damaged \(its checksum does not match"):
        store.read("e", [0, 1, 2])
    assert [index_of(frame) for frame in store.read("e", [0, 2])] == [0, 2]
    assert not find_unreadable(store, list(COUNTS), 2)
    assert all(list(store.scan(video_id)) for video_id in COUNTS if video_id != "e")
    with pytest.raises(FrameError) as caught:
        list(store.scan("e"))
    assert caught.value.kind == "damaged"


def test_images_in_each_others_place_are_damage(packed: Path) -> None:
    """The checksum tells of the place, too."""
    held = values(packed)
    keys = sorted(key for key in held if key.startswith(b"i"))
    change(packed, keys[0], held[keys[1]])
    assert len(find_unreadable(PackedFrames(packed), list(COUNTS), 1)) == 1


def test_damaged_records_and_missing_images(packed: Path) -> None:
    store, held = Pack(packed), values(packed)
    record = next(key for key in held if key.startswith(b"v") and b'"video_id": "b"' in held[key])
    del store
    change(packed, record, held[record].replace(b'"images": 3', b'"images": 4'))
    with pytest.raises(FrameError, match=r"b: .*what it says of the video is damaged \(its checksum"):
        PackedFrames(packed).count("b")
    change(packed, record, sealed(record, held[record][4:].replace(b'"images": 3', b'"images": 4')))
    with pytest.raises(FrameError, match=r"b: .*image_00004\.jpg is not in it, though it should be"):
        PackedFrames(packed).read("b", [3])


def test_what_is_no_pack(frames: Path, packed: Path, tmp_path: Path) -> None:
    held = values(packed)
    wrong = {
        "empty": b"", "text": b"hello" * 4000, "zeros": bytes(20000), "half": packed.read_bytes()[: 1 << 16],
        "meta": packed.read_bytes()[:4096],
    }  # fmt: skip
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        said = "is cut off, 65536 of" if name == "half" else "is no pack of frames; adaclip pack makes one"
        with pytest.raises(UserError, match=f"{name}: {said}"):
            PackedFrames(tmp_path / name)
    with pytest.raises(UserError, match="nowhere: No such file"):
        PackedFrames(tmp_path / "nowhere")
    for content, said in [
        (held[CONTENTS][:-1], "what it says of itself is damaged"),
        (sealed(CONTENTS, held[CONTENTS][4:].replace(b'"version": 1', b'"version": 2')), "reads version 1 of"),
    ]:
        change(packed, CONTENTS, content)
        with pytest.raises(UserError, match=rf"data\.lmdb: .*{said}.*: pack anew|data\.lmdb: .*{said}.*; pack anew"):
            PackedFrames(packed)
    with lmdb.open(str(tmp_path / "foreign"), subdir=False, lock=False) as foreign, foreign.begin(write=True) as t:
        t.put(b"key", b"value")
    with pytest.raises(UserError, match="is an LMDB file, but no finished pack"):
        PackedFrames(tmp_path / "foreign")


def test_a_pack_that_cannot_be_opened(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a pack all the same. (Root may open any file, so another one that LMDB cannot open stands for it.)"""

    def refused(_: bytes, original: Any = lmdb.open, **named: Any) -> Any:
        return original(str(packed.parent), **named)

    store = PackedFrames(packed)
    copy = pickle.loads(pickle.dumps(store))
    del store
    monkeypatch.setattr(lmdb, "open", refused)
    with pytest.raises(UserError, match=r"data\.lmdb: cannot be opened: Is a directory") as caught:
        PackedFrames(packed)
    assert "is no pack" not in str(caught.value)
    with pytest.raises(FrameError, match="cannot be opened") as failed:
        copy.count("a")
    assert failed.value.kind == "unreadable"


def test_a_pack_that_is_cut_after_it_was_opened(packed: Path) -> None:
    """A worker opens it anew; LMDB would die of the pages that are not there."""
    code = (
        "import os, pickle, sys; from pathlib import Path; from adaclip_finetune.data.frames import PackedFrames\n"
        "packed = Path(sys.argv[1]); copy = pickle.loads(pickle.dumps(PackedFrames(packed)))\n"
        "os.truncate(packed, 12000); copy.read('a', range(copy.count('a')))"
    )
    done = subprocess.run([sys.executable, "-c", code, packed], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "data.lmdb: is cut off, 12000 of" in done.stderr, done.stderr


def test_a_run_says_what_is_wrong_with_frames_dir(
    project: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.lmdb").write_text("hello")
    (tmp_path / "c.json").write_text(json.dumps({**project, "frames_dir": str(tmp_path / "x.lmdb")}))
    assert main(["train", "--config", str(tmp_path / "c.json"), "--dry_run"]) == 2
    assert "x.lmdb: is no pack of frames; adaclip pack makes one" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "c.json"), "--frames_dir", "nowhere", "--dry_run"]) == 2
    assert "frames_dir nowhere: there is no such file or folder" in capsys.readouterr().err


# ---- many readers ----


def read_all(store: PackedFrames) -> bool:
    """Whether each frame is the one it should be."""
    return all(
        [index_of(frame) for frame in store.read(video_id, range(count))] == list(range(count))
        for video_id, count in COUNTS.items()
    )


def read_in_threads(store: PackedFrames, threads: int = 4) -> list[bool]:
    found: list[bool] = []
    running = [threading.Thread(target=lambda: found.append(read_all(store))) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    return found


def test_threads_share_it(packed: Path) -> None:
    assert read_in_threads(PackedFrames(packed)) == [True] * 4


def test_several_stores_in_several_forks(packed: Path) -> None:
    """Two splits name one pack; processes forked from theirs, and from those, read it in threads."""
    stores = [PackedFrames(packed), PackedFrames(packed.parent / "." / packed.name)]
    assert all(read_all(store) for store in stores)

    def child(deeper: int) -> None:
        sound = all(read_in_threads(store) == [True] * 4 for store in stores)
        if sound and deeper:
            grandchild = fork.Process(target=child, args=(deeper - 1,))
            grandchild.start()
            grandchild.join(30)
            sound = grandchild.exitcode == 0
        os._exit(0 if sound else 1)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(1,)) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0, 0]
    assert all(read_all(store) for store in stores), "a child took the parent's along"


def test_a_store_travels_by_pickle(packed: Path) -> None:
    store = PackedFrames(packed)
    assert read_all(store)
    assert len(content := pickle.dumps(store)) < 2000 and b"image_00001" not in content
    assert read_all(pickle.loads(content))


def test_the_file_is_closed_with_the_last_store(packed: Path) -> None:
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("no /proc")
    before = len(list(handles.iterdir()))
    for _ in range(20):
        one, other = PackedFrames(packed), PackedFrames(packed)
        assert one.count("a") == other.count("a") == COUNTS["a"]
    del one, other
    assert len(list(handles.iterdir())) == before
