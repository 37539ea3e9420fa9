"""Frame n is the n-th that the ffmpeg program shows, pixel by pixel, for all containers, codecs, times and damage."""

import random
from pathlib import Path

import av
import numpy as np
import pytest
from media import ffmpeg, index_of, with_edits, write_video

from adaclip_finetune.data.video.decoding import BrokenVideo, Frame
from adaclip_finetune.data.video.file import read_frames, scan_frames
from adaclip_finetune.data.video.index import FrameIndex, index_video

FRAMES = 60  # of the source, at 25 a second

H264 = "-c:v libx264 -g 12 -bf 3 -pix_fmt yuv420p"
OPEN = f"{H264} -x264-params open-gop=1:b-pyramid=2"
HEVC = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=error:keyint=12:bframes=4"
VP9 = "-c:v libvpx-vp9 -cpu-used 8 -g 20 -lag-in-frames 16 -auto-alt-ref 1 -pix_fmt yuv420p"
AV1 = "-c:v libsvtav1 -preset 12 -g 20 -pix_fmt yuv420p"
MPEG2 = "-c:v mpeg2video -bf 2 -g 12 -b:v 4M"
VARIABLE = f"-vf select=not(mod(n\\,3))+gt(n\\,30) -fps_mode vfr {H264}"
INTERLACED = {
    codec: f"-vf scale=128:64,interlace,format=yuv420p -flags +ildct+ilme -c:v {codec} -b:v 4M"
    for codec in ("libx264", "mpeg2video")
}

# Name → options of the ffmpeg program that makes it of the source, or (below) of the file named first.
ENCODED = {
    "h264.mp4": H264,
    "h264.mkv": H264,
    "h264.mov": H264,
    "h264.ts": H264,
    "h264.flv": H264,
    "h264.avi": H264,
    "open.mp4": OPEN,
    "open.mkv": OPEN,
    "open.ts": OPEN,
    "hevc.mp4": f"{HEVC}:open-gop=0",
    "hevc_open.mp4": f"{HEVC}:open-gop=1",
    "hevc_open.mkv": f"{HEVC}:open-gop=1",
    "hevc_open.ts": f"{HEVC}:open-gop=1",
    "variable.mp4": VARIABLE,
    "variable.mkv": VARIABLE,
    "variable.webm": VARIABLE.replace(H264, VP9),
    "vp9.webm": VP9,
    "vp9.mp4": VP9,
    "av1.webm": AV1,
    "av1.mp4": f"{AV1} -svtav1-params film-grain=20",
    "mpeg2.ts": MPEG2,
    "mpeg2.mpg": MPEG2,
    "mpeg1.mpeg": MPEG2.replace("mpeg2", "mpeg1"),
    "mpeg4.avi": "-c:v mpeg4 -bf 2 -b:v 4M",
    "mpeg4.mp4": "-c:v mpeg4 -bf 2 -b:v 4M",
    "packed.avi": "-c:v libxvid -bf 2 -b:v 4M",
    "wmv.wmv": "-c:v wmv2 -g 12 -b:v 4M",
    "h263.3gp": "-s 176x144 -c:v h263 -b:v 1M",
    "flv1.flv": "-c:v flv -g 12 -b:v 4M",
    "mjpeg.avi": "-c:v mjpeg",
    "theora.ogv": "-c:v libtheora -q:v 7 -g 12 -pix_fmt yuv420p",
    "palette.gif": "-c:v gif",
    "mpeg2.vob": MPEG2,
    "h264.m2ts": H264,
}
COPIED = {
    "fragments.mp4": ("h264.mp4", "-movflags frag_keyframe+empty_moov"),
    "negative_offsets.mp4": ("h264.mp4", "-movflags negative_cts_offsets"),
    "no_edit_list.mp4": ("h264.mp4", "-use_editlist 0"),
    "before_zero.mp4": ("h264.mp4", "-avoid_negative_ts disabled -output_ts_offset -0.5"),
    "late.mp4": ("h264.mp4", "-output_ts_offset 1.5"),
    "clock_starts_anew.ts": ("h264.mp4", "-output_ts_offset 95443.2"),  # 33 bits of 1/90000 s end within the file
    "cut_h264.mp4": ("h264.mp4", "-ss 0.71 -t 1.2"),  # by an edit list, from the key frame before it
    "cut_open.mp4": ("open.mp4", "-ss 0.71 -t 1.2"),
    "cut_hevc_open.mp4": ("hevc_open.mp4", "-ss 0.71 -t 1.2"),
    "cut_vp9.mp4": ("vp9.mp4", "-ss 0.71 -t 1.2"),
    "cut_open.mkv": ("open.mkv", "-ss 0.71"),
    "cut_open.ts": ("open.ts", "-ss 0.71"),
    "cut_hevc_open.ts": ("hevc_open.ts", "-ss 0.71"),
}
# Edit lists that the program does not write: (milliseconds shown, from this second of the video; None: nothing).
EDITS: dict[str, list[tuple[int, float | None]]] = {
    "within": [(1000, 0.6)],
    "two": [(520, 0.2), (720, 1.4)],
    "overlapping": [(1000, 0.0), (1000, 0.48)],
    "twice": [(600, 0.48), (600, 0.48)],
    "turned": [(800, 1.2), (800, 0.0)],
    "delayed": [(500, None), (1000, 0.7)],
}


