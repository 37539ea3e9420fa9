"""Folders of transformers' CLIPModel: names of tensors, config, preprocessing and tokenizer, read and written.

A folder is read into open_clip's terms, without transformers. Its tokens must be CLIP's own, and what open_clip's
towers cannot express is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.weights.architecture import mlp_ratio
from adaclip_finetune.weights.safe import named_tensors, read_untrusted

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
_EPS = 1e-5
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# In older files the end token is 2, which stands for the highest number, as in CLIP.
_END_TOKENS = (2, 49407)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def is_huggingface_folder(folder: Path) -> bool:
    """Return whether the folder's config.json describes a CLIPModel. Raise UserError if it cannot be read."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("model_type") == "clip"


def read_model_cfg(folder: Path) -> dict[str, Any]:
    """Return open_clip's description of the architecture in the folder's config.json.

    Raise UserError for an architecture that open_clip cannot express.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        text, vision = _section(config, "text"), _section(config, "vision")
        acts = {section.get("hidden_act", "quick_gelu") for section in (text, vision)}
        if len(acts) > 1 or not acts <= _ACTIVATIONS.keys():
            raise UserError(
                f"{path}: hidden_act is {' and '.join(sorted(acts))}; only quick_gelu or gelu, the same in both "
                "towers, can be built"
            )
        if (end := text.get("eos_token_id", 49407)) not in _END_TOKENS:
            raise UserError(f"{path}: eos_token_id is {end} instead of CLIP's 49407, so its tokens are not CLIP's")
        text_cfg, vision_cfg = _renamed_section(text, _TEXT, 2048), _renamed_section(vision, _VISION, 3072)
        vision_cfg["head_width"] = vision_cfg["width"] // vision.get("num_attention_heads", 12)
        return {
            "embed_dim": config.get("projection_dim", 512),
            "quick_gelu": _ACTIVATIONS[acts.pop()],
            "vision_cfg": vision_cfg,
            "text_cfg": text_cfg,
        }
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the config of a CLIPModel ({type(error).__name__}: {error})") from error


def read_preprocess(folder: Path, image_size: int) -> dict[str, Any]:
    """Return the folder's preprocessing in open_clip's terms, {} if it has none.

    Raise UserError for any other than resizing (bicubic or bilinear) to `image_size`, cropping and normalising.
    """
    paths = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    try:
        content = read_json(path)
        content = content.get("image_processor", content)
        size, crop = content.get("size", image_size), content.get("crop_size", image_size)
        stretched = isinstance(size, dict) and size.keys() == {"height", "width"}
        sides = [size] if not content.get("do_center_crop", True) else [size, crop]
        if {side for s in sides for side in (s.values() if isinstance(s, dict) else [s])} != {image_size}:
            raise KeyError(f"size {size}, crop_size {crop}")
        for step in ("do_resize", "do_rescale", "do_normalize", *([] if stretched else ["do_center_crop"])):
            if not content.get(step, True):
                raise KeyError(f"{step} is false")
        return {
            "mean": content["image_mean"],
            "std": content["image_std"],
            "interpolation": _RESAMPLING[content.get("resample", 3)],
            "resize_mode": "squash" if stretched else "shortest",
        }
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path}: asks for a preprocessing that is not available: images are resized (bicubic or bilinear) and "
            f"cropped, or stretched, to {image_size} pixels, and normalised ({error})"
        ) from error


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the folder's tensors under OpenAI's names, and the file they came from. Raise UserError if there is none.

    A file of weights may be divided into several, which an index lists.
    """
    found = (path for name in _WEIGHTS for path in (folder / name, folder / f"{name}.index.json") if path.is_file())
    if (path := next(found, None)) is None:
        raise UserError(f"{folder}: no weights found, such as {_WEIGHTS[0]}")
    files = [path.name]
    if path.suffix == ".json":
        content = read_json(path)
        listed = content.get("weight_map") if isinstance(content, dict) else None
        files = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
        if not files or any(Path(file).name != file for file in files):
            raise UserError(f"{path}: has no weight_map of tensors to files beside it")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= named_tensors(read_untrusted(folder / file)[0])
    return to_openai_names(state, str(path)), path


