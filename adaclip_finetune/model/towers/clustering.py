"""`tower: clustering`: tokens of neighbouring frames are clustered inside CLIP (CenterCLIP, Zhao et al. 2022).

Before chosen blocks the frames of a video are divided into segments. Of the patch tokens of a segment, only the centres
of clusters go on, behind the mean of the class tokens: from there on, a segment is treated like a frame.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config.choices.towers import ClusteringSettings, ClusteringStage
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.model.towers.base import BlockwiseTower
from adaclip_finetune.model.towers.cluster_ops import (
    MedoidRule,
    affinity,
    kmedoids,
    spectral_embedding,
    token_weights,
)
from adaclip_finetune.model.vit import OpenBlock

_MANY = 100  # tokens of a frame from which on spectral clustering takes more neighbours and a larger window
_SHIFTS = ("token_shift", "temporal_shift")


class Units(NamedTuple):
    """The U frames, or segments, of each video between two reductions.

    `real` (B, U) is False where no frame is real. `places` (B, U, L) are the places of the tokens in the grid of
    patches, as `OpenBlock` takes them.
    """

    real: Tensor
    places: Tensor


class Clustering(BlockwiseTower):
    """Encodes frames (B, T, 3, S, S) to one token a segment, (B, min(segments, T), D); with a shift, one a frame.

    Frame t of T is in segment s of S if ⌊sT/S⌋ ≤ t < ⌊(s+1)T/S⌋. Frames that are not real take no part. The token of a
    segment without a real frame points to the mean of the others, so that the pooling `mean` is not changed by it. A
    video without any real frame is encoded as it is.
    """

    def __init__(self, settings: ClusteringSettings, clip: nn.Module) -> None:
        super().__init__(settings, clip)
        self._stage_before = {stage.block: number for number, stage in enumerate(settings.stages)}
        patches, depth = self.view.grid[0] * self.view.grid[1], len(self.view.blocks)
        for stage in settings.stages:
            if stage.block >= depth:
                raise UserError(
                    f"tower.config.stages: there is no block {stage.block}; the image tower's blocks are "
                    f"0 to {depth - 1}"
                )
            if stage.tokens > patches and settings.algorithm not in ("pooling", *_SHIFTS):
                raise UserError(
                    f"tower.config.stages: {stage.tokens} tokens at block {stage.block} are more than the {patches} "
                    f"patches of a frame, which a segment of one frame has; name at most {patches}"
                )
        if settings.algorithm == "token_shift" and not self.view.prefix:
            raise UserError(
                "tower.config.algorithm token_shift shifts class tokens, which this image tower does not have; "
                "take temporal_shift"
            )
        self.embeddings = nn.ParameterList()  # one (tokens, W) a stage, unless cluster_embedding is off
        if settings.cluster_embedding != "off":
            self.embeddings.extend(self._embedding(stage.tokens) for stage in settings.stages)

    def enter(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        mask: Tensor = state["mask"] | ~state["mask"].any(dim=1, keepdim=True)
        places = torch.arange(-self.view.prefix, tokens.shape[2] - self.view.prefix, device=tokens.device).clamp(min=-1)
        state["units"] = {0: Units(mask, places.expand(*tokens.shape[:3]))}  # by the number of reductions before
        state["choices"] = {}
        return super().enter(tokens, state)

    def block(self, number: int, block: OpenBlock, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        reduces = number in self._stage_before
        if self.settings.algorithm in _SHIFTS:
            return self._shifted(block, tokens, state["units"][0].real) if reduces else block(tokens)
        if reduces:
            tokens = self._reduce(self._stage_before[number], tokens, state)
        stages = sum(stage.block <= number for stage in self.settings.stages)
        # All tokens of a frame are in place before the first reduction.
        return block(tokens, positions=state["units"][stages].places.flatten(0, 1) if stages else None)

    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        stages = 0 if self.settings.algorithm in _SHIFTS else len(self.settings.stages)
        real = state["units"][stages].real[..., None]
        vectors = self.view.pool(tokens).reshape(*real.shape[:2], -1)
        exact = at_least_float32(vectors) * real
        mean = F.normalize(F.normalize(exact, dim=-1).sum(dim=1, keepdim=True), dim=-1)
        length = exact.norm(dim=-1, keepdim=True).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        return torch.where(real, vectors, (mean * length).to(vectors.dtype))

    def frame_shares(self, frames: int) -> Tensor | None:
        if self.settings.algorithm in _SHIFTS:
            return None
        shares = torch.eye(frames)
        for stage in self.settings.stages:
            members, exists = _segments(len(shares), stage.segments)
            weights = exists / exists.sum(dim=1, keepdim=True)
            shares = (weights[..., None] * shares[members]).sum(dim=1)
        return shares

    def _embedding(self, tokens: int) -> nn.Parameter:
        if self.settings.cluster_embedding == "normal":
            return nn.Parameter(torch.randn(tokens, self.view.width) * self.view.width**-0.5)
        positions = self.view.patch_positions()
        if positions is None:
            raise UserError(
                "tower.config.cluster_embedding positions: this image tower has no positional embedding to start from; "
                "take normal"
            )
        return nn.Parameter(positions[:tokens].detach().clone())

    def _shifted(self, block: OpenBlock, tokens: Tensor, mask: Tensor) -> Tensor:
        """Run a block with an eighth of the channels taken from the next frame, and an eighth from the one before."""

        def shift(x: Tensor) -> Tensor:
            prefix, patches = x.reshape(*mask.shape, *x.shape[1:]).tensor_split([self.view.prefix], dim=2)
            if self.settings.algorithm == "token_shift":
                prefix = _from_neighbours(prefix, mask)
            else:
                patches = _from_neighbours(patches, mask)
            return torch.cat([prefix, patches], dim=2).flatten(0, 1)

        if self.settings.algorithm == "temporal_shift":
            return block(shift(tokens))
        x = shift(tokens)
        x = shift(x + block.attention_out(F.scaled_dot_product_attention(*block.qkv(x))))
        return x + block.mlp(x)

    def _reduce(self, number: int, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the tokens of the segments of a stage: (B · U, L, W) → (B · S, prefix + tokens, W)."""
        stage, prefix, before = self.settings.stages[number], self.view.prefix, state["units"][number]
        members, exists = _segments(before.real.shape[1], stage.segments, tokens.device)  # (S, d)
        real = before.real[:, members] & exists  # (B, S, d)
        some = real.any(dim=2)
        # A segment without a real frame is computed like the others, and replaced at the end.
        taken = torch.where(some[..., None], real, exists)
        units = tokens.reshape(*before.real.shape, *tokens.shape[1:])
        if self.settings.algorithm == "pooling":
            state["units"][number + 1] = Units(some, before.places[:, : len(members)])
            return _mean_over_units(units, members, taken).flatten(0, 1)
        first = _mean_over_units(units[:, :, :prefix], members, taken)
        # Where the patch tokens of each segment are among all tokens of the video: (S, N).
        length = tokens.shape[1]
        at = (members[..., None] * length + torch.arange(prefix, length, device=tokens.device)).flatten(1)
        everything, places = units.flatten(1, 2), before.places.flatten(1, 2)
        if number not in state["choices"]:  # a block that runs again in the backward pass takes the same tokens
            state["choices"][number] = self._choose(everything, places, at, taken, stage)
        chosen, clusters = state["choices"][number]
        where = at.expand(len(units), -1, -1).gather(2, chosen).flatten(1)  # (B, S · tokens)
        if self.settings.aggregation == "mean":
            valid = taken.repeat_interleave(length - prefix, dim=2).flatten(0, 1)
            weights = token_weights(clusters, stage.tokens, valid, tokens.dtype)
            with _without_autocast(tokens):
                centres = weights @ everything[:, at].flatten(0, 1)
        else:
            centres = everything.gather(1, where[..., None].expand(-1, -1, tokens.shape[2]))
        centres = centres.reshape(*some.shape, stage.tokens, -1)
        if len(self.embeddings):
            centres = centres + self.embeddings[number].to(centres.dtype)
        at_centres = places.gather(1, where).reshape(*some.shape, -1)
        around = before.places[:, : len(members), :prefix]
        state["units"][number + 1] = Units(some, torch.cat([around, at_centres], dim=2))
        return torch.cat([first, centres], dim=2).flatten(0, 1)

    @torch.no_grad()
    def _choose(
        self, tokens: Tensor, places: Tensor, at: Tensor, taken: Tensor, stage: ClusteringStage
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens of each segment go on, ascending: (B, S, tokens), and the cluster of each, (B · S, N).

        The tokens of a segment are `tokens` (B, …, W) of the video at `at` (S, N), with their places (B, …) in the
        grid of patches. `taken` (B, S, d) says which frames of the segment take part.
        """
        settings, count, rows = self.settings, stage.tokens, taken.shape[:2]
        everything = torch.arange(at.shape[1], device=at.device).expand(rows.numel(), -1)
        if count == at.shape[1] or tokens.is_meta:  # nothing to choose, or no values to choose by
            return everything[:, :count].reshape(*rows, -1), everything.clamp(max=count - 1)
        patches = at.shape[1] // taken.shape[2]
        valid = taken.repeat_interleave(patches, dim=2).flatten(0, 1)
        if settings.algorithm == "sparse_sampling":
            return self._sample(valid, rows, count).reshape(*rows, -1), everything
        rule = MedoidRule(settings.distance, settings.norm_p, settings.threshold, settings.iterations)
        with _without_autocast(tokens):
            x, pre_norm = at_least_float32(tokens[:, at].flatten(0, 1)), settings.pre_norm
            if settings.algorithm == "spectral":
                graph = self._graph(x, places[:, at].flatten(0, 1), valid, patches)
                x, pre_norm = spectral_embedding(graph, count, valid), True
            medoids, clusters = kmedoids(x, count, rule, valid, pre_norm)
        return medoids.reshape(*rows, -1), clusters

    def _sample(self, valid: Tensor, rows: torch.Size, count: int) -> Tensor:
        """Return one of every N / count tokens, (B · S, count): the middle one, or in training a random one."""
        order = valid.int().argsort(dim=1, descending=True, stable=True)  # those that take part, in their order
        found, slots = valid.sum(dim=1, keepdim=True), torch.arange(count, device=valid.device)
        if not self.training:
            return order.gather(1, found * (2 * slots + 1) // (2 * count))
        # Drawn on the CPU, so that the seed means the same on every device; the same for all videos, as published.
        drawn = torch.rand(rows[1], count).to(valid.device).repeat(rows[0], 1)
        step = found // count
        return order.gather(1, slots * step + (drawn * step).long())

    def _graph(self, x: Tensor, places: Tensor, valid: Tensor, patches: int) -> Tensor:
        """Return the graph (R, N, N) of tokens (R, N, W), of which each frame has `patches`."""
        settings, many = self.settings, patches >= _MANY
        neighbours = valid.sum(dim=1) // patches * 5 + 5 * many
        if settings.neighbours:
            neighbours = torch.full_like(neighbours, settings.neighbours)
        near = None
        if settings.window:
            frames = (torch.arange(x.shape[1], device=x.device) // patches).expand_as(places)
            columns, reach = self.view.grid[1], 9 if many else 4
            near = torch.ones_like(places[..., None], dtype=torch.bool)
            for values, most in ((frames, 3), (places // columns, reach), (places % columns, reach)):
                near = near & ((values[..., None] - values[:, None, :]).abs() <= most)
        return affinity(x, settings.sigma, neighbours if settings.graph == "knn" else None, valid, near)


def _without_autocast(tokens: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False)


def _segments(units: int, segments: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the units in each segment, and which of them exist: both (S, d) with S = min(segments, units).

    Segments are as even as possible, and d is the size of the largest.
    """
    bounds = torch.arange(min(segments, units) + 1, device=device) * units // min(segments, units)
    most = -(-units // min(segments, units))
    members = bounds[:-1, None] + torch.arange(most, device=device)
    return members.clamp(max=units - 1), members < bounds[1:, None]


def _mean_over_units(tokens: Tensor, members: Tensor, taken: Tensor) -> Tensor:
    """Return means of units (B, U, L, W): for each segment, of its `members` (S, d) that are `taken` (B, S, d)."""
    return (tokens[:, members] * taken[..., None, None]).sum(dim=2) / taken.sum(dim=2)[..., None, None]


def _from_neighbours(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return frames (B, T, L, W) with their first eighth of channels from the next frame, the second from the last one.

    There are zeros in place of a frame that does not exist, or is False in `mask` (B, T).
    """
    eighth = tokens.shape[-1] // 8
    known = tokens * mask[..., None, None]
    nothing = torch.zeros_like(tokens[:, :1, :, :eighth])
    after = torch.cat([known[:, 1:, :, :eighth], nothing], dim=1)
    before = torch.cat([nothing, known[:, :-1, :, eighth : 2 * eighth]], dim=1)
    return torch.cat([after, before, tokens[..., 2 * eighth :]], dim=-1)
