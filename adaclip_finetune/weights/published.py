"""The names of tensors in checkpoints of AdaCLIP (Hu et al. 2023) and CLIP4Clip (Luo et al. 2022), and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from adaclip_finetune.errors import UserError

Value = TypeVar("Value")

# Theirs → ours. CLIP4Clip's are among them: clip, transformerClip and frame_position_embeddings.
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


def to_our_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """A published state dict under our names. Raises UserError naming what neither system has."""
    prefixes = {name: next((p for p in PREFIXES if name.startswith(p)), None) for name in state}
    if unknown := [name for name, prefix in prefixes.items() if prefix is None]:
        raise UserError(f"neither AdaCLIP nor CLIP4Clip has tensors of these names: {_listed(unknown)}")
    return {PREFIXES[p] + name.removeprefix(p): state[name] for name, p in prefixes.items() if p is not None}


def to_published_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """Ours under the published names. Raises UserError naming what the published system has no place for."""
    # One place of ours has several names there, by what stands in it.
    seq_transf = any(name.startswith(_FOUR_BLOCKS) for name in state)
    left_out = {"transformer." if seq_transf else "transformerClip."}
    for part in ("frame_agg", "word_agg"):
        has_transformer = any(name.startswith(PREFIXES[f"{part}_transformer."]) for name in state)
        left_out.add(f"{part}_mlp." if has_transformer else f"{part}_proj.")
    theirs = {ours: name for name, ours in PREFIXES.items() if name not in left_out}
    prefixes = {name: next((p for p in theirs if name.startswith(p)), None) for name in state}
    if unknown := [name for name, prefix in prefixes.items() if prefix is None]:
        raise UserError(f"the published system has no place for these tensors: {_listed(unknown)}")
    return {theirs[p] + name.removeprefix(p): state[name] for name, p in prefixes.items() if p is not None}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
