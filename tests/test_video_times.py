"""Times of frames, where frames do not come evenly: those that were written into the file."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media import coded_frame, index_of

from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.folder import VideoFolder

MILLISECONDS = [0, 40, 80, 1000, 1040, 4000, 4040, 4080, 9000, 9960]


@pytest.fixture
def folder(tmp_path: Path) -> VideoFolder:
    """Of one video of 10 frames, most of which stand at the beginnings of three scenes."""
    with av.open(str(tmp_path / "uneven.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "4"})
        stream.width, stream.height, stream.pix_fmt = 130, 66, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, shown in enumerate(MILLISECONDS):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            frame.pts, frame.time_base = shown, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return VideoFolder(tmp_path)


def test_frames_of_a_variable_rate_are_shown_when_the_file_says(folder: VideoFolder) -> None:
    length, shown = folder.times("uneven", range(10))
    assert shown == pytest.approx([time / 1000 for time in MILLISECONDS], abs=0.0011)
    assert length is not None and shown[-1] is not None and shown[-1] <= length <= 10.05
    assert folder.times("uneven", [8, 3])[1] == [shown[8], shown[3]]
    # Spread evenly over the length, frame 5 would be told a second late and frame 8 a second early.
    assert not np.allclose(shown, np.arange(10) / 10 * 10, atol=0.5)
    assert [index_of(image) for image in folder.read("uneven", [5, 8])] == [5, 8]


def test_a_file_that_has_gone_is_a_frame_error(folder: VideoFolder) -> None:
    assert folder.count("uneven") == 10
    (folder.folder / "uneven.mp4").unlink()
    with pytest.raises(FrameError, match=r"uneven: .*No such file"):
        folder.times("uneven", [0])
