"""Runs of the extraction: what is finished stays, what fails is told, and nothing but the frames is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from media import write_frames, write_video

from adaclip_finetune.cli import main

ROOT = Path(__file__).parents[2]


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


def report(frames: Path) -> dict[str, object]:
    return json.loads((frames / "extraction_report.json").read_text())


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, with the time of its last change."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def names(folder: Path) -> list[str]:
    """Of what is in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program on PATH; it tells its options as ffmpeg does, and then behaves as the script says."""
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f'#!/bin/sh\ncase "$*" in *"-h long"*) echo " -fps_mode"; exit 0;; esac\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_finished_work_is_skipped_and_the_manifest_tells_of_it(videos: Path, frames: Path) -> None:
    assert run(videos, frames, "--parallel") == 0
    before = tree(frames / "a")
    assert run(videos, frames, "--parallel") == 0
    assert tree(frames / "a") == before
    assert (report(frames)["extracted"], report(frames)["finished_earlier"]) == (0, 3)
    assert names(frames) == ["a", "b", "c", "extraction_report.json"]
    manifest = json.loads((frames / "a/manifest.json").read_text())
    facts = (videos / "a.mp4").stat()
    assert manifest["source"] == {"name": "a.mp4", "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    assert (manifest["frames"], manifest["fps"], manifest["duration"]) == (6, 25.0, pytest.approx(0.24, abs=0.05))
    assert manifest["options"]["prefix"] == "image_%05d.jpg"


def test_another_source_or_a_lost_image_is_extracted_again(videos: Path, frames: Path) -> None:
    run(videos, frames)
    before = {name: tree(frames / name) for name in "abc"}
    write_video(videos / "a.mp4", 9)
    (frames / "b/image_00006.jpg").unlink()
    assert run(videos, frames) == 0
    assert report(frames)["extracted"] == 2
    assert len(list((frames / "a").glob("*.jpg"))) == 9
    assert len(list((frames / "b").glob("*.jpg"))) == 6
    assert tree(frames / "c") == before["c"]


def test_changed_options_stop_before_anything_is_done(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(videos, frames, "--end", 1)
    before = tree(frames)
    assert run(videos, frames, "--frame_size", 20, "--quality", 5) == 2
    error = capsys.readouterr().err
    assert "2 videos were extracted with other options" in error and "--overwrite" in error
    assert "frame_size was -1, is 20" in error and "quality was 2, is 5" in error
    assert tree(frames).keys() == before.keys() and not (frames / "c").exists()
    assert run(videos, frames, "--frame_size", 20, "--overwrite") == 0
    assert json.loads((frames / "a/manifest.json").read_text())["options"]["frame_size"] == 20
    assert names(frames) == ["a", "b", "c", "extraction_report.json"]


def test_folders_of_others_are_left_alone(videos: Path, frames: Path, tmp_path: Path) -> None:
    write_frames(frames / "a", 3)  # such as the published tool's: no manifest
    (frames / "b").mkdir()  # empty
    (frames / "c").mkdir()
    (frames / "c/thesis.txt").write_text("years of work")
    before = tree(frames / "a") | tree(frames / "c")
    assert run(videos, frames) == 1
    assert set(report(frames)["failed"]) == {"a", "c"}
    assert tree(frames / "a") | tree(frames / "c") == before
    assert run(videos, frames, "--overwrite") == 1  # images may be replaced, anything else may not
    assert set(report(frames)["failed"]) == {"c"}
    assert len(list((frames / "a").glob("*.jpg"))) == 6
    assert (frames / "c/thesis.txt").read_text() == "years of work"


def test_a_link_is_replaced_and_what_it_leads_to_is_not(videos: Path, frames: Path, tmp_path: Path) -> None:
    elsewhere = write_frames(tmp_path / "elsewhere", 2)
    frames.mkdir()
    (frames / "a").symlink_to(elsewhere)
    before = tree(elsewhere)
    assert run(videos, frames, "--overwrite") == 0
    assert tree(elsewhere) == before
    assert not (frames / "a").is_symlink()


HOSTILE = [
    "with space",
    "quote'\"`",
    "semi;touch canary",
    "$(touch canary)",
    "`touch canary`",
    "two\nlines",
    "-i",
    "--overwrite",
    "日本語 ñ",
    "n" * 200,
    "100%d %05d",
    "a:b,c[0];[v]=\\",
    "concat:x|y",
    "file:..",
    "*?",
    "dots.in.3.id",
    "trailing ",
    "\x1b[31mred",
]


@pytest.mark.parametrize("more", [[], ["--num_frames", 2]])
def test_hostile_names(tmp_path: Path, frames: Path, more: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_video(tmp_path / "source.mp4", 3).read_bytes()
    inside = tmp_path / "odd 100%d 'folder'"  # names above the videos matter too
    (inside / "v").mkdir(parents=True)
    for name in HOSTILE:
        (inside / "v" / f"{name}.mp4").write_bytes(source)
    canary = inside / "canary"
    canary.write_text("alive")
    before = tree(inside)
    monkeypatch.chdir(inside)
    assert run(Path("v"), inside / "$(frames) %d", "--parallel", *more) == 0
    made = inside / "$(frames) %d"
    assert names(made) == sorted([*HOSTILE, "extraction_report.json"])
    assert {len(list((made / name).glob("*.jpg"))) for name in HOSTILE} == {2 if more else 3}
    after = {name: changed for name, changed in tree(inside).items() if not name.startswith(made.name)}
    assert after == before
    assert run(Path("v"), made, "--parallel", *more) == 0
    assert report(made)["finished_earlier"] == len(HOSTILE)


def test_a_name_that_is_no_unicode_is_a_failure(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (videos / "a.mp4").rename(videos / os.fsdecode(b"a\xff.mp4"))
    assert run(videos, frames) == 1
    assert "a\\udcff: its name is not UTF-8: rename it" in capsys.readouterr().out
    assert list(report(frames)["failed"]) == [os.fsdecode(b"a\xff")]
    assert run(videos, frames, "--dry_run") == 0


def test_a_name_cannot_steer_the_terminal(tmp_path: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/\x1b[2J\nfake line.mp4").write_bytes(b"")
    assert run(tmp_path / "videos", frames) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[2J\\nfake line: " in shown


def test_playlists_and_scripts_open_no_other_file(tmp_path: Path, frames: Path) -> None:
    """That ffmpeg would follow such a file, were it not for the whitelist, is checked on the first."""
    canary = write_video(tmp_path / "videos/canary.ts", 4)
    concat = f"ffconcat version 1.0\nfile {canary.name}\n"
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\n{canary.name}\n#EXT-X-ENDLIST\n"
    texts = {
        "concat": concat,
        "hls": hls,
        "absolute": hls.replace(canary.name, str(canary)),
        "http": hls.replace(canary.name, "http://127.0.0.1:9/x.ts"),
        "url": f"concat:{canary}",
        "image": "\x89PNG\r\n\x1a\n",
    }
    for name, text in texts.items():
        (tmp_path / f"videos/{name}.mp4").write_text(text)
    unguarded = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "videos/concat.mp4")]
    assert subprocess.run([*unguarded, "-f", "null", "-"]).returncode == 0
    for more in ([], ["--num_frames", 2]):
        assert run(tmp_path / "videos", frames, "--overwrite", *more) == 1
        assert set(report(frames)["failed"]) == set(texts)
        assert names(frames) == ["canary", "extraction_report.json"]


def test_broken_videos_are_told_and_the_others_done(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    whole = write_video(videos.parent / "whole.mkv", 60).read_bytes()
    (videos / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    front = videos.parent / "front.mp4"
    source = write_video(videos.parent / "whole.mp4", 60)
    subprocess.run([ffmpeg, "-v", "error", "-i", source, "-c", "copy", "-movflags", "+faststart", front], check=True)
    (videos / "cutmp4.mp4").write_bytes(front.read_bytes()[: front.stat().st_size * 6 // 10])
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "noise.avi").write_bytes(bytes(range(256)) * 40)
    (videos / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(videos / "pipe.mp4")
    sound = ["-f", "lavfi", "-i", "sine=duration=1", str(videos / "sound.mp4")]
    subprocess.run([ffmpeg, "-v", "error", *sound], check=True)
    (videos / "._a.mp4").write_bytes(b"macOS leaves these beside files")
    expected = {
        "cut": "File ended prematurely",
        "cutmp4": "corrupt input packet",
        "empty": "Invalid data found",
        "noise": "Invalid data found",
        "gone": "No such file",
        "pipe": "not a regular file",
        "sound": "holds no video stream",
    }
    for more in ([], ["--num_frames", 3]):
        assert run(videos, frames, "--parallel", "--overwrite", *more) == 1
        failed = report(frames)["failed"]
        assert isinstance(failed, dict) and set(failed) == set(expected)
        shown = capsys.readouterr().out
        for name, reason in expected.items():
            assert reason in failed[name]["reason"]
            assert f"  {name}: {failed[name]['reason']}" in shown
        assert names(frames) == ["a", "b", "c", "extraction_report.json"]


def test_two_sources_of_one_folder_are_refused(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(videos / "a.mkv", 2)
    assert run(videos, frames) == 2
    assert "a.mkv and" in capsys.readouterr().err
    assert not frames.exists()
    assert run(videos, frames, "--accepted_formats", ".mp4") == 0
    write_video(videos / "b/c.mp4", 2)
    assert run(videos, frames, "--recursive", "--accepted_formats", "mp4") == 2
    assert "which is the folder of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["extraction_report.json.mp4"])
def test_a_video_may_not_take_the_place_of_the_report(videos: Path, frames: Path, name: str) -> None:
    (videos / "a.mp4").rename(videos / name)
    assert run(videos, frames) == 2


def test_choice_of_videos(videos: Path, frames: Path, tmp_path: Path) -> None:
    write_video(videos / "deep/er/d.x.MP4", 2)
    write_video(videos / "e.webm", 2, "libvpx-vp9", **{"cpu-used": "8"})

    def made(*words: object) -> list[str]:
        folder = tmp_path / f"f{len(list(tmp_path.iterdir()))}"
        assert run(videos, folder, *words) in (0, 1)
        return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("manifest.json"))

    assert made() == ["a", "b", "c", "e"]
    assert made("--recursive") == ["a", "b", "c", "deep/er/d.x", "e"]
    assert made("--begin", 1, "--end", 2) == ["b", "c"]
    assert made("--begin", 3) == ["e"]
    assert made("--accepted_formats", ".webm") == ["e"]
    listing = tmp_path / "list.txt"
    listing.write_text("c.mp4\r\na\n\nabsent\na\n../../etc/passwd\n", encoding="utf-8")
    assert made("--file_list", listing) == ["a", "c"]
    assert made("--file_list", listing, "--begin", 1, "--end", 1) == ["a"]
    listing.write_text("d.x\n")
    assert made("--file_list", listing, "--recursive") == ["deep/er/d.x"]


def test_listed_but_absent_is_a_failure(videos: Path, frames: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\nabsent\n")
    assert run(videos, frames, "--file_list", tmp_path / "list.txt") == 1
    failed = report(frames)["failed"]
    assert isinstance(failed, dict) and failed["absent"]["reason"] == "there is no such video"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frame_rate", "0"], "--frame_rate 0"),
        (["--frame_rate", "nan"], "--frame_rate nan"),
        (["--frame_size", "0"], "--frame_size 0"),
        (["--num_frames", "0"], "--num_frames 0"),
        (["--num_frames", "4", "--frame_rate", "2"], "leave out --frame_rate"),
        (["--quality", "1"], "--quality 1"),
        (["--prefix", "../x%d.jpg"], "--prefix"),
        (["--prefix", "image.jpg"], "--prefix"),
        (["--prefix", "%d%d.jpg"], "--prefix"),
        (["--prefix", "-%d.jpg"], "--prefix"),
        (["--accepted_formats", ".gif"], "--accepted_formats gif"),
        (["--begin", "-1"], "--begin -1"),
        (["--begin", "9"], "there are 3 videos"),
        (["--begin", "2", "--end", "1"], "--end 1"),
        (["--num_workers", "0", "--parallel"], "--num_workers 0"),
        (["--time_limit", "0"], "--time_limit 0"),
        (["--file_list", "nowhere.txt"], "nowhere.txt"),
        (["--clips", "x.json", "--file_list", "y"], "leave out --file_list"),
        (["--frame_sise", "3"], "--frame_size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    videos: Path, frames: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(videos, frames, *words) == 2
    assert said in capsys.readouterr().err
    assert not frames.exists()


def test_dry_run_writes_nothing(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(videos, frames, "--dry_run") == 0
    assert not frames.exists()
    shown = capsys.readouterr().out
    assert f"{videos / 'b.mp4'} -> {frames / 'b'}" in shown and "3 videos to extract" in shown
    assert "'-format_whitelist'" in shown


def test_every_ffmpeg_has_a_time_limit(
    videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ffmpeg(tmp_path / "bin", monkeypatch, "exec sleep 60")
    assert run(videos, frames, "--end", 0, "--time_limit", 0.3) == 1
    failed = report(frames)["failed"]
    assert isinstance(failed, dict) and "not done after 0.3 s" in failed["a"]["reason"]


def test_an_image_that_is_cut_off_fails_the_video(
    videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every ffmpeg tells of a write that failed."""
    fake_ffmpeg(tmp_path / "bin", monkeypatch, "printf '\\377\\330\\377' > image_00001.jpg")
    assert run(videos, frames) == 1
    assert names(frames) == ["extraction_report.json"]


