"""Folders of transformers' CLIPModel: names of tensors, config, preprocessing and tokenizer, read and written.

A folder is read into open_clip's terms, without transformers. Its tokens must be CLIP's own. A config that differs from
OpenAI's in more than sizes and the choice between GELU and quick-GELU is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names that a file of weights may have in a folder, by preference."""

# Parts of OpenAI's names → parts of transformers', in an order in which each can be replaced in either direction.
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
_PARTS = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale")
# transformers keeps these two as linear layers, which hold the transposed matrix.
_TRANSPOSED = ("visual.proj", "text_projection")

# open_clip's terms → transformers', with transformers' defaults.
_TEXT = {
    "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "context_length": ("max_position_embeddings", 77),
    "vocab_size": ("vocab_size", 49408),
}
_VISION = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_folder(folder: Path) -> dict[str, Any]:
    """Return open_clip's description of a folder: `model_cfg`, and `preprocess` ({} if the folder has none).

    Raise UserError for a folder without the config of a CLIPModel, or with one that open_clip cannot express.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        raise UserError(
            f"clip_weights: {folder} holds no open_clip_config.json and no config.json of a CLIPModel; give a folder "
            "of open_clip's or transformers', or a weights file"
        )
    processors = (folder / name for name in ("preprocessor_config.json", "processor_config.json"))
    processor = next((file for file in processors if file.is_file()), None)
    try:
        model_cfg, preprocess = to_model_cfg(config), {}
        if processor is not None:
            path = processor
            preprocess = _preprocess(read_json(path), model_cfg["vision_cfg"]["image_size"])
        return {"model_cfg": model_cfg, "preprocess": preprocess}
    except (TypeError, AttributeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: only a CLIPModel of OpenAI's kind can be read ({error})") from error


def to_openai_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIPModel's tensors under OpenAI's names, with q, k and v in one; unknown names stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):
            found[name] = tensor.T if name in _TRANSPOSED else tensor
    for query in [name for name in found if ".self_attn.q_proj." in name]:
        names = [query.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if all(name in found for name in names):
            joined = query.replace("self_attn.q_proj.", "attn.in_proj_")
            found[joined] = torch.cat([found.pop(name) for name in names])
    return found


def to_huggingface_names(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return CLIP's tensors under a CLIPModel's names, with q, k and v apart; None if a tensor has no place there."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = name
        for one, other in _NAMES.items():
            theirs = theirs.replace(one, other)
        before, in_proj, kind = theirs.partition(".attn.in_proj_")
        if in_proj:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{before}.self_attn.{letter}_proj.{kind}"] = part
        else:
            out[theirs] = tensor.T if name in _TRANSPOSED else tensor
    return out if all(name.startswith(_PARTS) for name in out) else None


def folder_files(model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a CLIPModel's folder holds besides the weights: file → text, or the content of a JSON file.

    `model_cfg` and `preprocess` describe the CLIP in open_clip's terms. The config says less than `model_cfg` if a
    CLIPModel cannot express it, which `to_model_cfg` shows.
    """
    vision, text = open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"]), open_clip.CLIPTextCfg(**model_cfg["text_cfg"])
    act = {"hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"}
    heads = {"num_attention_heads": vision.width // vision.head_width}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "vision_config": {**act, **heads, **_section(vision, _VISION)},
        "text_config": {**act, **_section(text, _TEXT), "bos_token_id": 49406, "eos_token_id": 49407},
    }
    tokenizer = SimpleTokenizer()
    vocabulary = {word: n for word, n in tokenizer.encoder.items() if n not in tokenizer.all_special_ids}
    vocabulary |= {_START: tokenizer.sot_token_id, _END: tokenizer.eot_token_id}
    square = {"height": vision.image_size, "width": vision.image_size}
    shortest = preprocess["resize_mode"] == "shortest"
    return {
        "config.json": config,
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": vision.image_size} if shortest else square,
            "resample": next(n for n, name in _RESAMPLING.items() if name == preprocess["interpolation"]),
            "do_center_crop": shortest,
            "crop_size": square,
            "image_mean": list(preprocess["mean"]),
            "image_std": list(preprocess["std"]),
        },
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.bpe_ranks)]) + "\n",
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length},
    }


def to_model_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's description of a CLIPModel. Raise ValueError for what open_clip cannot express."""
    text, vision = config["text_config"], config["vision_config"]
    acts = {section.get("hidden_act", "quick_gelu") for section in (text, vision)}
    eps = {section.get("layer_norm_eps", 1e-5) for section in (text, vision)}
    # In older files the end token is 2, which stands for the highest number, as in CLIP.
    end = text.get("eos_token_id", 49407)
    if len(acts) > 1 or not acts <= _ACTIVATIONS.keys() or eps != {1e-5} or end not in (2, 49407):
        found = f"hidden_act {' and '.join(sorted(acts))}, layer_norm_eps {eps}, eos_token_id {end}"
        raise ValueError(f"with one hidden_act, gelu or quick_gelu, layer_norm_eps 1e-5 and CLIP's tokens, not {found}")
    vision_cfg = _renamed(vision, _VISION, 3072)
    vision_cfg["head_width"] = vision_cfg["width"] // vision.get("num_attention_heads", 12)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[acts.pop()],
        "vision_cfg": vision_cfg,
        "text_cfg": _renamed(text, _TEXT, 2048),
    }


def _renamed(section: Mapping[str, Any], terms: Mapping[str, tuple[str, int]], mlp: int) -> dict[str, Any]:
    found: dict[str, Any] = {ours: section.get(theirs, default) for ours, (theirs, default) in terms.items()}
    hidden, width = section.get("intermediate_size", mlp), found["width"]
    # open_clip rounds the product of the ratio and the width down.
    return {**found, "mlp_ratio": hidden / width if hidden % width == 0 else (hidden + 0.5) / width}


def _section(cfg: Any, terms: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    found = {theirs: getattr(cfg, ours) for ours, (theirs, _) in terms.items()}
    return {**found, "intermediate_size": int(cfg.width * cfg.mlp_ratio)}


def _preprocess(content: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return an image processor's preprocessing in open_clip's terms. Raise ValueError for an unusual one."""
    content = content.get("image_processor", content)
    size, crops = content.get("size", image_size), content.get("do_center_crop", True)
    stretched = isinstance(size, dict) and size.keys() == {"height", "width"}
    sides = [size, content.get("crop_size", image_size)] if crops else [size]
    resized = {side for s in sides for side in (s.values() if isinstance(s, dict) else [s])} == {image_size}
    if not resized or not (crops or stretched) or not all(content.get(step, True) for step in _STEPS):
        given = {key: content.get(key) for key in ("size", "crop_size", "do_center_crop", *_STEPS)}
        raise ValueError(f"images are resized and cropped, or stretched, to {image_size} and normalised, not {given}")
    return {
        "mean": content["image_mean"],
        "std": content["image_std"],
        "interpolation": _RESAMPLING[content.get("resample", 3)],
        "resize_mode": "squash" if stretched else "shortest",
    }
