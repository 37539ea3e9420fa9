"""Frames out of a pack, as out of the folders that it was made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Kind, Scan
from adaclip_finetune.data.images import decoded, one_by_one, stacked
from adaclip_finetune.data.pack import BrokenPack, Pack
from adaclip_finetune.data.video.decoding import Stopped, never


class PackedFrames:
    """The file that `adaclip pack` made of such folders: the same frames."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is no pack."""
        self._pack = Pack(path)
        self._counts: dict[str, int] = {}

    def count(self, video_id: str) -> int:
        if video_id not in self._counts:
            try:
                record = self._pack.record(video_id)
            except (BrokenPack, OSError) as error:
                raise self._error(video_id, error) from None
            if record is None:
                raise FrameError(video_id, self._pack.path, "holds no video of this name", "missing")
            self._counts[video_id] = record.images
        return self._counts[video_id]

    def read(self, video_id: str, indices: Sequence[int]) -> NDArray[np.uint8]:
        different = sorted(set(indices))
        try:
            contents = self._pack.images(video_id, different)
        except (BrokenPack, OSError) as error:
            raise self._error(video_id, error) from None
        images = {i: self._image(video_id, i, content) for i, content in zip(different, contents, strict=True)}
        return stacked(images, indices, video_id, self._pack.path)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        return one_by_one(self, video_id, stopped)

    def _error(self, video_id: str, error: BrokenPack | OSError) -> FrameError:
        kind: Kind = "damaged" if isinstance(error, BrokenPack) else "unreadable"
        return FrameError(video_id, self._pack.path, str(error), kind)

    def _image(self, video_id: str, index: int, content: bytes) -> NDArray[np.uint8]:
        try:
            return decoded(io.BytesIO(content))
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            reason = f"{self._pack.image_name(index)} cannot be decoded ({error})"
            raise FrameError(video_id, self._pack.path, reason, "damaged") from None