def test_the_program_on_the_path_comes_first(
    videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ffmpeg(tmp_path / "bin", monkeypatch, f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"')
    assert run(videos, frames) == 0
    assert report(frames)["ffmpeg"] == str(tmp_path / "bin/ffmpeg")


def test_a_full_disk_stops_everything_and_leaves_no_half_folder(
    videos: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        'case "$*" in *a.mp4*) exec {} "$@";; esac\nprintf x > image_00001.jpg\n'
        'echo "[out#0/image2 @ 0x1] Task finished with error code: -28 (x)" >&2\n'
        'echo "Error submitting a packet to the muxer: No space left on device" >&2\nexit 228'
    )
    fake_ffmpeg(tmp_path / "bin", monkeypatch, script.replace("{}", imageio_ffmpeg.get_ffmpeg_exe()))
    assert run(videos, frames) == 2
    assert "No space left on device. What is complete stays" in capsys.readouterr().err
    assert names(frames) == ["a"]


def test_a_disk_that_is_really_full(videos: Path, tmp_path: Path) -> None:
    """A file system of 200 KB, in a name space of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    spaces = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=200k none "$1"'
    try:
        if subprocess.run([*spaces, mount, "sh", disk], capture_output=True).returncode:
            pytest.skip("this machine lets us mount nothing")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    for n in range(12):
        (videos / f"more{n}.mp4").write_bytes((videos / "a.mp4").read_bytes())
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main(sys.argv[1:]))"
    tool = f'{mount} && {{ "$2" -c "$3" extract "$4" "$1/frames" --quality 2; code=$?; find "$1"; exit $code; }}'
    done = subprocess.run(
        [*spaces, tool, "sh", disk, sys.executable, code, videos], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "No space left on device" in done.stderr
    found = [Path(line).relative_to(disk) for line in done.stdout.splitlines() if line.startswith(str(disk))]
    folders = {path.parts[1] for path in found if len(path.parts) > 1}
    assert folders and not any(name.startswith(".") for name in folders)
    assert all(Path("frames", name, "manifest.json") in found for name in folders)


def test_killed_at_any_time_only_what_was_in_flight_is_lost(tmp_path: Path) -> None:
    videos, frames = tmp_path / "videos", tmp_path / "frames"
    source = write_video(tmp_path / "source.mp4", 40).read_bytes()
    (videos).mkdir()
    ids = [f"v{n:02}" for n in range(16)]
    for name in ids:
        (videos / f"{name}.mp4").write_bytes(source)
    command = [sys.executable, "utils/frame_extraction.py", videos, frames, "--parallel", "--num_workers", "2"]
    finished: dict[str, dict[str, int]] = {}
    for wanted in (1, 5, 9):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while sum((frames / name).exists() for name in ids) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        now = {name: tree(frames / name) for name in ids if (frames / name).exists()}
        assert all(len(content) == 41 for content in now.values()), "a folder that is there is complete"
        assert finished.items() <= now.items(), "what was finished before is not done again"
        finished = now
    assert len(finished) < len(ids)
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert names(frames) == ["extraction_report.json", *ids]
    assert all(tree(frames / name) == content for name, content in finished.items())
    assert all(len(tree(frames / name)) == 41 for name in ids)


def test_ctrl_c_ends_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    videos, frames, bin_ = tmp_path / "videos", tmp_path / "frames", tmp_path / "bin"
    write_video(videos / "a.mp4", 3)
    with pytest.MonkeyPatch.context() as patch:
        fake_ffmpeg(bin_, patch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
        command = [sys.executable, "utils/frame_extraction.py", videos, frames]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert list(frames.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_two_runs_do_not_share_a_folder(videos: Path, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adaclip_finetune.extract.run import _work_folder

    frames.mkdir()
    with _work_folder(frames):
        assert run(videos, frames) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert run(videos, frames) == 0


def test_plain_lines_where_there_is_no_terminal(
    videos: Path, frames: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaclip_finetune.extract.progress.EVERY", 0.0)
    (videos / "b.mp4").write_bytes(b"")
    assert run(videos, frames) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("3 videos to extract, 0 finished earlier\n1 of 3 videos, ")
    assert "frames/s, about 0.0 min left, 1 failed\n2 videos extracted, 12 frames" in captured.out
    assert "\r" not in captured.out + captured.err
