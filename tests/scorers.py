"""What scorers are built from and given, without a whole model."""

import torch
from torch import Tensor, nn

from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.model.scoring import CosineScorer, Scorer


def clip_with(logit_scale: float, logit_bias: float | None = None) -> nn.Module:
    """All that a scorer needs of a CLIP, in float64."""
    clip = nn.Module()
    clip.logit_scale = nn.Parameter(torch.tensor(logit_scale, dtype=torch.float64))
    if logit_bias is not None:
        clip.logit_bias = nn.Parameter(torch.tensor(logit_bias, dtype=torch.float64))
    return clip


def cosine_scorer(logit_scale: float = 0.0) -> Scorer:
    """In float32."""
    return CosineScorer(clip_with(logit_scale).float())


def features(tokens: Tensor, vector: Tensor | None = None) -> VideoFeatures:
    """Tokens (B, K, D), or vectors (B, D) alone, of which nothing is known but them."""
    if tokens.ndim == 2:
        tokens, vector = tokens[:, None], tokens
    return VideoFeatures(tokens, vector, torch.full(tokens.shape[:2], 1 / tokens.shape[1]), None)
