"""Settings of the finetuning methods, and their table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from adaclip_finetune.config.base import LARGEST, Names, Problem, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type

_NUMBER = r"\d{1,4}(\.\d{1,6})?"
LoraTargets = Annotated[tuple[Literal["q", "k", "v", "out", "fc", "proj"], ...], Field(strict=False)]
SsfPlaces = Annotated[
    tuple[Literal["patch", "norm", "linear", "q", "k", "v", "out", "fc", "proj"], ...], Field(strict=False)
]
Towers = Literal["image", "text", "both"]
LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST["block"])], ...], Field(strict=False)]


def _inside_clip(method: str, config: Any) -> Iterator[Problem]:
    """Yield freeze_clip, which would freeze what a method adds inside CLIP."""
    if config.freeze_clip:
        yield f"freeze_clip also freezes what peft.method {method} adds to CLIP", ("freeze_clip", "peft.method")


class FullSettings(ChoiceSettings):
    """Train all parameters that freeze_layer_num and freeze_clip leave trainable."""

    towers: Towers = setting("both", "towers that learn; text: the images are locked (LiT, Zhai et al. 2022)")


class BitFitSettings(ChoiceSettings):
    """Train the biases only, and parameters named by keywords (Ben Zaken et al. 2022)."""

    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")
    include_qkv_bias: bool = setting(False, "also train the fused biases of queries, keys and values")


class IbsSettings(ChoiceSettings):
    """Importance-based selection: train everything for a few epochs, then only the most important tensors."""

    pre_batch_size: int | None = setting(
        None, "batch size of the first phase, in which everything is trained; null: batch_size", unit="videos", ge=1
    )
    num_pre_epochs: int = setting(1, "epochs of the first phase, in which everything is trained", unit="epochs", ge=1)
    retain_ratio: float = setting(0.1, "fraction of the candidate parameters trained in the second phase", gt=0, le=1)
    metric: Literal["l2norm", "angle"] = setting(
        "l2norm", "importance of a tensor: norm of its change, or angle in degrees"
    )
    normalization: bool = setting(True, "normalize importance within groups of tensors of similar size")
    num_groups: int = setting(2, "number of groups for the normalization", unit="groups", ge=1)
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")
    keep_evolved: bool = setting(
        False, "frozen tensors keep their values of the first phase instead of returning to CLIP's"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield a first phase that leaves no epochs for the second, and freeze_clip."""
        if self.num_pre_epochs >= config.num_epochs:
            left = f"leaves none of the {config.num_epochs} num_epochs for the second phase"
            names = ("peft.config.num_pre_epochs", "num_epochs")
            yield f"peft.config.num_pre_epochs {self.num_pre_epochs} {left}", names
        if config.freeze_clip:
            yield "freeze_clip leaves peft.method ibs no parameters to select from", ("freeze_clip", "peft.method")

    def with_fitting_batches(self, fit: Callable[[int], int]) -> IbsSettings:
        if self.pre_batch_size is None:
            return self
        return self.model_copy(update={"pre_batch_size": fit(self.pre_batch_size)})


