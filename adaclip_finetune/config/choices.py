"""What can be chosen by name, each with settings of its own: so far the methods of parameter-efficient finetuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from adaclip_finetune.config.base import Names, Problem, Settings, setting


class MethodSettings(Settings):
    """What the settings of every method share."""

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Combinations of the method's settings with others that cannot be; none unless a method says so."""
        yield from ()

    def with_fitting_batches(self, fit: Callable[[int], int]) -> MethodSettings:
        """The same with each batch size of the method's own replaced by what fits into memory (auto_batch_size)."""
        return self


class FullSettings(MethodSettings):
    """Everything that freeze_layer_num and freeze_clip leave learns."""


class BitFitSettings(MethodSettings):
    """Only biases learn, and what the keywords name (Ben Zaken et al. 2022)."""

    keep_module_keywords: Names = setting((), "parameters whose name holds one of these always learn")
    include_qkv_bias: bool = setting(False, "the fused biases of queries, keys and values learn too")


class IbsSettings(MethodSettings):
    """Importance-based selection: a few epochs of everything, then only the tensors that mattered."""

    pre_batch_size: int | None = setting(
        None, "batch size while everything learns; null: batch_size", unit="videos", ge=1
    )
    num_pre_epochs: int = setting(1, "first epochs, in which everything learns", unit="epochs", ge=1)
    retain_ratio: float = setting(0.1, "share of the candidate parameters that goes on learning", gt=0, le=1)
    metric: Literal["l2norm", "angle"] = setting("l2norm", "how far a tensor moved: by norm, or by angle in degrees")
    normalization: bool = setting(True, "compare importance within groups of tensors of like size")
    num_groups: int = setting(2, "groups of the normalization", unit="groups", ge=1)
    keep_module_keywords: Names = setting((), "parameters whose name holds one of these always learn")
    keep_evolved: bool = setting(
        False, "frozen tensors keep what they learned at first, instead of going back to CLIP's values"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """The first epochs must leave some, and CLIP something to select from."""
        if self.num_pre_epochs >= config.num_epochs:
            left = f"leaves no epoch of num_epochs {config.num_epochs} for what is selected"
            names = ("peft.config.num_pre_epochs", "num_epochs")
            yield f"peft.config.num_pre_epochs {self.num_pre_epochs} {left}", names
        if config.freeze_clip:
            yield "freeze_clip leaves peft.method ibs nothing to select from", ("freeze_clip", "peft.method")

    def with_fitting_batches(self, fit: Callable[[int], int]) -> IbsSettings:
        if self.pre_batch_size is None:
            return self
        return self.model_copy(update={"pre_batch_size": fit(self.pre_batch_size)})


Name = TypeVar("Name", bound=str)
Method = TypeVar("Method", bound=MethodSettings)


class Peft(Settings, Generic[Name, Method]):
    """A method and its settings."""

    method: Name = setting(..., "how CLIP learns")
    config: Method = setting({}, "the settings of the method")

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """Name `Peft[Literal["bitfit"], BitFitSettings]` BitFitPeft in the JSON Schema."""
        return str(params[1].__name__).removesuffix("Settings") + "Peft"


PeftChoice = Annotated[
    Peft[Literal["full"], FullSettings] | Peft[Literal["bitfit"], BitFitSettings] | Peft[Literal["ibs"], IbsSettings],
    Field(discriminator="method"),
]
