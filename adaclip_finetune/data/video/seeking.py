"""Frames of a video by seeking: decoded from the key frame before each, passing over frames that nothing refers to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from adaclip_finetune.data.video.container import opened, packets_of
from adaclip_finetune.data.video.decoding import Frame, to_rgb
from adaclip_finetune.data.video.index import KeyFrame, VideoIndex


def read_by_seeking(path: Path, index: VideoIndex, wanted: list[int]) -> dict[int, Frame]:
    """What decoding from the nearest key frames gives; what is damaged or not where it should be is left out."""
    found: dict[int, Frame] = {}
    if index.pts is None:
        return found
    with opened(path) as (container, stream):
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
        packets = packets_of(container, stream)
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
                found[wanted[frame.pts]] = to_rgb(frame)

    for packet in packets:
        context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        keep(context.decode(packet))
        if packet.pts == last:
            break
    keep(context.decode(None))
    return found
