"""Extracted frames: every frame of a video, upright and in order of time, or exactly those that sampling reads."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from media import ffmpeg, index_of, with_edits, write_joined, write_mirrored, write_video
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import index_video

# What files of each kind usually hold: name, codec, options, and the container that the name does not tell.
KINDS: dict[str, tuple[str, dict[str, str], str | None]] = {
    "a.mp4": ("libx264", {}, None),
    "a.mkv": ("libx265", {"x265-params": "log-level=error"}, None),
    "a.webm": ("libvpx-vp9", {"cpu-used": "8"}, None),
    "a.avi": ("mpeg4", {"bf": "2"}, None),
    "a.mov": ("libx264", {"x264-params": "open-gop=1"}, None),
    "a.mpg": ("mpeg2video", {"bf": "2"}, None),
    "a.vob": ("mpeg2video", {"bf": "2"}, "mpg"),
    "a.MTS": ("libx264", {}, "ts"),
    "a.FLV": ("libx264", {}, "flv"),
    "a.wmv": ("wmv2", {"bf": "0"}, None),
    "a.xyz": ("libx264", {}, "mp4"),
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


def make(path: Path, num_frames: int) -> Path:
    codec, options, container = KINDS[path.name]
    plain = path if container is None else path.with_suffix(f".{container}")
    return write_video(plain, num_frames, codec, **options).rename(path)


def extract(videos: Path, *words: object) -> Path:
    """Return the folder of frames, a new one; everything must have been extracted."""
    frames = videos.parent / f"frames{len(list(videos.parent.iterdir()))}"
    assert main(["extract", str(videos), str(frames), *map(str, words)]) == 0
    return frames


def images(folder: Path) -> list[np.ndarray]:
    """All images of a folder, numbered without a gap, beside which there are files of ours alone."""
    count = len(list(folder.glob("image_*.jpg")))
    assert {path.name for path in folder.iterdir() if path.suffix != ".jpg"} <= {"manifest.json", "frame_times.json"}
    return [np.asarray(Image.open(folder / f"image_{n:05d}.jpg")) for n in range(1, count + 1)]


def codes(folder: Path) -> list[int]:
    return [index_of(image) for image in images(folder)]


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_all_frames_and_those_that_sampling_reads(videos: Path, name: str) -> None:
    make(videos / name, 40)
    frames, store = extract(videos), VideoFolder(videos)
    assert codes(frames / "a") == list(range(40))
    times, written = store.times("a"), FrameFolder(frames, "image_{:05d}.jpg").times("a")
    assert (times is None) == (written is None) == (name == "a.avi")
    assert times is None or np.allclose(times, written, atol=1e-6)
    for number in (7, 50):
        picked = extract(videos, "--num_frames", number) / "a"
        expected = sorted(set(frame_indices(40, number).tolist()))
        assert codes(picked) == manifest(picked)["indices"] == expected


OTHERS = {
    "a.gif": "",
    "b.ogv": "-c:v libtheora -q:v 8",
    "interlaced.mpg": "-c:v mpeg2video -flags +ildct+ilme -q:v 2",
    "ten.mkv": "-c:v libx265 -x265-params log-level=error -pix_fmt yuv420p10le",
    "transparent.mov": "-c:v qtrle -pix_fmt argb",
    "odd.mkv": "-vf scale=131:67,format=yuv444p -c:v ffv1",
}


def test_unusual_pictures(videos: Path) -> None:
    source = write_video(videos.parent / "source.mkv", 20, "ffv1", height=68)
    for name, options in OTHERS.items():
        ffmpeg("-i", source, *options.split(), videos / name)
    frames, picked = extract(videos), extract(videos, "--num_frames", 4)
    for name in OTHERS:
        assert codes(frames / Path(name).stem) == list(range(20)), name
        assert codes(picked / Path(name).stem) == frame_indices(20, 4).tolist(), name


@pytest.mark.parametrize("matrix", ["1 0 0 1", "0 1 -1 0", "1 0 0 -1", "0 -1 -1 0"])
def test_pictures_are_those_of_reading_in_place_also_where_they_are_turned_or_mirrored(
    videos: Path, matrix: str
) -> None:
    """They differ by what JPEG takes away."""
    plain = write_video(videos.parent / "plain.mp4", 3)
    path = write_mirrored(videos / "a.mp4", plain, matrix)
    in_place = read_frames(path, index_video(path), [1])[0].astype(int)
    for words in ([], ["--num_frames", 3]):
        assert np.abs(images(extract(videos, *words) / "a")[1] - in_place).mean() < 4


def test_colours_are_those_of_the_video(videos: Path) -> None:
    """One green in BT.709 and in BT.601."""
    green = videos.parent / "green.png"
    Image.new("RGB", (128, 128), (20, 200, 40)).save(green)
    for space, matrix in {"bt709": "bt709", "smpte170m": "bt601"}.items():
        ffmpeg(
            *("-loop", 1, "-i", green, "-frames:v", 4, "-vf", f"scale=out_color_matrix={matrix},format=yuv420p"),
            *("-colorspace", space, "-color_range", "tv", "-crf", 5, videos / f"{space}.mp4"),
        )
    frames = extract(videos)
    for space in ("bt709", "smpte170m"):
        assert np.abs(images(frames / space)[0].reshape(-1, 3).mean(0) - (20, 200, 40)).max() < 4, space


@pytest.mark.parametrize(
    ("size", "frame_size", "expected"),
    [((130, 66), 33, (65, 33)), ((66, 130), 33, (33, 65)), ((130, 66), 500, (130, 66)), ((64, 64), 20, (20, 20))],
)
def test_the_shorter_side_is_resized_and_never_enlarged(
    videos: Path, size: tuple[int, int], frame_size: int, expected: tuple[int, int]
) -> None:
    write_video(videos / "a.mp4", 4, width=size[0], height=size[1])
    folder = extract(videos, "--frame_size", frame_size) / "a"
    assert {image.shape for image in images(folder)} == {(expected[1], expected[0], 3)}


def test_frame_rate(videos: Path) -> None:
    write_video(videos / "a.mp4", 50)  # at 25 a second
    folder = extract(videos, "--frame_rate", 5) / "a"
    found = codes(folder)
    assert len(found) == 10 and found == sorted(set(found))
    assert all(abs(code - 5 * n) <= 3 for n, code in enumerate(found))
    assert not (folder / "frame_times.json").exists()  # the rate is constant


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("jpeg", "JPEG")])
def test_prefix_and_quality(videos: Path, suffix: str, kind: str) -> None:
    write_video(videos / "a.mp4", 3)
    folder = extract(videos, "--prefix", f"f-%03d.{suffix}", "--quality", 20) / "a"
    names = [*(f"f-00{n}.{suffix}" for n in (1, 2, 3)), "frame_times.json", "manifest.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(folder / f"f-003.{suffix}") as image:
        assert image.format == kind and index_of(np.asarray(image)) == 2


def test_frames_that_change_size_midway_get_the_size_of_the_first(videos: Path) -> None:
    write_joined(videos.parent / "joined.webm").rename(videos / "a.webm")
    frames = images(extract(videos) / "a")
    assert [index_of(frame) for frame in frames] == [*range(8), *range(8)]
    assert {frame.shape for frame in frames} == {(66, 130, 3)}
    picked = extract(videos, "--num_frames", 5) / "a"
    assert codes(picked) == [i % 8 for i in manifest(picked)["indices"]]


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_a_variable_rate_gives_each_frame_once_with_its_time(videos: Path, name: str) -> None:
    """Bursts a few milliseconds apart, and a pause of two seconds."""
    shown = np.cumsum([0, *[2, 40, 3] * 8, 2000, *[7, 90] * 5])
    write_video(videos / name, len(shown), shown=shown.tolist(), bf="0")
    folder = extract(videos) / "a"
    assert codes(folder) == list(range(len(shown)))
    times = np.array(json.loads((folder / "frame_times.json").read_text()))
    assert times - times[0] == pytest.approx(shown / 1000, abs=0.001)


def test_num_frames_gives_what_is_read_in_place_of_a_variable_rate(videos: Path) -> None:
    """2 s at 25 frames a second, 6 s at 1: a frame that is shown long stands for several."""
    shown = [*range(0, 2000, 40), *range(2000, 8000, 1000)]
    write_video(videos / "a.mp4", len(shown), shown=shown)
    times = VideoFolder(videos).times("a")
    for number in (8, 16):
        folder = extract(videos, "--num_frames", number) / "a"
        expected = frame_indices(len(shown), number, times=times).tolist()
        assert codes(folder) == manifest(folder)["indices"] == expected and len(expected) == number
        again = frame_indices(number, 8, times=FrameFolder(folder.parent, "image_{:05d}.jpg").times("a"))
        assert [expected[i] for i in again] == frame_indices(len(shown), 8, times=times).tolist()


def test_many_frames_of_a_long_video(videos: Path) -> None:
    """More than ffmpeg's expressions may have terms in a row."""
    ffmpeg("-f", "lavfi", "-i", "testsrc=duration=60:size=32x32:rate=25", videos / "a.mkv")
    folder = extract(videos, "--num_frames", 900) / "a"
    assert len(images(folder)) == 900 and manifest(folder)["indices"] == frame_indices(1500, 900).tolist()


