"""What a folder of transformers' CLIPModel holds beside the weights: architecture, preprocessing, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

_START = "<|startoftext|>"
_END = "<|endoftext|>"


def config_json(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a CLIPModel for open_clip's description of a plain vision transformer CLIP."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    shared = {"hidden_act": act, "projection_dim": model_cfg["embed_dim"]}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "vision_config": shared
        | {
            "model_type": "clip_vision_model",
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            **_sizes(vision, 768, vision.get("width", 768) // vision.get("head_width", 64)),
        },
        "text_config": shared
        | {
            "model_type": "clip_text_model",
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            **_sizes(text, 512, text.get("heads", 8)),
        },
    }


def preprocessor_json(preprocess: Mapping[str, Any], size: int) -> dict[str, Any]:
    """preprocessor_config.json for open_clip's words."""
    square = {"height": size, "width": size}
    shortest = preprocess["resize_mode"] == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if shortest else square,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess["interpolation"]],
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "do_convert_rgb": True,
    }


def tokenizer_files(context_length: int) -> dict[str, Any]:
    """CLIP's own tokenizer as transformers reads it: file → text, or what its JSON holds."""
    tokenizer = SimpleTokenizer()
    vocabulary = dict(tokenizer.encoder)
    for name in ("<start_of_text>", "<end_of_text>"):
        del vocabulary[name]
    vocabulary |= {_START: tokenizer.sot_token_id, _END: tokenizer.eot_token_id}
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    return {
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.bpe_ranks)]) + "\n",
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length},
    }


def _sizes(section: Mapping[str, Any], default_width: int, heads: int) -> dict[str, Any]:
    width = section.get("width", default_width)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * section.get("mlp_ratio", 4.0)),
        "num_hidden_layers": section.get("layers", 12),
        "num_attention_heads": heads,
        "layer_norm_eps": (section.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
