"""Frames → one video vector, words → one sentence vector.

MLP-Score (AdaCLIP, Hu et al. 2023) scores each frame by a small network, so that the video vector does not depend on
the query and can be indexed. QScore (CLIP-Hitchhiker, Bain et al. 2022) weighs frames by their similarity to the query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from adaclip_finetune.model.blocks import clip_blocks, heads_for, padding_mask, start_small

_WORD_EPS = 1e-12


class FrameAggregator(nn.Module, ABC):
    """Base: frames (B, K, D) [and queries (Q, D)] → (B, D), or (Q, B, D) where `query_dependent`."""

    query_dependent = False

    @abstractmethod
    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor: ...


class MeanAggregator(FrameAggregator):
    """The mean of the L2-normalised frames."""

    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        return F.normalize(frames, dim=-1).mean(dim=1)


class SumAggregator(FrameAggregator):
    """The plain sum: for frames that already carry their weights (`reuse_scores`)."""

    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        return frames.sum(dim=1)


class MlpAggregator(FrameAggregator):
    """MLP-Score: a score for each frame, softmax over frames / temperature, weighted sum."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.scorer = mlp_scorer(width)
        start_small(self)

    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        return weighted_sum(frames, self.scorer(frames), self.temperature)


class TransformerAggregator(FrameAggregator):
    """One CLIP block looks at all frames before they are scored; the weights apply to the frames as they came."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.transformer = clip_blocks(width, 1)
        self.scorer = nn.Linear(width, 1)
        start_small(self)

    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        return weighted_sum(frames, self.scorer(self.transformer(frames)), self.temperature)


class QueryScoreAggregator(FrameAggregator):
    """Weights from each query's cosine to each frame: (B, K, D) and (Q, D) → (Q, B, D)."""

    query_dependent = True

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, frames: Tensor, queries: Tensor | None = None) -> Tensor:
        assert queries is not None
        cosines = torch.einsum("qd,bkd->qbk", F.normalize(queries, dim=-1), F.normalize(frames, dim=-1))
        return torch.einsum("qbk,bkd->qbd", (cosines / self.temperature).softmax(dim=-1), frames)


class WordAggregator(nn.Module):
    """Word embeddings (T, L, D) and which count (T, L) → (T, D).

    `mlp` is MLP-Score over words; `transformer` one CLIP block, which sees the words that count, and a linear score.
    """

    def __init__(self, kind: str, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.transformer = clip_blocks(width, 1, _WORD_EPS) if kind == "transformer" else None
        self.scorer = mlp_scorer(width) if kind == "mlp" else nn.Linear(width, 1)
        self.heads = heads_for(width)
        start_small(self)

    def forward(self, words: Tensor, is_word: Tensor) -> Tensor:
        seen = words
        if self.transformer is not None:
            seen = self.transformer(words, attn_mask=padding_mask(is_word, self.heads).to(words.dtype))
        scores = self.scorer(seen).masked_fill(~is_word[..., None], float("-inf"))
        return weighted_sum(words, scores, self.temperature)


def mlp_scorer(width: int) -> nn.Sequential:
    """(…, D) → (…, 1): Linear D→2D, quick-GELU, Linear 2D→D, quick-GELU, Linear D→1."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width), QuickGELU(), nn.Linear(width, 1)
    )


def weighted_sum(items: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Items (B, L, D), scores (B, L, 1) → (B, D), weights being the softmax over L of scores / temperature."""
    weights = (scores.float() if scores.dtype != torch.float64 else scores).div(temperature).softmax(dim=1)
    return (weights * items).sum(dim=1)
