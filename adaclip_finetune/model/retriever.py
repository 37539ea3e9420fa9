"""The AdaCLIP retriever (Hu et al. 2023): CLIP towers → frame selector → header → aggregator → one vector a video.

Only what is needed goes through CLIP (docs/architecture.md, "Encode only what is needed"): in evaluation the K selected
frames; in training those with gradients and the others without, since the straight-through estimator sends them none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec, normalise
from adaclip_finetune.model import clip as towers
from adaclip_finetune.model.aggregator import (
    FrameAggregator,
    MeanAggregator,
    MlpAggregator,
    QueryScoreAggregator,
    SumAggregator,
    TransformerAggregator,
    WordAggregator,
)
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.header import SeqTransformerHeader, TransformerHeader
from adaclip_finetune.model.policy import build_backbone
from adaclip_finetune.model.selector import FrameSelector


class VideoEmbedding(NamedTuple):
    """`frames` (B, K, D) after selection and header; `video` (B, D), None if it depends on the query; `selection` or
    None."""

    frames: Tensor
    video: Tensor | None
    selection: Selection | None


class VideoRetriever(nn.Module):
    """Text and video embeddings, and their similarity.

    Submodules: `clip` (open_clip's module, OpenAI's parameter names), `selector` or None, `header` or None,
    `aggregator`, `word_aggregator` or None. Everything outside `clip` is new and always trains, save a frozen policy
    backbone.
    """

    def __init__(self, config: Config, loaded: LoadedClip) -> None:
        super().__init__()
        self.clip = loaded.module
        self.image_spec: ImageSpec = loaded.image
        self.top_k = config.top_k if config.use_policy else config.num_frm
        self.frame_temperature = config.frame_agg_temp
        width = towers.embedding_width(self.clip)
        self.selector = None
        if config.use_policy:
            self.selector = FrameSelector(config, build_backbone(config, self.clip, width), width)
        # While K anneals, more than top_k frames reach the header.
        most_frames = config.num_frm if config.warmup_epochs else self.top_k
        self.header = _build_header(config, width, most_frames, self.clip)
        self.reuse_scores = config.reuse_scores and self.selector is not None
        self.aggregator = _build_aggregator(config, width, self.reuse_scores)
        self.word_aggregator = WordAggregator(config.word_agg, width, config.word_agg_temp) if config.word_agg else None

    def forward(
        self,
        videos: VideoBatch,
        token_ids: Tensor,
        k: int | None = None,
        temperature: float | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, VideoEmbedding]:
        """Both embeddings of a batch of pairs: what a training step needs. See `encode_text` and `encode_video`."""
        return self.encode_text(token_ids), self.encode_video(videos, k, temperature, noise)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Token ids (T, L) → (T, D). Ids on the CPU are cut to the longest text of the batch and moved to the model."""
        token_ids = towers.trim_padding(self.clip, token_ids).to(self._device())
        if self.word_aggregator is None:
            return towers.encode_sentences(self.clip, token_ids)
        return self.word_aggregator(*towers.encode_words(self.clip, token_ids))  # type: ignore[no-any-return]

    def encode_video(
        self,
        videos: VideoBatch,
        k: int | None = None,
        temperature: float | None = None,
        noise: Tensor | None = None,
    ) -> VideoEmbedding:
        """Choose k (default top_k) of the N frames, encode and aggregate them.

        With a `temperature` the choice is a differentiable draw (training), without one the k best (evaluation);
        `noise` (B, N) replaces the Gumbel draw.
        """
        frames, selection = self._selected_frames(videos, k or self.top_k, temperature, noise)
        if self.reuse_scores and selection is not None:
            scores = selection.logits.gather(1, selection.indices) / self.frame_temperature
            frames = frames * scores.softmax(dim=1)[..., None]
        if self.header is not None:
            frames = self.header(frames)
        video = None if self.aggregator.query_dependent else self.aggregator(frames)
        return VideoEmbedding(frames, video, selection)

    def similarity(self, text: Tensor, videos: VideoEmbedding) -> Tensor:
        """exp(logit_scale) · cosine of every text (T, D) and video: (T, B) in float32 (float64 for a float64 model)."""
        with torch.autocast(text.device.type, enabled=False):
            text, frames = _at_least_float32(text), _at_least_float32(videos.frames)
            queries = F.normalize(text, dim=-1)
            if videos.video is not None:
                cosines = queries @ F.normalize(_at_least_float32(videos.video), dim=-1).T
            else:
                per_query = F.normalize(self.aggregator(frames, text), dim=-1)  # (T, B, D)
                cosines = torch.einsum("td,tbd->tb", queries, per_query)
            return self.logit_scale().exp() * cosines

    def checkpoint_gradients(self) -> None:
        """Make CLIP's activations anew in the backward pass instead of keeping them: less memory, more time."""
        self.clip.set_grad_checkpointing(True)  # type: ignore[operator]

    def logit_scale(self) -> Tensor:
        """ln of the similarity's scale, a learned scalar of CLIP."""
        scale = self.clip.logit_scale
        assert isinstance(scale, Tensor)
        return scale.reshape(())

    def _selected_frames(
        self, videos: VideoBatch, k: int, temperature: float | None, noise: Tensor | None
    ) -> tuple[Tensor, Selection | None]:
        if self.selector is None:
            return self._encode(videos.frames, videos.frame_mask), None
        if self.selector.backbone is None:
            everything = self._encode(videos.frames, videos.frame_mask)
            selection = self.selector(everything, k, temperature, noise)
            return _mix(selection.weights, everything), selection
        selection = self.selector(self._policy_features(videos), k, temperature, noise)
        chosen = self._encode(*_take_frames(videos, selection.indices))
        if temperature is None:
            return chosen, selection
        # Rows of the weights are one-hot in value, but their gradient asks for every frame's embedding: as a value.
        others = _complement(selection.indices, videos.frames.shape[1])
        with torch.no_grad():
            rest = self._encode(*_take_frames(videos, others))
        order = torch.cat([selection.indices, others], dim=1)[:, None, :].expand_as(selection.weights)
        return _mix(selection.weights.gather(2, order), torch.cat([chosen, rest], dim=1)), selection

    def _policy_features(self, videos: VideoBatch) -> Tensor:
        assert self.selector is not None and self.selector.backbone is not None
        if videos.policy_frames is None:
            features = self.selector.backbone(self._pixels(videos.frames, videos.frame_mask))
        else:
            features = self.selector.backbone(videos.policy_frames, videos.frame_mask, self._dtype())
        assert isinstance(features, Tensor)
        return features

    def _encode(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """uint8 (B, n, 3, S, S) → CLIP embeddings (B, n, D), at least float32 so that what follows is exact."""
        if not frames.shape[1]:
            return torch.empty(
                len(frames), 0, towers.embedding_width(self.clip), device=frames.device, dtype=self._dtype()
            )
        embeddings = towers.encode_images(self.clip, self._pixels(frames, frame_mask).flatten(0, 1))
        return _at_least_float32(embeddings).reshape(*frames.shape[:2], -1)

    def _pixels(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        pixels = normalise(frames, self.image_spec.mean, self.image_spec.std).to(self._dtype())
        return pixels * frame_mask[..., None, None, None]

    def _dtype(self) -> torch.dtype:
        return self.logit_scale().dtype

    def _device(self) -> torch.device:
        return self.logit_scale().device


def _build_header(
    config: Config, width: int, most_frames: int, clip: nn.Module
) -> TransformerHeader | SeqTransformerHeader | None:
    headers = {"meanP": None, "transformer": TransformerHeader, "seqTransf": SeqTransformerHeader}
    header = headers[config.sim_header]
    return header(width, most_frames, clip) if header else None


def _build_aggregator(config: Config, width: int, reuse_scores: bool) -> FrameAggregator:
    if config.frame_agg == "mlp":
        return MlpAggregator(width, config.frame_agg_temp)
    if config.frame_agg == "transformer":
        return TransformerAggregator(width, config.frame_agg_temp)
    if config.frame_agg == "qscore":
        return QueryScoreAggregator(config.frame_agg_temp)
    return SumAggregator() if reuse_scores and not config.word_agg else MeanAggregator()


def _take_frames(videos: VideoBatch, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The frames (B, k, 3, S, S) and their mask (B, k) at `indices` (B, k)."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return videos.frames[rows, indices], videos.frame_mask[rows, indices]


def _complement(indices: Tensor, count: int) -> Tensor:
    """The indices of 0…count−1 that are not among `indices` (B, k), ascending: (B, count − k). No device wait."""
    chosen = torch.zeros(len(indices), count, dtype=torch.uint8, device=indices.device).scatter_(1, indices, 1)
    return chosen.argsort(dim=1, stable=True)[:, : count - indices.shape[1]]


def _mix(weights: Tensor, frames: Tensor) -> Tensor:
    """weights (B, K, N) @ frames (B, N, D). Outside autocast, which would round the embeddings."""
    with torch.autocast(frames.device.type, enabled=False):
        return weights.to(frames.dtype) @ frames


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