def to_openai_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a CLIPModel's tensors under OpenAI's names, with q, k and v in one; unknown names stay as they are.

    Raise UserError for a block that lacks one of q, k and v.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):
            found[name] = tensor
    out: dict[str, Tensor] = {}
    for name, tensor in found.items():
        match = re.fullmatch(r"(.*\.)self_attn\.([qkv])_proj\.(weight|bias)", name)
        if match and match[2] == "q":
            try:
                parts = [found[f"{match[1]}self_attn.{letter}_proj.{match[3]}"] for letter in "qkv"]
            except KeyError:
                raise UserError(f"{source}: {match[1]}self_attn has a q_proj without its k_proj or v_proj") from None
            out[f"{match[1]}attn.in_proj_{match[3]}"] = torch.cat(parts)
        elif not match:
            out[name] = tensor.T if name in _TRANSPOSED else tensor
    return out


def to_huggingface_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CLIP's tensors under a CLIPModel's names, with q, k and v apart."""
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
    return out


def folder_files(model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a CLIPModel's folder holds besides the weights: file → text, or the content of a JSON file.

    `model_cfg` and `preprocess` describe a plain vision transformer CLIP with CLIP's tokenizer, in open_clip's terms.
    """
    vision, text = open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"]), open_clip.CLIPTextCfg(**model_cfg["text_cfg"])
    tokenizer = SimpleTokenizer()
    vocabulary = {word: n for word, n in tokenizer.encoder.items() if n not in tokenizer.all_special_ids}
    vocabulary |= {_START: tokenizer.sot_token_id, _END: tokenizer.eot_token_id}
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    shared = {"hidden_act": act, "projection_dim": model_cfg["embed_dim"]}
    tokens = {"bos_token_id": tokenizer.sot_token_id, "eos_token_id": tokenizer.eot_token_id}
    heads = {"num_attention_heads": vision.width // vision.head_width}
    square = {"height": vision.image_size, "width": vision.image_size}
    shortest = preprocess["resize_mode"] == "shortest"
    return {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": model_cfg["embed_dim"],
            "vision_config": {"model_type": "clip_vision_model", **shared, **heads, **_sizes(vision, _VISION)},
            "text_config": {"model_type": "clip_text_model", **shared, **tokens, **_sizes(text, _TEXT)},
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": vision.image_size} if shortest else square,
            "resample": {"bilinear": 2, "bicubic": 3}[preprocess["interpolation"]],
            "do_center_crop": shortest,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocess["mean"]),
            "image_std": list(preprocess["std"]),
            "do_convert_rgb": True,
        },
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.bpe_ranks)]) + "\n",
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length},
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    # Older files have each section twice, and transformers takes the second.
    given = (config.get(f"{name}_config") or {}) | (config.get(f"{name}_config_dict") or {})
    return {key: value for key, value in given.items() if value is not None}


def _renamed_section(section: Mapping[str, Any], terms: Mapping[str, tuple[str, int]], mlp: int) -> dict[str, Any]:
    found: dict[str, Any] = {ours: section.get(theirs, default) for ours, (theirs, default) in terms.items()}
    found["mlp_ratio"] = mlp_ratio(section.get("intermediate_size", mlp), found["width"])
    if (eps := section.get("layer_norm_eps", _EPS)) != _EPS:
        found["norm_kwargs"] = {"eps": eps}
    return found


def _sizes(cfg: Any, terms: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    found = {theirs: getattr(cfg, ours) for ours, (theirs, _) in terms.items()}
    eps = (cfg.norm_kwargs or {}).get("eps", _EPS)
    return {**found, "intermediate_size": int(cfg.width * cfg.mlp_ratio), "layer_norm_eps": eps}