class Library:
    """Videos by name, each of which is made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = write_video(folder / "source.mkv", FRAMES, "ffv1")
        self.encoders = ffmpeg("-encoders").decode()

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if name in ENCODED and not path.exists():
            words = ENCODED[name].split()
            if (encoder := words[words.index("-c:v") + 1]) not in self.encoders:
                pytest.skip(f"this ffmpeg program has no encoder {encoder}")
            ffmpeg("-i", self.source, *words, path)
        elif name in COPIED and not path.exists():
            base, words_after = COPIED[name]
            before, after = (words_after.split(), []) if words_after.startswith("-ss") else ([], words_after.split())
            ffmpeg(*before, "-i", self[base], "-c", "copy", *after, path)
        return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


def shown_by_ffmpeg(path: Path) -> Frame:
    """Return every frame, none repeated or dropped for an even rate: RGB (n, H, W, 3)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        height, width = stream.height, stream.width
    plain = "-map 0:v:0 -fps_mode passthrough -f rawvideo -pix_fmt rgb24"
    raw = ffmpeg("-noautorotate", "-i", path, *plain.split(), "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def everything(path: Path) -> tuple[FrameIndex, Frame]:
    """Return the index and all frames; check that any choice of them, and a scan, give the same."""
    index = index_video(path)
    frames = read_frames(path, index, range(index.num_frames))
    numbers, scanned = zip(*scan_frames(path, index), strict=True)
    assert numbers == tuple(range(index.num_frames)) and np.array_equal(np.stack(scanned), frames)
    draw = random.Random(path.name)
    for number in (1, 1, 1, 3, 3, 16):
        chosen = [draw.randrange(index.num_frames) for _ in range(number)]
        assert np.array_equal(read_frames(path, index, chosen), frames[chosen]), chosen
    return index, frames


@pytest.mark.parametrize("name", [*ENCODED, *COPIED])
def test_frames_are_those_of_the_ffmpeg_program(library: Library, name: str) -> None:
    expected = shown_by_ffmpeg(library[name])
    assert len(expected) == FRAMES if name in ENCODED and "variable" not in name else 20 < len(expected) <= FRAMES
    _, frames = everything(library[name])
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("base", ["h264.mp4", "hevc_open.mp4"])
@pytest.mark.parametrize("edits", EDITS)
def test_edit_lists(library: Library, tmp_path: Path, base: str, edits: str) -> None:
    """Frames are those that the list says. A part that begins between key frames of open groups of HEVC is refused."""
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(library[base].read_bytes(), EDITS[edits]))
    if (base, edits) == ("hevc_open.mp4", "two"):
        with pytest.raises(BrokenVideo, match="after 13 sound frames"):
            index_video(path)
        return
    _, frames = everything(path)
    parts = [(round(start * 25), duration // 40) for duration, start in EDITS[edits] if start is not None]
    assert [index_of(frame) for frame in frames] == [first + i for first, count in parts for i in range(count)]
    assert np.array_equal(frames, shown_by_ffmpeg(path))


@pytest.mark.parametrize(
    "name", [*(f"{codec}.{end}" for codec in INTERLACED for end in ("mp4", "ts", "mpg")), "ten.mkv"]
)
def test_interlaced_pictures_and_those_of_ten_bits(library: Library, tmp_path: Path, name: str) -> None:
    """Near, not equal: two versions of FFmpeg bring the colours of such pictures to RGB by other rules."""
    words = INTERLACED.get(Path(name).stem, HEVC.replace("yuv420p", "yuv420p10le")).split()
    path = tmp_path / name
    ffmpeg("-i", library.source, *words, path)
    expected, (_, frames) = shown_by_ffmpeg(path), everything(path)
    assert [index_of(frame) for frame in frames] == [index_of(frame) for frame in expected]
    assert len(frames) >= FRAMES // 2 - 1 and mean_difference(frames, expected) < 3


@pytest.mark.parametrize("name", ["h264.ts", "open.ts", "hevc_open.ts", "mpeg2.ts", "mpeg2.mpg"])
def test_recordings_may_begin_anywhere(library: Library, tmp_path: Path, name: str) -> None:
    content = library[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[len(content) // 3 // 188 * 188 :])
    expected = shown_by_ffmpeg(path)
    _, frames = everything(path)
    assert 20 < len(frames) < FRAMES and np.array_equal(frames, expected)


@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_a_cut_between_open_groups_of_pictures(tmp_path: Path, container: str) -> None:
    """A decoder calls it an error that pictures before the cut are missing, though the pictures after it are sound."""
    path, whole = tmp_path / f"cut.{container}", tmp_path / f"whole.{container}"
    source = "-f lavfi -i testsrc=size=96x64:rate=25:duration=3"
    options = "open-gop=1:keyint=20:bframes=3:b-pyramid=normal"
    ffmpeg(*source.split(), "-c:v", "libx264", "-x264-params", options, whole)
    ffmpeg("-ss", "1.3", "-i", whole, "-t", "1.5", "-c", "copy", path)
    expected, (_, frames) = shown_by_ffmpeg(path), everything(path)
    assert len(frames) == len(expected) > 30 and mean_difference(frames, expected) < 1


TAILS = [
    *("h264.mkv", "open.mkv", "h264.ts", "open.ts", "h264.flv", "h264.avi", "hevc_open.mkv", "variable.mkv"),
    *("fragments.mp4", "vp9.webm", "av1.webm", "mpeg2.ts", "mpeg2.mpg", "mpeg4.avi", "wmv.wmv"),
    *("front.mp4", "front_hevc_open.mp4"),  # with the table of contents before the pictures
]
COPIED |= {
    "front.mp4": ("h264.mp4", "-movflags +faststart"),
    "front_hevc_open.mp4": ("hevc_open.mp4", "-movflags +faststart"),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("share", [0.45, 0.62, 0.9])
def test_a_broken_tail(library: Library, tmp_path: Path, name: str, share: float) -> None:
    """All whole frames are there, in order. The program conceals what is missing of the frame that was cut, or shows
    another one twice: only those of its frames count that the whole file has, too."""
    whole = {frame.tobytes(): number for number, frame in enumerate(shown_by_ffmpeg(library[name]))}
    content = library[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    sound = dict.fromkeys(whole[frame.tobytes()] for frame in shown_by_ffmpeg(path) if frame.tobytes() in whole)
    _, frames = everything(path)
    assert [whole.get(frame.tobytes()) for frame in frames] == list(sound)
    assert FRAMES // 5 < len(frames) < len(whole)


def mean_difference(one: Frame, other: Frame) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())
