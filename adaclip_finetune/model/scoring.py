"""The similarity of texts and videos, the same in training, evaluation and search.

`CosineScorer` compares vectors, so that videos can be indexed. `QueryScorer` is QScore (CLIP-Hitchhiker, Bain et al.
2022), which weighs a video's frames by their similarity to the query, so that videos cannot be indexed.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.model.features import TextFeatures, VideoFeatures, at_least_float32


class Scorer(nn.Module, ABC):
    """Scores texts and videos: exp(logit_scale) · cosine + logit_bias, which is 0 for a CLIP without one."""

    indexable = True
    """Whether `keep` returns one vector a video, whose product with a text's unit vector is the cosine."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self._clip = (clip,)  # in a tuple, which hides it from torch's registration of submodules
        self._fixed: tuple[Tensor, Tensor | None] | None = None

    @abstractmethod
    def keep(self, videos: VideoFeatures) -> Tensor:
        """Return what must be kept of B videos to score them later: (B, …), at least float32."""

    @abstractmethod
    def cosines(self, text: Tensor, kept: Tensor) -> Tensor:
        """Return the cosines (t, v) of unit text vectors (t, D) and what was kept of v videos."""

    def forward(self, text: TextFeatures, kept: Tensor) -> Tensor:
        """Return the logits (t, v), in float32 (float64 for a float64 model) even under autocast."""
        with torch.autocast(kept.device.type, enabled=False):
            logits = self.scale() * self.cosines(F.normalize(at_least_float32(text.sentence), dim=-1), kept)
            bias = self.logit_bias()
            return logits if bias is None else logits + bias

    def fixed(self) -> Scorer:
        """Return a copy without gradients, which keeps today's scale and bias while the model learns."""
        clip = self._clip[0]
        twin = copy.deepcopy(self, {id(clip): clip}).requires_grad_(False)
        bias = self.logit_bias()
        twin._fixed = (self.scale().detach().clone(), None if bias is None else bias.detach().clone())
        return twin

    def scale(self) -> Tensor:
        """Return exp(logit_scale), a scalar."""
        return self.logit_scale().exp() if self._fixed is None else self._fixed[0]

    def logit_scale(self) -> Tensor:
        """Return the logarithm of the similarity's scale, a learned scalar of CLIP."""
        scale = self._clip[0].logit_scale
        assert isinstance(scale, Tensor)
        return scale.reshape(())

    def logit_bias(self) -> Tensor | None:
        """Return the offset of the logits that SigLIP's towers learned, a scalar; None for other towers."""
        if self._fixed is not None:
            return self._fixed[1]
        bias = getattr(self._clip[0], "logit_bias", None)
        return bias.reshape(()) if isinstance(bias, Tensor) else None


class CosineScorer(Scorer):
    """Compares vectors, and keeps one unit vector a video: (B, D)."""

    def keep(self, videos: VideoFeatures) -> Tensor:
        assert videos.vector is not None
        with torch.autocast(videos.vector.device.type, enabled=False):
            return F.normalize(at_least_float32(videos.vector), dim=-1)

    def cosines(self, text: Tensor, kept: Tensor) -> Tensor:
        return text @ kept.T


class QueryScorer(Scorer):
    """Weighs the tokens of a video by their cosines to each query, and keeps all tokens: (B, K, D)."""

    indexable = False

    def __init__(self, clip: nn.Module, temperature: float) -> None:
        super().__init__(clip)
        self.temperature = temperature

    def keep(self, videos: VideoFeatures) -> Tensor:
        return at_least_float32(videos.tokens)

    def cosines(self, text: Tensor, kept: Tensor) -> Tensor:
        return torch.einsum("td,tvd->tv", text, F.normalize(self.videos_for(text, kept), dim=-1))

    def videos_for(self, text: Tensor, kept: Tensor) -> Tensor:
        """Return the vector of each video for each query: unit texts (t, D) and tokens (v, K, D) → (t, v, D)."""
        cosines = torch.einsum("qd,bkd->qbk", text, F.normalize(kept, dim=-1))
        return torch.einsum("qbk,bkd->qbd", (cosines / self.temperature).softmax(dim=-1), kept)
