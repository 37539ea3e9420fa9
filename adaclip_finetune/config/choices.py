"""What a run chooses by name: a PEFT method, a tower, an objective, a task, an adaptation. Torch-free.

A choice is a settings class here, one line in its table, and the class that the line names, which is imported when it
is used. In a config a choice is a section `{"method": name, "config": {...}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import Field, create_model

from adaclip_finetune.config.base import Names, Problem, Settings, setting


class ChoiceSettings(Settings):
    """What the settings of every choice share."""

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield the settings that contradict others of the whole `config`; none unless a choice says so."""
        yield from ()

    def with_fitting_batches(self, fit: Callable[[int], int]) -> ChoiceSettings:
        """Return the same with each batch size of the choice's own replaced by what fits into memory
        (auto_batch_size)."""
        return self


class Chosen(Settings):
    """A section of the config that names a choice and holds its settings."""

    method: str
    config: ChoiceSettings


class Choice(NamedTuple):
    """A choice: its settings, and `module:name` below adaclip_finetune of the class that they configure."""

    settings: type[ChoiceSettings]
    implementation: str


def implementation(table: Mapping[str, Choice], section: Chosen) -> Any:
    """Import and return the class that `section.method` names."""
    module, name = table[section.method].implementation.split(":")
    return getattr(import_module(f"adaclip_finetune.{module}"), name)


# ---- parameter-efficient finetuning ----

LoraTargets = Annotated[tuple[Literal["q", "k", "v", "out", "fc", "proj"], ...], Field(strict=False)]
LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class FullSettings(ChoiceSettings):
    """Everything that freeze_layer_num and freeze_clip leave learns."""


class BitFitSettings(ChoiceSettings):
    """Only biases learn, and what the keywords name (Ben Zaken et al. 2022)."""

    keep_module_keywords: Names = setting((), "parameters whose name holds one of these always learn")
    include_qkv_bias: bool = setting(False, "the fused biases of queries, keys and values learn too")


class IbsSettings(ChoiceSettings):
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


class LoraSettings(ChoiceSettings):
    """Low-rank matrices beside CLIP's own, which stay as they are (Hu et al. 2022)."""

    rank: int = setting(8, "rank of the matrices", ge=1)
    alpha: float | None = setting(None, "what is added is multiplied by alpha / rank; null: 2 x rank", gt=0)
    dropout: float = setting(
        0.0, "share of the input channels that the matrices leave out in a training step", ge=0, lt=1
    )
    targets: LoraTargets = setting(
        ("q", "k", "v", "out", "fc", "proj"),
        "what of a block gets matrices: attention (q, k, v, out), MLP (fc, proj)",
        min_length=1,
    )
    towers: Literal["image", "text", "both"] = setting("both", "the towers that get matrices")
    layers: LayerNumbers = setting(
        (), "blocks that get matrices, counted from 0 in each tower that has them; empty: all"
    )
    dora: bool = setting(False, "learn the length of each row of a weight apart from its direction (DoRA)")
    rslora: bool = setting(False, "multiply by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)")
    keep_module_keywords: Names = setting((), "parameters whose name holds one of these always learn")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip: the matrices are part of CLIP."""
        if config.freeze_clip:
            yield "freeze_clip leaves peft.method lora nothing that learns", ("freeze_clip", "peft.method")


PEFT: dict[str, Choice] = {
    "full": Choice(FullSettings, "peft.full:FullFinetuning"),
    "bitfit": Choice(BitFitSettings, "peft.bitfit:BitFit"),
    "ibs": Choice(IbsSettings, "peft.ibs:ImportanceSelection"),
    "lora": Choice(LoraSettings, "peft.lora:Lora"),
}


# ---- towers ----


class PerFrameSettings(ChoiceSettings):
    """Each frame goes through CLIP's image tower by itself."""


TOWERS: dict[str, Choice] = {
    "per_frame": Choice(PerFrameSettings, "model.towers.per_frame:PerFrame"),
}


# ---- objectives ----


class ContrastiveSettings(ChoiceSettings):
    """Each text is to find its video among those of the batch, and each video its text (InfoNCE)."""


class SigmoidSettings(ChoiceSettings):
    """Each pair of the batch is judged by itself: do text and video belong together (Zhai et al. 2023)?"""


OBJECTIVES: dict[str, Choice] = {
    "contrastive": Choice(ContrastiveSettings, "objectives.contrastive:Contrastive"),
    "sigmoid": Choice(SigmoidSettings, "objectives.sigmoid:Sigmoid"),
}


# ---- tasks ----


class TaskSettings(ChoiceSettings):
    """What the settings of every task share."""

    figures: ClassVar[Mapping[str, bool]]
    """What the task measures, and whether more is better. The first chooses the best epoch unless `primary` is set."""

    has_similarity: ClassVar[bool] = False
    """Whether it ranks by a matrix of similarities, which `save_similarity` keeps."""


class RetrievalSettings(TaskSettings):
    """Texts find videos, and videos texts."""

    has_similarity: ClassVar[bool] = True
    figures: ClassVar[Mapping[str, bool]] = {
        f"{direction}.{name}": name.startswith("R@")
        for direction in ("t2v", "v2t")
        for name in ("R@1", "R@5", "R@10", "R@50", "MedR", "MeanR")
    }


TASKS: dict[str, Choice] = {
    "retrieval": Choice(RetrievalSettings, "evaluation.tasks.retrieval:Retrieval"),
}


# ---- adaptations ----


class NoAdaptationSettings(ChoiceSettings):
    """The model is evaluated as it is."""


ADAPTATIONS: dict[str, Choice] = {
    "none": Choice(NoAdaptationSettings, "evaluation.adaptation.none:NoAdaptation"),
}


# ---- the sections of the config ----


def _section(table: Mapping[str, Choice], kind: str, help: str) -> Any:
    """Return the type of a section that holds one choice of the table: a class a choice, told apart by `method`."""
    options = []
    for name, choice in table.items():
        fields: Any = {
            "method": (Literal[name], setting(..., help)),
            "config": (choice.settings, setting({}, "its settings")),
        }
        title = choice.settings.__name__.removesuffix("Settings").removesuffix(kind) + kind
        section = create_model(title, __base__=Chosen, __module__=__name__, __doc__=choice.settings.__doc__, **fields)
        globals()[title] = section  # where pickle looks for it when a config is sent to a reading process
        options.append(section)
    return Annotated[reduce(or_, options), Field(discriminator="method")] if len(options) > 1 else options[0]


if TYPE_CHECKING:
    PeftSection: TypeAlias = Chosen
    TowerSection: TypeAlias = Chosen
    ObjectiveSection: TypeAlias = Chosen
    TaskSection: TypeAlias = Chosen
    AdaptationSection: TypeAlias = Chosen
else:
    PeftSection = _section(PEFT, "Peft", "how CLIP learns")
    TowerSection = _section(TOWERS, "Tower", "how frames go through CLIP")
    ObjectiveSection = _section(OBJECTIVES, "Objective", "the loss")
    TaskSection = _section(TASKS, "Task", "what is measured")
    AdaptationSection = _section(ADAPTATIONS, "Adaptation", "how the model adapts")
