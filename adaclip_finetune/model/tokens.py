"""Captions → token ids, by the tokenizer that a text tower was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
