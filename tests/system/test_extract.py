"""Extracted frames: every frame of a video, upright and in time order, or exactly those that sampling would pick."""

import json
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from media import coded_frame, index_of, write_video
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.index import index_video

# One file of each extension that is taken, in what such files usually hold.
KINDS = {
    "a.mp4": ("libx264", {}),
    "a.mkv": ("libx265", {"x265-params": "log-level=error"}),
    "a.webm": ("libvpx-vp9", {"cpu-used": "8"}),
    "a.avi": ("mpeg4", {"bf": "2"}),
    "a.mov": ("libx264", {"x264-params": "open-gop=1"}),
    "a.m4v": ("libx264", {"bf": "0"}),
    "a.mpg": ("mpeg2video", {"bf": "2"}),
    "a.MPEG": ("mpeg1video", {}),
    "a.3gp": ("mpeg4", {}),
    "a.ts": ("libx264", {}),
    "a.FLV": ("libx264", {}),
    "a.wmv": ("wmv2", {"bf": "0"}),
}


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def extract(videos: Path, *words: object) -> Path:
    """Where the frames are; everything must have been extracted."""
    frames = videos.parent / f"frames{len(list(videos.parent.iterdir()))}"
    assert main(["extract", str(videos), str(frames), *map(str, words)]) == 0
    return frames


def images(folder: Path) -> list[np.ndarray]:
    """All images of a folder; their names must be without a gap."""
    count = len(list(folder.glob("image_*.jpg")))
    assert len(list(folder.iterdir())) == count + 1, "images and the manifest"
    return [np.asarray(Image.open(folder / f"image_{n:05d}.jpg")) for n in range(1, count + 1)]


def codes(folder: Path) -> list[int]:
    return [index_of(image) for image in images(folder)]


def container_of(name: str) -> str | None:
    return {"a.MPEG": "mpeg", "a.FLV": "flv", "a.wmv": "asf", "a.m4v": "mp4"}.get(name)


def make(path: Path, num_frames: int) -> Path:
    codec, options = KINDS[path.name]
    if (kind := container_of(path.name)) is None:
        return write_video(path, num_frames, codec, **options)
    plain = path.with_suffix({"asf": ".wmv", "mpeg": ".mpg"}.get(kind, f".{kind}"))
    return write_video(plain, num_frames, codec, **options).rename(path)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_all_frames_and_those_that_sampling_picks(tmp_path: Path, name: str) -> None:
    videos = tmp_path / "videos"
    make(videos / name, 40)
    assert codes(extract(videos) / "a") == list(range(40))
    for number in (1, 7, 40, 50):
        picked = extract(videos, "--num_frames", number) / "a"
        expected = sorted(set(frame_indices(40, number).tolist()))
        assert codes(picked) == expected
        assert json.loads((picked / "manifest.json").read_text())["indices"] == expected


def test_the_frames_are_those_of_reading_in_place(tmp_path: Path) -> None:
    """Training reads a video in place or extracted: the pictures differ by what JPEG takes away."""
    path = write_video(tmp_path / "videos/a.mp4", 30)
    index = index_video(path)
    in_place = read_frames(path, index, range(30)).astype(int)
    for words in ([], ["--num_frames", 30]):
        extracted = np.stack(images(extract(tmp_path / "videos", *words) / "a")).astype(int)
        assert np.abs(extracted - in_place).mean() < 4
        assert np.abs(extracted[:-1] - in_place[1:]).mean() > 20


def test_colours_are_those_of_the_video(tmp_path: Path) -> None:
    """BT.709 and BT.601 sources of one green: read as the JPEG says, both ways of extracting agree with the source."""
    green = tmp_path / "green.png"
    Image.new("RGB", (128, 128), (20, 200, 40)).save(green)
    (tmp_path / "videos").mkdir()
    for space in ("bt709", "smpte170m"):
        matrix = {"bt709": "bt709", "smpte170m": "bt601"}[space]
        ffmpeg(
            *("-loop", 1, "-i", green, "-frames:v", 4, "-vf", f"scale=out_color_matrix={matrix},format=yuv420p"),
            *("-colorspace", space, "-color_range", "tv", "-crf", 5, tmp_path / f"videos/{space}.mp4"),
        )
    for words in ([], ["--num_frames", 2]):
        for space in ("bt709", "smpte170m"):
            frames = images(extract(tmp_path / "videos", *words) / space)
            assert np.abs(frames[0].reshape(-1, 3).mean(0) - (20, 200, 40)).max() < 4, (space, words)


