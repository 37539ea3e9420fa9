"""The similarity of every text to every video, one block of rows at a time.

The size of a block is limited in bytes: 50,000 texts against 50,000 videos take no more memory than 500 against 500.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.model.features import TextFeatures, at_least_float32
from adaclip_finetune.model.scoring import Scorer

BLOCK_BYTES = 16 * 2**20  # larger blocks are slower: the allocator requests their memory from the system each time


@dataclass(frozen=True)
class SimilarityBlocks:
    """Iterates over row blocks (t, V) of the similarity matrix, starting afresh each time."""

    text: Tensor
    videos: Tensor
    rows: int
    scorer: Scorer

    def __len__(self) -> int:
        return -(-len(self.text) // self.rows)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        # If the scorer cannot be indexed, every text has a vector of its own for every video.
        at_once = len(self.videos) or 1
        if not self.scorer.indexable:
            at_once = rows_in_a_block(self.rows * self.text.shape[1] * max(4, self.text.element_size()))
        for queries in torch.split(self.text, self.rows):
            text = TextFeatures(queries.to(self.videos.device))
            with _float32_products():
                parts = [self.scorer(text, kept) for kept in torch.split(self.videos, at_once)]
            yield parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @torch.no_grad()
    def cosines(self, texts: Sequence[int] | None = None, videos: Sequence[int] | None = None) -> Tensor:
        """Return the cosines (t, v) of the texts and videos with these numbers; None: of all."""
        text = self.text if texts is None else self.text[list(texts)]
        kept = self.videos if videos is None else self.videos[list(videos)]
        text = F.normalize(at_least_float32(text), dim=-1).to(kept.device)
        with _float32_products(), torch.autocast(kept.device.type, enabled=False):
            return self.scorer.cosines(text, kept)


def similarity_blocks(text: Tensor, videos: Tensor, scorer: Scorer, block: int) -> SimilarityBlocks:
    """Return the scorer's logits of texts (T, D) and of what it keeps of videos (V, …), in blocks of at most `block`
    rows and BLOCK_BYTES.

    Blocks are float32 (float64 for float64 texts), on the device of the videos, without gradients. Each pass gives the
    same values, whatever the model learns in between.
    """
    rows = min(block, rows_in_a_block(len(videos) * max(4, videos.element_size())))
    return SimilarityBlocks(text, videos, rows, scorer.fixed())


@contextmanager
def _float32_products() -> Iterator[None]:
    """Switch TF32 off: it is meant for the towers, and would round away differences that decide ranks."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rows_in_a_block(bytes_a_row: int) -> int:
    """Return how many rows of this size fit into BLOCK_BYTES; at least one."""
    return max(1, BLOCK_BYTES // max(1, bytes_a_row))
