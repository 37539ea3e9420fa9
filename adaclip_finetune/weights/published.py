"""Checkpoints of the published systems: which system wrote a file, its tensors under our names, and its settings.

Known are AdaCLIP (Hu et al. 2023) and CLIP4Clip (Luo et al. 2022), whose tensors have the same names; CLIP-ViP (Xue et
al. 2023); CenterCLIP (Zhao et al. 2022), a CLIP4Clip with settings beside it; and DGL (Yang et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.weights.clip_weights import NO_WEIGHTS
from adaclip_finetune.weights.huggingface import to_openai_names
from adaclip_finetune.weights.safe import named_tensors

State = dict[str, Tensor]

# AdaCLIP's prefix → ours.
_PREFIXES = {
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

# Without selector and pooling: what all systems but AdaCLIP have in common.
_PLAIN = {"use_policy": False, "frame_agg": None, "sim_header": "meanP"}


@dataclass(frozen=True)
class Published:
    """A file of a published system: the name of the system, tensors by our names, and what is known of its settings.

    The settings of AdaCLIP are as it stored them; those of others follow from tensors and neighbouring files, and are
    settings of ours.
    """

    system: str
    state: State
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: str | None = None


def read_published(path: Path, content: Any) -> Published:
    """Return what is in a file of a published system. Raise UserError, which names what is unknown, for another one."""
    state = {n: t for n, t in named_tensors(content).items() if n.removeprefix("clip.") not in NO_WEIGHTS}
    read = next((reader for marker, reader in _SYSTEMS.items() if marker in state), None)
    if read is not None:
        return read(path, state)
    if "clip.logit_scale" not in state:
        alone = "; CLIP weights alone belong into clip_weights" if "logit_scale" in state else ""
        raise UserError(f"it holds no clip.logit_scale{alone}" if state else "it holds no tensors by name")
    if (found := _center_clip(path, state)) is not None:
        return found
    settings, epoch = content.get("config"), content.get("epoch")
    settings = dict(settings) if isinstance(settings, dict) else {}
    return Published("AdaCLIP", to_our_names(state), settings, None if epoch is None else str(epoch))


def to_our_names(state: Mapping[str, Tensor]) -> State:
    """Return AdaCLIP's state dict under our names. Raise UserError listing names that neither system has."""
    return _renamed(state, _PREFIXES, "neither AdaCLIP nor CLIP4Clip has tensors of these names")


def to_published_names(state: Mapping[str, Tensor]) -> State:
    """Return our state dict under AdaCLIP's names. Raise UserError listing tensors that have no place there."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    # Where two published prefixes mean the same place, what else is in that place decides.
    unused = {"transformer." if has("header.transformer.resblocks.3.") else "transformerClip."}
    for part in ("frame_agg", "word_agg"):
        unused.add(f"{part}_mlp." if has(_PREFIXES[f"{part}_transformer."]) else f"{part}_proj.")
    prefixes = {ours: theirs for theirs, ours in _PREFIXES.items() if theirs not in unused}
    return _renamed(state, prefixes, "the published system has no place for these tensors")


def _renamed(state: Mapping[str, Tensor], prefixes: Mapping[str, str], problem: str) -> State:
    found = {name: next((p for p in prefixes if name.startswith(p)), None) for name in state}
    if unknown := [name for name, prefix in found.items() if prefix is None]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{problem}: {', '.join(unknown[:5])}{more}")
    return {prefixes[p] + name.removeprefix(p): state[name] for name, p in found.items() if p is not None}


# ---- CLIP-ViP ----


def _clip_vip(path: Path, state: State) -> Published:
    named = {name.removeprefix("clipmodel."): tensor for name, tensor in state.items()}
    embeddings = "vision_model.embeddings."
    proxies, times = (named.pop(embeddings + name, None) for name in ("added_cls", "temporal_embedding"))
    found = {f"clip.{name}": tensor for name, tensor in to_openai_names(named).items()}
    config: dict[str, Any] = {"num_proxies": 1, "temporal_embedding": times is not None}
    if proxies is not None and len(proxies):
        found["tower.proxies"], config["num_proxies"] = proxies, 1 + len(proxies)
    settings: dict[str, Any] = {**_PLAIN, "resize": "stretch", "to_last_frame": True}
    if times is not None:
        found["tower.temporal_embedding"], config["temporal_size"] = times[0], times.shape[1]
        settings["num_frm"] = times.shape[1]
    return Published("CLIP-ViP", found, {**settings, "tower": {"method": "proxy_tokens", "config": config}})


# ---- CenterCLIP ----


_HPARAMS = "hparams_train.json"
_CLUSTER_EMBEDDING = re.compile(r"clip\.visual\.transformer\.resblocks\.(\d+)\.tokencluster_inter\.cluster_embed")
_CENTER_CLIP_UNUSED = ("clip.visual.position_ids", "tokencluster_inter.spg", "tokencluster_inter.cluster_frame_embed")
# CenterCLIP's option → ours, under tower.config.
_CLUSTERING = {
    "cluster_distance": "distance",
    "minkowski_norm_p": "norm_p",
    "cluster_threshold": "threshold",
    "cluster_iter_limit": "iterations",
    "spectral_sigma": "sigma",
}


def _center_clip(path: Path, state: State) -> Published | None:
    """Return CenterCLIP's checkpoint, or None for another one. Its settings are in the file `_HPARAMS` beside it."""
    beside = path.parent / _HPARAMS
    embeddings = sorted((int(m[1]), name) for name in state if (m := _CLUSTER_EMBEDDING.fullmatch(name)))
    if not beside.is_file() and not embeddings and _CENTER_CLIP_UNUSED[0] not in state:
        return None
    named = [name for _, name in embeddings]
    kept = {n: t for n, t in state.items() if not n.endswith(_CENTER_CLIP_UNUSED) and n not in named}
    found = to_our_names(kept) | {f"tower.embeddings.{number}": state[name] for number, name in enumerate(named)}
    settings: dict[str, Any] = {}
    if beside.is_file():
        try:
            settings = _center_clip_settings(dict(read_json(beside)))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{beside}: not the settings of a CenterCLIP run ({error!r})") from error
    return Published("CenterCLIP", found, settings)


