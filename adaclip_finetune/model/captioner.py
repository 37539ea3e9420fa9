"""The captioner: a mapper from vectors of CLIP to the prefix that a frozen language model continues with a caption.

ClipCap (Mokady et al. 2021, "ClipCap: CLIP Prefix for Image Captioning") has the MLP and the transformer. Only the
mapper is part of a model's state; of the language model there is a digest, by which it is recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config.choices.base import Chosen, implementation
from adaclip_finetune.config.choices.captioners import (
    CAPTIONERS,
    CaptionerSettings,
    MlpCaptionerSettings,
    TransformerCaptionerSettings,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import VideoFeatures, at_least_float32
from adaclip_finetune.model.language_model import LanguageModel, input_width
from adaclip_finetune.weights.plain import weights_digest


class MlpMapper(nn.Module):
    """Maps vectors (B, D) to prefixes (B, P, W) through one hidden layer of P · W / 2 units."""

    def __init__(self, settings: MlpCaptionerSettings, width: int, word_width: int) -> None:
        super().__init__()
        self.word_width, size = word_width, settings.prefix_length * word_width
        self.hidden, self.out = nn.Linear(width, size // 2), nn.Linear(size // 2, size)

    def forward(self, vectors: Tensor) -> Tensor:
        prefix: Tensor = self.out(self.hidden(vectors).tanh())
        return prefix.reshape(len(vectors), -1, self.word_width)


class TransformerMapper(nn.Module):
    """Maps vectors (B, D) to prefixes (B, P, W): what a transformer makes of P learned tokens.

    It also reads the `vector_tokens` tokens to which a linear layer maps the vector.
    """

    def __init__(self, settings: TransformerCaptionerSettings, width: int, word_width: int) -> None:
        super().__init__()
        if word_width % settings.heads:
            raise UserError(
                f"captioner.config.heads {settings.heads} does not divide {word_width}, the width of language_model "
                f"{settings.language_model}: give another number"
            )
        self.word_width = word_width
        self.linear = nn.Linear(width, settings.vector_tokens * word_width)
        self.prefix = nn.Parameter(torch.randn(settings.prefix_length, word_width))
        self.layers = nn.ModuleList(_MapperBlock(word_width, settings.heads) for _ in range(settings.layers))

    def forward(self, vectors: Tensor) -> Tensor:
        mapped = self.linear(vectors).reshape(len(vectors), -1, self.word_width)
        tokens: Tensor = torch.cat([mapped, self.prefix.expand(len(vectors), -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, -len(self.prefix) :]


class _MapperBlock(nn.Module):
    """A block with norms in front of attention and MLP, without biases of queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys_values = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        parts = self.queries(normed), *self.keys_values(normed).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.project(attended)
        mixed: Tensor = tokens + self.proj(self.fc(self.norm2(tokens)).relu())
        return mixed


class Captioner(nn.Module):
    """Turns vectors of width D into captions. The language model is opened when it is first used."""

    digest: Tensor

    def __init__(self, section: Chosen, width: int, frames: int) -> None:
        """`width` is D, and `frames` the number of frame vectors that a video has."""
        super().__init__()
        assert isinstance(section.config, CaptionerSettings)
        self.settings = section.config
        self.vectors = frames if self.settings.prefix == "frames" else 1
        word_width = input_width(self.settings.language_model)
        self.mapper: nn.Module = implementation(CAPTIONERS, section)(self.settings, width, word_width)
        # SHA-256 of the language model that the mapper learned with; zeros until it has learned.
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self._opened: tuple[LanguageModel, ...] = ()  # in a tuple, which hides it from torch's registration

    def language_model(self) -> LanguageModel:
        """Return the language model, on the device of the mapper. Raise UserError if the mapper learned with another
        one, or if it reads too few tokens."""
        if not self._opened:
            source, settings = self.settings.language_model, self.settings
            model = LanguageModel(source)
            found = torch.frombuffer(bytearray.fromhex(weights_digest(model.module)), dtype=torch.uint8)
            if self.digest.any() and not self.digest.cpu().equal(found):
                raise UserError(
                    f"captioner.config.language_model {source} has other weights than the language model that this "
                    "captioner learned with: name that one"
                )
            longest = self.vectors * settings.prefix_length + settings.max_tokens
            if model.longest is not None and longest > model.longest:
                raise UserError(
                    f"captioner.config.language_model {source} reads {model.longest} tokens, but {self.vectors} x "
                    f"prefix_length and max_tokens are {longest}: lower one of them"
                )
            self.digest.copy_(found)
            like = next(self.mapper.parameters())
            model.module.to(like.device, like.dtype)
            self._opened = (model,)
        return self._opened[0]

    def inputs(self, videos: VideoFeatures) -> Tensor:
        """Return the unit vectors (B, n, D) from which the prefix is made: the video's, or its frames' in order."""
        if self.settings.prefix == "video":
            assert videos.vector is not None
            return F.normalize(at_least_float32(videos.vector), dim=-1)[:, None]
        tokens = videos.tokens
        if videos.selection is not None and tokens.shape[1] == videos.selection.indices.shape[1]:
            order = videos.selection.indices.argsort(dim=1)
            tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        return F.normalize(at_least_float32(tokens), dim=-1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the prefixes (B, n · P, W) made of unit vectors (B, n, D), at least float32."""
        prefixes = at_least_float32(self.mapper(vectors.flatten(0, 1)))
        return prefixes.reshape(len(vectors), -1, prefixes.shape[2])

    @torch.no_grad()
    def generate(self, vectors: Tensor, beams: int, captions: int = 1) -> Tensor:
        """Return the token ids (B · captions, max_tokens) of captions for each row of unit vectors (B, n, D)."""
        return self.language_model().generate(self(vectors), self.settings.max_tokens, beams, captions)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has; it opens the language model itself."""
        return {**self.__dict__, "_opened": ()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the language model as well."""
        for model in self._opened:
            model.module._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
