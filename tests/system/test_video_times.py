"""When frames are shown: as the file says, wherever it says it; and sampling by these times."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from media import index_of, write_frames, write_video

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoReader
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.preprocess import ImageSpec, Views
from adaclip_finetune.data.sampling import frame_indices, generator
from adaclip_finetune.data.video.folder import VideoFolder

MILLISECONDS = [0, 40, 80, 1000, 1040, 4000, 4040, 4080, 9000, 9960]
SLOWING = [*range(0, 2000, 40), *range(2000, 8000, 1000)]  # 2 s at 25 frames a second, 6 s at 1
VARIABLE = {
    "uneven.mp4": ("libx264", {}),
    "uneven.flv": ("libx264", {}),
    "mpeg4.mkv": ("mpeg4", {}),
    "uneven.webm": ("libvpx", {"cpu-used": "8"}),
    "uneven.ts": ("libx264", {"bf": "0"}),
    "late.mpg": ("mpeg2video", {"bf": "2"}),
}


@pytest.mark.parametrize("name", VARIABLE)
def test_times_are_those_that_the_file_holds(tmp_path: Path, name: str) -> None:
    codec, options = VARIABLE[name]
    written = [2000 + 40 * index for index in range(10)] if name.startswith("late") else MILLISECONDS
    path = write_video(tmp_path / name, 10, codec, shown=written, g="4", **options)
    store = VideoFolder(tmp_path)
    with av.open(str(path)) as container:
        begins = (container.start_time or 0) / av.time_base
        true = [frame.time - begins for frame in container.decode(video=0)]
    times = store.times(path.stem)
    assert times is not None and times == pytest.approx(true, abs=1e-6)
    assert times - times[0] == pytest.approx((np.array(written) - written[0]) / 1000, abs=0.002)
    length, shown, is_measured = store.shown(path.stem, range(10))
    assert shown == pytest.approx(true, abs=0.0011) and is_measured
    assert length is not None and shown[-1] is not None and shown[-1] <= length
    assert store.shown(path.stem, [8, 3]).shown == [shown[8], shown[3]]
    assert [index_of(image) for image in store.read(path.stem, [5, 8])] == [5, 8]


@pytest.mark.parametrize(("name", "codec"), [("v.avi", "libx264"), ("v.avi", "mpeg4"), ("v.m2v", "mpeg2video")])
def test_times_that_the_file_does_not_hold_are_computed_from_the_rate(tmp_path: Path, name: str, codec: str) -> None:
    """AVI and raw streams. Frames are then chosen by number."""
    path = write_video(tmp_path / name, 30, codec, bf="2")
    path.rename(path.with_suffix(".mpg" if name.endswith("m2v") else path.suffix))
    store = VideoFolder(tmp_path)
    times = store.shown("v", [0, 10, 29])
    assert times.shown == [0.0, 0.4, 1.16] and store.times("v") is None
    assert times.length == pytest.approx(1.2, abs=0.05) and times.length_measured == name.endswith("avi")


def chosen(store: VideoFolder | FrameFolder, random: bool = False, **settings: object) -> list[int]:
    """Return the frames that a run reads of the video v."""
    config = load_config(None, {"num_frm": 8, "top_k": 2, **settings})
    reader = VideoReader(store, config, Views(ImageSpec(8, (0.0,) * 3, (1.0,) * 3)))
    indices: list[int] = reader.read("v", generator("frames", 0, 0) if random else None).indices.tolist()
    return indices


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_frames_are_sampled_by_time(tmp_path: Path, kind: str) -> None:
    """From the video itself, and from its frames, beside which their times are written."""
    store: VideoFolder | FrameFolder = VideoFolder(tmp_path)
    if kind == "video":
        write_video(tmp_path / "v.mp4", len(SLOWING), shown=SLOWING)
    else:
        write_frames(tmp_path / "v", len(SLOWING))
        store = FrameFolder(tmp_path, "image_{:05d}.jpg")
        assert store.times("v") is None and chosen(store) == frame_indices(56, 8).tolist()
        (tmp_path / "v/frame_times.json").write_text(json.dumps([time / 1000 for time in SLOWING]))
    assert chosen(store) == [0, 22, 44, 50, 51, 52, 53, 54]
    assert chosen(store, segment_sampling=True) == [11, 33, 50, 51, 52, 52, 53, 54]
    drawn = chosen(store, random=True)
    assert drawn == chosen(store, random=True) and sum(index >= 50 for index in drawn) >= 4


@pytest.mark.parametrize("content", ["[0, 1]", "[0, 2, 1]", '["a", "b", "c"]', "[0, 1, ", "{}"])
def test_times_that_do_not_fit_the_images_are_an_error(tmp_path: Path, content: str) -> None:
    (write_frames(tmp_path / "v", 3) / "frame_times.json").write_text(content)
    with pytest.raises(FrameError, match=r"frame_times\.json"):
        FrameFolder(tmp_path, "image_{:05d}.jpg").times("v")