class LoraSettings(ChoiceSettings):
    """Add trainable low-rank matrices to CLIP's frozen weights (Hu et al. 2022)."""

    rank: int = setting(8, "rank of the matrices", unit="channels", ge=1)
    alpha: float | None = setting(None, "the update is scaled by alpha / rank; null: 2 * rank", gt=0)
    dropout: float = setting(0.0, "dropout probability of the input channels of the matrices", ge=0, lt=1)
    targets: LoraTargets = setting(
        ("q", "k", "v", "out", "fc", "proj"),
        "layers of a block that get matrices: attention (q, k, v, out), MLP (fc, proj)",
        min_length=1,
    )
    towers: Towers = setting("both", "towers to which the method is applied")
    layers: LayerNumbers = setting((), "blocks to which it is applied, counted from 0 in each tower; empty: all")
    dora: bool = setting(False, "train the norm of each weight row separately from its direction (DoRA)")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)")
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip, since the matrices are part of CLIP."""
        yield from _inside_clip("lora", config)


class SsfSettings(ChoiceSettings):
    """Scale and shift the outputs of CLIP's frozen layers (Lian et al. 2022)."""

    where: SsfPlaces = setting(
        ("patch", "linear", "norm"),
        "layers that are scaled and shifted: patch embedding, norms, linear projections (all or some of q … proj)",
        min_length=1,
    )
    towers: Towers = setting("both", "towers to which the method is applied")
    layers: LayerNumbers = setting((), "blocks to which it is applied, counted from 0 in each tower; empty: all")
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip, and a choice without layers."""
        yield from _inside_clip("ssf", config)
        if set(self.where) == {"patch"} and (self.layers or self.towers == "text"):
            what = "the patch embedding, which peft.config.where names alone, is in no block and not in the text tower"
            yield what, ("peft.config.where", "peft.config.layers", "peft.config.towers")


class AdapterSettings(ChoiceSettings):
    """Add small bottleneck networks to CLIP's frozen blocks (Houlsby et al. 2019, Chen et al. 2022)."""

    dim: int = setting(64, "width of the bottleneck", unit="channels", ge=1)
    position: Literal["sequential", "parallel"] = setting(
        "parallel", "an adapter follows the MLP of its block (Houlsby), or stands beside it (AdaptFormer)"
    )
    scale: float | None = setting(
        None, "factor of the adapter's output; null: as published, 1 if sequential and 0.1 if parallel", gt=0
    )
    towers: Towers = setting("both", "towers to which the method is applied")
    layers: LayerNumbers = setting((), "blocks to which it is applied, counted from 0 in each tower; empty: all")
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip, since the adapters are part of CLIP."""
        yield from _inside_clip("adapter", config)


class PromptSettings(ChoiceSettings):
    """Add trainable tokens to the inputs of CLIP's frozen blocks (VPT, Jia et al. 2022; CoOp, Zhou et al. 2022)."""

    num_visual_prompts: int = setting(8, "prompts before the patches of each image", unit="tokens", ge=0)
    num_text_prompts: int = setting(4, "prompts before the words of each text, beyond max_txt_len", unit="tokens", ge=0)
    depth: int = setting(
        1,
        "blocks with prompts of their own, from the first; the later ones see what became of them",
        unit="blocks",
        ge=1,
    )
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip, no prompts, and towers that act on the tokens between the blocks."""
        yield from _inside_clip("prompt", config)
        names = ("peft.config.num_visual_prompts", "peft.config.num_text_prompts")
        if not self.num_visual_prompts and not self.num_text_prompts:
            yield "peft.method prompt has no prompts: raise one of the two numbers", names
        if config.freeze_layer_num >= self.depth:
            what = (
                f"freeze_layer_num {config.freeze_layer_num} freezes all blocks with prompts: lower it to 0, or raise "
            )
            yield f"{what}peft.config.depth", ("freeze_layer_num", "peft.config.depth")
        if self.num_visual_prompts and config.tower.method != "per_frame":
            what = (
                f"tower {config.tower.method} acts on the tokens between the blocks, which are not all of the frames' "
            )
            yield f"{what}with num_visual_prompts: set it to 0, or take tower per_frame", (names[0], "tower.method")


class AdabnSettings(ChoiceSettings):
    """Re-estimate the statistics of batch norms on the training frames, and train nothing of CLIP (Li et al. 2017)."""

    num_batches: int = setting(0, "batches of frames; 0: one pass over the training videos", unit="batches", ge=0)

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield models that are known to have no batch norm: neither in the selector nor in CLIP."""
        cnn = config.use_policy and config.policy_backbone not in ("raw", "clip", "frozen_clip")
        if not cnn and config.clip_weights is None and config.clip_backbone.startswith("ViT-"):
            what = (
                f"peft.method adabn: neither {config.clip_backbone} nor the frame selector has batch norms; take a CNN"
            )
            yield f"{what} as policy_backbone, or another method", ("peft.method", "policy_backbone", "clip_backbone")


