"""Vectors of frames, kept on disk: what networks that do not learn make of the frames of a video.

Each video has a file of its own, whose name is a digest of the networks, the settings and the state of the video's
file. A record that does not fit is therefore never found, and several processes and runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load, save

from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.durable import write_durably


class VectorsOfFrames(NamedTuple):
    """What is kept of the N frames of a video."""

    indices: NDArray[np.int64]  # (N,), place in the video from 0; -1 for a zero frame
    vectors: NDArray[np.float32]  # (N, D), CLIP's embedding of each frame
    features: NDArray[np.float32] | None  # (N, F), what the frame selector scores, if that is not `vectors`


class FrameVectors:
    """The vectors that networks and settings described by `about` make of frames, in a folder of their own."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Nothing is read or written."""
        self.folder = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    def kept(self, store: FrameStore, video_id: str) -> bool:
        """Return whether a video has a record. Raise FrameError if the video is not there."""
        return self._path(store, video_id).exists()

    def read(self, store: FrameStore, video_id: str) -> VectorsOfFrames:
        """Return what is kept of a video. Raise FrameError if nothing is."""
        path = self._path(store, video_id)
        try:
            return VectorsOfFrames(**{"features": None, **load(path.read_bytes())})
        except FileNotFoundError:
            reason = "has changed since its frames were encoded for the embedding_cache; resume the run"
        except (OSError, safetensors.SafetensorError, TypeError) as error:
            reason = f"cannot be read ({error}): delete it and resume the run"
        raise FrameError(video_id, path, reason)

    def write(self, store: FrameStore, video_id: str, record: VectorsOfFrames) -> None:
        """Keep the vectors of a video. Raise OSError, and FrameError if the video is not there."""
        path = self._path(store, video_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, save({key: value for key, value in record._asdict().items() if value is not None}), True)

    def _path(self, store: FrameStore, video_id: str) -> Path:
        name = hashlib.sha256(store.stamp(video_id).encode(errors="surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"
