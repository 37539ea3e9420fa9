"""The data audit of `adaclip check`: entries, videos, captions and splits, held against the code of a run."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checking import checked, finding, kinds, write_annotation, write_damaged_frames
from media import write_frames, write_video

from adaclip_finetune.check import data
from adaclip_finetune.check.data import CheckedSplit, check_videos, splits_of_files
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.data.splits import evaluation_split, train_split
from adaclip_finetune.errors import UserError

BROKEN = ("gone", "gap", "first")
ALL = ("good", "other", "late", "odd", "short", *BROKEN)
LONG = "one two three four five six seven eight nine ten eleven twelve"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return write_damaged_frames(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sound")
    for name in "abcdef":
        write_frames(folder / name, 4, height=8, width=8)
    return str(folder)


def annotations(folder: Path, *names: str) -> dict[str, str]:
    videos = {name: [f"what {name} shows"] for name in names}
    return {split: write_annotation(folder / f"{split}.json", videos) for split in ("train", "val")}


def words(frames: str | Path, *paths: str) -> list[str]:
    return [*(word for path in paths for word in ("--annot", path)), "--frames_dir", str(frames), "--num_frm", "4"]


def config_of(frames: str | Path) -> Config:
    return load_config(None, {"frames_dir": str(frames), "num_frm": 4, "top_k": 2})


# ---- entries ----


def test_every_refused_entry_is_listed(sound: str, tmp_path: Path, capsys: Captured) -> None:
    entries: dict[str, Any] = {"a": ["fine"], "b": [], "c": [""], "../f": ["x"]}
    entries |= {"d": {"sentences": ["x"], "duration": -1}, "e": {"sentences": ["x"], "extention": "mp4"}}
    path = write_annotation(tmp_path / "val.json", entries)
    code, found = checked(capsys, *words(sound, path))
    refused = finding(found, "annotation", "val")
    assert (code, refused.severity, len(refused.items)) == (1, "fails", 5)
    for name in ("b", "c", "d", "e", "../f"):
        assert any(f"'{name}'" in reason for reason in refused.items)
    with pytest.raises(UserError) as first:  # what a run would say is one of them
        load_annotations(path)
    assert str(first.value).removeprefix(f"{path}: ") in refused.items
    assert finding(found, "captions", "val").items["videos"] == 1


# ---- videos ----


def test_videos_are_judged_as_a_run_does(frames: Path, tmp_path: Path, capsys: Captured) -> None:
    """Training leaves out what it cannot read; an evaluation stops, or with skip_missing leaves it out."""
    paths, config = annotations(tmp_path, *ALL), config_of(frames)
    code, found = checked(capsys, *words(frames, paths["train"]))
    assert code == 0 and found["verdict"] == "warning"
    told = {name for entry in found["findings"] if entry["check"] != "short_videos" for name in entry["items"]}
    assert set(train_split(config, paths["train"]).left_out) == set(BROKEN) == told & set(ALL)
    assert finding(found, "short_videos", "train").items == {"short": "2 frames"}

    code, found = checked(capsys, *words(frames, paths["val"]))
    assert code == 1
    assert kinds(found, "fails") == {("missing_videos", "val"), ("gaps", "val"), ("broken_frames", "val")}
    assert list(finding(found, "missing_videos", "val").items) == ["gone"]
    gap = finding(found, "gaps", "val")
    assert "image_00003.jpg" in gap.items["gap"] and "1 of 8" in gap.message and "--skip_missing" in gap.message
    with pytest.raises(UserError):
        evaluation_split(config, paths["val"])

    code, found = checked(capsys, *words(frames, paths["val"]), "--skip_missing")
    assert code == 0 and "skip_missing" in finding(found, "gaps", "val").message

    code, found = checked(capsys, *words(frames, annotations(tmp_path, *BROKEN)["train"]))
    assert code == 1 and "none is left" in finding(found, "gaps", "train").message


def test_deep_finds_damage_behind_the_first_frame(frames: Path, tmp_path: Path, capsys: Captured) -> None:
    """Of 8 frames, num_frm 8 reads all, and num_frm 2 the first and the fifth."""
    paths = annotations(tmp_path, "good", "late", "odd")
    val, train = ["--annot", paths["val"]], ["--annot", paths["train"]]
    source = ["--frames_dir", str(frames), "--num_frm"]
    code, found = checked(capsys, *val, *source, "8")
    assert code == 0 and ("videos", "val") in kinds(found, "fine")
    code, found = checked(capsys, *val, *source, "8", "--deep")
    late, odd = finding(found, "broken_frames", "val"), finding(found, "frame_sizes", "val")
    assert code == 1 and late.severity == odd.severity == "fails"
    assert list(late.items) == ["late"] and "image_00006.jpg" in late.items["late"]
    assert list(odd.items) == ["odd"] and "66" in odd.items["odd"] and "80" in odd.items["odd"]
    code, found = checked(capsys, *val, *source, "2", "--deep")
    assert finding(found, "broken_frames", "val").severity == "warning"  # a run passes over it
    assert finding(found, "frame_sizes", "val").severity == "fails"  # the fifth
    for more in (["8"], ["2", "--sampling", "random"]):
        code, found = checked(capsys, *train, *source, *more, "--deep")
        assert code == 0 and "left out of their batches" in finding(found, "broken_frames", "train").message


def test_video_files(tmp_path: Path, capsys: Captured) -> None:
    bytes_of = write_video(tmp_path / "good.mp4", 100).read_bytes()
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    hurt = bytearray(bytes_of)
    start = bytes_of.index(b"mdat") + len(bytes_of) * 2 // 3
    hurt[start : start + 3000] = b"\xff" * 3000
    (tmp_path / "hurt.mp4").write_bytes(hurt)
    path = annotations(tmp_path, "good", "text", "empty", "hurt", "gone")["val"]
    request = ("--annot", path, "--video_dir", str(tmp_path), "--num_frm", "100")
    code, found = checked(capsys, *request)
    assert code == 1 and set(finding(found, "unreadable_videos", "val").items) == {"text", "empty"}
    assert list(finding(found, "missing_videos", "val").items) == ["gone"]
    code, found = checked(capsys, *request, "--deep")
    told = {name for entry in found["findings"] if entry["severity"] == "fails" for name in entry["items"]}
    assert code == 1 and told == {"text", "empty", "hurt", "gone"}


def test_clips_of_videos_that_are_read_in_place(tmp_path: Path, capsys: Captured) -> None:
    for name in ("v", "w"):
        write_video(tmp_path / f"{name}.mp4", 50)
        write_frames(tmp_path / name, 20)
    clip = {"sentences": ["x"], "start": 1.0, "end": 1.5}
    path = write_annotation(tmp_path / "val.json", {"v": clip, "w": ["y"]})
    code, found = checked(capsys, "--annot", path, "--video_dir", str(tmp_path))
    clips = finding(found, "clips", "val")
    assert code == 0 and clips.severity == "warning" and clips.items == {"v": "1 s to 1.5 s"}
    assert f"adaclip extract --clips {path}" in clips.advice
    _, found = checked(capsys, "--annot", path, "--frames_dir", str(tmp_path))
    assert ("clips", "val") not in kinds(found, "warning")


def test_deep_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the main thread stops a thread that is in the middle of an endless video."""
    going, ended = threading.Event(), threading.Event()

    def scan(video_id: str, stopped: Any) -> Any:
        while not stopped():
            going.set()
            yield 0, np.zeros((4, 4, 3), np.uint8)
        ended.set()

    def interrupted(*_: object, **__: object) -> Any:
        assert going.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "tqdm", interrupted)
    frame = np.zeros((1, 4, 4, 3), np.uint8)
    store: Any = SimpleNamespace(count=lambda _: 9, times=lambda _: None, read=lambda *_: frame, scan=scan)
    split = CheckedSplit("val", "val.json", False, [VideoAnnotation("v", ("x",))], [], store)
    with pytest.raises(KeyboardInterrupt):
        list(check_videos(split, load_config(None, {"video_dir": "."}), deep=True))
    assert ended.wait(60)


