"""Settings of adaptation at test time, and their table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from adaclip_finetune.config.base import Names, Problem, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type
from adaclip_finetune.config.choices.peft import PEFT


class NoAdaptationSettings(ChoiceSettings):
    """Evaluate the model as it is."""


class NormsSettings(ChoiceSettings):
    """Learn the weights and biases of all norms (Wang et al. 2021)."""


class ContextSettings(ChoiceSettings):
    """Learn the words before the class name, which all classes share (CoOp, Zhou et al. 2022)."""

    tokens: int = setting(4, "tokens at the beginning of each text that learn; 4: a photo of a", unit="tokens", ge=1)


LEARNS: dict[str, Choice] = {
    **{name: PEFT[name] for name in ("full", "bitfit", "lora", "ssf")},  # those that can be taken away again
    "norms": Choice(NormsSettings, "evaluation.adaptation.norms:Norms"),
    "context": Choice(ContextSettings, "evaluation.adaptation.context:Context"),
}
if TYPE_CHECKING:
    LearnsSection: TypeAlias = Chosen
else:
    LearnsSection = section_type(LEARNS, "Learns", "what learns for a query, as in peft")
RewardWeights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]


class ClipRewardSettings(ChoiceSettings):
    """For each query, learn from the reward that other CLIPs give to what was found (RLCF, Zhao et al. 2024)."""

    reward: Names = setting(
        ("ViT-L/14",),
        "CLIPs that reward: names, files or folders of weights, runs, or self (the model before it adapts)",
        min_length=1,
    )
    weights: RewardWeights = setting((), "weight of each CLIP in the reward; empty: all the same, of sum 1")
    directions: Literal["t2v", "v2t", "both"] = setting(
        "t2v", "queries of retrieval: texts, for which the text tower learns, videos (image tower), or both"
    )
    learns: LearnsSection = setting(
        {"method": "full"}, "what learns in the tower that encodes the query; context: words before a class name"
    )
    candidates: int = setting(12, "videos rewarded for a text: those that the model ranks first", unit="videos", ge=2)
    caption_candidates: int = setting(20, "texts rewarded for a video; in captioning, beams", unit="items", ge=2)
    class_candidates: int = setting(3, "classes rewarded for a video, in classification", unit="items", ge=2)
    views: int = setting(64, "views of a video in classification: itself, and random parts of its frames", ge=1)
    certain_share: float = setting(0.1, "share of the views that learn: those with the lowest entropies", gt=0, le=1)
    steps: int = setting(8, "steps of AdamW for a query", unit="steps", ge=0)
    learning_rate: float = setting(1e-6, "learning rate of the steps", gt=0)
    weight_decay: float = setting(5e-4, "weight decay of the steps", ge=0)
    loss: Literal["reward", "distillation", "adaptive_distillation", "decoupled_distillation"] = setting(
        "reward", "what is learned: the reward, or the other CLIPs' logits in one of three ways, baselines of RLCF"
    )
    baseline: Literal["query", "all", "none"] = setting(
        "query", "mean that is subtracted from rewards: of the query's candidates, of all of a step, or none"
    )
    entropy_weight: float = setting(0.0, "weight of the entropy of the mean answer of all views in the loss", ge=0)
    divide_by_std: bool = setting(False, "divide the rewards of a query by their standard deviation")
    momentum: float = setting(
        0.0, "decay of a slow average over queries that the next ones start from, as 0.9998; 0: none", ge=0, lt=1
    )
    interval: int = setting(64, "queries after which the slow average becomes the new start", unit="items", ge=1)
    average_share: float = setting(1.0, "share of the slow average in a new start; the rest is the model", gt=0, le=1)

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield an adaptation in training or in fp16, and weights of other CLIPs."""
        section = "adaptation.config."
        if self.weights and len(self.weights) != len(self.reward):
            counts = f"{section}weights has {len(self.weights)} numbers for {len(self.reward)} CLIPs of {section}reward"
            yield f"{counts}: give one for each, or none", (f"{section}weights", f"{section}reward")
        if self.learns.method == "context" and not config.task_settings.of_classes:
            what = f"{section}learns context changes the words before class names: take another, or task classification"
            yield what, (f"{section}learns.method", "task.method")
        elif self.learns.method == "context" and getattr(config.task.config, "templates", "none") == "none":
            what = (
                f"{section}learns context changes the words before class names, but task.config.templates none has none"
            )
            yield f"{what}: give a file with the template a photo of a {{}}.", ("task.config.templates",)
        if self.loss != "reward" and config.task_settings.of_captions:
            what = f"adaptation.config.loss {self.loss} needs candidates that stay, which captions do not: take reward"
            yield what, (f"{section}loss", "task.method")
        if not config.do_inference:
            what = "adaptation clip_reward is not for training, in which each validation would adapt to each query"
            yield f"{what}: train without it, and adapt with do_inference", ("adaptation.method", "do_inference")
        if config.precision == "fp16":
            what = "adaptation clip_reward computes gradients without scaling, which precision fp16 rounds to 0"
            yield f"{what}: take bf16 or fp32", ("adaptation.method", "precision")


ADAPTATIONS: dict[str, Choice] = {
    "none": Choice(NoAdaptationSettings, "evaluation.adaptation.none:NoAdaptation"),
    "clip_reward": Choice(ClipRewardSettings, "evaluation.adaptation.clip_reward:ClipReward"),
}


if TYPE_CHECKING:
    AdaptationSection: TypeAlias = Chosen
else:
    AdaptationSection = section_type(ADAPTATIONS, "Adaptation", "test-time adaptation")
