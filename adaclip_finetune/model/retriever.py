"""The retriever: a frame selector, CLIP's towers, pooling and a scorer (AdaCLIP, Hu et al. 2023).

    frames ─► selector ─► tower ─► header ─► pooling ─► scorer ◄─ text tower ◄─ words

Only what is needed goes through CLIP (docs/architecture.md, "Encode only what is needed"): in evaluation the K selected
frames; in training those with gradients and the others without, since the straight-through estimator sends them none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices import TOWERS, implementation
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec, Views, normalise
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.features import TextFeatures, VideoFeatures, at_least_float32
from adaclip_finetune.model.frame_features import build_backbone
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.header import SeqTransformerHeader, TransformerHeader
from adaclip_finetune.model.pooling import WordPooling, build_pooling
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer, Scorer
from adaclip_finetune.model.selector import FrameSelector
from adaclip_finetune.model.text import check_words
from adaclip_finetune.model.towers.base import FrameTower
from adaclip_finetune.model.towers.per_frame import PerFrame
from adaclip_finetune.weights.loaded import LoadedClip


class VideoRetriever(nn.Module):
    """Text and video features, and their similarity.

    Submodules: `clip` (open_clip's module, OpenAI's parameter names), `tower` and `text_tower` (what the setting
    `tower` adds to CLIP's), `selector` or None, `header` or None, `aggregator` (the pooling, None if it depends on the
    query), `word_aggregator` or None, `scorer`. Everything outside `clip` is new and always trains, save a frozen
    backbone of the selector.
    """

    def __init__(self, config: Config, loaded: LoadedClip) -> None:
        super().__init__()
        self.clip = loaded.module
        self._parametrized = any(isinstance(part, parametrize.ParametrizationList) for part in self.clip.modules())
        self.image_spec: ImageSpec = loaded.image
        self.num_frm = config.num_frm
        self.top_k = config.top_k if config.use_policy else config.num_frm
        self.frame_temperature = config.frame_agg_temp
        width = embedding_width(self.clip)
        self.tower: FrameTower = implementation(TOWERS, config.tower)(config.tower.config, self.clip)
        self.text_tower = self.tower.text_tower()
        self.selector = None
        if config.use_policy:
            self.selector = FrameSelector(config, build_backbone(config, self.clip, width), width)
        # While K anneals, more than top_k frames reach the header.
        most_frames = config.num_frm if config.warmup_epochs else self.top_k
        shares = self.tower.frame_shares(most_frames)
        self.header = _build_header(config, width, most_frames if shares is None else len(shares), self.clip)
        self.reuse_scores = config.reuse_scores and self.selector is not None
        if self.reuse_scores and self.tower.frame_shares(self.top_k) is not None:
            raise UserError(
                f"reuse_scores weighs each frame by its score, but tower {config.tower.method} mixes frames; "
                "leave reuse_scores out"
            )
        self.aggregator = build_pooling(config, width, self.reuse_scores)
        if config.word_agg:
            check_words(self.clip)
        self.word_aggregator = WordPooling(config.word_agg, width, config.word_agg_temp) if config.word_agg else None
        self.scorer: Scorer = (
            QueryScorer(self.clip, config.frame_agg_temp) if self.aggregator is None else CosineScorer(self.clip)
        )

    def forward(self, batch: TrainBatch) -> tuple[TextFeatures, VideoFeatures]:
        """The features of a batch of pairs: what a training step needs."""
        noise = batch.noise.to(self.device, non_blocking=True)
        with self._weights_computed_once():
            return self.encode_text(batch.token_ids), self.encode_video(batch.videos, noise)

    def encode_text(self, token_ids: Tensor) -> TextFeatures:
        """Token ids (T, L) → features; ids may be on the CPU."""
        with self._weights_computed_once():
            features: TextFeatures = self.text_tower(token_ids, words=self.word_aggregator is not None)
        if self.word_aggregator is None:
            return features
        return features._replace(sentence=self.word_aggregator(features.words, features.is_word))

    def encode_video(self, videos: VideoBatch, noise: Tensor | None = None) -> VideoFeatures:
        """Choose frames of the N candidates, encode and pool them.

        In training mode the choice is a differentiable draw, for which `noise` (B, N) may replace the Gumbel noise; in
        evaluation mode it is the top_k best.
        """
        with self._weights_computed_once():
            tokens, selection = self._tokens(videos, noise)
        reused = self._reused_scores(selection) if self.reuse_scores and selection is not None else None
        if reused is not None:
            tokens = tokens * reused[..., None]
        if self.header is not None:
            tokens = self.header(tokens)
        if self.aggregator is None:
            vector, shares = None, torch.full(tokens.shape[:2], 1 / tokens.shape[1], device=tokens.device)
        else:
            vector, shares = self.aggregator(tokens)
            if reused is not None and self.aggregator.uses_length:
                shares = shares * reused
        weights = self._frame_weights(shares.detach(), selection, videos.frames.shape[1])
        return VideoFeatures(tokens, vector, weights, selection)

    def encode_image(self, image: Tensor) -> Tensor:
        """An image, uint8 (1, 3, S, S), as a video of this one frame, which nothing selects: (1, D)."""
        mask = torch.ones(1, 1, dtype=torch.bool, device=image.device)
        tokens = self._encode(image[None], mask)
        if self.header is not None:
            tokens = self.header(tokens)
        if tokens.shape[1] == 1:
            return tokens[:, 0]
        return tokens.mean(dim=1) if self.aggregator is None else self.aggregator(tokens)[0]

    def similarity(self, text: TextFeatures, videos: VideoFeatures) -> Tensor:
        """The scorer's logits of every text and every video: (T, B), at least float32."""
        logits: Tensor = self.scorer(text, self.scorer.keep(videos))
        return logits

    def views(self) -> Views:
        """How the reader must prepare frames for this model."""
        return Views(self.image_spec, None if self.selector is None else self.selector.view)

    def start_epoch(self, epoch: int) -> None:
        """Set what follows a schedule over training epochs (from 0)."""
        if self.selector is not None:
            self.selector.start_epoch(epoch)

    def schedule(self) -> dict[str, float]:
        """What `start_epoch` set, by name, for the log: K and the temperature τ of the frame selector."""
        if self.selector is None:
            return {"k": self.num_frm}
        return {"tau": self.selector.temperature, "k": self.selector.k}

    @property
    def frames_with_gradients(self) -> int:
        """How many frames of a video go through CLIP with gradients in a training step."""
        if self.selector is None:
            return self.num_frm
        if self.selector.backbone is not None:
            return self.selector.k
        # The selector looks at the embeddings of all frames, and those of independent frames are the tokens too.
        return self.num_frm + (0 if self.tower.independent else self.selector.k)

    def checkpoint_gradients(self) -> None:
        """Make CLIP's activations anew in the backward pass instead of keeping them: less memory, more time."""
        self.clip.set_grad_checkpointing(True)  # type: ignore[operator]
        self.tower.checkpointing = True

    def logit_scale(self) -> Tensor:
        """ln of the similarity's scale, a learned scalar of CLIP."""
        return self.scorer.logit_scale()

    def _weights_computed_once(self) -> AbstractContextManager[Any]:
        """Within it, a weight under a parametrization (LoRA's, say) is computed once and not each time it is used.

        Where activations are made anew in the backward pass, weights are too, and nothing may be remembered.
        """
        return parametrize.cached() if self._parametrized and not self.tower.checkpointing else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.logit_scale().device

    def _tokens(self, videos: VideoBatch, noise: Tensor | None) -> tuple[Tensor, Selection | None]:
        """Tokens (B, K, D) of the chosen frames, in the order chosen; in that of time if frames meet in the tower."""
        if self.selector is None:
            return self._encode(videos.frames, videos.frame_mask), None
        if not self.tower.independent:
            return self._tokens_of_mixed_input(videos, noise)
        if self.selector.backbone is None:
            everything = self._encode(videos.frames, videos.frame_mask)
            selection = self.selector(everything, noise)
            return _mix(selection.weights, everything), selection
        selection = self.selector(self._selector_features(videos), noise)
        chosen = self._encode(*_take_frames(videos, selection.indices))
        if not self.training:
            return chosen, selection
        # Rows of the weights are one-hot in value, but their gradient asks for every frame's embedding: as a value.
        others = _complement(selection.indices, videos.frames.shape[1])
        with torch.no_grad():
            rest = self._encode(*_take_frames(videos, others))
        order = torch.cat([selection.indices, others], dim=1)[:, None, :].expand_as(selection.weights)
        return _mix(selection.weights.gather(2, order), torch.cat([chosen, rest], dim=1)), selection

    def _tokens_of_mixed_input(self, videos: VideoBatch, noise: Tensor | None) -> tuple[Tensor, Selection]:
        """For a tower in which frames meet: the straight-through weights mix pixels, so that scores learn."""
        assert self.selector is not None
        if self.selector.backbone is None:
            features = at_least_float32(PerFrame.encode(self.clip, self._pixels(videos.frames, videos.frame_mask)))
        else:
            features = self._selector_features(videos)
        selection = _in_time(self.selector(features, noise))
        if not self.training:
            frames, mask = _take_frames(videos, selection.indices)
            return self._encode(frames, mask), selection
        pixels = self._pixels(videos.frames, videos.frame_mask)
        mixed = _mix(selection.weights, pixels.flatten(2)).reshape(len(pixels), -1, *pixels.shape[2:]).to(pixels.dtype)
        mask = videos.frame_mask.gather(1, selection.indices)
        return at_least_float32(self.tower(mixed, mask)), selection

    def _selector_features(self, videos: VideoBatch) -> Tensor:
        assert self.selector is not None and self.selector.backbone is not None
        if videos.policy_frames is None:
            features = self.selector.backbone(self._pixels(videos.frames, videos.frame_mask))
        else:
            features = self.selector.backbone(videos.policy_frames, videos.frame_mask, self._dtype())
        assert isinstance(features, Tensor)
        return features

    def _encode(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """uint8 (B, n, 3, S, S) → tokens, at least float32 so that what follows is exact; n tokens if frames are
        independent, of which there may be none."""
        if not frames.shape[1]:
            width = embedding_width(self.clip)
            return torch.empty(len(frames), 0, width, device=frames.device, dtype=self._dtype())
        return at_least_float32(self.tower(self._pixels(frames, frame_mask), frame_mask))

    def _reused_scores(self, selection: Selection) -> Tensor:
        """The chosen frames' scores as weights: (B, K), rows of sum 1."""
        return (selection.logits.gather(1, selection.indices) / self.frame_temperature).softmax(dim=1)

    def _frame_weights(self, shares: Tensor, selection: Selection | None, frames: int) -> Tensor:
        """What the tokens count (B, K) → what the candidate frames count (B, N), rows of sum 1."""
        encoded = frames if selection is None else selection.indices.shape[1]
        of_frames = self.tower.frame_shares(encoded)
        weights = shares.float() if of_frames is None else shares.float() @ of_frames.to(shares.device)
        if selection is not None:
            weights = weights.new_zeros(len(weights), frames).scatter_add(1, selection.indices, weights)
        return weights / weights.sum(dim=1, keepdim=True)

    def _pixels(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        pixels = normalise(frames, self.image_spec.mean, self.image_spec.std).to(self._dtype())
        return pixels * frame_mask[..., None, None, None]

    def _dtype(self) -> torch.dtype:
        return self.logit_scale().dtype


def _build_header(
    config: Config, width: int, most_frames: int, clip: nn.Module
) -> TransformerHeader | SeqTransformerHeader | None:
    headers = {"meanP": None, "transformer": TransformerHeader, "seqTransf": SeqTransformerHeader}
    header = headers[config.sim_header]
    return header(width, most_frames, clip) if header else None


def _take_frames(videos: VideoBatch, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The frames (B, k, 3, S, S) and their mask (B, k) at `indices` (B, k)."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return videos.frames[rows, indices], videos.frame_mask[rows, indices]


def _complement(indices: Tensor, count: int) -> Tensor:
    """The indices of 0…count−1 that are not among `indices` (B, k), ascending: (B, count − k). No device wait."""
    chosen = torch.zeros(len(indices), count, dtype=torch.uint8, device=indices.device).scatter_(1, indices, 1)
    return chosen.argsort(dim=1, stable=True)[:, : count - indices.shape[1]]


def _in_time(selection: Selection) -> Selection:
    """The same selection with its frames in the order of time instead of that in which they were chosen."""
    indices, order = selection.indices.sort(dim=1)
    weights = selection.weights.gather(1, order[..., None].expand_as(selection.weights))
    return Selection(weights, indices, selection.logits)


def _mix(weights: Tensor, frames: Tensor) -> Tensor:
    """weights (B, K, N) @ frames (B, N, D). Outside autocast, which would round the embeddings."""
    with torch.autocast(frames.device.type, enabled=False):
        return weights.to(frames.dtype) @ frames