# ---- captions and splits ----


def test_long_captions(sound: str, tmp_path: Path, capsys: Captured) -> None:
    """Twelve words of a token each, and two for start and end."""
    entries = {"a": [LONG], "b": ["short", LONG + " thirteen"], "c": ["short one"]}
    request = words(sound, write_annotation(tmp_path / "val.json", entries))
    code, found = checked(capsys, *request, "--concat_captions", "indep-all", "--max_txt_len", "10")
    long = finding(found, "long_captions", "val")
    assert code == 0 and long.severity == "warning" and "2 of 4 captions (50.0%)" in long.message
    assert long.items == {"a": [LONG], "b": [f"{LONG} thirteen"]}
    assert long.advice.startswith("max_txt_len 15 cuts none")
    _, found = checked(capsys, *request, "--concat_captions", "concat", "--max_txt_len", "15")
    joined = finding(found, "long_captions", "val")
    assert list(joined.items) == ["b"] and "concat_captions" in joined.message and "1 of 3" in joined.message


def test_overlap(sound: str, tmp_path: Path, capsys: Captured) -> None:
    groups = dict(zip("abcdef", "111223", strict=True))
    of = {name: {"sentences": [f"caption {name}"], "group": group} for name, group in groups.items()}
    paths = {
        split: write_annotation(tmp_path / f"{split}.json", {name: of[name] for name in names})
        for split, names in {"train": "ab", "val": "bc", "test": "def"}.items()
    }
    code, found = checked(capsys, *words(sound, *paths.values()))
    assert code == 0
    assert kinds(found, "warning") == {("shared_videos", "train, val"), ("shared_groups", "train, val")}
    assert list(finding(found, "shared_videos", "train, val").items) == ["b"]
    assert finding(found, "shared_groups", "train, val").items == {"1": ["c"]}

    other = write_annotation(tmp_path / "other.json", {"f": {"sentences": ["Caption  A", "of its own"]}})
    _, found = checked(capsys, *words(sound, paths["train"], other))
    assert finding(found, "captions_of_both", "train, other").items == {"Caption  A": ["a", "f"]}

    _, found = checked(capsys, *words(sound, paths["train"], paths["test"]))
    assert finding(found, "overlap", "train, test").severity == "fine"
    copy = write_annotation(tmp_path / "copy.json", {name: of[name] for name in "def"})
    _, found = checked(capsys, *words(sound, paths["test"], copy))
    assert kinds(found, "warning") == {("same_data", "test, copy")}
    entries = {"a": ["A Dog", "x"], "b": ["a  dog"], "c": ["a cat"], "d": ["a dog"]}
    request = words(sound, write_annotation(tmp_path / "train.json", entries))
    code, found = checked(capsys, *request, "--concat_captions", "indep-one")
    shared = finding(found, "shared_captions", "train")
    assert code == 0 and shared.severity == "warning" and shared.items == {"A Dog": ["a", "b", "d"]}
    counts = finding(found, "captions", "train").items
    assert counts == {"videos": 4, "captions": 5, "min": 1, "max": 2}


def test_files_are_named_by_what_tells_them_apart_and_train_means_training(sound: str, tmp_path: Path) -> None:
    names = ["Training-1/captions", "held out/captions", "restrained/captions", "x/captions"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        write_annotation(tmp_path / f"{name}.json", {"a": ["x"]})
    config = load_config(None, {"frames_dir": sound})
    splits = splits_of_files([f"{tmp_path}/{name}.json" for name in names], config)
    assert [(split.name, split.trains) for split in splits] == list(zip(names, [True, *[False] * 3], strict=True))
    (split,) = splits_of_files([write_annotation(tmp_path / "msrvtt_train9k.json", {"a": ["x"]})], config)
    assert (split.name, split.trains) == ("msrvtt_train9k", True)
