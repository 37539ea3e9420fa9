"""`learns: context`: learn what the first words of all class texts are, as "a photo of a" (CoOp, Zhou et al. 2022,
"Learning to Prompt for Vision-Language Models")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaclip_finetune.config.choices.adaptations import ContextSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.base import PeftMethod
from adaclip_finetune.weights.loaded import text_tower
from adaclip_finetune.weights.plain import Added


class Offset(Added):
    """What is added to the embeddings of the tokens behind the start token, (count, width); at first nothing."""

    def __init__(self, count: int, like: Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(like.new_zeros(count, like.shape[1]))

    def add(self, embedding: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Return the embeddings (T, L, width) of texts with the offsets: a forward hook."""
        count = min(len(self.tokens), out.shape[1] - 1)
        return torch.cat([out[:, :1], out[:, 1 : 1 + count] + self.tokens[:count], out[:, 1 + count :]], dim=1)


class Context(PeftMethod):
    """Learns the offsets alone."""

    settings: ContextSettings
    mergeable = False

    def attach(self, clip: nn.Module) -> None:
        embedding = getattr(text_tower(clip), "token_embedding", None)
        if not isinstance(embedding, nn.Embedding):
            raise UserError(
                "adaptation.config.learns context: this text tower is not open_clip's own; take full or bitfit"
            )
        clip.context = Offset(self.settings.tokens, embedding.weight)
        self._hook = embedding.register_forward_hook(clip.context.add)

    def detach(self, clip: nn.Module) -> None:
        """Take away what `attach` added."""
        if hasattr(clip, "context"):
            self._hook.remove()
            del clip.context

    def choose(self, model: nn.Module) -> None:
        for name, parameter in model.get_submodule("clip").named_parameters():
            parameter.requires_grad_(name.startswith("context."))
