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
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.config.choices.towers import TOWERS
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec, Views, normalise
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.captioner import Captioner
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.features import TextFeatures, VideoFeatures, at_least_float32
from adaclip_finetune.model.frame_features import build_backbone
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.header import SeqTransformerHeader, TransformerHeader
from adaclip_finetune.model.pooling import WordPooling, build_pooling
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer, Scorer
from adaclip_finetune.model.selector import FrameSelector
from adaclip_finetune.model.text import check_words
from adaclip_finetune.model.towers.base import FrameTower, FramewiseTower
from adaclip_finetune.weights.loaded import LoadedClip

_FIXED_FRAMES_AT_ONCE = 1024


class VideoRetriever(nn.Module):
    """Computes features of texts and videos, and their similarity.

    Submodules: `clip` (open_clip's module, with OpenAI's parameter names), `tower` and `text_tower` (what the setting
    `tower` adds to CLIP's towers), `selector` or None, `header` or None, `aggregator` (the pooling; None if it depends
    on the query), `word_aggregator` or None, `scorer`, and `captioner` or None. Everything outside `clip` is new and
    always trained, except a frozen backbone of the selector.
    """

    def __init__(self, config: Config, loaded: LoadedClip) -> None:
        super().__init__()
        self.clip = loaded.module
        self._parametrized = any(isinstance(part, parametrize.ParametrizationList) for part in self.clip.modules())
        self.image_spec: ImageSpec = loaded.image
        self.num_frm = config.num_frm
        self.top_k = config.top_k if config.use_policy else config.num_frm
        self.frame_temperature = config.frame_agg_temp
        self.encodes_others = config.policy_gradient == "exact"
        width = embedding_width(self.clip)
        self.tower: FrameTower = implementation(TOWERS, config.tower)(config.tower.config, self.clip)
        self.text_tower = self.tower.text_tower()
        self.selector = None
        if config.use_policy:
            self.selector = FrameSelector(config, build_backbone(config, self.clip, width), width)
        # While K anneals, more than top_k frames reach the header.
        most_frames = config.num_frm if config.warmup_epochs else self.top_k
        shares = self.tower.frame_shares(most_frames)
        tokens = most_frames if shares is None else len(shares)
        self.header = _build_header(config, width, tokens, self.clip)
        self.captioner = None if config.captioner is None else Captioner(config.captioner, width, tokens)
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
        """Return the features of the texts and videos of a training batch."""
        noise = batch.noise.to(self.device, non_blocking=True)
        with self._weights_computed_once():
            return self.encode_text(batch.token_ids), self.encode_video(batch.videos, noise)

    def encode_text(self, token_ids: Tensor) -> TextFeatures:
        """Return the features of token ids (T, L), which may be on the CPU."""
        with self._weights_computed_once():
            features: TextFeatures = self.text_tower(token_ids, words=self.word_aggregator is not None)
        if self.word_aggregator is None:
            return features
        return features._replace(sentence=self.word_aggregator(features.words, features.is_word))

    def encode_video(
        self, videos: VideoBatch, noise: Tensor | None = None, selection: Selection | None = None
    ) -> VideoFeatures:
        """Select frames among the N candidates, encode them and pool them.

        In training mode frames are drawn differentiably, and `noise` (B, N) may replace the Gumbel noise; in evaluation
        mode the top_k frames with the highest scores are taken, or those of a `selection` that was made earlier.
        """
        with self._weights_computed_once():
            if selection is None:
                tokens, selection = self._tokens(videos, noise)
            else:
                tokens = self._encode(*_take_frames(videos, selection.indices))
        reused = None
        if self.reuse_scores and selection is not None:
            reused = (selection.logits.gather(1, selection.indices) / self.frame_temperature).softmax(dim=1)
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

    @property
    def encoded_frames(self) -> int:
        """How many frames of a video go through CLIP in evaluation: K, or N if the selector does not choose first."""
        return self.num_frm if self.selector is not None and self.selector.backbone is None else self.top_k

    @torch.no_grad()
    def frame_vectors(self, videos: VideoBatch) -> tuple[Tensor, Tensor | None]:
        """Return CLIP's embedding of each frame (B, N, D), and the features that the selector scores (B, N, F).

        The features are None without a selector, and if it scores the embeddings.
        """
        vectors = self._alone_fixed(videos.frames, videos.frame_mask)
        scored = self.selector is not None and self.selector.backbone is not None
        return vectors, self._selector_features(videos) if scored else None

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the vectors (B, D) of images, uint8 (B, 3, S, S), each encoded as a video of one frame."""
        mask = torch.ones(len(images), 1, dtype=torch.bool, device=images.device)
        tokens = self._encode(images[:, None], mask)
        if self.header is not None:
            tokens = self.header(tokens)
        if tokens.shape[1] == 1:
            return tokens[:, 0]
        return tokens.mean(dim=1) if self.aggregator is None else self.aggregator(tokens)[0]

    def similarity(self, text: TextFeatures, videos: VideoFeatures) -> Tensor:
        """Return the scorer's logits of every text and every video: (T, B), at least float32."""
        logits: Tensor = self.scorer(text, self.scorer.keep(videos))
        return logits

    def views(self) -> Views:
        """Return how the reader must prepare frames for this model."""
        return Views(self.image_spec, None if self.selector is None else self.selector.view)

    def start_epoch(self, epoch: int) -> None:
        """Set everything that follows a schedule over training epochs, which count from 0."""
        if self.selector is not None:
            self.selector.start_epoch(epoch)

    def schedule(self) -> dict[str, float]:
        """Return what `start_epoch` set: K and the temperature τ of the frame selector, by name, for the log."""
        if self.selector is None:
            return {"k": self.num_frm}
        return {"tau": self.selector.temperature, "k": self.selector.k}

    def checkpoint_gradients(self) -> None:
        """Recompute CLIP's activations in the backward pass instead of keeping them: less memory, more time."""
        self.clip.set_grad_checkpointing(True)  # type: ignore[operator]
        self.tower.checkpointing = True

    def logit_scale(self) -> Tensor:
        """Return the logarithm of the similarity's scale, a learned scalar of CLIP."""
        return self.scorer.logit_scale()

    def _weights_computed_once(self) -> AbstractContextManager[Any]:
        """Return a context in which a weight with a parametrization, such as LoRA's, is computed only once.

        With gradient checkpointing nothing is cached, because the backward pass computes the weights again.
        """
        return parametrize.cached() if self._parametrized and not self.tower.checkpointing else nullcontext()

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.logit_scale().device

    def _tokens(self, videos: VideoBatch, noise: Tensor | None) -> tuple[Tensor, Selection | None]:
        """Return tokens (B, K, D) of the selected frames.

        If the tower has a token a frame, they are in the order of selection.
        """
        if videos.vectors is not None:
            if self.selector is None:
                return self._combined(videos.vectors, videos.frame_mask), None
            selection = self._select(videos.vectors if videos.features is None else videos.features, noise)
            return self._of_selected(videos, selection, videos.vectors), selection
        if self.selector is None:
            return self._encode(videos.frames, videos.frame_mask), None
        if not isinstance(self.tower, FramewiseTower):
            return self._tokens_of_mixed_frames(videos, noise)
        # Where no frame needs gradients, one batch of all is faster than those that were selected and then the others.
        images_learn = self._images_learn()
        if self.selector.backbone is None or (self.training and not images_learn and self.encodes_others):
            encode = self._alone if images_learn else self._alone_fixed
            everything = encode(videos.frames, videos.frame_mask)
            features = everything if self.selector.backbone is None else self._selector_features(videos)
            selection = self._select(features, noise)
            return self._of_selected(videos, selection, everything), selection
        selection = self._select(self._selector_features(videos), noise)
        frames, mask = _take_frames(videos, selection.indices)
        chosen = self._alone(frames, mask)
        if not self.training:
            return self._combined(chosen, mask), selection
        # The rows of the weights are one-hot, but their gradient needs the values of the embeddings of all frames.
        others = _complement(selection.indices, videos.frames.shape[1])
        rest = self._embeddings_of_others(videos, others, chosen)
        order = torch.cat([selection.indices, others], dim=1)[:, None, :].expand_as(selection.weights)
        mixed = _mix(selection.weights.gather(2, order), torch.cat([chosen, rest], dim=1))
        return self._combined(mixed, mask), selection

    def _select(self, features: Tensor, noise: Tensor | None) -> Selection:
        """Return the selection; if the tower mixes frames, they are in the order of time."""
        assert self.selector is not None
        selection: Selection = self.selector(features, noise)
        return selection if self.tower.independent else _in_time(selection)

    def _of_selected(self, videos: VideoBatch, selection: Selection, vectors: Tensor) -> Tensor:
        """Return tokens (B, K, D) of the selected ones of the vectors (B, N, D) of all frames."""
        return self._combined(_mix(selection.weights, vectors), videos.frame_mask.gather(1, selection.indices))

    def _combined(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return tokens (B, K, D) of the vectors of frames (B, T, D)."""
        assert isinstance(self.tower, FramewiseTower)
        return at_least_float32(self.tower.combine(vectors, mask))

    def _embeddings_of_others(self, videos: VideoBatch, others: Tensor, chosen: Tensor) -> Tensor:
        """Return the embeddings (B, N − K, D) of the frames that were not selected, without gradients.

        With `policy_gradient` selected, the mean of those that were selected stands for each of them.
        """
        if self.encodes_others:
            return self._alone_fixed(*_take_frames(videos, others))
        return chosen.detach().mean(dim=1, keepdim=True).expand(-1, others.shape[1], -1)

    def _images_learn(self) -> bool:
        """Return whether the image tower learns."""
        return any(parameter.requires_grad for parameter in self.clip.get_submodule("visual").parameters())

    def _tokens_of_mixed_frames(self, videos: VideoBatch, noise: Tensor | None) -> tuple[Tensor, Selection]:
        """Return the tokens of a tower that mixes frames.

        What another choice of frames would have changed is not known without encoding every choice. For the gradient of
        the scores, each token is taken to change as the embedding that CLIP gives to a frame alone, in the share that
        the frame has in the token. With `per_frame` this would be exact.
        """
        assert self.selector is not None
        scores_clip = self.selector.backbone is None
        everything = (videos.frames, videos.frame_mask)
        features = self._alone(*everything) if scores_clip else self._selector_features(videos)
        selection = self._select(features, noise)
        tokens = self._encode(*_take_frames(videos, selection.indices))
        if not self.training:
            return tokens, selection
        # Only now, since weights that are computed once (LoRA's) must be computed with gradients first.
        with torch.no_grad():
            alone = features.detach() if scores_clip else self._alone(*everything)
        chosen = _mix(selection.weights, alone)
        change = chosen - chosen.detach()  # zero, with a gradient
        shares = self.tower.frame_shares(chosen.shape[1])
        return tokens + (change if shares is None else _mix(shares.to(change.device), change)), selection

    def _selector_features(self, videos: VideoBatch) -> Tensor:
        assert self.selector is not None and self.selector.backbone is not None
        if videos.policy_frames is None:
            features = self.selector.backbone(self._pixels(videos.frames, videos.frame_mask))
        else:
            features = self.selector.backbone(videos.policy_frames, videos.frame_mask, self._dtype())
        assert isinstance(features, Tensor)
        return features

    def _encode(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Return the tower's tokens (B, K, D) of frames, uint8 (B, n, 3, S, S), in float32 or float64."""
        return at_least_float32(self.tower(self._pixels(frames, frame_mask), frame_mask))

    def _alone(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Return CLIP's embedding of each frame by itself, (B, n, D), whatever the tower. n may be 0."""
        if not frames.shape[1]:
            width = embedding_width(self.clip)
            return torch.empty(len(frames), 0, width, device=frames.device, dtype=self._dtype())
        return at_least_float32(FramewiseTower.encode(self.clip, self._pixels(frames, frame_mask)))

    @torch.no_grad()
    def _alone_fixed(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Return what `_alone` returns, without gradients, computed in parts to limit memory."""
        videos = max(1, _FIXED_FRAMES_AT_ONCE // max(1, frames.shape[1]))
        parts = zip(torch.split(frames, videos), torch.split(frame_mask, videos), strict=True)
        return torch.cat([self._alone(*part) for part in parts])

    def _frame_weights(self, shares: Tensor, selection: Selection | None, frames: int) -> Tensor:
        """Return the weights of the candidate frames (B, N), rows of sum 1, from those of the tokens (B, K)."""
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
    """Return the frames (B, k, 3, S, S) at `indices` (B, k), and their mask (B, k)."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    return videos.frames[rows, indices], videos.frame_mask[rows, indices]


def _complement(indices: Tensor, count: int) -> Tensor:
    """Return the indices of 0…count−1 that are not in `indices` (B, k), ascending: (B, count − k).

    It never waits for the device.
    """
    chosen = torch.zeros(len(indices), count, dtype=torch.uint8, device=indices.device).scatter_(1, indices, 1)
    return chosen.argsort(dim=1, stable=True)[:, : count - indices.shape[1]]


def _in_time(selection: Selection) -> Selection:
    """Return the selection with its frames in the order of time instead of the order of selection."""
    indices, order = selection.indices.sort(dim=1)
    weights = selection.weights.gather(1, order[..., None].expand_as(selection.weights))
    return Selection(weights, indices, selection.logits)


def _mix(weights: Tensor, frames: Tensor) -> Tensor:
    """Return weights (B, K, N) @ frames (B, N, D), computed without autocast, which would round the embeddings."""
    with torch.autocast(frames.device.type, enabled=False):
        return weights.to(frames.dtype) @ frames
