"""A frozen causal language model of transformers, which continues a prefix of input embeddings with a caption.

transformers is an optional dependency (`pip install adaclip-finetune[caption]`) and is imported when a model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.errors import UserError


class Tokens(NamedTuple):
    """Captions as `ids` (B, L), int64, each with the end token unless it was cut; `mask` (B, L) is False behind it."""

    ids: Tensor
    mask: Tensor


def optional_library(name: str) -> Any:
    """Import a library of the extra `caption`. Raise UserError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"captions need {name}: pip install 'adaclip-finetune[caption]' ({error})") from error


def input_width(source: str) -> int:
    """Return the width of a language model's input embeddings, from its config alone. Raise UserError."""
    transformers = optional_library("transformers")
    with _explained(source), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return int(model.get_input_embeddings().embedding_dim)


class LanguageModel:
    """A language model in evaluation mode, in float32, with its tokenizer; nothing of it learns.

    `source` is a name or a folder, as transformers has it. Code that comes with a model is never run. Raise UserError.
    """

    def __init__(self, source: str) -> None:
        transformers = optional_library("transformers")
        with _explained(source):
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.module: Any = model.requires_grad_(False).eval()
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise UserError(f"captioner.config.language_model {source}: its tokenizer has no end token (eos_token)")
        self.longest = getattr(self.module.config, "max_position_embeddings", None)

    def tokenize(self, texts: Sequence[str], max_tokens: int) -> Tokens:
        """Return the tokens of texts, on the CPU; what is beyond `max_tokens` is cut off."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*ids, self.end][:max_tokens]) for ids in encoded]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.end)
        lengths = torch.tensor([len(row) for row in rows])
        return Tokens(ids, torch.arange(ids.shape[1]) < lengths[:, None])

    def losses(self, prefix: Tensor, tokens: Tokens) -> Tensor:
        """Return the cross-entropy of each token of a caption, given the prefix (B, P, W) and the tokens before it.

        The losses (B, L) are at least float32, and 0 behind the end of a caption.
        """
        words = self.module.get_input_embeddings()(tokens.ids)
        inputs = torch.cat([prefix, words[:, :-1]], dim=1)
        mask = torch.cat([tokens.mask.new_ones(prefix.shape[:2]), tokens.mask[:, :-1]], dim=1)
        count = tokens.ids.shape[1]
        logits = self.module(inputs_embeds=inputs, attention_mask=mask.long(), logits_to_keep=count).logits
        return token_losses(logits[:, -count:], tokens)

    @torch.no_grad()
    def generate(self, prefix: Tensor, max_tokens: int, beams: int, captions: int = 1) -> Tensor:
        """Return the token ids (B · captions, max_tokens) of the likeliest captions behind each prefix (B, P, W).

        They are found by beam search, the best of each prefix first. The score of a caption is the mean log probability
        of its tokens. The end token fills the rows.
        """
        ids: Tensor = self.module.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            max_new_tokens=max_tokens,
            num_beams=beams,
            num_return_sequences=captions,
            do_sample=False,
            length_penalty=1.0,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        return F.pad(ids, (0, max_tokens - ids.shape[1]), value=self.end)

    def tokens(self, ids: Tensor) -> Tokens:
        """Return token ids (B, L) as captions, each up to its first end token."""
        ends = (ids == self.end).long()
        return Tokens(ids, ends.cumsum(dim=1) == ends)

    def texts(self, ids: Tensor) -> list[str]:
        """Return the texts of token ids (B, L), each up to its end token, without line breaks and double spaces."""
        rows = [row[: row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        return [" ".join(self.tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]


def token_losses(logits: Tensor, tokens: Tokens) -> Tensor:
    """Return the cross-entropies (B, L) of tokens, given the logits (B, L, V) at each place, 0 where the mask is False.

    They are float32 even under autocast, and float64 for float64 logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.ids.flatten(), reduction="none")
    return losses.reshape(tokens.ids.shape) * tokens.mask


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Raise UserError for what transformers raises about a model that it cannot open."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "is not a causal language model that transformers can open here"
        raise UserError(f"captioner.config.language_model {source} {what}: {reason}") from error
