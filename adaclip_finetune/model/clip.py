"""What goes on inside the CLIP towers: everything that depends on how open_clip lays out its modules.

A text tower is either the CLIP module itself (OpenAI's layout, `open_clip.CLIP`) or its child `text`
(`open_clip.CustomTextCLIP`); the names of the tensors below are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from open_clip.transformer import Transformer
from torch import Tensor, nn

from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError


@dataclass(frozen=True)
class LoadedClip:
    """The towers and how to feed them.

    `tokenize(texts, max_len)` gives int64 (n, max_len), cut at max_len keeping the end token; a tower that needs its
    whole context gets it padded to that. `count_cut(texts, max_len)` says how many texts lose words that way.
    """

    module: nn.Module
    image: ImageSpec
    tokenize: Callable[[Sequence[str], int], Tensor]
    count_cut: Callable[[Sequence[str], int], int]
    context_length: int
    source: str


def text_tower(clip: nn.Module) -> nn.Module:
    """The module that holds token_embedding, transformer, ln_final …"""
    tower = getattr(clip, "text", clip)
    assert isinstance(tower, nn.Module)
    return tower


def embedding_width(clip: nn.Module) -> int:
    """D, the width of the shared embedding space."""
    for owner in (clip.visual, text_tower(clip)):
        if isinstance(width := getattr(owner, "output_dim", None), int):
            return width
    projection = text_tower(clip).text_projection
    assert isinstance(projection, Tensor)
    return projection.shape[1]


def text_blocks(clip: nn.Module) -> list[nn.Module]:
    """The residual attention blocks of the text tower, or none if it is not one of open_clip's own transformers."""
    transformer = getattr(text_tower(clip), "transformer", None)
    return list(getattr(transformer, "resblocks", []))


def text_positions(clip: nn.Module) -> Tensor | None:
    """The text tower's positional embedding (context_length, width)."""
    positions = getattr(text_tower(clip), "positional_embedding", None)
    return positions if isinstance(positions, Tensor) else None


def encode_images(clip: nn.Module, pixels: Tensor) -> Tensor:
    """Normalised images (n, 3, S, S) → embeddings (n, D), not normalised. `clip` holds the image tower as `visual`."""
    out = clip.get_submodule("visual")(pixels)
    # CoCa's tower gives the embeddings of its patches too.
    embeddings = out[0] if isinstance(out, tuple) else out
    assert isinstance(embeddings, Tensor)
    return embeddings


def pools_at_end_token(clip: nn.Module) -> bool:
    """True for a causal text tower whose sentence is the output at the end token: what follows it cannot matter."""
    tower = text_tower(clip)
    return (
        isinstance(getattr(tower, "attn_mask", None), Tensor)
        and _text_setting(clip, "pool_type") in ("argmax", "eos")
        and getattr(tower, "cls_emb", None) is None
    )


def end_positions(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Where the end token stands in each row of token_ids (T, L): int64 (T,)."""
    if _text_setting(clip, "pool_type") == "eos":
        is_end: Tensor = token_ids == _text_setting(clip, "eos_id")
        return is_end.int().argmax(dim=-1)
    # In CLIP's vocabulary the end token has the highest number.
    return token_ids.argmax(dim=-1)


def trim_padding(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Drop the columns after the longest text of the batch, where that cannot change the embeddings.

    Only for ids on the CPU: on an accelerator, asking for the longest would wait for the device.
    """
    if token_ids.device.type != "cpu" or not len(token_ids) or not pools_at_end_token(clip):
        return token_ids
    return token_ids[:, : int(end_positions(clip, token_ids).max()) + 1]


def encode_sentences(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Token ids (T, L) → sentence embeddings (T, D), not normalised."""
    if not pools_at_end_token(clip):
        return cast(_Clip, clip).encode_text(token_ids)
    hidden = _text_hidden(clip, token_ids)
    rows = torch.arange(len(hidden), device=hidden.device)
    return _project_text(clip, hidden[rows, end_positions(clip, token_ids)])


def encode_words(clip: nn.Module, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (T, L) → word embeddings (T, L, D) and which of them count, bool (T, L): all up to the end token.

    Raises UserError for a text tower without an end token to stop at.
    """
    if not pools_at_end_token(clip):
        raise UserError("word_agg: this text tower does not pool at an end token; leave word_agg unset for it")
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_word = positions <= end_positions(clip, token_ids)[:, None]
    return _project_text(clip, _text_hidden(clip, token_ids)), is_word


class _Clip(Protocol):
    """What every CLIP module of open_clip can do."""

    def encode_text(self, text: Tensor) -> Tensor: ...


class _CausalText(Protocol):
    """What holds the parts of a causal text tower."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # (context_length, width)
    transformer: Transformer
    attn_mask: Tensor  # (context_length, context_length)
    ln_final: nn.LayerNorm
    text_projection: Tensor | nn.Linear | None


def _text_setting(clip: nn.Module, name: str) -> Any:
    """`pool_type` or `eos_id` of the text tower, which a CLIP that is its own text tower keeps as `text_…`."""
    tower = text_tower(clip)
    return getattr(tower, f"text_{name}", getattr(tower, name, None))


def _text_hidden(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Causal tower: the hidden states (T, L, width) of the first L positions, after ln_final."""
    tower, length = cast(_CausalText, text_tower(clip)), token_ids.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    hidden = tower.token_embedding(token_ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
    hidden = tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length])
    out: Tensor = tower.ln_final(hidden)
    return out


def _project_text(clip: nn.Module, hidden: Tensor) -> Tensor:
    projection = cast(_CausalText, text_tower(clip)).text_projection
    if projection is None:
        return hidden
    out: Tensor = projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection
    return out
