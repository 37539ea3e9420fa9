"""A similarity matrix on disk: `<name>.npy` (rows queries, columns videos) with its ids in `<name>.json`.

It is written and read one block of rows at a time, without a memory map: mapped pages count as memory of the process,
which would be ten gigabytes for 50,000 texts against 50,000 videos.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.durable import beside
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.similarity import rows_in_a_block
from adaclip_finetune.strict_json import read_json

_FLOATS = ("float16", "float32", "float64")
_KEYS = ("queries", "videos", "video_of_query")


@dataclass(frozen=True, eq=False)
class SimilarityFile:
    """Iterates over row blocks (t, V) of a saved matrix, starting afresh each time."""

    path: Path
    queries: Queries
    dtype: np.dtype[Any]
    offset: int  # bytes before the first value

    def __iter__(self) -> Iterator[Tensor]:
        """Yield float32 blocks (float64 for a float64 file). Raises UserError for NaN."""
        texts, videos = len(self.queries.texts), len(self.queries.video_ids)
        rows = rows_in_a_block(videos * max(4, self.dtype.itemsize))
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, texts, rows):
                count = min(rows, texts - start) * videos
                yield self._checked(np.fromfile(file, self.dtype, count).reshape(-1, videos), start)

    def _checked(self, values: NDArray[Any], start: int) -> Tensor:
        native = np.dtype("float64" if self.dtype.itemsize == 8 else "float32")
        block = torch.from_numpy(values.astype(native, copy=False))
        if (nan := block.isnan()).any():
            row, column = nan.nonzero()[0].tolist()
            query, video = self.queries.texts[start + row], self.queries.video_ids[column]
            raise UserError(
                f"{self.path}: row {start + row}, column {column} (query {query!r}, video {video!r}) is nan; "
                "so nothing can be ranked"
            )
        return block


def similarity_file(path: Path, ids: Path | None = None) -> SimilarityFile:
    """Open a matrix that `write_similarity_file`, or another program, wrote. Nothing is unpickled.

    `ids` is the JSON file with its queries and videos, by default the one with the same name. Raises UserError for a
    file that is missing or not .npy, for a wrong shape or dtype, and for ids that do not fit.
    """
    try:
        header = npy.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a complete .npy file of numbers ({error})") from error
    if header.ndim != 2:
        raise UserError(f"{path}: has the shape {header.shape}; a similarity is (queries, videos)")
    if header.dtype.newbyteorder("=").name not in _FLOATS:
        raise UserError(f"{path}: has the dtype {header.dtype}; a similarity is one of {', '.join(_FLOATS)}")
    if not header.flags.c_contiguous:
        raise UserError(f"{path}: is stored column by column; save it row by row (numpy.ascontiguousarray)")
    ids = path.with_suffix(".json") if ids is None else ids
    queries = _read_ids(ids)
    expected = (len(queries.texts), len(queries.video_ids))
    if header.shape != expected:
        raise UserError(
            f"{path}: has the shape {header.shape}, but {ids} lists {expected[0]} queries and {expected[1]} videos"
        )
    return SimilarityFile(path, queries, header.dtype, header.offset)


def write_similarity_file(path: Path, blocks: Iterable[Tensor], queries: Queries) -> None:
    """Write the matrix in float32, and its ids.

    Raises OSError, leaving an older matrix at `path` untouched, and UserError if the file for the ids exists and holds
    something else, such as an annotation.
    """
    _refuse_other_json(path.with_suffix(".json"))
    ids = dict(zip(_KEYS, (queries.texts, queries.video_ids, queries.video_of_text.tolist()), strict=True))
    part = beside(path)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(queries.texts), len(queries.video_ids))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            npy.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block.float().cpu().numpy(), "<f4").data)
        path.with_suffix(".json").write_text(json.dumps(ids, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _refuse_other_json(path: Path) -> None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # absent, or left incomplete by a writer that was killed
        return
    if not isinstance(found, dict) or not found.keys() >= set(_KEYS):
        raise UserError(
            f"save_similarity: the ids of the matrix would replace {path}, which holds something else; nothing is "
            "written. Give the matrix another name"
        )


class _Ids(BaseModel):
    model_config = ConfigDict(strict=True)

    queries: list[str] = Field(min_length=1)
    videos: list[str] = Field(min_length=1)
    video_of_query: list[int]


def _read_ids(path: Path) -> Queries:
    try:
        ids = _Ids.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: must hold the lists {', '.join(_KEYS)}; {where}: {first['msg']}") from error
    videos, owners = ids.videos, ids.video_of_query
    if twice := next((name for name, count in Counter(videos).items() if count > 1), None):
        raise UserError(f"{path}: videos lists {twice!r} twice; each video is one column, with any number of captions")
    if len(owners) != len(ids.queries):
        raise UserError(f"{path}: video_of_query has {len(owners)} entries for {len(ids.queries)} queries")
    if wrong := [owner for owner in owners if not 0 <= owner < len(videos)]:
        raise UserError(
            f"{path}: video_of_query holds {wrong[0]}, which is not the number of a video (0 to {len(videos) - 1})"
        )
    return Queries(ids.queries, np.array(owners, np.int64), videos)