@pytest.mark.parametrize(
    ("size", "frame_size", "expected"),
    [
        ((130, 66), 33, (65, 33)),
        ((66, 130), 33, (33, 65)),
        ((130, 66), 66, (130, 66)),
        ((130, 66), 500, (130, 66)),
        ((64, 64), 20, (20, 20)),
        ((130, 66), -1, (130, 66)),
    ],
)
@pytest.mark.parametrize("more", [[], ["--num_frames", 2]])
def test_the_shorter_side_is_resized_and_never_enlarged(
    tmp_path: Path, size: tuple[int, int], frame_size: int, expected: tuple[int, int], more: list[object]
) -> None:
    width, height = size
    write_video(tmp_path / "videos/a.mp4", 4, height=height, width=width)
    folder = extract(tmp_path / "videos", "--frame_size", frame_size, *more) / "a"
    assert {image.shape for image in images(folder)} == {(expected[1], expected[0], 3)}


def test_frame_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "videos/a.mp4", 50)  # at 25 a second
    found = codes(extract(tmp_path / "videos", "--frame_rate", 5) / "a")
    assert len(found) == 10
    assert all(abs(code - 5 * n) <= 3 for n, code in enumerate(found))
    assert found == sorted(set(found))


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("jpeg", "JPEG")])
def test_prefix_and_quality(tmp_path: Path, suffix: str, kind: str) -> None:
    write_video(tmp_path / "videos/a.mp4", 3)
    folder = extract(tmp_path / "videos", "--prefix", f"f-%03d.{suffix}", "--quality", 20) / "a"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"f-00{n}.{suffix}" for n in (1, 2, 3)),
        "manifest.json",
    ]
    with Image.open(folder / f"f-003.{suffix}") as image:
        assert image.format == kind
        assert index_of(np.asarray(image)) == 2


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotated_sources_come_out_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    plain = write_video(tmp_path / "plain.mp4", 3)
    (tmp_path / "videos").mkdir()
    ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", tmp_path / "videos/a.mp4")
    upright = np.rot90(read_frames(plain, index_video(plain), [1])[0], turns).astype(int)
    for words in ([], ["--num_frames", 3]):
        assert np.abs(images(extract(tmp_path / "videos", *words) / "a")[1] - upright).mean() < 4