class LisaSettings(ChoiceSettings):
    """Train a changing sample of CLIP's tensors, drawn by importance (after LISA, Pan et al. 2024)."""

    sampling_interval: int = setting(10, "optimizer steps between two drawings", unit="steps", ge=1)
    active_ratio: float = setting(0.1, "fraction of the candidate tensors that is trained at a time", gt=0, le=1)
    importance: Literal["update", "gradient"] = setting(
        "update", "importance of a tensor: norm of its change since the start, or of its gradient, over sqrt(size)"
    )
    warmup_steps: int = setting(0, "optimizer steps at the start in which everything is trained", unit="steps", ge=0)
    warmup_decay: int = setting(
        0, "optimizer steps after the warm-up in which the fraction falls from 1 to active_ratio", unit="steps", ge=0
    )
    schedule: str = setting(
        "const_0.5",
        "weight x of importance in the probabilities: constant, or rising over the epochs; the rest is uniform",
        pattern=r"^(const|linear|sin|square)_(0(\.\d+)?|1(\.0+)?)$",
        allowed="const_x, linear_x, sin_x or square_x with x from 0 to 1",
    )
    transform: str = setting(
        "none",
        "importance v (at most 1) as a probability: v, v^p, exp(s v), v clipped to a … b, or the k largest alike",
        pattern=rf"^(none|power_{_NUMBER}|exp_{_NUMBER}|sat_{_NUMBER}_{_NUMBER}|uniform_[1-9]\d{{0,5}})$",
        allowed="none, power_p, exp_s, sat_a_b or uniform_k with numbers",
    )
    keep_module_keywords: Names = setting((), "also train parameters whose name contains one of these")

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield freeze_clip, and limits in the wrong order."""
        if config.freeze_clip:
            yield "freeze_clip leaves peft.method lisa no parameters to draw from", ("freeze_clip", "peft.method")
        kind, *numbers = self.transform.split("_")
        if kind == "sat" and float(numbers[0]) >= float(numbers[1]):
            yield f"peft.config.transform {self.transform}: a must be below b", ("peft.config.transform",)


_JOINABLE: dict[str, Choice] = {
    "bitfit": Choice(BitFitSettings, "peft.bitfit:BitFit"),
    "lora": Choice(LoraSettings, "peft.lora:Lora"),
    "ssf": Choice(SsfSettings, "peft.ssf:ScaleAndShift"),
    "adapter": Choice(AdapterSettings, "peft.adapter:Adapters"),
    "prompt": Choice(PromptSettings, "peft.prompt:Prompting"),
    "adabn": Choice(AdabnSettings, "peft.adabn:AdaptiveBatchNorm"),
}
if TYPE_CHECKING:
    PartSection: TypeAlias = Chosen
else:
    PartSection = section_type(_JOINABLE, "Part", "finetuning method that is joined with others")


class JoinedSettings(ChoiceSettings):
    """Apply several methods together: what any of them trains is trained."""

    methods: Annotated[tuple[PartSection, ...], Field(strict=False)] = setting(
        [{"method": "lora"}, {"method": "bitfit"}],
        "methods that are joined, each with its config; a list in place of peft means the same",
        min_length=2,
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield a method that is named twice, and what the methods themselves refuse."""
        names = [part.method for part in self.methods]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"peft.config.methods names {name} more than once", ("peft.config.methods",)
        for part in self.methods:
            for problem, _ in part.config.contradictions(config):
                yield problem, ("peft.config.methods",)


PEFT: dict[str, Choice] = {
    "full": Choice(FullSettings, "peft.full:FullFinetuning"),
    "bitfit": _JOINABLE["bitfit"],
    "ibs": Choice(IbsSettings, "peft.ibs:ImportanceSelection"),
    "lora": _JOINABLE["lora"],
    "ssf": _JOINABLE["ssf"],
    "adapter": _JOINABLE["adapter"],
    "prompt": _JOINABLE["prompt"],
    "lisa": Choice(LisaSettings, "peft.lisa:Lisa"),
    "adabn": _JOINABLE["adabn"],
    "joined": Choice(JoinedSettings, "peft.joined:Joined"),
}


if TYPE_CHECKING:
    PeftSection: TypeAlias = Chosen
else:
    PeftSection = section_type(PEFT, "Peft", "finetuning method of CLIP")
