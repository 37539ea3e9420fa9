"""Runs of the extraction: what is finished stays, what fails is reported, and nothing but the frames is touched."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from media import FFMPEG, ffmpeg, write_frames, write_video

from adaclip_finetune.cli import main
from adaclip_finetune.lock import FolderLock

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "utils/frame_extraction.py")]
REPORT = "extraction_report.json"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three short videos."""
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"videos/{name}.mp4", 6)
    return tmp_path / "videos"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return tmp_path / "frames"


def run(videos: Path, frames: Path, *words: object) -> int:
    return main(["extract", str(videos), str(frames), *map(str, words)])


def report(frames: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((frames / REPORT).read_text())
    return content


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, with the time of its last change."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def names(folder: Path) -> list[str]:
    """The names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program on PATH that knows ffmpeg's options, and then does what the script says."""
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f'#!/bin/sh\ncase "$*" in *"-h long"*) echo " -fps_mode"; exit 0;; esac\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_only_what_is_not_finished_is_extracted(videos: Path, frames: Path) -> None:
    """A video that changed and one that lost an image are extracted again."""
    assert run(videos, frames, "--parallel") == 0
    before = {name: tree(frames / name) for name in "abc"}
    assert run(videos, frames, "--parallel") == 0
    assert {name: tree(frames / name) for name in "abc"} == before
    assert (report(frames)["finished_earlier"], report(frames)["extracted"]) == (3, 0)
    assert names(frames) == ["a", "b", "c", REPORT]
    manifest = json.loads((frames / "a/manifest.json").read_text())
    facts = (videos / "a.mp4").stat()
    assert manifest["source"] == {"name": "a.mp4", "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    assert (manifest["frames"], manifest["fps"], manifest["duration"]) == (6, 25.0, pytest.approx(0.24, abs=0.05))
    assert manifest["options"]["prefix"] == "image_%05d.jpg"
    write_video(videos / "a.mp4", 9)
    (frames / "b/image_00006.jpg").unlink()
    assert run(videos, frames) == 0
    assert report(frames)["extracted"] == 2 and tree(frames / "c") == before["c"]
    assert [len(list((frames / name).glob("*.jpg"))) for name in "abc"] == [9, 6, 6]


def test_other_options_are_refused_before_anything_is_done(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(videos, frames, "--end", 1)
    before = tree(frames)
    assert run(videos, frames, "--frame_size", 20, "--quality", 5) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in ("2 videos", "--overwrite", "frame_size was -1, is 20", "quality was 2"))
    assert tree(frames).keys() == before.keys()
    assert run(videos, frames, "--frame_size", 20, "--overwrite") == 0
    assert json.loads((frames / "a/manifest.json").read_text())["options"]["frame_size"] == 20


def test_folders_of_others_are_left_alone(videos: Path, frames: Path, tmp_path: Path) -> None:
    write_frames(frames / "a", 3)  # such as the published tool's: no manifest
    (frames / "b").mkdir()  # empty
    (frames / "c").mkdir()
    (frames / "c/thesis.txt").write_text("years of work")
    write_video(videos / "d.mp4", 3)
    elsewhere = write_frames(tmp_path / "elsewhere", 2)
    (frames / "d").symlink_to(elsewhere)
    before = [tree(folder) for folder in (frames / "a", frames / "c", elsewhere)]
    assert run(videos, frames) == 1
    assert set(report(frames)["failed"]) == {"a", "c", "d"}
    assert [tree(folder) for folder in (frames / "a", frames / "c", elsewhere)] == before
    assert run(videos, frames, "--overwrite") == 1  # images may be replaced, anything else may not
    assert set(report(frames)["failed"]) == {"c", "d"}
    assert len(list((frames / "a").glob("*.jpg"))) == 6
    assert [tree(folder) for folder in (frames / "c", elsewhere)] == before[1:]


HOSTILE = [
    *("with space", "quote'\"`", "semi;touch canary", "$(touch canary)", "`touch canary`", "two\nlines", "-i"),
    *("--overwrite", "日本語 ñ", "n" * 200, "100%d %05d", "a:b,c[0];[v]=\\", "concat:x|y", "file:..", "*?"),
    *("dots.in.3.id", "trailing ", "\x1b[31mred"),
]


@pytest.mark.parametrize("more", [[], ["--num_frames", 2]])
def test_hostile_names(tmp_path: Path, more: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "source.mp4", 3).read_bytes()
    inside = tmp_path / "odd 100%d 'folder'"  # names above the videos matter too
    (inside / "v").mkdir(parents=True)
    for name in HOSTILE:
        (inside / "v" / f"{name}.mp4").write_bytes(source)
    before = tree(inside)
    monkeypatch.chdir(inside)
    made = inside / "$(frames) %d"
    assert run(Path("v"), made, "--parallel", *more) == 0
    assert names(made) == sorted([*HOSTILE, REPORT])
    assert {len(list((made / name).glob("*.jpg"))) for name in HOSTILE} == {2 if more else 3}
    assert {name: changed for name, changed in tree(inside).items() if not name.startswith(made.name)} == before
    assert run(Path("v"), made, "--parallel", *more) == 0
    assert report(made)["finished_earlier"] == len(HOSTILE)


def test_broken_videos_are_reported_and_the_others_done(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(videos.parent / "whole.mkv", 60).read_bytes()
    (videos / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    source, front = write_video(videos.parent / "whole.mp4", 60), videos.parent / "front.mp4"
    ffmpeg("-i", source, "-c", "copy", "-movflags", "+faststart", front)
    content = front.read_bytes()
    (videos / "cutmp4.mp4").write_bytes(content[: len(content) * 6 // 10])
    middle = len(content) // 2
    (videos / "hurt.mp4").write_bytes(content[:middle] + bytes(3000) + content[middle + 3000 :])
    (videos / "noise.avi").write_bytes(bytes(range(256)) * 40)
    (videos / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(videos / "pipe.mp4")
    (videos / "._a.mp4").write_bytes(b"macOS leaves these beside files")
    (videos / "\x1b[2J\nfake line.mp4").write_bytes(b"")
    (videos / os.fsdecode(b"no utf-8 \xff.mp4")).write_bytes(b"")
    expected = {
        "cut": "File ended prematurely",
        "cutmp4": "corrupt input packet",
        "hurt": "",
        "noise": "Invalid data found",
        "gone": "No such file",
        "pipe": "not a regular file",
        "\x1b[2J\nfake line": "empty",
        "no utf-8 \udcff": "",
    }
    for more in ([], ["--num_frames", 3]):
        assert run(videos, frames, "--parallel", "--overwrite", *more) == 1
        failed = report(frames)["failed"]
        assert set(failed) == set(expected)
        assert all(reason in failed[name]["reason"] for name, reason in expected.items())
        shown = capsys.readouterr().out
        assert "\x1b" not in shown, "names must not steer the terminal"
        assert all(f"  {name}: " in shown for name in ("cut", "\\x1b[2J\\nfake line", "no utf-8 \\udcff"))
        assert names(frames) == ["a", "b", "c", REPORT]


def test_two_videos_for_one_folder_are_refused(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(videos / "a.mkv", 2)
    assert run(videos, frames) == 2
    assert "a.mkv" in capsys.readouterr().err and not frames.exists()
    assert run(videos, frames, "--accepted_formats", ".mp4") == 0
    (videos / "a.mkv").rename(videos / f"{REPORT}.mp4")
    assert run(videos, frames) == 2


def test_choice_of_videos(videos: Path, tmp_path: Path) -> None:
    write_video(videos / "deep/er/d.x.MP4", 2)
    write_video(videos / "e.webm", 2, "libvpx-vp9", **{"cpu-used": "8"})
    listing = tmp_path / "list.txt"

    def made(*words: object, failed: tuple[str, ...] = ()) -> list[str]:
        folder = tmp_path / f"f{len(list(tmp_path.iterdir()))}"
        assert run(videos, folder, *words) == int(bool(failed))
        assert set(report(folder)["failed"]) == set(failed)
        return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("manifest.json"))

    assert made("--recursive") == ["a", "b", "c", "deep/er/d.x", "e"]
    assert made("--begin", 1, "--end", 2) == ["b", "c"]
    assert made("--accepted_formats", ".WEBM,avi", "mp4", "--begin", 2) == ["c", "e"]
    listing.write_text("c.mp4\r\na\n\nabsent\na\n../../etc/passwd\n", encoding="utf-8")
    assert made("--file_list", listing, failed=("absent", "../../etc/passwd")) == ["a", "c"]
    assert made("--file_list", listing, "--begin", 1, "--end", 1) == ["a"]
    listing.write_text("deep/er/d.x\n")
    assert made("--file_list", listing) == ["deep/er/d.x"]


@pytest.mark.parametrize("frames", [Path("frames"), Path("videos/frames"), Path()], ids=["beside", "inside", "around"])
def test_files_that_are_no_videos_are_counted(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that an earlier run wrote into the folder of videos are not among them."""
    monkeypatch.chdir(videos.parent)
    (videos / "notes.txt").write_text("hello")
    write_video(videos / "plain.mp4", 3).rename(videos / "d.unknown")
    for _ in range(2):
        assert run(videos, frames, "--recursive") == 0
        assert re.search(r"^1 other file\b.*notes\.txt", capsys.readouterr().out, re.MULTILINE)
    assert report(frames)["finished_earlier"] == report(frames)["videos"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--frame_rate 0", "--frame_rate 0"),
        ("--frame_rate nan", "--frame_rate nan"),
        ("--frame_size 0", "--frame_size 0"),
        ("--num_frames 0", "--num_frames 0"),
        ("--num_frames 4 --frame_rate 2", "--frame_rate"),
        ("--quality 1", "--quality 1"),
        ("--prefix ../x%d.jpg", "--prefix"),
        ("--prefix image.jpg", "--prefix"),
        ("--prefix %d%d.jpg", "--prefix"),
        ("--prefix -%d.jpg", "--prefix"),
        ("--accepted_formats .gif", ".gif"),
        ("--begin -1", "--begin -1"),
        ("--begin 9", "3 videos"),
        ("--begin 2 --end 1", "--end 1"),
        ("--num_workers 0 --parallel", "--num_workers 0"),
        ("--time_limit 0", "--time_limit 0"),
        ("--file_list nowhere.txt", "nowhere.txt"),
        ("--clips x.json --file_list y", "--file_list"),
        ("--file_list y --accepted_formats mp4", "--accepted_formats"),
    ],
)
def test_what_is_not_possible_is_refused_before_anything_is_made(
    videos: Path, frames: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(videos, frames, *words.split()) == 2
    assert said in capsys.readouterr().err
    assert not frames.exists()


def test_dry_run_writes_nothing(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(videos, frames, "--dry_run") == 0
    assert not frames.exists()
    shown = capsys.readouterr().out
    assert "3 videos to extract" in shown


def test_ffmpeg_has_a_time_limit(videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path / "bin", monkeypatch, "exec sleep 60")
    assert run(videos, frames, "--end", 0, "--time_limit", 0.3) == 1
    assert "--time_limit" in report(frames)["failed"]["a"]["reason"]
    assert report(frames)["ffmpeg"] == str(tmp_path / "bin/ffmpeg"), "the program on PATH comes first"


def test_a_full_disk_stops_everything_and_leaves_no_half_folder(
    videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        f'case "$*" in *a.mp4*) exec {FFMPEG} "$@";; esac\nprintf x > image_00001.jpg\n'
        'echo "[out#0/image2 @ 0x1] Task finished with error code: -28 (x)" >&2\n'
        'echo "Error submitting a packet to the muxer: No space left on device" >&2\nexit 228'
    )
    fake_ffmpeg(tmp_path / "bin", monkeypatch, script)
    assert run(videos, frames) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert names(frames) == ["a"]


def test_killed_at_any_time_only_what_was_in_flight_is_lost(tmp_path: Path) -> None:
    """The fake program tells through a pipe that it starts on a video, and waits until it may go on."""
    videos, frames = tmp_path / "videos", tmp_path / "frames"
    ids = [f"v{n}" for n in range(4)]
    for name in ids:
        write_video(videos / f"{name}.mp4", 40)
    started, go_on = tmp_path / "started", tmp_path / "go_on"
    os.mkfifo(started)
    os.mkfifo(go_on)
    with pytest.MonkeyPatch.context() as patch:
        fake_ffmpeg(tmp_path / "bin", patch, f'{FFMPEG} "$@"\necho x > {started}\nread x < {go_on}')
        process = subprocess.Popen([*COMMAND, videos, frames], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2):
            started.read_text()
            go_on.write_text("x\n")
        started.read_text()
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        go_on.write_text("x\n")  # lets the program end that outlived the run
    finished = {name: tree(frames / name) for name in ids if (frames / name).exists()}
    assert len(finished) == 2 and all(len(content) == 42 for content in finished.values())
    assert subprocess.run([*COMMAND, videos, frames, "--parallel"], capture_output=True).returncode == 0
    assert names(frames) == [REPORT, *ids]
    assert all(tree(frames / name) == content for name, content in finished.items())
    assert all(len(tree(frames / name)) == 42 for name in ids)


def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    videos, frames, pids = tmp_path / "videos", tmp_path / "frames", tmp_path / "pids"
    write_video(videos / "a.mp4", 3)
    os.mkfifo(pids)
    with pytest.MonkeyPatch.context() as patch:
        fake_ffmpeg(tmp_path / "bin", patch, f"echo $$ > {pids}; exec sleep 600")
        process = subprocess.Popen([*COMMAND, videos, frames], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pid = int(pids.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    assert list(frames.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_two_runs_do_not_share_a_folder(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frames / ".extraction").mkdir(parents=True)
    lock = FolderLock(frames / ".extraction")
    lock.take()
    assert run(videos, frames) == 2
    assert str(os.getpid()) in capsys.readouterr().err
    lock.release()
    assert run(videos, frames) == 0 and names(frames) == ["a", "b", "c", REPORT]