def write_timed(path: Path, times: list[int]) -> None:
    """Coded frames at these times, in milliseconds."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "bf": "3", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 130, 66, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("rate", [1, 10, 60])
def test_any_constant_rate_gives_each_frame_once(tmp_path: Path, rate: int) -> None:
    for suffix in ("mp4", "mkv"):
        write_timed(tmp_path / f"videos/{suffix}.{suffix}", [round(n * 1000 / rate) for n in range(30)])
    frames = extract(tmp_path / "videos")
    assert codes(frames / "mp4") == codes(frames / "mkv") == list(range(30))


def test_variable_rate_neither_repeats_nor_drops(tmp_path: Path) -> None:
    """Bursts a millisecond apart, and a pause of two seconds."""
    times = np.cumsum([0, *[1, 40, 3] * 8, 2000, *[7, 90] * 5]).tolist()
    write_timed(tmp_path / "videos/a.mkv", times)
    assert codes(extract(tmp_path / "videos") / "a") == list(range(len(times)))
    picked = frame_indices(len(times), 9).tolist()
    assert codes(extract(tmp_path / "videos", "--num_frames", 9) / "a") == picked


def test_edit_list(tmp_path: Path) -> None:
    """What is cut without coding again carries frames that must not be shown."""
    source = write_video(tmp_path / "a.mp4", 60)
    (tmp_path / "videos").mkdir()
    cut = tmp_path / "videos/cut.mp4"
    ffmpeg("-ss", "0.7", "-i", source, "-t", "1", "-c", "copy", cut)
    index = index_video(cut)
    expected = [index_of(frame) for frame in read_frames(cut, index, range(index.num_frames))]
    assert codes(extract(tmp_path / "videos") / "cut") == expected
    assert codes(extract(tmp_path / "videos", "--num_frames", 5) / "cut") == [
        expected[i] for i in frame_indices(len(expected), 5)
    ]


SPECIAL = {
    "interlaced.mpg": ("-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-q:v", "2"),
    "interlaced.mkv": ("-c:v", "libx264", "-flags", "+ildct+ilme"),
    "ten.mkv": ("-c:v", "libx265", "-x265-params", "log-level=error", "-pix_fmt", "yuv420p10le"),
    "hdr.mp4": (
        *("-c:v", "libx265", "-pix_fmt", "yuv420p10le"),
        *("-x265-params", "log-level=error:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"),
    ),
    "full.mkv": ("-c:v", "libx264", "-pix_fmt", "yuv444p"),
    "grey.mkv": ("-c:v", "ffv1", "-pix_fmt", "gray"),
    "transparent.mov": ("-c:v", "qtrle", "-pix_fmt", "argb"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_unusual_pictures(tmp_path: Path, name: str) -> None:
    plain = write_video(tmp_path / "plain.mp4", 25, height=68)
    (tmp_path / "videos").mkdir()
    ffmpeg("-i", plain, *SPECIAL[name], tmp_path / "videos" / name)
    stem = Path(name).stem
    assert codes(extract(tmp_path / "videos") / stem) == list(range(25))
    assert codes(extract(tmp_path / "videos", "--num_frames", 4) / stem) == frame_indices(25, 4).tolist()


@pytest.mark.parametrize(("width", "height"), [(131, 67), (67, 131)])
def test_odd_sizes(tmp_path: Path, width: int, height: int) -> None:
    plain = write_video(tmp_path / "plain.mp4", 5, height=140, width=140)
    (tmp_path / "videos").mkdir()
    ffmpeg("-i", plain, "-vf", f"scale={width}:{height},format=yuv444p", "-c:v", "ffv1", tmp_path / "videos/a.mkv")
    for words in ([], ["--num_frames", 5]):
        frames = images(extract(tmp_path / "videos", *words) / "a")
        assert {frame.shape for frame in frames} == {(height, width, 3)}
        assert [index_of(frame) for frame in frames] == list(range(5))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts", "a.mpg", "a.avi", "a.FLV", "a.wmv"])
def test_clips_hold_the_frames_between_start_and_end(tmp_path: Path, name: str) -> None:
    with av.open(str(make(tmp_path / "videos" / name, 50))) as container:
        begins = container.start_time / av.time_base
        times = [round(frame.time - begins, 3) for frame in container.decode(video=0)]
    clips = {
        "one": {"sentences": ["x"], "group": "a", "start": 0.4, "end": 1.21},
        "deep/two": {"sentences": ["x"], "group": "a", "start": 0.99},
        "three": {"sentences": ["x"], "group": "a", "end": 0.51},
        "a": {"sentences": ["x"]},
    }
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    words = ("--clips", tmp_path / "clips.json")
    every, some = extract(tmp_path / "videos", *words), extract(tmp_path / "videos", *words, "--num_frames", 6)
    for clip, facts in clips.items():
        start, end = facts.get("start", 0), facts.get("end", 9)
        frames = [n for n, time in enumerate(times) if start <= time < end]
        assert codes(every / clip) == frames
        assert codes(some / clip) == [frames[i] for i in frame_indices(len(frames), 6)]


def test_real_clips(shared: Path, tmp_path: Path) -> None:
    """Ids hold dots and begin with dashes; the frames are those that reading in place gives."""
    sources = sorted((shared / "data/panda70m/videos").glob("*.mp4"))[:3]
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{path.stem}\n" for path in sources))
    frames = tmp_path / "frames"
    words = ["--parallel", "--num_frames", "8", "--file_list", str(names)]
    assert main(["extract", str(shared / "data/panda70m/videos"), str(frames), *words]) == 0
    for path in sources:
        index = index_video(path)
        expected = read_frames(path, index, frame_indices(index.num_frames, 8).tolist()).astype(int)
        assert np.abs(np.stack(images(frames / path.stem)) - expected).mean() < 4
