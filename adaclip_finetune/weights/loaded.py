"""A CLIP that was loaded, and how it is fed: pixels and token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaclip_finetune.data.preprocess import ImageSpec


@dataclass(frozen=True)
class LoadedClip:
    """The towers and how to feed them.

    `tokenize(texts, max_len)` gives int64 (n, max_len), cut at max_len keeping the end token; a tower that needs its
    whole context gets it padded to that. `count_cut(texts, max_len)` says how many texts lose words that way.
    `description` is what a checkpoint keeps, so that the towers can be built again without the file they came from.
    """

    module: nn.Module
    image: ImageSpec
    tokenize: Callable[[Sequence[str], int], Tensor]
    count_cut: Callable[[Sequence[str], int], int]
    context_length: int
    source: str
    description: Mapping[str, Any] = field(default_factory=dict)


class Tokenizer:
    """Cuts captions at a length and keeps the end token of what is left.

    `encode(texts, length)` is open_clip's tokenizer: int64 (n, length), padded or cut. With `whole_context` the ids are
    padded to `context_length`, for towers that look at the padding or count positions from the end.
    """

    def __init__(self, encode: Callable[[list[str], int], Tensor], context_length: int, whole_context: bool) -> None:
        self.encode, self.context_length, self.whole_context = encode, context_length, whole_context

    def __call__(self, texts: Sequence[str], max_len: int) -> Tensor:
        """int64 (n, max_len), or (n, context_length)."""
        ids = self.encode(list(texts), max_len)
        if not self.whole_context or max_len == self.context_length:
            return ids
        padding = torch.full((len(ids), self.context_length - max_len), self._padding_id(), dtype=ids.dtype)
        return torch.cat([ids, padding], dim=1)

    def count_cut(self, texts: Sequence[str], max_len: int) -> int:
        """How many of the texts do not fit into max_len tokens."""
        # Given one place more, what fits gains a padding, and what does not gains a token.
        ids, longer = self.encode(list(texts), max_len), self.encode(list(texts), max_len + 1)
        cut = (longer[:, :-1] != ids).any(dim=1) | (longer[:, -1] != self._padding_id())
        return int(cut.sum())

    def _padding_id(self) -> int:
        return int(self.encode([""], self.context_length)[0, -1])


LOGIT_BIAS = -10.0
"""Where the bias of the logits begins for a CLIP that has none (SigLIP, Zhai et al. 2023): most pairs are wrong."""


def ensure_logit_bias(clip: nn.Module) -> None:
    """Give a CLIP without a `logit_bias` a new one, at its starting value; `has_new_logit_bias` tells of it."""
    if getattr(clip, "logit_bias", None) is None:
        scale = clip.logit_scale
        assert isinstance(scale, Tensor)
        clip.logit_bias = nn.Parameter(torch.full_like(scale.detach(), LOGIT_BIAS))
        clip.logit_bias_is_new = True  # type: ignore[assignment]


def has_new_logit_bias(clip: nn.Module) -> bool:
    """Whether `logit_bias` is none that the CLIP was pretrained with: then it always learns with the sigmoid loss."""
    return getattr(clip, "logit_bias_is_new", False) is True


def text_tower(clip: nn.Module) -> nn.Module:
    """The module that holds token_embedding, transformer, ln_final …: CLIP itself (OpenAI's layout, `open_clip.CLIP`)
    or its child `text` (`open_clip.CustomTextCLIP`)."""
    tower = getattr(clip, "text", clip)
    assert isinstance(tower, nn.Module)
    return tower


def text_setting(clip: nn.Module, name: str) -> Any:
    """`pool_type` or `eos_id` of the text tower, which a CLIP that is its own text tower keeps as `text_…`."""
    tower = text_tower(clip)
    return getattr(tower, f"text_{name}", getattr(tower, name, None))


def pools_at_end_token(clip: nn.Module) -> bool:
    """True for a causal text tower whose sentence is the output at the end token: what follows it cannot matter."""
    tower = text_tower(clip)
    return (
        isinstance(getattr(tower, "attn_mask", None), Tensor)
        and text_setting(clip, "pool_type") in ("argmax", "eos")
        and getattr(tower, "cls_emb", None) is None
    )