def test_edit_lists(videos: Path) -> None:
    """A file that was cut without coding it again carries frames that must not be shown. Of one list, ffmpeg shows
    three frames fewer than reading in place, so it numbers the others wrongly: that is a failure."""
    ffmpeg("-ss", "0.7", "-i", write_video(videos.parent / "a.mp4", 60), "-t", "1", "-c", "copy", videos / "cut.mp4")
    index = index_video(videos / "cut.mp4")
    expected = [index_of(frame) for frame in read_frames(videos / "cut.mp4", index, range(index.num_frames))]
    assert codes(extract(videos) / "cut") == expected
    picked = frame_indices(len(expected), 5, times=index.times())
    assert codes(extract(videos, "--num_frames", 5) / "cut") == [expected[i] for i in picked]

    hevc = ("libx265", "-pix_fmt", "yuv420p", "-x265-params", "log-level=error:keyint=12:bframes=4:open-gop=1")
    whole, frames = videos.parent / "whole.mp4", videos.parent / "frames"
    ffmpeg("-i", write_video(videos.parent / "source.mkv", 60, "ffv1"), "-c:v", *hevc, whole)
    (videos / "cut.mp4").write_bytes(with_edits(whole.read_bytes(), [(520, 0.2), (720, 1.4)]))
    assert main(["extract", str(videos), str(frames), "--num_frames", "12"]) == 1
    assert [path.name for path in frames.iterdir()] == ["extraction_report.json"]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.MTS", "a.mpg", "a.avi", "a.FLV", "a.wmv"])
def test_clips_hold_the_frames_between_start_and_end(videos: Path, name: str) -> None:
    with av.open(str(make(videos / name, 50))) as container:
        begins = container.start_time / av.time_base
        times = [round(frame.time - begins, 3) for frame in container.decode(video=0)]
    clips: dict[str, dict[str, Any]] = {
        "one": {"sentences": ["x"], "group": "a", "start": 0.4, "end": 1.21},
        "deep/two": {"sentences": ["x"], "group": "a", "start": 0.99},
        "three": {"sentences": ["x"], "group": "a", "end": 0.51},
        "a": {"sentences": ["x"]},
    }
    listed = videos.parent / "clips.json"
    listed.write_text(json.dumps(clips))
    every, some = extract(videos, "--clips", listed), extract(videos, "--clips", listed, "--num_frames", 6)
    for clip, facts in clips.items():
        start, end = facts.get("start", 0), facts.get("end", 9)
        frames = [n for n, time in enumerate(times) if start <= time < end]
        assert codes(every / clip) == frames
        assert codes(some / clip) == [frames[i] for i in frame_indices(len(frames), 6)]
