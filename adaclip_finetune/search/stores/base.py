"""The protocols of an index that can be searched, `Searchable`, and of a place to push one to, `VectorStore`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.search.index import Hit, IndexedVideo
from adaclip_finetune.search.stored import EmbeddedVideo, IndexInfo
from adaclip_finetune.search.transcripts import FoundLine


class Searchable(Protocol):
    """An index that can be searched, wherever it is. `VideoIndex` describes the methods."""

    info: IndexInfo
    width: int
    fuses: bool  # whether `search` takes the lines of transcripts
    distinct: int
    folder: Path  # of the index, or of the one that it is a copy of, where its pictures lie; it need not be there

    @property
    def place(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def moments(self) -> Sized | None: ...

    def __len__(self) -> int: ...

    def search(
        self,
        vectors: Any,
        k: int,
        ranks: slice = ...,
        score: Literal["whole", "moment"] | None = ...,
        where: Sequence[str] = ...,
        lines: Sequence[Mapping[str, FoundLine]] | None = ...,
    ) -> list[list[Hit]]: ...

    def search_moments(
        self, vectors: Any, k: int, ranks: slice = ..., where: Sequence[str] = ...
    ) -> list[list[Hit]]: ...

    def ranked_by(self, score: Literal["whole", "moment"] | None = ...) -> Literal["whole", "moment"]: ...

    def count(self, where: Sequence[str] = ...) -> int: ...

    def need_moments(self) -> Sized: ...

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[list[IndexedVideo], NDArray[np.float32]]: ...

    def find(self, key: str) -> IndexedVideo | None: ...

    def moment_picture(self, key: str, number: int) -> Path | None: ...


class VectorStore(Searchable, Protocol):
    """A place that holds videos, by id, and can be searched. What it holds survives when the process is killed."""

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model of its vectors; None if nothing has been stored yet."""

    def begin(self, info: IndexInfo, width: int, folder: Path) -> None:
        """Make the place ready for vectors of this width, from the index in a folder. Raise UserError."""

    def digests(self) -> dict[str, str]:
        """Return the id of each video that is stored completely, with its `digest_of`."""

    def upsert(self, videos: Sequence[EmbeddedVideo]) -> None:
        """Store videos, with their moments, replacing those of the same ids."""

    def delete(self, ids: Collection[str]) -> None:
        """Remove videos, with their moments."""

    def finish(self) -> None:
        """Note that everything has been stored, so that it can be searched."""


def digest_of(video: EmbeddedVideo) -> str:
    """Return a digest of all that is stored of a video, 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(video.row).encode() + video.vector.astype(np.float32).tobytes())
    if video.moments is not None:
        digest.update(json.dumps(video.moments.rows).encode() + video.moments.vectors.astype(np.float32).tobytes())
    return digest.hexdigest()[:32]
