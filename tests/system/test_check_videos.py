"""`adaclip check` of videos: what a run would find, what --deep finds, and what a run would make of it."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checking import checked, finding, kinds, made_up, write_annotation
from media import write_frames, write_video

from adaclip_finetune.check import videos
from adaclip_finetune.check.source import Split
from adaclip_finetune.check.videos import check_videos
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.splits import evaluation_split, train_split
from adaclip_finetune.data.video import container, decoding, index, seeking
from adaclip_finetune.errors import UserError

BROKEN = ("gone", "gap", "first")
ALL = ("good", "other", "late", "odd", "short", *BROKEN)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return made_up(tmp_path)


def annotations(folder: Path, *names: str) -> dict[str, str]:
    videos = {name: [f"what {name} shows"] for name in names}
    return {split: write_annotation(folder / f"{split}.json", videos) for split in ("train", "val")}


def test_train_leaves_out_what_an_evaluation_stops_at(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = annotations(tmp_path, *ALL)
    for split, severity in (("train", "warning"), ("val", "fails")):
        code, found = checked(capsys, "--annot", paths[split], "--frames_dir", str(frames), "--num_frm", "4")
        assert code == (1 if severity == "fails" else 0)
        assert found["verdict"] == severity
        assert kinds(found, severity) >= {("missing_videos", split), ("gaps", split), ("broken_frames", split)}
        assert list(finding(found, "missing_videos", split).items) == ["gone"]
        gap = finding(found, "gaps", split)
        assert "image_00003.jpg is missing" in gap.items["gap"] and "1 of 8 videos" in gap.message
        assert list(finding(found, "broken_frames", split).items) == ["first"]
        short = finding(found, "short_videos", split)
        assert (short.severity, short.items) == ("warning", {"short": "2 frames"})
        assert ("--skip_missing" in gap.advice) is (split == "val")


def test_it_says_what_a_run_does(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held against the code of a run: it leaves out the same videos, or stops."""
    paths = annotations(tmp_path, *ALL)
    words = ["--frames_dir", str(frames), "--num_frm", "4"]
    config = load_config(None, {"frames_dir": str(frames), "num_frm": 4, "top_k": 2})
    _, found = checked(capsys, "--annot", paths["train"], *words)
    told = {name for entry in found["findings"] if entry["check"] != "short_videos" for name in entry["items"]}
    assert set(train_split(config, paths["train"]).left_out) == set(BROKEN) == told & set(ALL)
    with pytest.raises(UserError):
        evaluation_split(config, paths["val"])
    code, found = checked(capsys, "--annot", paths["val"], "--skip_missing", *words)
    skipping = config.model_copy(update={"skip_missing": True})
    assert set(evaluation_split(skipping, paths["val"]).left_out) == set(BROKEN)
    assert code == 0 and "skip_missing" in finding(found, "gaps", "val").message


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_left_fails(frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str) -> None:
    paths = annotations(tmp_path, *BROKEN)
    words = ("--annot", paths[split], "--frames_dir", str(frames), "--skip_missing")
    code, found = checked(capsys, *words)
    assert code == 1 and "none is left" in finding(found, "gaps", split).message


