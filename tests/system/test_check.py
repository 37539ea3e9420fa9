"""`adaclip check` as a command: what it is asked, what it prints, and real data."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checking import checked, finding, kinds, made_up, write_annotation
from media import write_frames
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.sampling import frame_indices

EXAMPLE = Path(__file__).parents[2] / "dataset_example"
VAL = ("--annot", str(EXAMPLE / "val.json"), "--video_dir", str(EXAMPLE / "videos"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--annot", "nowhere.json", "--frames_dir", "."], "--annot nowhere.json: there is no such file"),
        (["--annot", str(EXAMPLE / "val.json")], "frames_dir"),
        (["--annot", str(EXAMPLE / "val.json"), "--frames_dir", "nowhere"], "nowhere"),
        (["--annot", str(EXAMPLE / "val.json"), "--config", "x.json"], "x.json"),
        (["--annot", str(EXAMPLE / "val.json"), "--val_annot", "x.json"], "--annot is for files without a run"),
        ([*VAL, "--sheet", "no/where.png"], "--sheet no/where.png"),
        ([*VAL, "--sheet", str(EXAMPLE / "val.json")], "ends in .png"),
        ([*VAL, "--annot", str(EXAMPLE / "." / "val.json")], "is given twice"),
        (["--frames_dir", "."], "train_annot is needed"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--deepp"], "--deep"),
    ],
)
def test_wrong_requests(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.out == "" and "Traceback" not in printed.err


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The worst first, each with an example and what to do."""
    frames = made_up(tmp_path)
    videos = {name: [f"what {name} shows"] for name in ("good", "short", "gap", "gone", "gone too", "gone as well")}
    path = write_annotation(tmp_path / "val.json", videos)
    code = main(["check", "--annot", path, "--frames_dir", str(frames), "--num_frm", "4"])
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in ("fails", "warning", "fine")]
    assert code == 1 and starts == sorted(starts, key=("fails", "warning", "fine").index)
    text = "\n".join(lines)
    assert "3 of 6 videos are missing" in text and "· gone: " in text and "and 1 more (--json lists all)" in text
    assert "→ extract or fetch them" in text and "--skip_missing" in text
    assert lines[-1] == "As things stand a run would fail. (2 would fail, 1 warning, 2 fine)"
    columns = {line.index(word) for line in lines for word in ("3 of 6 videos", "1 of 6 videos") if word in line}
    assert len(columns) == 1


def test_the_example_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    names = [word for split in ("train", "val", "test") for word in ("--annot", str(EXAMPLE / f"{split}.json"))]
    settings = ["--clip_weights", str(EXAMPLE / "tiny_clip"), "--max_txt_len", "32", "--concat_captions", "indep-one"]
    code, found = checked(capsys, *names, "--video_dir", str(EXAMPLE / "videos"), *settings)
    assert code == 0 and found["verdict"] == "fine"
    assert finding(found, "captions", "train").items["videos"] == 600


