"""Which settings of a retriever the shapes of its tensors show: what a checkpoint must be loaded with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from adaclip_finetune.config import Config

_CNN = "selector.backbone.cnn."


def contradictions(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Settings of `config` that cannot be those of a model with these tensors (our names), and what they can be."""
    for name, possible in _possible(state, config):
        if getattr(config, name) not in possible:
            yield name, possible


def _possible(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    has_selector = _has(state, "selector.")
    yield "use_policy", (has_selector,)
    if has_selector:
        yield from _of_encoder(state)
        yield from _of_features(state, config)
        yield "mlp_type", ("mlp",) if "selector.scorer.2.weight" in state else ("fc",)
        if "selector.scorer.2.weight" in state:
            yield "mlp_hidden_dim", (len(state["selector.scorer.0.weight"]),)
    yield from _of_header(state, config)
    # Means and query scores have no tensors.
    yield "frame_agg", _aggregator(state, "aggregator.") or (None, "qscore")
    yield "word_agg", _aggregator(state, "word_aggregator.") or (None,)


def _has(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in state)


def _of_encoder(state: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "use_rnn", (_has(state, "selector.encoder."),)
    positions = state.get("selector.encoder.positions.weight")
    recurrent = state.get("selector.encoder.rnn.weight_hh_l0")
    if positions is not None:
        yield "rnn", ("transformer",)
        yield "num_frm", (len(positions),)
        yield "hidden_dim", (positions.shape[1],)
    elif recurrent is not None:
        yield "rnn", ("bilstm",) if "selector.encoder.rnn.weight_hh_l0_reverse" in state else ("lstm",)
        yield "hidden_dim", (recurrent.shape[1],)


def _of_features(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    first = ("encoder.projection.weight", "encoder.rnn.weight_ih_l0", "scorer.0.weight")
    width = next(state[f"selector.{name}"].shape[1] for name in first if f"selector.{name}" in state)
    side = math.isqrt(width)
    if _has(state, _CNN):
        deep = ("mobilenet_v3_large",) if _has(state, f"{_CNN}classifier.") else ("mobilenet_v2",)
        yield "policy_backbone", ("resnet50",) if _has(state, f"{_CNN}layer1.") else deep
        return
    if _has(state, "selector.backbone."):
        yield "policy_backbone", ("frozen_clip",)
        return
    # The features of CLIP are embeddings; of raw frames, the pixels of a square.
    of_clip = ("clip", "frozen_clip") if width == state["clip.text_projection"].shape[1] else ()
    yield "policy_backbone", (*(("raw",) if side**2 == width else ()), *of_clip)
    if config.policy_backbone == "raw" or not of_clip:
        yield "rescale_size", (side,)


def _of_header(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if not _has(state, "header."):
        yield "sim_header", ("meanP",)
    elif _has(state, "header.transformer.resblocks.1."):
        yield "sim_header", ("seqTransf",)
    else:
        yield "sim_header", ("transformer",)
        frames = len(state["header.positions.weight"])
        # While K anneals, more than top_k frames reach the header.
        yield "top_k" if config.use_policy and not config.warmup_epochs else "num_frm", (frames,)


def _aggregator(state: Mapping[str, Tensor], prefix: str) -> tuple[str, ...]:
    if _has(state, f"{prefix}transformer."):
        return ("transformer",)
    return ("mlp",) if _has(state, prefix) else ()