def test_deep_finds_what_the_first_frame_does_not_tell(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 frames, of which num_frm 8 reads all, and num_frm 2 the first and the fifth."""
    paths = annotations(tmp_path, "good", "late", "odd")
    val, train = ["--annot", paths["val"], "--frames_dir", str(frames)], ["--annot", paths["train"]]
    code, found = checked(capsys, *val, "--num_frm", "8")
    assert code == 0 and ("videos", "val") in kinds(found, "fine")
    code, found = checked(capsys, *val, "--num_frm", "8", "--deep")
    late, odd = finding(found, "broken_frames", "val"), finding(found, "frame_sizes", "val")
    assert code == 1 and late.severity == odd.severity == "fails"
    assert list(late.items) == ["late"] and "image_00006.jpg" in late.items["late"]
    assert list(odd.items) == ["odd"] and "130x66 and 130x80" in odd.items["odd"]
    code, found = checked(capsys, *val, "--num_frm", "2", "--deep")
    late = finding(found, "broken_frames", "val")
    assert late.severity == "warning" and "passes over" in late.message
    assert finding(found, "frame_sizes", "val").severity == "fails"  # the fifth
    code, found = checked(capsys, *train, "--frames_dir", str(frames), "--num_frm", "8", "--deep")
    assert code == 0 and "left out of their batches" in finding(found, "broken_frames", "train").message
    words = ("--frames_dir", str(frames), "--num_frm", "2", "--deep", "--sampling", "random")
    _, found = checked(capsys, *train, *words)
    assert "left out of their batches" in finding(found, "broken_frames", "train").message


def test_every_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_frames(tmp_path / "frames" / "v", 150)  # more than are read at once
    for number in (2, 70, 149):
        (folder / f"image_{number:05d}.jpg").write_bytes(b"")
    path = annotations(tmp_path, "v")["val"]
    _, found = checked(capsys, "--annot", path, "--frames_dir", str(tmp_path / "frames"), "--deep")
    named = finding(found, "broken_frames", "val").items["v"]
    assert [f"image_{number:05d}.jpg" in named for number in (2, 70, 149, 3)] == [True, True, True, False]


def test_video_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_video(tmp_path / "good.mp4", 100)
    data = whole.read_bytes()
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    middle = bytearray(data)
    start = data.index(b"mdat") + len(data) * 2 // 3
    middle[start : start + 3000] = b"\xff" * 3000
    (tmp_path / "hurt.mp4").write_bytes(bytes(middle))
    path = annotations(tmp_path, "good", "text", "empty", "hurt", "gone")["val"]
    words = ("--annot", path, "--video_dir", str(tmp_path), "--num_frm", "100")
    code, found = checked(capsys, *words)
    assert code == 1 and set(finding(found, "unreadable_videos", "val").items) == {"text", "empty"}
    assert list(finding(found, "missing_videos", "val").items) == ["gone"]
    code, found = checked(capsys, *words, "--deep")
    told = {name for entry in found["findings"] if entry["severity"] == "fails" for name in entry["items"]}
    assert code == 1 and told == {"text", "empty", "hurt", "gone"}


def test_the_kind_is_not_read_off_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be called like any reason; what a pack lacks is missing, and what is damaged in it is damaged."""
    folder = tmp_path / "cannot be decoded yet, though there is no file"
    write_frames(folder / "v", 4)
    (folder / "empty").mkdir()
    path = annotations(tmp_path, "v", "empty")["val"]
    code, found = checked(capsys, "--annot", path, "--frames_dir", str(folder), "--num_frm", "4")
    assert code == 1 and kinds(found, "fails") == {("unreadable_videos", "val")}
    packed = tmp_path / "frames.lmdb"
    assert main(["pack", str(folder), "-o", str(packed)]) == 1  # for the empty one
    capsys.readouterr()
    code, found = checked(capsys, "--annot", path, "--frames_dir", str(packed), "--num_frm", "4")
    assert code == 1 and kinds(found, "fails") == {("missing_videos", "val")}


def test_skip_missing_is_advised_where_it_helps(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--frames_dir", str(frames), "--num_frm", "4")
    for names, more, helps in (
        (("good", "gone"), (), True),
        (("gone",), (), False),  # nothing would be left
        (("gone",), ("--skip_missing",), False),
        (("good", "gone"), ("--skip_missing",), False),
    ):
        _, found = checked(capsys, "--annot", annotations(tmp_path, *names)["val"], *words, *more)
        assert ("--skip_missing" in finding(found, "missing_videos", "val").advice) is helps


def test_clips_that_are_read_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The frames of the run are those of the whole file: start and end do not matter to it."""
    write_video(tmp_path / "v.mp4", 50)
    write_video(tmp_path / "w.mp4", 50)
    clip = {"sentences": ["x"], "start": 1.0, "end": 1.5}
    path = write_annotation(tmp_path / "val.json", {"v": clip, "w": ["y"]})
    code, found = checked(capsys, "--annot", path, "--video_dir", str(tmp_path))
    clips = finding(found, "clips", "val")
    assert code == 0 and clips.severity == "warning" and clips.items == {"v": "1 s to 1.5 s"}
    assert f"adaclip extract --clips {path}" in clips.advice
    write_frames(tmp_path / "v", 20)
    write_frames(tmp_path / "w", 20)
    assert ("clips", "val") not in kinds(checked(capsys, "--annot", path, "--frames_dir", str(tmp_path))[1], "warning")


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_deep_decodes_a_video_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """Told by how often the file is opened: for its first frame, and for all of them."""
    name = {"mpeg4": "v.avi", "libx264": "v.mp4"}[codec]
    write_video(tmp_path / name, 200, codec, g="200")  # a key frame at the start, and no other
    path = annotations(tmp_path, "v")["val"]
    words = ("--annot", path, "--video_dir", str(tmp_path), "--num_workers", "1")
    checked(capsys, *words)  # indexed from here on
    real, opened = container.opened, []

    def counted(path: Path) -> Any:
        opened.append(path)
        return real(path)

    for module in (decoding, index, seeking):
        monkeypatch.setattr(module, "opened", counted)
    code, found = checked(capsys, *words, "--deep")
    assert code == 0 and ("videos", "val") in kinds(found, "fine")
    assert len(opened) == 2


def test_deep_stops_when_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the main thread, while a thread is in the middle of an endless video."""
    going, ended = threading.Event(), threading.Event()

    class Endless:
        def count(self, video_id: str) -> int:
            return 10**9

        def read(self, video_id: str, indices: Any) -> Any:
            return np.zeros((len(indices), 4, 4, 3), np.uint8)

        def scan(self, video_id: str, stopped: Any = lambda: False) -> Any:
            while not stopped():
                going.set()
                yield 0, np.zeros((4, 4, 3), np.uint8)
            ended.set()

    def interrupted(looks: Any, *_: object, **__: object) -> Any:
        assert going.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(videos, "tqdm", interrupted)
    split = Split("val", "val.json", False, [VideoAnnotation("v", ("x",))], [])
    with pytest.raises(KeyboardInterrupt):
        check_videos(split, Endless(), load_config(None, {"video_dir": str(tmp_path)}), deep=True)
    assert ended.is_set()


def test_a_pack_is_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checksums are compared by --deep."""
    write_frames(tmp_path / "frames" / "v", 8)
    write_frames(tmp_path / "frames" / "w", 8, height=80)
    path, packed = annotations(tmp_path, "v", "w")["val"], tmp_path / "frames.lmdb"
    assert main(["pack", str(tmp_path / "frames"), "-o", str(packed)]) == 0
    capsys.readouterr()
    shutil.move(tmp_path / "frames", tmp_path / "elsewhere")
    words = ("--annot", path, "--frames_dir", str(packed), "--num_frm", "8", "--deep")
    assert checked(capsys, *words)[0] == 0
    content, image = packed.read_bytes(), (tmp_path / "elsewhere" / "w" / "image_00004.jpg").read_bytes()
    at = content.index(image[-64:])
    packed.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    code, found = checked(capsys, *words)
    told = finding(found, "broken_frames", "val").items
    assert code == 1 and list(told) == ["w"] and "image_00004.jpg" in told["w"]
