"""Find where the frames of a video are in its file and when a player shows them, and remember it for later runs.

Frames are counted by reading the packets without decoding them, or by decoding where packets do not tell the frames.
What is found in a folder of videos is kept in one file of the user's cache directory. It only saves time: where it
cannot be read or written, videos are scanned as if it were not there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.video.decoding import BrokenVideo, Source, opened, packets_of, sound_frames
from adaclip_finetune.data.video.remote import RemotePath
from adaclip_finetune.durable import write_durably

# Packets are frames in containers that keep both times of every packet, for codecs that put one frame into each.
TIMED_CONTAINERS = ("mov", "matroska", "flv")
ONE_FRAME_A_PACKET = ("h264", "hevc", "av1", "vp9", "mpeg2video", "mjpeg")
# Containers that say when frames are shown. In others (avi, raw MPEG) FFmpeg guesses by the order in the file.
SHOWN_IN = (*TIMED_CONTAINERS, "mpegts", "mpeg", "asf", "ogg", "gif", "mxf")


class ShownTimes(NamedTuple):
    """The length of a video, and when a player shows some of its frames, in seconds. None: not known.

    Each is measured where the file says it, else computed from the frame rate, as if frames were evenly spaced.
    """

    length: float | None
    shown: list[float | None]
    length_measured: bool


@dataclass(frozen=True)
class FrameIndex:
    """The number of frames, and their times in the order in which they are shown."""

    num_frames: int
    pts: NDArray[np.int64] | None = None  # (num_frames,), ascending, in ticks; None: the file does not say
    keys: NDArray[np.int64] | None = None  # (K,), pts of the frames where decoding can start; None: only at the first
    tick: float = math.nan  # seconds that a pts of 1 stands for
    begins: float = 0.0  # where a player's clock is 0, in seconds: sound may begin before the picture
    rate: float = math.nan  # frames a second, NaN: not known
    duration: float = math.nan  # seconds, as the file says, NaN: it does not

    def times(self) -> NDArray[np.float64] | None:
        """Return when a player shows each frame, in seconds (num_frames,); None where the file does not say."""
        if self.pts is None or math.isnan(self.tick):
            return None
        return np.asarray(self.pts * self.tick - self.begins, np.float64)

    def shown(self, frames: Sequence[int]) -> ShownTimes:
        """Return the length of the video and when these frames are shown, both in full milliseconds."""
        length = None if math.isnan(self.duration) else self.duration
        spacing = None if math.isnan(self.rate) else 1 / self.rate
        times = self.times()
        if times is None:
            evenly = [None if spacing is None else _milliseconds(i * spacing) for i in [*frames, self.num_frames]]
            return ShownTimes(evenly[-1] if length is None else length, evenly[:-1], length is not None)
        *shown, last = [_milliseconds(float(time)) for time in times[[*frames, -1]]]
        if length is None:
            length = round(last + (spacing or 0.0), 3)
        # Writers compute a length from when frames are decoded, which is before they are shown.
        return ShownTimes(max(length, last), list(shown), True)


def index_video(source: Source) -> FrameIndex:
    """Count and locate the frames of a video that has at least one. Raises BrokenVideo."""
    with opened(source) as (container, stream):
        facts = {
            "tick": float(stream.time_base) if stream.time_base else math.nan,
            "begins": (container.start_time or 0) / av.time_base,
            "rate": float(stream.average_rate) if stream.average_rate else math.nan,
            "duration": round(container.duration / av.time_base, 3) if container.duration else math.nan,
        }
        kind, codec = container.format.name.partition(",")[0], stream.codec_context.codec.canonical_name
        by_packets = kind in TIMED_CONTAINERS and codec in ONE_FRAME_A_PACKET
        pts, keys = _pts_and_keys(packets_of(container, stream)) if by_packets else (None, None)
    # A stream that starts in the middle loses its first frames: then packets do not tell the frames.
    if pts is not None and next((frame.pts for frame in sound_frames(source)), None) == pts[0]:
        return FrameIndex(len(pts), pts, keys, **facts)
    shown: list[int | None] = [frame.pts for frame in sound_frames(source)]
    if not shown:
        raise BrokenVideo("it holds no video frame")
    pts = np.array(shown, np.int64) if kind in SHOWN_IN and None not in shown else None
    return FrameIndex(len(shown), pts if pts is not None and (np.diff(pts) > 0).all() else None, **facts)


def _pts_and_keys(packets: Iterator[Any]) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Return pts and keys of a FrameIndex; (None, None) unless packets tell them and seeking is safe.

    It is safe where everything that is shown from a key frame on comes after it in the file. Some edit lists and joined
    files are not so.
    """
    shown: list[int] = []
    keys: list[int] = []
    latest = -math.inf
    for packet in packets:
        if not packet.size:
            continue
        if packet.pts is None or (packet.is_keyframe and packet.pts <= latest):
            return None, None
        latest = max(latest, packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if not packet.is_discard and not packet.is_corrupt:  # outside the edit list; cut off by the end of the file
            shown.append(packet.pts)
    pts = np.array(sorted(shown), np.int64)
    return (pts, np.array(keys, np.int64)) if len(pts) and keys and (np.diff(pts) > 0).all() else (None, None)


def _milliseconds(seconds: float) -> float:
    """Round up to milliseconds: a moment earlier, a player would show the frame before."""
    return math.ceil(seconds * 1000 - 1e-3) / 1000


FORMAT = 4  # to be raised whenever index_video would find anything else in the same file, or packing changes
Entry = tuple[int, int, str]  # size, mtime_ns, and the packed index as text


class IndexCache:
    """The packed indices of the videos of one folder, by name relative to it, size and time of the last change."""

    def __init__(self, folder: Path | RemotePath) -> None:
        self._folder = folder
        self._known: dict[str, Entry] | None = None
        self._new: dict[str, Entry] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: the store tells workers what they need, and they can read the file."""
        return {"_folder": self._folder, "_known": None, "_new": {}}

    def packed_index(self, path: Path | RemotePath) -> bytes:
        """Return the packed index of a video, which is scanned unless it is as it was at an earlier scan.

        Raises OSError and BrokenVideo.
        """
        if self._known is None:
            self._known = self._load()
        name, facts = path.relative_to(self._folder).as_posix(), path.stat()
        size, mtime_ns, packed = self._known.get(name, (0, 0, ""))
        if (size, mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            return packed.encode("latin-1")
        found = pack_index(index_video(path))
        self._new[name] = facts.st_size, facts.st_mtime_ns, found.decode("latin-1")
        return found

    def save(self) -> None:
        """Write what is new, if anything is."""
        if self._new:
            with suppress(OSError, RuntimeError):
                content = gzip.compress(json.dumps(self._load() | self._new).encode(), 1)
                self._file().parent.mkdir(parents=True, exist_ok=True)
                write_durably(self._file(), content, shared=True)

    def _load(self) -> dict[str, Entry]:
        with suppress(OSError, RuntimeError, ValueError, EOFError, zlib.error):  # not there, or damaged
            known: dict[str, Entry] = json.loads(gzip.decompress(self._file().read_bytes()))
            return known
        return {}

    def _file(self) -> Path:
        """Return the file of this folder. Raises RuntimeError for a user without a home."""
        # Another FFmpeg may see other frames in the same video.
        folder = os.path.realpath(self._folder) if isinstance(self._folder, Path) else self._folder
        key = f"{FORMAT} {av.ffmpeg_version_info} {folder}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        return cache_folder() / "videos" / f"{name}.json.gz"


def cache_folder() -> Path:
    """Return the user's folder for what only saves time. Raises RuntimeError for a user without a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # XDG Base Directory Specification
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "adaclip-finetune"


def pack_index(index: FrameIndex) -> bytes:
    """Compress an index to some hundred bytes: times are nearly regular."""
    none = np.zeros(0, np.int64)
    pts, keys = (none if each is None else np.diff(each, prepend=0) for each in (index.pts, index.keys))
    head = json.dumps([index.num_frames, index.tick, index.begins, index.rate, index.duration, len(pts)])
    return zlib.compress(head.encode() + b"\n" + np.concatenate([pts, keys]).astype("<i8").tobytes(), 9)


def unpack_index(packed: bytes) -> FrameIndex:
    """Return the index that `pack_index` was given."""
    head, _, body = zlib.decompress(packed).partition(b"\n")
    num_frames, *facts, num_pts = json.loads(head)
    numbers = np.frombuffer(body, "<i8").astype(np.int64)
    pts, keys = (np.cumsum(part) if len(part) else None for part in (numbers[:num_pts], numbers[num_pts:]))
    return FrameIndex(num_frames, pts, keys, *facts)
