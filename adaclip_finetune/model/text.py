"""The text tower: token ids to sentence vectors, and to word vectors for word pooling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.weights.loaded import pools_at_end_token, text_setting, text_tower


class TextTower(nn.Module, ABC):
    """Encodes token ids (T, L); word features only with `words`.

    Ids on the CPU are cut to the longest text of the batch, if that cannot change the features, and moved to the model.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self._clip = (clip,)  # in a tuple, which hides it from torch's registration of submodules

    @property
    def clip(self) -> nn.Module:
        """The CLIP whose text tower this one uses."""
        return self._clip[0]

    @abstractmethod
    def forward(self, token_ids: Tensor, words: bool = False) -> TextFeatures: ...


class ClipTextTower(TextTower):
    """CLIP's own text tower, unchanged."""

    def forward(self, token_ids: Tensor, words: bool = False) -> TextFeatures:
        scale = self.clip.logit_scale
        assert isinstance(scale, Tensor)
        token_ids = trim_padding(self.clip, token_ids).to(scale.device)
        if not words:
            return TextFeatures(encode_sentences(self.clip, token_ids))
        embedded, is_word = encode_words(self.clip, token_ids)
        return TextFeatures(rows_at(embedded, end_positions(self.clip, token_ids)), embedded, is_word)


def end_positions(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Return the position of the end token in each row of token_ids (T, L): int64 (T,).

    For a tower that pools at the first or the last token of all, it is the position of that one.
    """
    pooling = text_setting(clip, "pool_type")
    if pooling in ("first", "last"):
        return token_ids.new_full(token_ids.shape[:1], token_ids.shape[1] - 1 if pooling == "last" else 0)
    if pooling == "eos":
        is_end: Tensor = token_ids == text_setting(clip, "eos_id")
        return is_end.int().argmax(dim=-1)
    # In CLIP's vocabulary the end token has the highest number.
    return token_ids.argmax(dim=-1)


def trim_padding(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Drop the columns after the longest text of the batch, if that cannot change the embeddings.

    Ids on an accelerator stay as they are, because finding the longest text would wait for the device.
    """
    if token_ids.device.type != "cpu" or not len(token_ids) or not pools_at_end_token(clip):
        return token_ids
    return token_ids[:, : int(end_positions(clip, token_ids).max()) + 1]


def encode_sentences(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Return the sentence embeddings (T, D) of token ids (T, L), not normalised."""
    if not pools_at_end_token(clip):
        any_clip: Any = clip
        sentences: Tensor = any_clip.encode_text(token_ids)
        return sentences
    return finish_text(clip, rows_at(_text_hidden(clip, token_ids), end_positions(clip, token_ids)))


def encode_words(clip: nn.Module, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the word embeddings (T, L, D) of token ids (T, L), and a mask (T, L) that is True up to the end token.

    The text tower must be one that `check_words` accepts.
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_word = positions <= end_positions(clip, token_ids)[:, None]
    return finish_text(clip, _text_hidden(clip, token_ids)), is_word


def check_words(clip: nn.Module) -> None:
    """Raise UserError for a text tower without an end token, which does not tell where the words of a text end."""
    if not pools_at_end_token(clip):
        raise UserError("word_agg: this text tower does not pool at an end token; leave word_agg unset for it")


def embed_tokens(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Return what enters the first block of open_clip's own text tower: (T, L) → (T, L, width)."""
    tower: Any = text_tower(clip)
    dtype = tower.transformer.get_cast_dtype()
    places = tower.positional_embedding[: token_ids.shape[1]].to(dtype)
    embedded: Tensor = tower.token_embedding(token_ids).to(dtype) + places
    return embedded


def finish_text(clip: nn.Module, hidden: Tensor) -> Tensor:
    """Return embeddings (…, D) of what leaves the last block of open_clip's own text tower, (…, width)."""
    tower: Any = text_tower(clip)
    out: Tensor = tower.ln_final(hidden)
    if (projection := tower.text_projection) is not None:
        out = projection(out) if isinstance(projection, nn.Linear) else out @ projection
    return out


def rows_at(rows: Tensor, positions: Tensor) -> Tensor:
    """Return row positions[t] of each rows[t]: (T, L, W) → (T, W)."""
    return rows[torch.arange(len(rows), device=rows.device), positions]


def _text_hidden(clip: nn.Module, token_ids: Tensor) -> Tensor:
    """Return what leaves the last block of a causal tower, (T, L, width)."""
    tower: Any = text_tower(clip)
    length = token_ids.shape[1]
    hidden: Tensor = tower.transformer(embed_tokens(clip, token_ids), attn_mask=tower.attn_mask[:length, :length])
    return hidden
