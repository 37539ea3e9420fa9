"""A CLIP that was loaded, its tokenizer, and what its text tower is like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaclip_finetune.data.preprocess import ImageSpec

LOGIT_BIAS = -10.0
"""Initial bias of the logits for a CLIP without one (SigLIP, Zhai et al. 2023): most pairs do not match."""


@dataclass(frozen=True)
class LoadedClip:
    """CLIP's towers, how images and texts are prepared for them, and where they came from.

    `tokenize(texts, max_len)` returns token ids (n, max_len), int64, cut at `max_len` but with the end token; they are
    padded to the whole context for a tower that needs it. `count_cut(texts, max_len)` counts the texts that lose words.
    `description` is what a checkpoint stores, so that the towers can be built without the file they came from.
    """

    module: nn.Module
    image: ImageSpec
    tokenize: Callable[[Sequence[str], int], Tensor]
    count_cut: Callable[[Sequence[str], int], int]
    context_length: int
    source: str
    description: Mapping[str, Any] = field(default_factory=dict)


class Tokenizer:
    """Turns captions into token ids of a given length, keeping the end token of a caption that is cut.

    `encode(texts, length)` is open_clip's tokenizer, which returns int64 ids (n, length). With `whole_context` the ids
    are padded to `context_length`, for towers that attend to the padding or count positions from the end.
    """

    def __init__(self, encode: Callable[[list[str], int], Tensor], context_length: int, whole_context: bool) -> None:
        self.encode, self.context_length, self.whole_context = encode, context_length, whole_context

    def __call__(self, texts: Sequence[str], max_len: int) -> Tensor:
        """Return int64 ids (n, max_len), or (n, context_length) with `whole_context`."""
        ids = self.encode(list(texts), max_len)
        if not self.whole_context or max_len == self.context_length:
            return ids
        padding = torch.full((len(ids), self.context_length - max_len), self._padding_id(), dtype=ids.dtype)
        return torch.cat([ids, padding], dim=1)

    def count_cut(self, texts: Sequence[str], max_len: int) -> int:
        """Count the texts that have more than `max_len` tokens."""
        # With room for one token more, a text that fits gains padding, and one that was cut gains a token.
        ids, longer = self.encode(list(texts), max_len), self.encode(list(texts), max_len + 1)
        cut = (longer[:, :-1] != ids).any(dim=1) | (longer[:, -1] != self._padding_id())
        return int(cut.sum())

    def _padding_id(self) -> int:
        return int(self.encode([""], self.context_length)[0, -1])


def ensure_logit_bias(clip: nn.Module) -> None:
    """Add a `logit_bias` at its initial value to a CLIP without one; `has_new_logit_bias` is then true."""
    if getattr(clip, "logit_bias", None) is None:
        scale = clip.logit_scale
        assert isinstance(scale, Tensor)
        clip.logit_bias = nn.Parameter(torch.full_like(scale.detach(), LOGIT_BIAS))
        clip.logit_bias_is_new = True  # type: ignore[assignment]


def has_new_logit_bias(clip: nn.Module) -> bool:
    """Return whether `logit_bias` was added by `ensure_logit_bias`; it then always learns with the sigmoid loss."""
    return getattr(clip, "logit_bias_is_new", False) is True


def text_tower(clip: nn.Module) -> nn.Module:
    """Return the module with the text tower's parts: CLIP itself (`open_clip.CLIP`, OpenAI's layout) or its child
    `text` (`open_clip.CustomTextCLIP`)."""
    tower = getattr(clip, "text", clip)
    assert isinstance(tower, nn.Module)
    return tower


def text_setting(clip: nn.Module, name: str) -> Any:
    """Return `pool_type` or `eos_id` of the text tower; `open_clip.CLIP` keeps them as `text_pool_type` and so on."""
    tower = text_tower(clip)
    return getattr(tower, f"text_{name}", getattr(tower, name, None))


def pools_at_end_token(clip: nn.Module) -> bool:
    """Return whether the text tower is causal and a sentence is its output at the end token, so that padding after the
    end token has no effect."""
    tower = text_tower(clip)
    return (
        isinstance(getattr(tower, "attn_mask", None), Tensor)
        and text_setting(clip, "pool_type") in ("argmax", "eos")
        and getattr(tower, "cls_emb", None) is None
    )
