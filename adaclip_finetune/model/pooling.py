"""Pooling: frames to one video vector, words to one sentence vector.

MLP-Score (AdaCLIP, Hu et al. 2023) scores each frame by a small network, so that the video vector does not depend on
the query and can be indexed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.model.blocks import clip_blocks, heads_for, padding_mask, start_small
from adaclip_finetune.model.features import at_least_float32

_WORD_EPS = 1e-12


class Pooling(nn.Module, ABC):
    """Pools tokens (B, K, D) to a video vector (B, D). Also returns the weight of each token: (B, K), rows of sum 1."""

    uses_length = True
    """False if tokens are normalised first, so that their lengths do not matter."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


class MeanPooling(Pooling):
    """Returns the mean of the L2-normalised tokens."""

    uses_length = False

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(tokens, dim=-1).mean(dim=1), _equal_shares(tokens)


class SumPooling(Pooling):
    """Returns the sum of tokens that are already weighted (`reuse_scores`)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.sum(dim=1), _equal_shares(tokens)


class MlpScore(Pooling):
    """MLP-Score: scores each token, and returns the sum weighted by softmax(scores / temperature)."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.scorer = mlp_scorer(width)
        start_small(self)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_sum(tokens, self.scorer(tokens), self.temperature)


class TransformerScore(Pooling):
    """Scores tokens after a CLIP block over all of them, and returns the weighted sum of the original tokens."""

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.transformer = clip_blocks(width, 1)
        self.scorer = nn.Linear(width, 1)
        start_small(self)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_sum(tokens, self.scorer(self.transformer(tokens)), self.temperature)


class WordPooling(nn.Module):
    """Pools word embeddings (T, L, D) to sentence vectors (T, D). `is_word` (T, L) says which embeddings count.

    The kind `mlp` is MLP-Score over words; `transformer` is a CLIP block over the words that count, and a linear score.
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
        return weighted_sum(words, scores, self.temperature)[0]


def build_pooling(config: Config, width: int, reuse_scores: bool) -> Pooling | None:
    """Return the pooling that `frame_agg` names; None for `qscore`, which pools for each query (`model.scoring`)."""
    if config.frame_agg == "mlp":
        return MlpScore(width, config.frame_agg_temp)
    if config.frame_agg == "transformer":
        return TransformerScore(width, config.frame_agg_temp)
    if config.frame_agg == "qscore":
        return None
    return SumPooling() if reuse_scores and not config.word_agg else MeanPooling()


def mlp_scorer(width: int) -> nn.Sequential:
    """Return an MLP (…, D) → (…, 1): linear to 2D, quick-GELU, linear to D, quick-GELU, linear to 1."""
    return nn.Sequential(
        nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, width), QuickGELU(), nn.Linear(width, 1)
    )


def weighted_sum(items: Tensor, scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the weighted sum (B, D) of items (B, L, D), and the weights (B, L).

    The weights are the softmax over L of scores (B, L, 1) / temperature.
    """
    weights = at_least_float32(scores).div(temperature).softmax(dim=1)
    return (weights * items).sum(dim=1), weights.squeeze(-1)


def _equal_shares(tokens: Tensor) -> Tensor:
    return torch.full(tokens.shape[:2], 1 / tokens.shape[1], device=tokens.device)
