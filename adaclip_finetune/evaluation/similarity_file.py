"""Write a similarity matrix to `<name>.npy` (rows queries, columns videos) and its ids to `<name>.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.durable import replacing, write_durably
from adaclip_finetune.errors import UserError


def write_similarity_file(path: Path, blocks: Iterable[Tensor], queries: Queries) -> None:
    """Write the row blocks (t, V) in float32, one at a time, and the lists queries, videos and video_of_query.

    Raise OSError, leaving an older matrix at `path` untouched, and UserError if the file for the ids exists and holds
    something else, such as an annotation.
    """
    ids = path.with_suffix(".json")
    if ids.exists() and b'"video_of_query"' not in ids.read_bytes():
        raise UserError(
            f"save_similarity: the ids would replace {ids}, which holds something else; choose another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(queries.texts), len(queries.video_ids))
    with replacing(path) as part, part.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block.float().cpu().numpy(), "<f4").data)
    content = {"queries": queries.texts, "videos": queries.video_ids, "video_of_query": queries.video_of_text.tolist()}
    write_durably(ids, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
