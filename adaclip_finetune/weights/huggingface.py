"""A folder of transformers' CLIPModel, read into open_clip's words: config.json, weights, preprocessing.

Its tokens must be CLIP's own. What open_clip's towers cannot express is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.weights.architecture import mlp_ratio
from adaclip_finetune.weights.huggingface_names import to_openai_names
from adaclip_finetune.weights.untrusted import read_untrusted

_EPS = 1e-5
# What transformers takes where a config says nothing.
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
    "eos_token_id": 49407,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# Older files give the end token as 2 and mean the highest number, as CLIP does.
_END_TOKENS = (None, 2, 49407)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def is_huggingface_folder(folder: Path) -> bool:
    """Whether its config.json describes a CLIPModel. Raises UserError for a config.json that cannot be read."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("model_type") == "clip"


def read_model_cfg(folder: Path) -> dict[str, Any]:
    """open_clip's description of the folder's architecture. Raises UserError for what open_clip cannot express."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        return _model_cfg(path, config, _section(config, "text", _TEXT), _section(config, "vision", _VISION))
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: is no description of a CLIPModel ({type(error).__name__}: {error})") from error


def read_preprocess(folder: Path, image_size: int) -> dict[str, Any]:
    """open_clip's words for the folder's preprocessing; empty where it has none. Raises UserError for another kind."""
    paths = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    try:
        content = read_json(path)
        return _preprocess(content.get("image_processor", content), image_size)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path}: asks for another preprocessing than the towers here get: resized (bicubic or bilinear) and "
            f"cropped, or stretched, to {image_size} pixels, and normalised ({error})"
        ) from error


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The folder's tensors under OpenAI's names, and the file they came from. Raises UserError."""
    for name in _WEIGHTS:
        if (path := folder / name).is_file():
            return to_openai_names(_named_tensors(path), str(path)), path
        if (index := folder / f"{name}.index.json").is_file():
            return to_openai_names(_read_shards(index), str(index)), index
    raise UserError(f"{folder} holds no weights, such as {_WEIGHTS[0]}")


def _section(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    # Older files say it twice, and transformers believes the second.
    given = (config.get(f"{name}_config") or {}) | (config.get(f"{name}_config_dict") or {})
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def _model_cfg(
    path: Path, config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, Any]:
    if text["hidden_act"] != vision["hidden_act"] or text["hidden_act"] not in _ACTIVATIONS:
        both = f"{text['hidden_act']} (text) and {vision['hidden_act']} (vision)"
        raise UserError(f"{path}: hidden_act is {both}; quick_gelu or gelu, the same in both towers, can be built here")
    if text["eos_token_id"] not in _END_TOKENS:
        raise UserError(f"{path}: eos_token_id is {text['eos_token_id']}, not 49407, CLIP's: its tokens are not CLIP's")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[text["hidden_act"]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_mlp_and_norm(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            **_mlp_and_norm(text),
        },
    }


def _preprocess(content: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Raises KeyError, TypeError or AttributeError for what the towers here do not get."""
    size, crop = content.get("size", image_size), content.get("crop_size", image_size)
    stretched = isinstance(size, dict) and size.keys() == {"height", "width"}
    crops = crop.values() if isinstance(crop, dict) else [crop]
    sides = size.values() if isinstance(size, dict) else [size]
    if {*sides, *(crops if content.get("do_center_crop", True) else [])} != {image_size}:
        raise KeyError(f"size {size}, crop_size {crop}")
    for step in ("do_resize", "do_rescale", "do_normalize", *(() if stretched else ("do_center_crop",))):
        if not content.get(step, True):
            raise KeyError(f"{step} is false")
    return {
        "mean": content["image_mean"],
        "std": content["image_std"],
        "interpolation": _RESAMPLING[content.get("resample", 3)],
        "resize_mode": "squash" if stretched else "shortest",
    }


def _mlp_and_norm(section: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"mlp_ratio": mlp_ratio(section["intermediate_size"], section["hidden_size"])}
    if section["layer_norm_eps"] != _EPS:
        found["norm_kwargs"] = {"eps": section["layer_norm_eps"]}
    return found


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index}: has no weight_map of tensors to files beside it")
    state: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        state |= _named_tensors(index.parent / name)
    return state


def _named_tensors(path: Path) -> dict[str, Tensor]:
    content = read_untrusted(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no tensors by name")
    return content