def _center_clip_settings(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of ours from CenterCLIP's options. A reduction is where either of its lists falls."""
    settings = {**_PLAIN, "sim_header": theirs.get("sim_header", "meanP"), "segment_sampling": True}
    settings |= {"num_frm": theirs["max_frames"], "max_txt_len": theirs["max_words"]}
    if not theirs.get("cluster_inter", 1):
        return settings
    segments, tokens = list(theirs["target_frames_blocks"]), list(theirs["cluster_num_blocks"])
    before = [(theirs["max_frames"], tokens[0]), *zip(segments, tokens, strict=True)]
    stages = [
        {"block": number, "segments": segments[number], "tokens": tokens[number]}
        for number, (frames, many) in enumerate(before[:-1])
        if tokens[number] > 1 and (frames > segments[number] or many > tokens[number])
    ]
    neighbours = int(theirs.get("spectral_knn_k", 1))
    config = {
        "stages": stages,
        "algorithm": {"kmediods++": "kmedoids"}.get(theirs["cluster_algo"], theirs["cluster_algo"]),
        "aggregation": theirs.get("aggregation") or "none",
        "cluster_embedding": "normal" if theirs.get("cluster_embedding") else "off",
        "pre_norm": bool(theirs.get("pre_norm", 0)),
        "graph": {"HeatKernel": "heat"}.get(theirs.get("spectral_graph", "HeatKernel"), "knn"),
        "neighbours": neighbours if neighbours >= 5 else 0,
        "window": bool(theirs.get("spectral_spg", 0)),
        **{ours: theirs[name] for name, ours in _CLUSTERING.items() if name in theirs},
    }
    return {**settings, "tower": {"method": "clustering", "config": config}}


# ---- DGL ----

_DGL = {
    "clip.prefix_text_prompt_proj_layer.": "tower.prompts.prefix.",
    "clip.postfix_text_prompt_proj_layer.": "tower.prompts.postfix.",
    "clip.PromptTransformer.": "tower.prompts.mixer.",
    "clip.unified_prompt_mlp.c_fc.": "tower.prompts.to_text.0.",
    "clip.unified_prompt_mlp.c_proj.": "tower.prompts.to_text.2.",
    "clip.": "clip.",
}
_DGL_UNUSED = ("clip.visual.position_ids", "clip.visual.frame_embedding")
_DGL_TEXT_PROMPTS = 4  # before the words and as many behind them: of the transformer's rows, no shape tells it


def _dgl(path: Path, state: State) -> Published:
    state = {name: tensor for name, tensor in state.items() if name not in _DGL_UNUSED}
    carried = state.pop("clip.visual.prompt_embeddings")[0]
    count, width = carried.shape
    config: dict[str, Any] = {"global_prompts": count, "postfix_prompts": True}
    if "clip.visual_prompt_embedding" in state:
        table = state.pop("clip.visual_prompt_embedding")[0]
        config |= {"generator": "linear", "local_prompts": len(table), "text_prompts": len(table)}
    else:
        table = state.pop("clip.unified_prompt_embedding.weight")
        frames, left = divmod(len(table) - 2 * _DGL_TEXT_PROMPTS, count)
        if left:
            raise UserError(f"{path}: {len(table)} rows of prompts are not 8 and {count} for each frame")
        config |= {"generator": "transformer", "local_prompts": count, "text_prompts": _DGL_TEXT_PROMPTS}
        config["frames"] = frames
    found = _renamed(state, _DGL, "DGL has no tensors of these names")
    found["tower.global_prompts"] = carried
    found["tower.prompts.table"] = table.reshape(len(table), -1, width).transpose(0, 1).contiguous()
    settings: dict[str, Any] = {**_PLAIN, "tower": {"method": "global_local", "config": config}}
    return Published("DGL", found, settings | ({"num_frm": config["frames"]} if "frames" in config else {}))


_SYSTEMS: dict[str, Callable[[Path, State], Published]] = {
    "clipmodel.vision_model.embeddings.class_embedding": _clip_vip,
    "vision_model.embeddings.added_cls": _clip_vip,
    "clip.visual.prompt_embeddings": _dgl,
}
"""A tensor that only one system has → what reads its files."""
