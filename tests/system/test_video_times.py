"""Times of frames, where frames do not come evenly or from the start on: those that were written into the file."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from media import coded_frame, index_of, write_video

from adaclip_finetune.compare.strips import StripMaker
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.cache import pack_index, unpack_index
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import index_video
from adaclip_finetune.search.stamp import stamp_of
from adaclip_finetune.search.videos import Clip, Source

MILLISECONDS = [0, 40, 80, 1000, 1040, 4000, 4040, 4080, 9000, 9960]
LATE = [2000 + 40 * index for index in range(10)]

UNTIMED_BY_PACKETS = {  # a key frame every 4
    "uneven.webm": ("libvpx", {"cpu-used": "8"}, MILLISECONDS, ""),
    "uneven.mkv": ("mpeg4", {}, MILLISECONDS, ""),
    "uneven.ts": ("libx264", {}, MILLISECONDS, ""),
    "late.webm": ("libvpx", {"cpu-used": "8"}, LATE, "libopus"),
    "late.ts": ("libx264", {}, LATE, "mp2"),
    "late.mpg": ("mpeg2video", {"bf": "2"}, LATE, "mp2"),
}


def write_shown(
    path: Path, codec: str, options: dict[str, str], shown: Sequence[int], sound: str = "", **muxer: str
) -> Path:
    """Frames that are shown at these milliseconds, and half a second of silence from 0 on."""
    with av.open(str(path), "w", options=muxer) as container:
        noise: Any = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        stream = container.add_stream(codec, rate=25, options={"g": "4", **options})
        stream.width, stream.height, stream.pix_fmt = 130, 66, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25 if codec == "mpeg2video" else 1000)
        if noise:
            silence = np.zeros((1, 24000), np.int16)
            quiet = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
            quiet.sample_rate, quiet.pts = 48000, 0
            container.mux([*noise.encode(quiet), *noise.encode()])
        for index, time in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> VideoFolder:
    """Of one video of 10 frames, most of which stand at the beginnings of three scenes."""
    write_shown(tmp_path / "uneven.mp4", "libx264", {}, MILLISECONDS)
    return VideoFolder(tmp_path)


def test_frames_of_a_variable_rate_are_shown_when_the_file_says(folder: VideoFolder) -> None:
    length, shown, *measured = folder.times("uneven", range(10))
    assert shown == pytest.approx([time / 1000 for time in MILLISECONDS], abs=0.0011) and measured == [True, True]
    assert length is not None and shown[-1] is not None and shown[-1] <= length <= 10.05
    assert folder.times("uneven", [8, 3]).shown == [shown[8], shown[3]]
    # Spread evenly over the length, frame 5 would be told a second late and frame 8 a second early.
    assert not np.allclose(shown, np.arange(10) / 10 * 10, atol=0.5)
    assert [index_of(image) for image in folder.read("uneven", [5, 8])] == [5, 8]


@pytest.mark.parametrize("name", UNTIMED_BY_PACKETS)
def test_so_they_are_where_packets_do_not_tell_the_frames(tmp_path: Path, name: str) -> None:
    codec, options, written, sound = UNTIMED_BY_PACKETS[name]
    path = write_shown(tmp_path / name, codec, options, written, sound)
    assert index_video(path).pts is None
    length, shown, *measured = VideoFolder(tmp_path).times(path.stem, range(10))
    with av.open(str(path)) as container:
        begins = (container.start_time or 0) / av.time_base
        true = [frame.time - begins for frame in container.decode(video=0)]
    assert shown == pytest.approx(true, abs=0.0011) and measured == [True, True]
    assert shown == pytest.approx([time / 1000 for time in written], abs=0.03)  # encoders of sound begin before 0
    assert length is not None and shown[-1] is not None and shown[-1] <= length
    assert [index_of(image) for image in VideoFolder(tmp_path).read(path.stem, [5, 8])] == [5, 8]
    kept = pack_index(index_video(path))
    assert np.array_equal(unpack_index(kept).shown, index_video(path).shown) and len(kept) < 100


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_a_file_without_a_length_is_as_long_as_its_frames(tmp_path: Path, codec: str) -> None:
    write_shown(tmp_path / "live.webm", codec, {"cpu-used": "8"}, MILLISECONDS, live="1")
    with av.open(str(tmp_path / "live.webm")) as container:
        assert container.duration is None
    times = VideoFolder(tmp_path).times("live", [9])
    assert times.length == pytest.approx(10.0, abs=0.05) and times.shown == [9.96]


@pytest.mark.parametrize(("name", "codec"), [("v.avi", "libx264"), ("v.avi", "mpeg4"), ("v.m2v", "mpeg2video")])
def test_where_the_file_holds_no_times_they_are_reckoned(
    tmp_path: Path, name: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / name, 30, codec, bf="2")
    path = path.rename(path.with_suffix(".mpg" if name.endswith("m2v") else path.suffix))
    store, clip = VideoFolder(tmp_path), Clip("v", path, stamp_of(path), duration=7.0)
    times = store.times("v", [0, 10, 29])
    assert times.shown == [0.0, 0.4, 1.16] and not times.shown_measured
    assert times.length == pytest.approx(1.2, abs=0.05) and times.length_measured == (path.suffix == ".avi")
    # What is annotated is better than a length that is reckoned, and worse than one that the file tells.
    told = times.length if path.suffix == ".avi" else 7.0
    assert Source(tmp_path, tmp_path, [clip], {}, store).times(clip, [10]) == (told, [0.4])
    monkeypatch.setattr(StripMaker, "_chosen", lambda *_: [(10, None)])
    retriever = SimpleNamespace(views=lambda: None)
    model: Any = SimpleNamespace(config=None, session=SimpleNamespace(model=retriever))
    for annotated, length in ((7.0, told), (None, times.length)):
        make = StripMaker(model, store, {"v": VideoAnnotation("v", ("a",), duration=annotated)})
        assert make.seconds("v") == length
        assert [(frame.seconds, frame.measured) for frame in make("v").frames] == [(0.4, False)]


def test_a_file_that_has_gone_is_a_frame_error(folder: VideoFolder) -> None:
    assert folder.count("uneven") == 10
    (folder.folder / "uneven.mp4").unlink()
    with pytest.raises(FrameError, match=r"uneven: .*No such file"):
        folder.times("uneven", [0])
