"""Reading videos in place: upright, of any size, honest about damage; and only the file itself is opened."""

import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from media import ffmpeg, index_of, write_joined, write_mirrored, write_video
from PIL import Image

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoReader
from adaclip_finetune.data.preprocess import ImageSpec, Views, to_square
from adaclip_finetune.data.video.decoding import BrokenVideo, to_rgb
from adaclip_finetune.data.video.file import read_frames, scan_frames
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.data.video.index import index_video

# Display matrix → what it does to a picture
MATRICES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1 0 0 1": lambda x: x,
    "0 1 -1 0": lambda x: np.rot90(x, 3),
    "-1 0 0 -1": lambda x: np.rot90(x, 2),
    "0 -1 1 0": lambda x: np.rot90(x, 1),
    "-1 0 0 1": lambda x: x[:, ::-1],
    "1 0 0 -1": lambda x: x[::-1],
    "0 1 1 0": lambda x: x.swapaxes(0, 1),
    "0 -1 -1 0": lambda x: x[::-1, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_turned_and_mirrored_as_their_display_matrix_says(tmp_path: Path, matrix: str) -> None:
    plain = write_video(tmp_path / "plain.mp4", 3)
    turned = write_mirrored(tmp_path / "turned.mp4", plain, matrix)
    expected = MATRICES[matrix](read_frames(plain, index_video(plain), [1])[0])
    (frame,) = read_frames(turned, index_video(turned), [1])
    assert np.array_equal(frame, expected)
    raw = ffmpeg("-i", turned, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(3, *frame.shape)[1], frame)


@pytest.mark.parametrize("container", ["ts", "webm"])
def test_frames_that_change_size_midway_are_prepared_one_by_one(tmp_path: Path, container: str) -> None:
    """As in calls in a browser, and in transport streams that were joined."""
    path = write_joined(tmp_path / f"joined.{container}")
    views = Views(ImageSpec(32, (0.5,) * 3, (0.5,) * 3))
    item = VideoReader(VideoFolder(tmp_path), load_config(None, {"num_frm": 16, "top_k": 2}), views).read("joined")
    frames = read_frames(path, index_video(path), range(16))
    assert [frame.shape[:2] for frame in frames] == [(66, 130)] * 8 + [(98, 98)] * 8
    assert [index_of(frame) for frame in frames] == [*range(8), *range(8)]
    alone = np.concatenate([to_square([frame], views.clip) for frame in frames])
    assert np.array_equal(item.frames, alone[item.indices])
    assert [frame.shape for _, frame in scan_frames(path, index_video(path))] == [frame.shape for frame in frames]


def damage(path: Path, first: int, end: int) -> list[int]:
    """Of each of these packets, leave only the beginning. Return the numbers of the packets with key frames."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for packet in packets[first:end]:
        assert packet.pos is not None
        content[packet.pos + 60 : packet.pos + packet.size] = bytes(packet.size - 60)
    path.write_bytes(content)
    return [i for i, packet in enumerate(packets) if packet.is_keyframe]


def test_damage_is_reported_and_not_painted_over(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    keys = damage(path, 0, 0)
    damage(path, keys[1], keys[2])
    index = index_video(path)
    before, after = keys[1] - 3, keys[2]  # in other groups of pictures, which are sound
    assert [index_of(frame) for frame in read_frames(path, index, [before, after])] == [before, after]
    reason = rf"frame {keys[1] + 1} of 60 .* after {keys[1]} sound frames"
    for wanted in ([keys[1]], list(range(60))):
        with pytest.raises(BrokenVideo, match=reason):
            read_frames(path, index, wanted)
    given: list[int] = []
    with pytest.raises(BrokenVideo, match=reason) as caught:
        given.extend(i for i, _ in scan_frames(path, index))
    assert given == list(range(keys[1])) and caught.value.kind == "damaged"


def test_damage_right_after_the_first_frame_is_not_taken_for_a_cut(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30)
    damage(path, 1, 2)
    with pytest.raises(BrokenVideo, match=r"after \d sound frames"):
        read_frames(path, index_video(path), range(30))


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.ts"), ("mpeg2video", "a.mpg"), ("mpeg4", "a.avi")])
def test_damage_where_frames_are_counted_by_decoding(tmp_path: Path, codec: str, name: str) -> None:
    """Frames behind the damage cannot be numbered."""
    path = write_video(tmp_path / name, 60, codec)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1500] = bytes(1500)
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"after ([1-9]|[1-3]\d) sound frames"):
        index_video(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "cut.avi"])
def test_a_scan_is_one_pass_that_can_be_stopped(tmp_path: Path, name: str) -> None:
    """Counted in the packets that are read. The cut file has a broken tail, which costs a second pass."""
    path = write_video(tmp_path / name, 60, "mpeg4" if name.endswith("avi") else "libx264", bf="0")
    if name == "cut.avi":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    index = index_video(path)
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > limit

    limit = 10**6
    assert len(list(scan_frames(path, index, stopped))) == index.num_frames > 8
    packets = len(asked)
    assert packets <= (2 if name == "cut.avi" else 1) * (index.num_frames + 2)
    for limit in (0, 5, packets - 2):
        asked.clear()
        assert len(list(scan_frames(path, index, stopped))) <= limit
        assert len(asked) <= limit + 2


@pytest.mark.parametrize("kind", ["empty", "noise", "cut", "sound", "song"])
def test_files_that_are_no_videos(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    if kind in ("sound", "song"):
        ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)
    if kind == "song":
        sound = path.rename(tmp_path / "sound.mp4")
        Image.new("RGB", (64, 64)).save(tmp_path / "cover.png")
        streams = ("-map", 0, "-map", 1, "-c:v", "copy", "-disposition:v:0", "attached_pic")
        ffmpeg("-i", sound, "-i", tmp_path / "cover.png", *streams, path)
    elif kind == "cut":  # the table of contents stands at the end of an mp4 and is lost with it
        path.write_bytes(write_video(tmp_path / "whole.mp4", 20).read_bytes()[:-300])
    elif kind != "sound":
        path.write_bytes(bytes(range(256)) * 40 if kind == "noise" else b"")
    with pytest.raises(
        BrokenVideo, match={"empty": "empty", "sound": "no video", "song": "cover"}.get(kind, "cut off")
    ):
        index_video(path)


def test_only_the_file_itself_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg would follow playlists and protocols if it were not for the whitelist: that is checked on the first."""
    canary = write_video(tmp_path / "canary.ts", 10)
    concat = f"ffconcat version 1.0\nfile {canary.name}\n"
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\n{canary.name}\n#EXT-X-ENDLIST\n"
    script = tmp_path / "concat.mp4"
    script.write_text(concat)
    with av.open(str(script)) as unguarded:
        assert unguarded.format.name == "concat"
    monkeypatch.chdir(tmp_path)
    for text in (concat, hls, f"concat:{canary}", f"file:{canary}"):
        script.write_text(text)
        with pytest.raises(BrokenVideo):
            index_video(script)
    with pytest.raises(BrokenVideo, match="No such file"):
        index_video(Path("concat:canary.ts"))
    odd = write_video(tmp_path / "plain.mp4", 5).rename(tmp_path / "-a b'\"$(x)%3a?#;日.mp4")
    assert index_video(odd).num_frames == 5


def test_nothing_keeps_a_decoded_frame_after_its_conversion(tmp_path: Path) -> None:
    with av.open(str(write_video(tmp_path / "v.mp4", 4))) as container:
        frame = next(container.decode(video=0))
        before = sys.getrefcount(frame)
        to_rgb(frame)
        assert sys.getrefcount(frame) == before
        assert frame.side_data is not None and sys.getrefcount(frame) > before, "this is how it would be kept"
