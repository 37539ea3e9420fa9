"""The similarity of every text to every video, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Videos = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SimilarityBlocks:
    """Iterates over row blocks (t, V) of the similarity matrix, from the start each time it is asked."""

    text: Tensor
    videos: Videos
    scale: float
    block: int

    def __len__(self) -> int:
        return -(-len(self.text) // self.block)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        for queries in torch.split(self.text, self.block):
            with torch.autocast(queries.device.type, enabled=False):
                yield self._similarity(queries)

    def _similarity(self, queries: Tensor) -> Tensor:
        if callable(self.videos):
            answers = _unit(self.videos(queries))  # (t, V, D)
            return self.scale * torch.einsum("td,tvd->tv", _unit(queries), answers)
        return self.scale * (_unit(queries.to(self.videos.device)) @ self.videos.T)


def similarity_blocks(text: Tensor, videos: Videos, logit_scale: float | Tensor, block: int) -> SimilarityBlocks:
    """exp(logit_scale) · cosine of texts (T, D) and videos (V, D), in blocks of at most `block` rows.

    Videos that depend on the query are a callable: queries (t, D) → video embeddings (t, V, D). Float32, on the videos'
    device (float64 stays float64); no gradients. A pass holds one block, and a second pass gives the very same values.
    """
    if block < 1:
        raise ValueError(f"a block has at least one row, not {block}")
    videos = videos if callable(videos) else _unit(videos)
    return SimilarityBlocks(text, videos, float(torch.as_tensor(logit_scale, dtype=torch.float64).exp()), block)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
