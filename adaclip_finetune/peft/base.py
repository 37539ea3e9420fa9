"""What every finetuning method shares: what it adds to CLIP, which parameters learn, when, and what it leaves behind.

A method sees CLIP alone when it adds something (`attach`), and later a model with CLIP at `.clip`, under OpenAI's
parameter names. Whatever stands outside CLIP (frame selector, header, pooling) is new and always learns, so methods
never touch its `requires_grad`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.peft.importance import TensorImportance
from adaclip_finetune.weights.plain import plain_state

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimizer and a schedule of its own.

    `may_be_best` is False where the weights are not yet what the method promises (IBS before it selects): an epoch of
    such a phase is validated but never chosen as the result.
    """

    num_epochs: int
    batch_size: int
    may_be_best: bool = True


@dataclass(frozen=True)
class MethodState:
    """What a method needs to continue after an interruption: tensors, and values that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class PeftMethod:
    """A way to finetune CLIP. This base adds nothing, trains whatever `apply_freezing` left and remembers nothing."""

    mergeable = True
    """Whether what the method added can be folded into CLIP's own weights, so that a plain CLIP suffices afterwards."""

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    def attach(self, clip: nn.Module) -> None:
        """Add modules to CLIP that leave its outputs as they are. Called once, before a checkpoint is filled in."""

    def reset(self, model: nn.Module) -> None:
        """Make what `attach` added change nothing. Called when plain weights were filled in below it."""

    def choose(self, model: nn.Module) -> None:
        """Set what learns, after `apply_freezing` and before the optimizer, with all weights in place."""

    def phases(self, num_epochs: int, batch_size: int) -> list[Phase]:
        """The phases, in order; their epochs add up to `num_epochs`."""
        return [Phase(num_epochs, batch_size)]

    def on_epoch_start(self, epoch: int) -> bool:
        """True if the set of learning parameters changed: optimizer, schedule and wrapper are made anew."""
        return False

    def after_backward(self, step: int) -> None:
        """May change gradients before they are clipped."""

    def merged_state(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights of the model as best.safetensors holds them: with CLIP's plain names if `mergeable`."""
        return plain_state(model) if self.mergeable else dict(model.state_dict())

    def own_state(self, model: nn.Module) -> dict[str, Tensor]:
        """What adapter.safetensors holds, by the names of the model's state dict.

        CLIP's tensors that differ from the pretrained ones (and running statistics, where a tower has any), what
        `attach` added, and all of the selector and pooling; but not a frozen copy of CLIP's image tower, which the
        pretrained weights bring.
        """
        changed = self.changed_parameters(model)
        unchanged = {f"clip.{name}" for name, _ in clip_of(model).named_parameters() if name not in changed}
        copies = tuple(f"{name}." for name in _frozen_tower_copies(model))
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in unchanged and not name.startswith(copies)
        }

    def changed_parameters(self, model: nn.Module) -> set[str]:
        """Names of the CLIP parameters, added ones included, that may differ from the pretrained ones by now."""
        return {name for name, parameter in clip_of(model).named_parameters() if parameter.requires_grad}

    def parameter_rows(self) -> list[TensorImportance]:
        """The candidate tensors and what became of them, for methods that choose by importance; else empty."""
        return []

    def state_dict(self) -> MethodState:
        """What `load_state_dict` needs to continue in the middle of a run."""
        return MethodState()

    def load_state_dict(self, state: MethodState) -> None:
        """Continue from `state_dict()`. Called after `choose`; the weights come from the checkpoint."""


def clip_of(model: nn.Module) -> nn.Module:
    """The CLIP inside the model."""
    return model.get_submodule("clip")


def learning(clip: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of CLIP that learn as things stand."""
    return ((name, parameter) for name, parameter in clip.named_parameters() if parameter.requires_grad)


def holds_keyword(name: str, keywords: Iterable[str]) -> bool:
    """Whether the parameter name holds one of the keywords."""
    return any(keyword in name for keyword in keywords)


def warn_of_idle_keywords(clip: nn.Module, keywords: Iterable[str]) -> None:
    """Warn about `keep_module_keywords` that no parameter of this CLIP holds: a slip, or another kind of tower."""
    names = [name for name, _ in clip.named_parameters()]
    idle = [keyword for keyword in keywords if not any(keyword in name for name in names)]
    if idle:
        _log.warning("keep_module_keywords: no parameter of this CLIP has %s in its name", " or ".join(map(repr, idle)))


def _frozen_tower_copies(model: nn.Module) -> list[str]:
    tower = getattr(clip_of(model), "visual", None)
    return [
        name
        for name, module in model.named_modules()
        if tower is not None
        and type(module) is type(tower)
        and not name.startswith("clip.")
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]
