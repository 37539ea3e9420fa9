"""The base of finetuning methods: what a method adds to CLIP, which parameters learn when, and what is saved.

`attach` gets CLIP alone; the other functions get a model with CLIP at `.clip`, under OpenAI's parameter names.
Everything outside CLIP (frame selector, header, pooling) is new and always learns, so methods never change its
`requires_grad`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adaclip_finetune.config import ChoiceSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.vit import TOWER_NAMES, Block, TowerName, tower_blocks
from adaclip_finetune.peft.importance import TensorImportance
from adaclip_finetune.weights.plain import plain_state

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of training with its own optimizer and schedule.

    `may_be_best` is False if the weights are not yet what the method promises (IBS before it selects): the epochs of
    such a phase are validated but never chosen as the result.
    """

    num_epochs: int
    batch_size: int
    may_be_best: bool = True


@dataclass(frozen=True)
class MethodState:
    """The state of a method, from which an interrupted run continues: tensors, and values that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingHistory:
    """The probabilities with which a method drew tensors: a row for each drawing, after `steps` updates."""

    names: list[str]
    steps: list[int]
    probabilities: Tensor  # (drawings, tensors)
    drawn: Tensor  # bool (drawings, tensors)


class PeftMethod:
    """A way to finetune CLIP. This base adds nothing, and trains everything that `apply_freezing` did not freeze."""

    mergeable = True
    """Whether what the method adds can be merged into CLIP's own weights, which leaves a plain CLIP."""

    keeps_outputs = True
    """Whether the outputs of CLIP are the pretrained ones until something is trained."""

    seed = 0
    """The seed of the run, for methods that draw."""

    def __init__(self, settings: ChoiceSettings) -> None:
        self.settings = settings

    def attach(self, clip: nn.Module) -> None:
        """Add modules to CLIP, without changing its outputs if `keeps_outputs`. Called before a checkpoint is loaded.

        Modules that act through hooks are of a subclass of `Added`.
        """

    def reset(self, model: nn.Module) -> None:
        """Reset the parametrizations that `attach` added, so that they change nothing.

        Called after weights were loaded into which they had been merged.
        """

    def choose(self, model: nn.Module) -> None:
        """Set `requires_grad`. Called after `apply_freezing`, with all weights loaded, before an optimizer is built."""

    def before_training(self, model: nn.Module, batches: Iterator[TrainBatch]) -> None:
        """Prepare the model. Called once, before the first update; `batches` are those of the first epoch.

        With several processes, each has its share of every batch, which may be without videos.
        """

    def phases(self, num_epochs: int, batch_size: int) -> list[Phase]:
        """Return the phases in order; their epochs add up to `num_epochs`."""
        return [Phase(num_epochs, batch_size)]

    def on_epoch_start(self, epoch: int) -> bool:
        """Return whether the set of learning parameters changed; then optimizer, schedule and wrapper are rebuilt."""
        return False

    def after_backward(self, step: int) -> None:
        """Change gradients before they are clipped."""

    def merged_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all weights of the model for best.safetensors, parametrizations merged into them.

        They are those of a plain CLIP if the method is `mergeable`; otherwise those of `Added` modules are among them.
        """
        return plain_state(model)

    def own_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors for adapter.safetensors, by the names of the model's state dict.

        These are CLIP's tensors that differ from the pretrained ones (and running statistics of towers that have any),
        what `attach` added, and all of the selector and pooling; but not a frozen copy of CLIP's image tower, which
        comes from the pretrained weights.
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
        """Return the names of the CLIP parameters, added ones included, that may differ from the pretrained ones."""
        return {name for name, parameter in clip_of(model).named_parameters() if parameter.requires_grad}

    def parameter_rows(self) -> list[TensorImportance]:
        """Return the candidate tensors and whether each was retained, for methods that select by importance."""
        return []

    def sampling_history(self) -> SamplingHistory | None:
        """Return with which probabilities tensors were drawn so far, for methods that draw them."""
        return None

    def state_dict(self) -> MethodState:
        """Return the state from which `load_state_dict` continues."""
        return MethodState()

    def load_state_dict(self, state: MethodState) -> None:
        """Continue from what `state_dict` returned. Called after `choose`; weights come from the checkpoint."""


def clip_of(model: nn.Module) -> nn.Module:
    """Return the CLIP inside the model."""
    return model.get_submodule("clip")


def learning(clip: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return names and parameters of CLIP that learn at present."""
    return ((name, parameter) for name, parameter in clip.named_parameters() if parameter.requires_grad)


def holds_keyword(name: str, keywords: Iterable[str]) -> bool:
    """Return whether the parameter name contains one of the keywords."""
    return any(keyword in name for keyword in keywords)


def warn_of_idle_keywords(clip: nn.Module, keywords: Iterable[str]) -> None:
    """Warn about `keep_module_keywords` that occur in no parameter name: a typing error, or another kind of tower."""
    names = [name for name, _ in clip.named_parameters()]
    idle = [keyword for keyword in keywords if not any(keyword in name for name in names)]
    if idle:
        _log.warning("keep_module_keywords: no parameter of this CLIP has %s in its name", " or ".join(map(repr, idle)))


def train_added(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...], keywords: Iterable[str]
) -> None:
    """Let only the parameters of CLIP's modules of these classes learn, and those that `keywords` name."""
    clip = clip_of(model)
    warn_of_idle_keywords(clip, keywords)
    added = {id(own) for module in clip.modules() if isinstance(module, kinds) for own in module.parameters()}
    for name, parameter in learning(clip):
        parameter.requires_grad_(id(parameter) in added or holds_keyword(name, keywords))


def chosen_blocks(clip: nn.Module, method: str, towers: str, layers: Iterable[int]) -> dict[TowerName, list[Block]]:
    """Return the blocks of the chosen towers (image, text or both); those numbered in `layers`, or all if it is empty.

    Raise UserError for a tower that cannot be opened, or a number that no tower has.
    """
    found: dict[TowerName, Sequence[Block]] = {}
    for name in TOWER_NAMES:
        if towers in (name, "both"):
            try:
                found[name] = tower_blocks(clip, name)
            except UserError as error:
                other = "text" if name == "image" else "image"
                raise UserError(
                    f"peft {method}: {error}; set peft.config.towers to {other}, or take peft bitfit or full"
                ) from error
    for number in layers:
        if all(number >= len(blocks) for blocks in found.values()):
            depths = " and ".join(f"the {name} tower {len(blocks)}" for name, blocks in found.items())
            raise UserError(f"peft.config.layers names block {number}, counted from 0, but there are fewer: {depths}")
    wanted = set(layers)
    return {
        name: [block for number, block in enumerate(blocks) if not wanted or number in wanted]
        for name, blocks in found.items()
    }


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
