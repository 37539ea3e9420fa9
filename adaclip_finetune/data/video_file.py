"""One video file, read in place by PyAV: frame n is the n-th frame in presentation order, whatever the container says.

`index_video` counts and locates the frames by walking over the packets, without decoding. `read_frames` then decodes
from the key frame before each wanted frame, passing over frames that nothing refers to. Both fall back on decoding
from the start where a file's packets do not tell its frames. Only plain containers are opened, and only from disk:
a playlist or script that calls itself .mp4 cannot make us open anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Stopped = Callable[[], bool]

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf"
# Where packets are frames: containers that keep both times of every packet, codecs that put one frame into each.
TIMED_CONTAINERS = ("mov", "matroska", "flv")
ONE_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg")
READ_ERRORS = (av.FFmpegError, OSError, ValueError)  # what PyAV raises for files that are not what they should be


class BrokenVideo(Exception):
    """The file cannot give what was asked of it; the message is the reason, without the file's name."""

    def __init__(self, reason: str, kind: Literal["sizes", "damaged", "unreadable"] = "unreadable") -> None:
        super().__init__(reason, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class VideoIndex:
    """Where the frames are. Where the packets do not tell, `pts` is None: frames are counted from the start."""

    num_frames: int
    pts: NDArray[np.int64] | None = None  # (num_frames,), ascending
    position: NDArray[np.int64] | None = None  # (num_frames,), place in decoding order
    keys: tuple[KeyFrame, ...] = ()  # in decoding order


@dataclass(frozen=True)
class KeyFrame:
    """A packet where decoding can start; times in units of the stream."""

    position: int
    pts: int
    dts: int


def index_video(path: Path) -> VideoIndex:
    """Count and locate the frames of a video that has at least one. Raises BrokenVideo."""
    try:
        index = _index_by_packets(path)
        if index is None:
            index = VideoIndex(sum(1 for _ in _sound_frames(path)))
    except READ_ERRORS as error:
        raise BrokenVideo(_reason(error)) from None
    if index.num_frames == 0:
        raise BrokenVideo("it holds no video frame")
    return index


def read_frames(path: Path, index: VideoIndex, indices: Sequence[int]) -> Frame:
    """The frames with these indices (any order, repeats allowed) → RGB (n, H, W, 3), upright. Raises BrokenVideo."""
    wanted = sorted(set(indices))
    if wanted[0] < 0 or wanted[-1] >= index.num_frames:
        raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of {index.num_frames}")
    try:
        found = _read_by_seeking(path, index, wanted)
        if len(found) < len(wanted):
            found |= _read_from_start(path, index, [i for i in wanted if i not in found])
    except READ_ERRORS as error:
        raise BrokenVideo(_reason(error)) from None
    if len({frame.shape for frame in found.values()}) > 1:
        raise BrokenVideo("its frames differ in size", "sizes")
    return np.stack([found[i] for i in indices])


def never() -> bool:
    """For a pass that nobody stops."""
    return False


def scan_frames(path: Path, index: VideoIndex, stopped: Stopped = never) -> Iterator[tuple[int, Frame]]:
    """Every frame with its index, in order, in one pass: RGB (H, W, 3), upright. They may differ in size.

    It ends early when `stopped`, which is asked before each packet, says so. Raises BrokenVideo at the first frame
    that `read_frames` could not give either.
    """
    damage: list[str] = []
    ahead = 0
    try:
        for i, frame in _in_one_pass(path, index, stopped, damage):
            for passed_over in range(ahead, i):
                yield passed_over, _seek(path, index, passed_over, damage)
            yield i, _to_rgb(frame)
            ahead = i + 1
        for left in range(ahead, index.num_frames):
            if stopped():
                return
            yield left, _seek(path, index, left, damage)
    except READ_ERRORS as error:
        raise BrokenVideo(_reason(error)) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream.

    One thread, because many workers read at once. The decoder reports damage instead of painting over it, so that a
    file which went bad does not quietly become other training data.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        opened = av.open(f"file:{path}", container_options=options, metadata_errors="replace")
    except (av.InvalidDataError, av.EOFError) as error:
        what = f"it is no video of a known kind, or was cut off ({_reason(error)})"
        raise BrokenVideo(what if path.stat().st_size else "the file is empty") from None
    with opened as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BrokenVideo("it holds no video stream")
        if stream.disposition & av.stream.Disposition.attached_pic:
            raise BrokenVideo("it holds no video stream, only a cover picture")
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _index_by_packets(path: Path) -> VideoIndex | None:
    """None where packets and frames do not match one to one, or have no times."""
    pts: list[int] = []
    position: list[int] = []
    keys: list[KeyFrame] = []
    with _opened(path) as (container, stream):
        container_name = container.format.name.partition(",")[0]
        codec = stream.codec_context.codec.canonical_name
        if container_name not in TIMED_CONTAINERS or codec not in ONE_FRAME_A_PACKET:
            return None
        for at, packet in enumerate(_packets(container, stream)):
            if packet.pts is None:
                return None
            if packet.is_keyframe:
                keys.append(KeyFrame(at, packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard and not packet.is_corrupt:  # outside the edit list; cut off by the end of the file
                pts.append(packet.pts)
                position.append(at)
    times = np.array(pts, np.int64)
    order = np.argsort(times, kind="stable")
    times = times[order]
    if len(times) and ((np.diff(times) == 0).any() or not keys or _first_pts(path) != times[0]):
        return None
    return VideoIndex(len(times), times, np.array(position, np.int64)[order], tuple(keys))


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    return (packet for packet in container.demux(stream) if packet.size)


def _first_pts(path: Path) -> int | None:
    """A stream that starts in the middle loses its first frames: then packets are no guide."""
    return next((frame.pts for frame in _sound_frames(path)), None)


def _sound_frames(path: Path, stopped: Stopped = never) -> Iterator[Any]:
    """Decode everything in order, up to a broken tail. Raises BrokenVideo for damage in the middle."""
    decoded, damaged_at, damage, goes_on = 0, -1, "", False
    with _opened(path) as (container, stream):
        may_start_anywhere = container.format.name == "mpegts"  # recordings begin between key frames
        for at, packet in enumerate(container.demux(stream)):
            if stopped():
                return
            if at == 0:
                may_start_anywhere |= _is_cut_out(stream.codec_context, bytes(packet))
            if damage and not packet.size:
                break
            try:
                frames = stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                if not damage:
                    damaged_at, damage = at, _reason(error)
                continue
            goes_on = bool(damage) and (decoded > 0 or not may_start_anywhere)
            if goes_on:
                break
            damage = ""
            for frame in _whole(frames):
                decoded += 1
                yield frame
    if damage:
        # A decoder that fails may have swallowed a sound frame that it held back, and would now give the one it spoilt.
        for frame in islice(_frames_of(path, damaged_at, stopped), decoded, None):
            decoded += 1
            yield frame
    if goes_on:
        raise BrokenVideo(f"the file is damaged after {decoded} sound frames ({damage})", "damaged")


def _is_cut_out(context: Any, first: bytes) -> bool:
    """Whether H.264 begins with a key frame that is no IDR picture, as where a stream of open groups of pictures was
    cut: what follows may speak of pictures before it, which the decoder then calls an error, though it needs none."""
    if context.codec.canonical_name != "h264":
        return False
    header = context.extradata or b""
    if len(header) < 5 or header[0] != 1:  # units behind start codes: ITU-T H.264, annex B
        kinds = {unit[0] & 31 for unit in re.findall(rb"\x00\x00\x01(.)", first, re.DOTALL)}
    else:  # units behind their lengths: ISO/IEC 14496-15, 5.3.3
        kinds, at, bytes_of_length = set(), 0, (header[4] & 3) + 1
        while at + bytes_of_length < len(first):
            kinds.add(first[at + bytes_of_length] & 31)
            at += bytes_of_length + int.from_bytes(first[at : at + bytes_of_length], "big")
    return 1 in kinds and 5 not in kinds


def _frames_of(path: Path, num_packets: int, stopped: Stopped) -> Iterator[Any]:
    """What the first packets of a file give, which are known to be sound."""
    with _opened(path) as (container, stream), suppress(av.FFmpegError):  # damage may show a packet late
        for packet in islice(container.demux(stream), num_packets):
            if stopped():
                return
            yield from _whole(stream.codec_context.decode(packet))
        yield from _whole(stream.codec_context.decode(None))


def _whole(frames: list[Any]) -> list[Any]:
    return [frame for frame in frames if not frame.is_corrupt]


def _read_by_seeking(path: Path, index: VideoIndex, wanted: list[int]) -> dict[int, Frame]:
    """What decoding from the nearest key frames gives; what is damaged or not where it should be is left out."""
    found: dict[int, Frame] = {}
    if index.pts is None:
        return found
    with _opened(path) as (container, stream):
        for key, group in _by_key_frame(index, wanted):
            try:
                packets = _packets_from(container, stream, index.keys, key)
                found |= _decode_group(stream.codec_context, packets, index, group)
            except av.FFmpegError:  # decoding from the start will tell
                continue
    return found


def _by_key_frame(index: VideoIndex, wanted: list[int]) -> list[tuple[int, list[int]]]:
    """Group frames by the key frame (its place in index.keys) that decoding must start from."""
    assert index.pts is not None and index.position is not None
    key_positions = [key.position for key in index.keys]
    groups: dict[int, list[int]] = {}
    for i in wanted:
        key = int(np.searchsorted(key_positions, index.position[i], side="right")) - 1
        # A frame shown before the key frame that it follows in the file may refer to frames before that key frame.
        while key > 0 and index.keys[key].pts > index.pts[i]:
            key -= 1
        groups.setdefault(max(key, 0), []).append(i)
    return sorted(groups.items())


def _packets_from(container: Any, stream: Any, keys: tuple[KeyFrame, ...], key: int) -> Iterator[Any]:
    """Packets from key frame number `key` on, or from one before it if the container seeks no better."""
    place = {one.pts: i for i, one in enumerate(keys)}
    for target in (keys[key].pts, keys[key].dts):
        container.seek(target, stream=stream)
        packets = _packets(container, stream)
        for first in packets:
            if first.is_keyframe:
                if place.get(first.pts, len(keys)) <= key:
                    yield first
                    # What is shown before it refers to frames that were passed over.
                    yield from (packet for packet in packets if packet.pts is None or packet.pts > first.pts)
                    return
                break


def _decode_group(context: Any, packets: Iterator[Any], index: VideoIndex, group: list[int]) -> dict[int, Frame]:
    assert index.pts is not None and index.position is not None
    wanted = {int(index.pts[i]): i for i in group}
    last = int(index.pts[max(group, key=lambda i: index.position[i])])  # type: ignore[index]
    found: dict[int, Frame] = {}

    def keep(frames: list[Any]) -> None:
        for frame in frames:
            if frame.pts in wanted and not frame.is_corrupt:
                found[wanted[frame.pts]] = _to_rgb(frame)

    for packet in packets:
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        keep(context.decode(packet))
        if packet.pts == last:
            break
    keep(context.decode(None))
    return found


def _read_from_start(path: Path, index: VideoIndex, wanted: list[int]) -> dict[int, Frame]:
    """The slow way, which needs nothing but a decoder. Raises BrokenVideo."""
    place = None if index.pts is None else {int(index.pts[i]): i for i in wanted}
    found: dict[int, Frame] = {}
    damage = ""
    try:
        for count, frame in enumerate(_sound_frames(path)):
            i = count if place is None else place.get(frame.pts)
            if i in wanted:
                found[i] = _to_rgb(frame)
                if len(found) == len(wanted):
                    return found
    except BrokenVideo as error:
        damage = f": {error}"
    raise _undecodable(next(i for i in wanted if i not in found), index, damage)


def _in_one_pass(path: Path, index: VideoIndex, stopped: Stopped, damage: list[str]) -> Iterator[tuple[int, Any]]:
    """What decoding from the start gives, with its index; into `damage` goes why it went no further."""
    place = None if index.pts is None else {int(pts): i for i, pts in enumerate(index.pts)}
    ahead = 0
    try:
        for count, frame in enumerate(_sound_frames(path, stopped)):
            i = count if place is None else place.get(frame.pts, -1)
            if ahead <= i < index.num_frames:
                yield i, frame
                ahead = i + 1
    except BrokenVideo as error:
        damage.append(f": {error}")


def _seek(path: Path, index: VideoIndex, i: int, damage: list[str]) -> Frame:
    """One frame that decoding from the start did not give. Raises BrokenVideo."""
    found = _read_by_seeking(path, index, [i])
    if i not in found:
        raise _undecodable(i, index, "".join(damage))
    return found[i]


def _undecodable(i: int, index: VideoIndex, why: str) -> BrokenVideo:
    return BrokenVideo(f"frame {i + 1} of {index.num_frames} cannot be decoded{why}", "damaged")


def _to_rgb(frame: Any) -> Frame:
    """RGB (H, W, 3), turned upright where the file says that the camera was held sideways."""
    pixels: Frame = frame.to_ndarray(format="rgb24", threads=1)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
