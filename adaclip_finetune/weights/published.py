"""Checkpoints of AdaCLIP (Hu et al. 2023) and CLIP4Clip (Luo et al. 2022): names of tensors, and implied settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

Value = TypeVar("Value")

# Published prefix → ours. CLIP4Clip has three of them: clip, transformerClip and frame_position_embeddings.
PREFIXES = {
    "sampler.cnn_model.": "selector.backbone.cnn.",
    "sampler.projection.0.": "selector.encoder.projection.",
    "sampler.frame_position_embeddings.": "selector.encoder.positions.",
    "sampler.transformer.": "selector.encoder.transformer.",
    "sampler.rnn.": "selector.encoder.rnn.",
    "sampler.linear.": "selector.scorer.",
    "frame_position_embeddings.": "header.positions.",
    "transformerClip.": "header.transformer.",
    "transformer.": "header.transformer.",
    "frame_agg_mlp.": "aggregator.scorer.",
    "frame_agg_transformer.": "aggregator.transformer.",
    "frame_agg_proj.": "aggregator.scorer.",
    "word_agg_mlp.": "word_aggregator.scorer.",
    "word_agg_transformer.": "word_aggregator.transformer.",
    "word_agg_proj.": "word_aggregator.scorer.",
    "clip.": "clip.",
}
_FOUR_BLOCKS = "header.transformer.resblocks.3."
_CNN = "selector.backbone.cnn."


def to_our_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return a published state dict under our names. Raise UserError listing names that neither system has."""
    return _renamed(state, PREFIXES, "neither AdaCLIP nor CLIP4Clip has tensors of these names")


def to_published_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return our state dict under the published names. Raise UserError listing tensors that have no place there."""
    # Where two published prefixes mean the same place, what else is in that place decides.
    unused = {"transformer." if _has(state, _FOUR_BLOCKS) else "transformerClip."}
    for part in ("frame_agg", "word_agg"):
        has_transformer = _has(state, PREFIXES[f"{part}_transformer."])
        unused.add(f"{part}_mlp." if has_transformer else f"{part}_proj.")
    prefixes = {ours: theirs for theirs, ours in PREFIXES.items() if theirs not in unused}
    return _renamed(state, prefixes, "the published system has no place for these tensors")


def contradictions(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the settings that a model with these tensors (our names) cannot have, and the values that it can have."""
    for name, possible in _possible(state, config):
        if getattr(config, name) not in possible:
            yield name, possible


def _renamed(state: Mapping[str, Value], prefixes: Mapping[str, str], problem: str) -> dict[str, Value]:
    found = {name: next((p for p in prefixes if name.startswith(p)), None) for name in state}
    if unknown := [name for name, prefix in found.items() if prefix is None]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{problem}: {', '.join(unknown[:5])}{more}")
    return {prefixes[p] + name.removeprefix(p): state[name] for name, p in found.items() if p is not None}


def _has(state: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _possible(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the settings that the tensors show, each with its possible values."""
    has_selector = _has(state, "selector.")
    yield "use_policy", (has_selector,)
    if has_selector:
        yield from _of_selector(state, config)
    if not _has(state, "header."):
        yield "sim_header", ("meanP",)
    elif _has(state, "header.transformer.resblocks.1."):
        yield "sim_header", ("seqTransf",)
    else:
        yield "sim_header", ("transformer",)
        # As long as K anneals, more than top_k frames reach the header.
        frames = "top_k" if config.use_policy and not config.warmup_epochs else "num_frm"
        yield frames, (len(state["header.positions.weight"]),)
    # A mean and query scores have no tensors.
    for setting, prefix, without in (
        ("frame_agg", "aggregator.", (None, "qscore")),
        ("word_agg", "word_aggregator.", (None,)),
    ):
        kind = "transformer" if _has(state, f"{prefix}transformer.") else "mlp"
        yield setting, (kind,) if _has(state, prefix) else without


def _of_selector(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "use_rnn", (_has(state, "selector.encoder."),)
    positions = state.get("selector.encoder.positions.weight")
    recurrent = state.get("selector.encoder.rnn.weight_hh_l0")
    if positions is not None:
        yield from (("rnn", ("transformer",)), ("num_frm", (len(positions),)), ("hidden_dim", (positions.shape[1],)))
    elif recurrent is not None:
        yield "rnn", ("bilstm",) if "selector.encoder.rnn.weight_hh_l0_reverse" in state else ("lstm",)
        yield "hidden_dim", (recurrent.shape[1],)
    yield "mlp_type", ("mlp",) if "selector.scorer.2.weight" in state else ("fc",)
    if "selector.scorer.2.weight" in state:
        yield "mlp_hidden_dim", (len(state["selector.scorer.0.weight"]),)
    first = ("selector.encoder.projection.weight", "selector.encoder.rnn.weight_ih_l0")
    width = state[next((name for name in first if name in state), "selector.scorer.0.weight")].shape[1]
    if _has(state, _CNN):
        mobilenet = "mobilenet_v3_large" if _has(state, f"{_CNN}classifier.") else "mobilenet_v2"
        yield "policy_backbone", ("resnet50" if _has(state, f"{_CNN}layer1.") else mobilenet,)
    elif _has(state, "selector.backbone."):
        yield "policy_backbone", ("frozen_clip",)
    else:
        # The features of CLIP are embeddings; those of raw frames are the pixels of a square.
        side, of_clip = math.isqrt(width), width == state["clip.text_projection"].shape[1]
        raw = ("raw",) if side**2 == width else ()
        yield "policy_backbone", (*raw, "clip", "frozen_clip") if of_clip else raw
        if config.policy_backbone == "raw" or not of_clip:
            yield "rescale_size", (side,)
