"""The names of CLIP's tensors: OpenAI's, and those of transformers' CLIPModel, which keeps q, k and v apart."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from adaclip_finetune.errors import UserError

# OpenAI's names → transformers'.
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
    "logit_scale": "logit_scale",
}
_IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
# The two projections are plain matrices there, and the weights of linear layers here.
_TRANSPOSED = ("visual.proj", "text_projection")


def to_openai_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A CLIPModel's tensors under OpenAI's names, q, k and v in one; names that nobody knows stay as they are.

    Raises UserError for a block that lacks some of the three.
    """
    found = {
        _translated(name, _swapped(_NAMES), _swapped(_IN_BLOCK)): tensor
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
    out: dict[str, Tensor] = {}
    for name, tensor in found.items():
        match = re.fullmatch(r"(.*\.)self_attn\.([qkv])_proj\.(weight|bias)", name)
        if match and match[2] == "q":
            parts = [found.get(f"{match[1]}self_attn.{letter}_proj.{match[3]}") for letter in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) < 3:
                raise UserError(f"{source}: {match[1]}self_attn has a q_proj without its k_proj or v_proj")
            out[f"{match[1]}attn.in_proj_{match[3]}"] = torch.cat(present)
        elif not match:
            out[name] = tensor.T if name in _TRANSPOSED else tensor
    return out


def to_huggingface_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors under a CLIPModel's names, q, k and v apart."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = _translated(name, _NAMES, _IN_BLOCK)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", theirs):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{match[1]}.self_attn.{letter}_proj.{match[2]}"] = part
        else:
            out[theirs] = tensor.T if name in _TRANSPOSED else tensor
    return out


def _translated(name: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    for one, other in prefixes.items():
        if name == one or (one.endswith(".") and name.startswith(one)):
            name = other + name.removeprefix(one)
            break
    for one, other in parts.items():
        name = name.replace(one, other)
    return name


def _swapped(names: Mapping[str, str]) -> dict[str, str]:
    return {other: one for one, other in names.items()}
