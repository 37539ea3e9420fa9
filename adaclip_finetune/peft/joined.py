"""Several methods together: each adds what it adds, and what any of them trains is trained."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.config.choices.peft import PEFT, JoinedSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.peft.base import PeftMethod, clip_of, learning


class Joined(PeftMethod):
    """Applies methods in the order in which they are listed. None of them has phases or a state of its own."""

    settings: JoinedSettings

    def __init__(self, settings: JoinedSettings) -> None:
        super().__init__(settings)
        self.parts: list[PeftMethod] = [implementation(PEFT, part)(part.config) for part in settings.methods]
        self.mergeable = all(part.mergeable for part in self.parts)
        self.keeps_outputs = all(part.keeps_outputs for part in self.parts)

    def attach(self, clip: nn.Module) -> None:
        for part in self.parts:
            part.attach(clip)

    def reset(self, model: nn.Module) -> None:
        for part in self.parts:
            part.reset(model)

    def choose(self, model: nn.Module) -> None:
        free, chosen = dict(learning(clip_of(model))), set[str]()
        for part in self.parts:
            for parameter in free.values():
                parameter.requires_grad_(True)
            part.choose(model)
            chosen |= {name for name, _ in learning(clip_of(model))}
        for name, parameter in free.items():
            parameter.requires_grad_(name in chosen)

    def before_training(self, model: nn.Module, batches: Iterator[TrainBatch]) -> None:
        for part in self.parts:
            part.before_training(model, batches)
