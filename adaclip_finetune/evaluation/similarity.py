"""The similarity of every text to every video, a block of rows at a time.

What is held at once is counted in bytes: 50,000 texts against 50,000 videos take no more than 500 against 500.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.model.scoring import Scorer

BLOCK_BYTES = 16 * 2**20  # larger blocks are slower: their memory is fetched anew from the system each time


@dataclass(frozen=True)
class SimilarityBlocks:
    """Iterates over row blocks (t, V) of the similarity matrix, from the start each time it is asked."""

    text: Tensor
    videos: Tensor
    rows: int
    scorer: Scorer

    def __len__(self) -> int:
        return -(-len(self.text) // self.rows)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for queries in torch.split(self.text, self.rows):
            with _float32_products():
                block = self._scored(TextFeatures(queries.to(self.videos.device)))
            yield block

    def _scored(self, text: TextFeatures) -> Tensor:
        if self.scorer.indexable:
            logits: Tensor = self.scorer(text, self.videos)
            return logits
        # Here every text has a vector of its own for every video.
        queries = text.sentence
        at_once = rows_in_a_block(len(queries) * queries.shape[1] * max(4, queries.element_size()))
        return torch.cat([self.scorer(text, kept) for kept in torch.split(self.videos, at_once)], dim=1)


def similarity_blocks(text: Tensor, videos: Tensor, scorer: Scorer, block: int) -> SimilarityBlocks:
    """The scorer's logits of texts (T, D) and of what it keeps of videos (V, …), in blocks of at most `block` rows and
    BLOCK_BYTES.

    Float32, on the videos' device (float64 stays float64); no gradients. A pass holds one block, and a second pass
    gives the very same values, whatever the model has learned since.
    """
    if block < 1:
        raise ValueError(f"a block has at least one row, not {block}")
    rows = min(block, rows_in_a_block(len(videos) * max(4, videos.element_size())))
    return SimilarityBlocks(text, videos, rows, scorer.fixed())


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
