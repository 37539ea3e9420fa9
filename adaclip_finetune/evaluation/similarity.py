"""The similarity of every text to every video, a block of rows at a time.

What is held at once is counted in bytes: 50,000 texts against 50,000 videos take no more than 500 against 500.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 16 * 2**20  # larger blocks are slower: their memory is fetched anew from the system each time

Aggregate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SimilarityBlocks:
    """Iterates over row blocks (t, V) of the similarity matrix, from the start each time it is asked."""

    text: Tensor
    videos: Tensor
    scale: float
    rows: int
    aggregate: Aggregate | None

    def __len__(self) -> int:
        return -(-len(self.text) // self.rows)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for queries in torch.split(self.text, self.rows):
            with torch.autocast(self.videos.device.type, enabled=False), _float32_products():
                block = self.scale * self._cosines(_at_least_float32(queries.to(self.videos.device)))
            yield block

    def _cosines(self, queries: Tensor) -> Tensor:
        unit = F.normalize(queries, dim=-1)
        if self.aggregate is None:
            return unit @ self.videos.T
        at_once = rows_in_a_block(len(queries) * queries.shape[1] * queries.element_size())
        parts = []
        for frames in torch.split(self.videos, at_once):
            answers = F.normalize(self.aggregate(_at_least_float32(frames), queries), dim=-1)  # (t, v, D)
            parts.append(torch.einsum("td,tvd->tv", unit, answers))
        return torch.cat(parts, dim=1)


def similarity_blocks(
    text: Tensor, videos: Tensor, logit_scale: float | Tensor, block: int, aggregate: Aggregate | None = None
) -> SimilarityBlocks:
    """exp(logit_scale) · cosine of texts (T, D) and videos (V, D), in blocks of at most `block` rows and BLOCK_BYTES.

    Videos that depend on the query are their frames (V, K, D) and `aggregate`: frames (v, K, D), queries (t, D) →
    video embeddings (t, v, D). Float32, on the videos' device (float64 stays float64); no gradients. A pass holds one
    block, and a second pass gives the very same values.
    """
    if block < 1:
        raise ValueError(f"a block has at least one row, not {block}")
    if aggregate is None:
        videos = F.normalize(_at_least_float32(videos), dim=-1)
    rows = min(block, rows_in_a_block(len(videos) * max(4, videos.element_size())))
    return SimilarityBlocks(text, videos, math.exp(float(logit_scale)), rows, aggregate)


@contextmanager
def _float32_products() -> Iterator[None]:
    """Ranks are made of differences that `tf32`, meant for the towers, would round away."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rows_in_a_block(bytes_a_row: int) -> int:
    """How many rows of this size BLOCK_BYTES hold; at least one."""
    return max(1, BLOCK_BYTES // max(1, bytes_a_row))


def _at_least_float32(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