def test_real_videos(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "data" / "panda70m"
    names = [word for split in ("val", "test") for word in ("--annot", str(folder / f"{split}.json"))]
    code, found = checked(capsys, *names, "--video_dir", str(folder / "videos"))
    assert code == 0 and kinds(found, "warning") == {("long_captions", "val"), ("long_captions", "test")}
    assert ("overlap", "val, test") in kinds(found, "fine") and ("videos", "val") in kinds(found, "fine")


def test_real_frames(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a count of the files themselves."""
    folder = shared / "data" / "msrvtt_frames"
    annotation = json.loads((folder / "val.json").read_text())
    counts = {name: len(list((folder / "frames" / name).iterdir())) for name in annotation}
    code, found = checked(capsys, "--annot", str(folder / "val.json"), "--frames_dir", str(folder / "frames"))
    short = finding(found, "short_videos", "val")
    assert code == 0 and short.items == {name: f"{count} frames" for name, count in counts.items() if count < 16}


def test_the_sheet_shows_the_frames_that_are_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames of one colour each, told by the index: the colours on the sheet are those of the indices."""
    colours = [(30 * index, 255 - 30 * index, 40 + 20 * index) for index in range(8)]
    for name, count in {"long": 8, "short": 2}.items():
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (160, 90), colours[index]).save(tmp_path / name / f"image_{index + 1:05d}.png")
    videos = {
        "long": {"sentences": ["what is long", "слово 猫", "x " * 300], "duration": 4.0},
        "short": ["what is short"],
    }
    path, sheet = write_annotation(tmp_path / "val.json", videos), tmp_path / "sheet.png"
    words = ("--annot", path, "--frames_dir", str(tmp_path), "--img_tmpl", "image_{:05d}.png", "--num_frm", "4")
    assert main(["check", *words, "--sheet", str(sheet)]) == 0
    assert f"{sheet} shows 2 videos" in " ".join(capsys.readouterr().out.split())
    with Image.open(sheet, formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB"))
    sampled = frame_indices(8, 4).tolist()
    assert sampled == [0, 2, 4, 6]
    for index, colour in enumerate(colours):
        places = np.argwhere((pixels == colour).all(axis=2))
        # `short` has 0 and 1, each twice, the second time with a border.
        assert (len(places) > 0) is (index in (*sampled, 1)), index
        if index in (2, 4, 6):
            height, width = places.max(axis=0) - places.min(axis=0) + 1
            assert (width, height) == (160, 90)
    lefts = [np.argwhere((pixels == colours[index]).all(axis=2))[:, 1].min() for index in sampled]
    assert lefts == sorted(lefts) and len(set(lefts)) == 4
    assert (pixels == (230, 120, 0)).all(axis=2).sum() > 2 * 3 * 160  # what is repeated has a border
    assert main(["check", *words, "--sheet", str(sheet)]) == 0
    with Image.open(sheet, formats=["PNG"]) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels), "the second sheet is the first, replaced"


def test_a_sheet_of_hostile_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a shell would leave its traces
    names = ["two\nlines", "$(touch canary)", "é; ü", "n" * 200]
    for name in names:
        (tmp_path / "frames" / name).mkdir(parents=True)
        Image.new("RGB", (16, 9)).save(tmp_path / "frames" / name / "image_00001.jpg")
    path = write_annotation(tmp_path / "val.json", {name: [f"a\n{name}"] * 9 for name in names})
    sheet = tmp_path / "sheet.png"
    words = ("--annot", path, "--frames_dir", str(tmp_path / "frames"), "--num_frm", "1", "--sheet", str(sheet))
    assert checked(capsys, *words)[0] == 0
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.height > 4 * 90
    assert {path.name for path in tmp_path.iterdir()} == {"frames", "val.json", "sheet.png"}


def test_a_sheet_takes_the_place_of_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(tmp_path / "val.json", {"v": ["x"]})
    write_frames(tmp_path / "v", 2)
    words = ["check", "--annot", path, "--frames_dir", str(tmp_path), "--num_frm", "2", "--sheet"]
    other = tmp_path / "other.png"
    other.write_text("notes that somebody called so")
    (tmp_path / "folder.png").mkdir()
    for name, told in {
        path: "ends in .png",
        str(other): "is no PNG",
        str(tmp_path / "folder.png"): "directory",
    }.items():
        assert main([*words, name]) == 2 and told in capsys.readouterr().err
    assert other.read_text() == "notes that somebody called so" and json.loads(Path(path).read_text())
    sheet = tmp_path / "sheet.png"
    for _ in range(2):  # the second time it replaces a sheet
        assert main([*words, str(sheet)]) == 0 and sheet.read_bytes().startswith(b"\x89PNG")


def test_a_sheet_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is told all the same."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_annotation(tmp_path / "val.json", {"v": ["x"]})
    write_frames(tmp_path / "v", 2)
    monkeypatch.setattr(Image.Image, "save", full)
    words = ("--annot", path, "--frames_dir", str(tmp_path), "--num_frm", "2", "--sheet", str(tmp_path / "sheet.png"))
    code, found = checked(capsys, *words)
    assert code == 0 and kinds(found, "warning") == {("sheet", "run")} and ("videos", "val") in kinds(found, "fine")
    assert "No space left" in finding(found, "sheet", "run").message


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "go\x1b]0;hacked\x07ne\nfails    val  what is not so"
    path = write_annotation(tmp_path / "val.json", {name: ["x"]})
    assert main(["check", "--annot", path, "--frames_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and r"go\x1b]0;hacked\x07ne\nfails" in printed
    assert sum(line.startswith("fails") for line in printed.splitlines()) == 1


def test_a_terminal_without_our_signs(tmp_path: Path) -> None:
    path = write_annotation(tmp_path / "val.json", {"gone ü": ["x"]})
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "check", "--annot", path, "--frames_dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and done.stderr == b""
    assert rb"- gone \xfc: " in done.stdout and b"-> extract" in done.stdout


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(tmp_path / "val.json", {"gone": ["x"]})
    sheet = tmp_path / "sheet.png"
    code, found = checked(capsys, "--annot", path, "--frames_dir", str(tmp_path), "--sheet", str(sheet))
    assert code == 1 and ("missing_videos", "val") in kinds(found, "fails") and not sheet.exists()
    assert "nothing to show" in finding(found, "sheet", "run").message
