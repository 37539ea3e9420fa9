"""Batches of videos that were embedded and are no index yet: kept on disk, so that what was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError


class Parts:
    """`folder/<number>.safetensors`: vectors (B, D) in float32, and their videos. What is of something else than `of`
    (model, videos, how frames are called) is ignored, and so is what did not reach the disk whole. A video is a line of
    videos.jsonl."""

    def __init__(self, folder: Path, of: Mapping[str, str]) -> None:
        self.folder, self._of = folder, json.dumps(of, sort_keys=True)
        self._next = 1 + max((int(path.stem) for path in self._paths()), default=-1)

    def read(self) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
        """All videos that were kept, the last ones last, each with its vector (D,)."""
        for path in self._paths():
            try:
                with safetensors.safe_open(path, framework="np") as file:
                    metadata, vectors = file.metadata() or {}, file.get_tensor("vectors")
                if metadata["of"] == self._of:
                    yield from zip(json.loads(metadata["videos"]), vectors, strict=True)
            except (OSError, ValueError, KeyError, safetensors.SafetensorError):
                continue

    def write(self, videos: Sequence[dict[str, Any]], vectors: NDArray[np.float32]) -> None:
        """Raises UserError where that fails, the disk being full, say: then the batches before it stay."""
        path = self.folder / f"{self._next:06d}.safetensors"
        metadata = {"of": self._of, "videos": json.dumps(videos)}
        try:
            self.folder.mkdir(exist_ok=True)
            write_durably(path, save({"vectors": np.ascontiguousarray(vectors)}, metadata))
        except OSError as error:
            raise UserError(
                f"{path}: could not be written ({error}). The batches before it are kept: make room, and go on"
            ) from error
        self._next += 1

    def remove(self) -> None:
        """What was kept is part of the index now."""
        for path in self._paths():
            path.unlink()
        with suppress(OSError):  # there is none, or it holds what is not ours
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.safetensors") if path.stem.isdecimal())
