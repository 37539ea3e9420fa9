"""Which CLIP a set of weights is: told from the shapes of its tensors (OpenAI's names, Radford et al. 2021).

Shapes do not show how many heads a block has nor which activation. So: the shapes of a model that OpenAI published mean
that model, with quick-GELU; those of another model that open_clip knows mean that one; any other are taken for
OpenAI's kind, a head for every 64 channels and quick-GELU. `clip_backbone` decides otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import open_clip
from torch import Tensor

from adaclip_finetune.errors import UserError

_HEAD_WIDTH = 64
_RESNET_SHRINKS = 32
_VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


class Shapes(NamedTuple):
    """What the shapes of a CLIP show. A residual network has no patches, and its blocks are counted by stage."""

    patch_size: int | None
    image_size: int
    vision_width: int
    vision_layers: int | tuple[int, ...]
    vision_hidden: int | None
    text_width: int = 0
    text_layers: int = 0
    text_hidden: int = 0
    context_length: int = 0
    vocab_size: int = 0
    embed_dim: int = 0


class Architecture(NamedTuple):
    """open_clip's description of a CLIP, and its name there; None for one that open_clip has no name for."""

    model_cfg: dict[str, Any]
    name: str | None


def shapes_of(state: Mapping[str, Tensor], source: str) -> Shapes:
    """Read the shapes of CLIP's tensors. Raises UserError for what is not laid out as OpenAI's models are."""
    try:
        shapes = _vit(state) if "visual.class_embedding" in state else _resnet(state)
        context_length, text_width = state["positional_embedding"].shape
        return shapes._replace(
            text_width=text_width,
            text_layers=_count(state, r"transformer\.resblocks\.(\d+)\."),
            text_hidden=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
            context_length=context_length,
            vocab_size=len(state["token_embedding.weight"]),
            embed_dim=state["text_projection"].shape[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source}: the architecture cannot be told from these tensors, which are not laid out as OpenAI's CLIP is "
            f"({type(error).__name__}: {error}); name it with clip_backbone (an open_clip name), or give a folder that "
            "holds its config"
        ) from error


def shapes_of_config(model_cfg: Mapping[str, Any]) -> Shapes | None:
    """The shapes that open_clip's description of a model leads to; None for a tower that is not of OpenAI's kind."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    plain = _used(model_cfg) <= {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
    if not plain or not _used(vision) <= _VISION_KEYS or not _used(text) <= _TEXT_KEYS:
        return None
    seen, read = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
    resnet = isinstance(seen.layers, list | tuple)
    if not isinstance(seen.image_size, int):
        return None
    return Shapes(
        None if resnet else seen.patch_size,
        seen.image_size,
        seen.width,
        tuple(seen.layers) if resnet else seen.layers,
        None if resnet else int(seen.width * seen.mlp_ratio),
        read.width,
        read.layers,
        int(read.width * read.mlp_ratio),
        read.context_length,
        read.vocab_size,
        model_cfg["embed_dim"],
    )


def architecture_of(shapes: Shapes) -> Architecture:
    """The model that has these shapes, as the head of this file says."""
    for name in open_clip.list_openai_models():
        if name.endswith("-quickgelu") and shapes == shapes_of_config(open_clip.get_model_config(name)):
            return Architecture(open_clip.get_model_config(name), name)
    # `name` comes before `name-quickgelu`: an open_clip model is GELU unless its name says otherwise.
    for name in sorted(open_clip.list_models(), key=len):
        if shapes == shapes_of_config(open_clip.get_model_config(name)):
            return Architecture(open_clip.get_model_config(name), name)
    return Architecture(_of_openai_kind(shapes), None)


def differences(given: Shapes, found: Shapes) -> Iterator[str]:
    """In words, what differs between two architectures: `patch_size 32, not 16`."""
    for name, one, other in zip(Shapes._fields, given, found, strict=True):
        if one != other:
            yield f"{name} {_shown(one)}, not {_shown(other)}"


def mlp_ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` from which open_clip, rounding down, makes `hidden` again."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _used(section: Mapping[str, Any]) -> set[str]:
    return {name for name, value in section.items() if value not in (None, False)}


def _shown(value: int | tuple[int, ...] | None) -> str:
    return "none" if value is None else str(value)


def _vit(state: Mapping[str, Tensor]) -> Shapes:
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    image_size = patch_size * _grid(state["visual.positional_embedding"])
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    return Shapes(patch_size, image_size, width, layers, len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]))


def _resnet(state: Mapping[str, Tensor]) -> Shapes:
    image_size = _RESNET_SHRINKS * _grid(state["visual.attnpool.positional_embedding"])
    layers = tuple(_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    return Shapes(None, image_size, len(state["visual.layer1.0.conv1.weight"]), layers, None)


def _grid(positions: Tensor) -> int:
    """Positions are those of a square of patches, and one of the class."""
    side = math.isqrt(len(positions) - 1)
    if side**2 != len(positions) - 1:
        raise ValueError(f"{len(positions)} positions are no square and one")
    return side


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _of_openai_kind(shapes: Shapes) -> dict[str, Any]:
    text_heads = max(shapes.text_width // _HEAD_WIDTH, 1)
    return {
        "embed_dim": shapes.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": shapes.image_size,
            "layers": shapes.vision_layers,
            "width": shapes.vision_width,
            "patch_size": shapes.patch_size,
            "head_width": min(_HEAD_WIDTH, shapes.vision_width) if shapes.patch_size else _HEAD_WIDTH,
            "mlp_ratio": mlp_ratio(shapes.vision_hidden or 0, shapes.vision_width),
        },
        "text_cfg": {
            "context_length": shapes.context_length,
            "vocab_size": shapes.vocab_size,
            "width": shapes.text_width,
            "heads": text_heads,
            "layers": shapes.text_layers,
            "mlp_ratio": mlp_ratio(shapes.text_hidden, shapes.text_width),
        },
    }
