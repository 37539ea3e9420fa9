"""Tell the architecture of a CLIP from the shapes of its tensors (OpenAI's names, Radford et al. 2021).

Shapes show neither the number of attention heads nor the activation. Shapes of a model that OpenAI published are
therefore taken for that model, with quick-GELU; shapes of another open_clip model for that one; and all others for a
model with 64 channels per head and quick-GELU. The setting `clip_backbone` overrides this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import open_clip
from torch import Tensor

from adaclip_finetune.errors import UserError

_HEAD_WIDTH = 64
_RESNET_STRIDE = 32
# What open_clip's description of a model may hold if its tensors are laid out as OpenAI's are.
_MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


class Architecture(NamedTuple):
    """open_clip's description of a CLIP, and its open_clip name (None for a model that open_clip does not have)."""

    model_cfg: dict[str, Any]
    name: str | None


def architecture_of(state: Mapping[str, Tensor], source: str) -> Architecture:
    """Return the model that these tensors are taken for, by the rules in the docstring of this module.

    Raise UserError for tensors that are not laid out as OpenAI's are.
    """
    try:
        model_cfg = _openai_like(state)
    except (KeyError, ValueError, TypeError) as error:
        why = f"there is no tensor {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{source}: cannot tell the architecture from the tensors, which are not laid out as OpenAI's CLIP ({why}; "
            f"the file holds, for example, {', '.join(sorted(state)[:3])}). Name the architecture with clip_backbone "
            "(an open_clip name), or give a folder that holds its config"
        ) from error
    sizes = sizes_of(model_cfg)
    openai = [name for name in open_clip.list_openai_models() if name.endswith("-quickgelu")]
    # `NAME` comes before `NAME-quickgelu`, since an open_clip model has GELU unless its name says otherwise.
    for name in [*openai, *sorted(open_clip.list_models(), key=len)]:
        if sizes_of(known := open_clip.get_model_config(name)) == sizes:
            return Architecture(known, name)
    return Architecture(model_cfg, None)


def sizes_of(model_cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the sizes that the tensors of a model show, or None for a model that is not laid out as OpenAI's are."""
    sections = (model_cfg, _MODEL), (model_cfg["vision_cfg"], _VISION), (model_cfg["text_cfg"], _TEXT)
    if any(key not in known and value not in (None, False) for part, known in sections for key, value in part.items()):
        return None
    vision, text = open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"]), open_clip.CLIPTextCfg(**model_cfg["text_cfg"])
    resnet = isinstance(vision.layers, list | tuple)
    return {
        "embed_dim": model_cfg["embed_dim"],
        "image_size": vision.image_size,
        "patch_size": None if resnet else vision.patch_size,
        "vision_width": vision.width,
        "vision_layers": list(vision.layers) if resnet else vision.layers,
        "vision_mlp": None if resnet else int(vision.width * vision.mlp_ratio),
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "text_width": text.width,
        "text_layers": text.layers,
        "text_mlp": int(text.width * text.mlp_ratio),
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the `mlp_ratio` with which open_clip, which rounds down, builds an MLP of `hidden` channels."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _openai_like(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the description of a model of OpenAI's kind. Raise KeyError or ValueError for another layout."""
    width, embed_dim = state["text_projection"].shape
    text = {
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "width": width,
        "heads": max(width // _HEAD_WIDTH, 1),
        "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
        "mlp_ratio": mlp_ratio(len(state["transformer.resblocks.0.mlp.c_fc.weight"]), width),
    }
    if "visual.class_embedding" in state:
        width, _, patch_size, _ = state["visual.conv1.weight"].shape
        vision: dict[str, Any] = {
            "image_size": patch_size * _grid(state["visual.positional_embedding"]),
            "patch_size": patch_size,
            "width": width,
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "head_width": min(_HEAD_WIDTH, width),
            "mlp_ratio": mlp_ratio(len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]), width),
        }
    else:
        vision = {
            "image_size": _RESNET_STRIDE * _grid(state["visual.attnpool.positional_embedding"]),
            "width": len(state["visual.layer1.0.conv1.weight"]),
            "layers": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        }
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def _grid(positions: Tensor) -> int:
    """Return the side of the square of patches; one position more belongs to the class token."""
    side = math.isqrt(len(positions) - 1)
    if side**2 != len(positions) - 1:
        raise ValueError(f"{len(positions)} image positions are not a square plus one")
    return side


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
