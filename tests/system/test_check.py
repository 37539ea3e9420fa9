"""`adaclip check` as a command: wrong requests, what it prints, and real data."""

from pathlib import Path

import pytest
from checking import checked, finding, kinds, write_annotation, write_damaged_frames

from adaclip_finetune.cli import main

EXAMPLE = Path(__file__).parents[2] / "dataset_example"
VAL = ("--annot", str(EXAMPLE / "val.json"), "--video_dir", str(EXAMPLE / "videos"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--annot", "nowhere.json", "--frames_dir", "."], "--annot nowhere.json"),
        (["--annot", str(EXAMPLE / "val.json")], "frames_dir"),
        (["--annot", str(EXAMPLE / "val.json"), "--frames_dir", "nowhere"], "nowhere"),
        (["--annot", str(EXAMPLE / "val.json"), "--config", "x.json"], "x.json"),
        (["--annot", str(EXAMPLE / "val.json"), "--val_annot", "x.json"], "--val_annot"),
        ([*VAL, "--annot", str(EXAMPLE / "." / "val.json")], "twice"),
        (["--frames_dir", "."], "train_annot"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--deepp"], "--deep"),
    ],
)
def test_wrong_requests(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.out == "" and "Traceback" not in printed.err


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worst findings come first, each with examples and a way out; names cannot steer the terminal."""
    frames = write_damaged_frames(tmp_path)
    evil = "go\x1b]0;hacked\x07ne\nfails    val  what is not so"
    videos = {name: [f"what {name} shows"] for name in ("good", "short", "gap", evil, "gone", "gone too")}
    path = write_annotation(tmp_path / "val.json", videos)
    assert main(["check", "--annot", path, "--frames_dir", str(frames), "--num_frm", "4"]) == 1
    text = capsys.readouterr().out
    starts = [line.split()[0] for line in text.splitlines() if line.startswith(("fails", "warning", "fine"))]
    assert starts == ["fails", "fails", "warning", "fine", "fine"]
    assert "3 of 6 videos missing" in text and "and 1 more (--json lists all)" in text
    assert "→ extract or fetch them" in text and "--skip_missing" in text
    assert text.splitlines()[-1].endswith("(2 would fail, 1 warning, 2 fine)")
    assert "\x1b" not in text and "\x07" not in text and r"go\x1b]0;hacked\x07ne\nfails" in text


def test_the_example_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    names = [word for split in ("train", "val", "test") for word in ("--annot", str(EXAMPLE / f"{split}.json"))]
    settings = ["--clip_weights", str(EXAMPLE / "tiny_clip"), "--max_txt_len", "32", "--concat_captions", "indep-one"]
    code, found = checked(capsys, *names, "--video_dir", str(EXAMPLE / "videos"), *settings)
    assert code == 0 and found["verdict"] == "fine"
    assert finding(found, "captions", "train").items["videos"] == 600


def test_real_data(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "data" / "panda70m"
    names = [word for split in ("val", "test") for word in ("--annot", str(folder / f"{split}.json"))]
    code, found = checked(capsys, *names, "--video_dir", str(folder / "videos"))
    assert code == 0 and kinds(found, "warning") == {("long_captions", "val"), ("long_captions", "test")}
    assert kinds(found, "fine") >= {("overlap", "val, test"), ("videos", "val")}
