"""The parts of a run that are chosen by name: PEFT method, tower, captioner, objective, task and adaptation.

A choice is a settings class in this file, one line in a table, and the class named by that line, which is imported
when it is used. In a config a choice is a section `{"method": name, "config": {...}}`. This file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from importlib import import_module
from itertools import pairwise
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import Field, create_model

from adaclip_finetune.config.base import LARGEST, Names, PathText, Problem, Settings, setting
from adaclip_finetune.config.parts import is_folder_of_videos, parts_of


class ChoiceSettings(Settings):
    """Base class of the settings of a choice."""

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield combinations of these settings with the rest of `config` that are impossible; by default none."""
        yield from ()

    def with_fitting_batches(self, fit: Callable[[int], int]) -> ChoiceSettings:
        """Return a copy in which `fit` has replaced every batch size among these settings (auto_batch_size)."""
        return self


class Chosen(Settings):
    """A section of the config: the name of a choice, and its settings."""

    method: str
    config: ChoiceSettings


class Choice(NamedTuple):
    """A choice: its settings class, and the class it configures as `module:name` below adaclip_finetune."""

    settings: type[ChoiceSettings]
    implementation: str


def implementation(table: Mapping[str, Choice], section: Chosen) -> Any:
    """Import and return the class that `section.method` names."""
    module, name = table[section.method].implementation.split(":")
    return getattr(import_module(f"adaclip_finetune.{module}"), name)


def _section(table: Mapping[str, Choice], kind: str, help: str) -> Any:
    """Return the type of a section: a union of one class per choice of the table, discriminated by `method`."""
    options = []
    for name, choice in table.items():
        fields: Any = {
            "method": (Literal[name], setting(..., help)),
            "config": (choice.settings, setting({}, "settings of the method")),
        }
        title = choice.settings.__name__.removesuffix("Settings").removesuffix(kind) + kind
        section = create_model(title, __base__=Chosen, __module__=__name__, __doc__=choice.settings.__doc__, **fields)
        globals()[title] = section  # where pickle looks for it when a config is sent to a data loader process
        options.append(section)
    return Annotated[reduce(or_, options), Field(discriminator="method")] if len(options) > 1 else options[0]


# ---- parameter-efficient finetuning ----

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
    PartSection = _section(_JOINABLE, "Part", "finetuning method that is joined with others")


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


# ---- towers ----


class TowerSettings(ChoiceSettings):
    """Base class of the settings of a tower."""

    learns: ClassVar[bool] = False
    """Whether the tower has parameters of its own, which are trained even if CLIP is frozen."""


class PerFrameSettings(TowerSettings):
    """Encode each frame independently with CLIP's image tower."""


class GlobalLocalSettings(TowerSettings):
    """Add prompts to both towers; global ones see all frames, and one is the video's vector (DGL, Yang et al. 2024)."""

    learns: ClassVar[bool] = True

    generator: Literal["linear", "transformer"] = setting(
        "linear", "what makes the prompts: a linear map, or a transformer block, which gives each frame its own"
    )
    output: Literal["global_prompt0", "global_mean", "class_mean", "all_mean"] = setting(
        "global_prompt0",
        "the video's vector: the first global prompt, or the mean of these, of the frames' class tokens, or of both",
    )
    global_prompts: int = setting(4, "prompts that see all frames", unit="tokens", ge=1)
    local_prompts: int = setting(4, "prompts in each frame", unit="tokens", ge=1)
    text_prompts: int = setting(
        4, "prompts in each text; generator linear has as many as local_prompts", unit="tokens", ge=1
    )
    frames: int = setting(
        12,
        "frames for which generator transformer has prompts, which are interpolated for other numbers",
        unit="frames",
        ge=1,
    )
    postfix_prompts: bool = setting(
        False, "keep prompts behind the words, which no word sees: only for checkpoints of the published system"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield numbers of prompts that generator linear cannot make, and text prompts of peft.method prompt."""
        if self.generator == "linear" and self.text_prompts != self.local_prompts:
            numbers = f"text_prompts {self.text_prompts} and local_prompts {self.local_prompts}"
            what = f"tower.config.generator linear makes the text prompts of the local ones, but {numbers} differ: "
            names = ("tower.config.generator", "tower.config.text_prompts", "tower.config.local_prompts")
            yield f"{what}set both to one number, or take generator transformer", names
        methods = getattr(config.peft.config, "methods", (config.peft,))
        if any(isinstance(part.config, PromptSettings) and part.config.num_text_prompts for part in methods):
            what = "tower global_local has its own text prompts, and those of peft.method prompt would have no effect"
            yield f"{what}: take another method, or tower per_frame", ("tower.method", "peft.method")


class ProxyTokensSettings(TowerSettings):
    """Let the frames meet in proxy tokens, which attend to all frames (CLIP-ViP, Xue et al. 2023)."""

    learns: ClassVar[bool] = True

    num_proxies: int = setting(
        4, "tokens that attend to all frames; the class token is the first, the others are new", unit="tokens", ge=1
    )
    temporal_embedding: bool = setting(True, "add a learned embedding of a frame's time to its patches")
    temporal_size: int = setting(
        12, "rows of the temporal embedding, interpolated linearly to other numbers of frames", unit="frames", ge=1
    )
    proxy_init: Literal["published", "clip"] = setting(
        "published", "initial values of new proxies: N(0, 1) as published, or the class token with a little noise"
    )


class ClusteringStage(Settings):
    """One reduction of the tokens of a video."""

    block: int = setting(..., "block before which tokens are reduced, counted from 0", unit="block", ge=0)
    segments: int = setting(4, "segments a video is divided into; not used by the shifts", unit="frames", ge=1)
    tokens: int = setting(49, "patch tokens kept of each segment; not used by pooling and shifts", unit="tokens", ge=1)


ClusteringStages = Annotated[tuple[ClusteringStage, ...], Field(strict=False)]
_CLUSTERS = ("kmedoids", "spectral")


class ClusteringSettings(TowerSettings):
    """Cluster patches of neighbouring frames inside CLIP, and keep only the centres (CenterCLIP, Zhao et al. 2022)."""

    learns: ClassVar[bool] = True  # with a cluster embedding

    stages: ClusteringStages = setting(
        [{"block": 6}],
        "reductions, in the order of their blocks",
        allowed="a JSON list of objects with block, segments (default 4) and tokens (default 49)",
        min_length=1,
    )
    algorithm: Literal["kmedoids", "spectral", "pooling", "sparse_sampling", "token_shift", "temporal_shift"] = setting(
        "kmedoids", "how the tokens of a segment are reduced; the two shifts reduce nothing and mix neighbouring frames"
    )
    aggregation: Literal["none", "mean"] = setting(
        "none", "what stands for a cluster: its central token, or the mean of its tokens"
    )
    cluster_embedding: Literal["off", "normal", "positions"] = setting(
        "off", "embedding added to the centres and trained, from random values or CLIP's positional embedding"
    )
    distance: Literal["euclidean", "cosine"] = setting("euclidean", "distance between tokens")
    norm_p: float = setting(2.0, "exponent of the euclidean distance (Minkowski); 1: sum of differences", ge=1)
    threshold: float = setting(1e-6, "k-medoids stops when the centres of a segment together move less", gt=0)
    iterations: int = setting(100, "most updates of the centres by k-medoids", unit="steps", ge=1)
    pre_norm: bool = setting(False, "kmedoids clusters tokens divided by their norms")
    graph: Literal["knn", "heat"] = setting("knn", "graph of spectral: nearest neighbours, or all pairs of tokens")
    neighbours: int = setting(
        0,
        "neighbours of a token in the graph knn, itself included; 0: 5 a frame, and 5 more from 100 tokens a frame",
        unit="tokens",
        ge=0,
    )
    sigma: float = setting(2.0, "distance at which the similarity of two tokens in spectral's graph is e^-0.5", gt=0)
    window: bool = setting(
        False, "spectral's graph connects only tokens near in time (3 frames) and space (4 patches; 9 from 100 tokens)"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield stages that do not follow from each other, and settings of another algorithm."""
        name = "tower.config.stages"
        for first, second in pairwise(self.stages):
            if second.block <= first.block:
                order = f"block {second.block} follows block {first.block}: name each block once, in ascending order"
                yield f"{name}: {order}", (name,)
            for what in ("segments", "tokens"):
                before, after = getattr(first, what), getattr(second, what)
                used = self.algorithm in _CLUSTERS or self.algorithm == "sparse_sampling"
                if after > before and (used or (what, self.algorithm) == ("segments", "pooling")):
                    yield (
                        f"{name}: {after} {what} at block {second.block} are more than the {before} before it",
                        (name,),
                    )
        for setting_name, off in (("aggregation", "none"), ("cluster_embedding", "off")):
            if getattr(self, setting_name) != off and self.algorithm not in _CLUSTERS:
                where = f"tower.config.{setting_name}"
                yield f"{where} needs the algorithm kmedoids or spectral", (where, "tower.config.algorithm")


TOWERS: dict[str, Choice] = {
    "per_frame": Choice(PerFrameSettings, "model.towers.per_frame:PerFrame"),
    "proxy_tokens": Choice(ProxyTokensSettings, "model.towers.proxy_tokens:ProxyTokens"),
    "clustering": Choice(ClusteringSettings, "model.towers.clustering:Clustering"),
    "global_local": Choice(GlobalLocalSettings, "model.towers.global_local:GlobalLocal"),
}


# ---- captioners ----


class CaptionerSettings(ChoiceSettings):
    """Base class of the settings of a captioner."""

    language_model: str = setting(
        "facebook/opt-125m", "frozen causal language model of transformers: a name, or a folder", min_length=1
    )
    prefix: Literal["video", "frames"] = setting(
        "video", "what the language model continues: the video's vector, or all encoded frames in the order of time"
    )
    prefix_length: int = setting(40, "input embeddings of the language model made of each vector", unit="tokens", ge=1)
    max_tokens: int = setting(50, "tokens of a caption, its end included; longer ones are cut", unit="tokens", ge=2)

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield a pooling without a vector of the video, and training by another objective."""
        if config.frame_agg == "qscore":
            what = "captioner: with frame_agg qscore a video has no vector of its own: take another frame_agg"
            yield what, ("captioner.method", "frame_agg")
        objective = config.objective and config.objective.method
        if not config.do_inference and config.train_annot is not None and objective != "captioning":
            what = f"a captioner learns from objective captioning only, not from {objective or 'the default objective'}"
            yield f"{what}: set objective.method, or leave captioner out", ("captioner.method", "objective.method")


class MlpCaptionerSettings(CaptionerSettings):
    """Make the prefix with a multilayer perceptron of one hidden layer (ClipCap, Mokady et al. 2021)."""


class TransformerCaptionerSettings(CaptionerSettings):
    """Make the prefix with a transformer, which reads the vector and learned tokens (ClipCap, Mokady et al. 2021)."""

    vector_tokens: int = setting(
        40, "tokens that a vector is mapped to, which the transformer reads", unit="tokens", ge=1
    )
    layers: int = setting(8, "blocks of the transformer", unit="blocks", ge=1)
    heads: int = setting(8, "attention heads, which divide the width of the language model", ge=1, le=1024)


CAPTIONERS: dict[str, Choice] = {
    "mlp": Choice(MlpCaptionerSettings, "model.captioner:MlpMapper"),
    "transformer": Choice(TransformerCaptionerSettings, "model.captioner:TransformerMapper"),
}


# ---- objectives ----


class ObjectiveSettings(ChoiceSettings):
    """Base class of the settings of an objective."""

    uses_unlabelled: ClassVar[bool] = False
    """Whether the objective learns from rows of which `TrainBatch.labelled` is False."""

    @property
    def uses_videos(self) -> bool:
        """Whether the objective sees the training videos; otherwise they are not read, and need not be there."""
        return True

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the objective learns from auxiliary captions."""
        return False


class ContrastiveSettings(ObjectiveSettings):
    """Contrast each text with all videos of the batch, and each video with all texts (InfoNCE)."""

    dual_softmax: bool = setting(
        False, "multiply each logit by its softmax over the other direction (CAMoE, Cheng et al. 2021)"
    )
    label_smoothing: float = setting(
        0.0, "share of the target that is spread evenly over all texts or videos of a softmax", ge=0, lt=1
    )
    hard_negatives: int = setting(
        0, "negatives of each pair: those whose captions are most similar to its own; 0: all", unit="videos", ge=0
    )


class SigmoidSettings(ObjectiveSettings):
    """Classify each pair of the batch as matching or not with a sigmoid (SigLIP, Zhai et al. 2023)."""


class DistillationSettings(ObjectiveSettings):
    """Contrast labelled pairs, follow a frozen teacher on other videos (FitCLIP, Castro & Caba Heilbron 2022)."""

    uses_unlabelled: ClassVar[bool] = True

    labelled_weight: float = setting(0.9999, "weight of the contrastive loss of the labelled pairs", ge=0)
    kd_weight: float = setting(0.4444, "weight of the divergence from the teacher on the unlabelled videos", ge=0)
    temperature: float = setting(0.015, "temperature of the student's similarities in both parts of the loss", ge=0.001)
    teacher_temperature: float = setting(0.015, "temperature of the teacher's similarities", ge=0.001)
    fit_temperature: bool = setting(False, "train both temperatures, which stay at 0.001 or above")
    teacher: PathText | None = setting(
        None, "run, checkpoint or CLIP that teaches; null: the CLIP that the run starts from", unit="file or folder"
    )
    prompts: PathText | None = setting(
        None, "texts for the unlabelled videos, one in each line; null: their own captions", unit="file"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield training data without an unlabelled part."""
        if config.train_annot is not None and all(part.labelled for part in parts_of(config.train_annot)):
            what = "objective distillation has nothing to learn from its teacher, since all of train_annot is labelled"
            yield f"{what}: give a list of parts, one with labelled false", ("objective.method", "train_annot")
        for number, part in enumerate(parts_of(config.train_annot or [])):
            if self.prompts is None and not part.labelled and is_folder_of_videos(part.annotation):
                what = f"train_annot[{number}] {part.annotation} is a folder of videos, which have no captions"
                yield (
                    f"{what}: give objective.config.prompts, a file of texts",
                    ("objective.config.prompts", "train_annot"),
                )


class AuxiliaryCaptionsSettings(ObjectiveSettings):
    """Contrast videos and their middle frames with sentences and auxiliary captions (CLIP-ViP, Xue et al. 2023)."""

    loss: Literal["v_s", "v_s+v_c", "v_s+v_c+f_c", "v_sc", "v_sc+f_c"] = setting(
        "v_sc+f_c",
        "what is contrasted: v video, f middle frame, s sentence, c auxiliary caption, sc both texts at once",
    )

    @property
    def uses_auxiliary(self) -> bool:
        return self.loss != "v_s"


class CaptionLossSettings(ObjectiveSettings):
    """Train a captioner on a frozen retriever, with videos (ClipCap) or texts alone (CapDec, Nukrai et al. 2022)."""

    learn_from: Literal["videos", "texts"] = setting(
        "videos", "what is captioned in training: the videos, or the captions' own text vectors with noise (CapDec)"
    )
    noise_variance: float = setting(
        0.016, "variance of the noise that is added to each coordinate of a text's unit vector", ge=0
    )

    @property
    def uses_videos(self) -> bool:
        return self.learn_from == "videos"

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield a missing captioner, texts in place of frames, joined captions, and methods that change CLIP by
        themselves."""
        if config.captioner is None:
            yield "objective captioning trains a captioner: give captioner.method", ("objective.method", "captioner")
        elif config.captioner.config.prefix == "frames" and not self.uses_videos:
            what = "objective.config.learn_from texts: a text is one vector, but captioner.config.prefix is frames"
            yield f"{what}: take video", ("objective.config.learn_from", "captioner.config.prefix")
        if config.concat_captions == "concat":
            what = "objective captioning would learn to say all captions of a video as one (concat_captions concat)"
            yield f"{what}: take indep-one or indep-all", ("objective.method", "concat_captions")
        methods = [part.method for part in getattr(config.peft.config, "methods", (config.peft,))]
        for method in sorted({"ibs", "lisa", "adabn"}.intersection(methods)):
            what = f"objective captioning trains the captioner alone, and peft.method {method} changes CLIP"
            yield f"{what}: leave peft out", ("objective.method", "peft.method")


OBJECTIVES: dict[str, Choice] = {
    "contrastive": Choice(ContrastiveSettings, "objectives.contrastive:Contrastive"),
    "sigmoid": Choice(SigmoidSettings, "objectives.sigmoid:Sigmoid"),
    "distillation": Choice(DistillationSettings, "objectives.distillation:Distillation"),
    "auxiliary_captions": Choice(AuxiliaryCaptionsSettings, "objectives.auxiliary_captions:AuxiliaryCaptions"),
    "captioning": Choice(CaptionLossSettings, "objectives.captioning:CaptionLoss"),
}


# ---- tasks ----

BUILT_IN_TEMPLATES = ("none", "imagenet", "action", "kinetics")


class TaskSettings(ChoiceSettings):
    """Base class of the settings of a task."""

    figures: ClassVar[Mapping[str, bool]]
    """Name of each figure → whether higher is better. The first one is the default of `primary`."""

    has_similarity: ClassVar[bool] = False
    """Whether the task ranks by a similarity matrix, which `save_similarity` can keep."""

    has_zero_shot: ClassVar[bool] = True
    """Whether the task can measure a pretrained CLIP."""

    of_classes: ClassVar[bool] = False
    """Whether a sentence names the class of its video, so that many videos share it."""

    of_captions: ClassVar[bool] = False
    """Whether the task is about captions that the model says."""

    @property
    def training_templates(self) -> str:
        """The templates into which the training sentences are put; `none` leaves them as they are."""
        return "none"

    def files(self) -> dict[str, str]:
        """Return the files that these settings name, by the name of the setting."""
        return {}


class RetrievalSettings(TaskSettings):
    """Text-to-video and video-to-text retrieval."""

    has_similarity: ClassVar[bool] = True
    figures: ClassVar[Mapping[str, bool]] = {
        f"{direction}.{name}": name.startswith("R@")
        for direction in ("t2v", "v2t")
        for name in ("R@1", "R@5", "R@10", "R@50", "MedR", "MeanR")
    }


class ClassificationSettings(TaskSettings):
    """Which class does a video belong to? Each video's only sentence names its class."""

    of_classes: ClassVar[bool] = True
    figures: ClassVar[Mapping[str, bool]] = {"top1": True, "top5": True, "mean_class": True}

    classes: PathText | None = setting(
        None, "class names: a text with one a line, or an annotation; null: those that the split has", unit="file"
    )
    templates: PathText = setting(
        "none",
        "templates of class names, whose vectors are averaged",
        unit="file",
        allowed=f"{', '.join(BUILT_IN_TEMPLATES)}, or the path of a file with one template a line, each with one {{}}",
    )
    normalize: bool = setting(False, "normalize the mean vector of a class again; FitCLIP does not")
    train_templates: bool = setting(
        False, "the training sentences are class names: put each into a template that is drawn anew in each epoch"
    )

    @property
    def training_templates(self) -> str:
        return self.templates if self.train_templates else "none"

    def files(self) -> dict[str, str]:
        classes = {} if self.classes is None else {"classes": self.classes}
        return classes | ({} if self.templates in BUILT_IN_TEMPLATES else {"templates": self.templates})

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield templates for training that are none."""
        if self.train_templates and self.templates == "none":
            what = "task.config.train_templates has no templates: give task.config.templates"
            yield what, ("task.config.train_templates", "task.config.templates")


class CaptioningSettings(TaskSettings):
    """What does the captioner say about a video, compared with what people said?"""

    has_zero_shot: ClassVar[bool] = False
    of_captions: ClassVar[bool] = True
    figures: ClassVar[Mapping[str, bool]] = dict.fromkeys(
        ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "CLIPScore", "RefCLIPScore"), True
    )

    beams: int = setting(5, "beams of the search for the likeliest caption", ge=1, le=100)
    scorer: PathText | None = setting(
        None, "run, checkpoint or CLIP behind CLIPScore and RefCLIPScore; null: the model itself", unit="file or folder"
    )

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield a model without a captioner, and joined captions."""
        if config.captioner is None:
            yield "task captioning needs a model with a captioner: give captioner.method", ("task.method", "captioner")
        if config.do_inference and config.resume is None:
            what = "task captioning measures a captioner that has learned"
            yield f"{what}: give its run or checkpoint (resume)", ("task.method", "resume")
        if config.concat_captions == "concat":
            what = "task captioning compares with each caption of a video, not with all of them as one"
            yield f"{what}: set concat_captions to indep-one or indep-all", ("task.method", "concat_captions")


TASKS: dict[str, Choice] = {
    "retrieval": Choice(RetrievalSettings, "evaluation.tasks.retrieval:Retrieval"),
    "classification": Choice(ClassificationSettings, "evaluation.tasks.classification:Classification"),
    "captioning": Choice(CaptioningSettings, "evaluation.tasks.captioning:Captioning"),
}


# ---- adaptations ----


class NoAdaptationSettings(ChoiceSettings):
    """Evaluate the model as it is."""


class ContextSettings(ChoiceSettings):
    """Learn the words before the class name, which all classes share (CoOp, Zhou et al. 2022)."""

    tokens: int = setting(4, "tokens at the beginning of each text that learn; 4: a photo of a", unit="tokens", ge=1)


LEARNS: dict[str, Choice] = {
    **{name: PEFT[name] for name in ("full", "bitfit", "lora", "ssf")},  # those that can be taken away again
    "context": Choice(ContextSettings, "evaluation.adaptation.context:Context"),
}
if TYPE_CHECKING:
    LearnsSection: TypeAlias = Chosen
else:
    LearnsSection = _section(LEARNS, "Learns", "what learns for a query, as in peft")
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
    loss: Literal["reward", "distillation"] = setting(
        "reward", "what is learned: the reward, or the softmax of the other CLIPs' logits, a baseline of RLCF"
    )
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
        if self.loss == "distillation" and config.task_settings.of_captions:
            what = "adaptation.config.loss distillation needs candidates that stay, which captions do not: take reward"
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


# ---- the sections of the config ----


if TYPE_CHECKING:
    PeftSection: TypeAlias = Chosen
    TowerSection: TypeAlias = Chosen
    CaptionerSection: TypeAlias = Chosen
    ObjectiveSection: TypeAlias = Chosen
    TaskSection: TypeAlias = Chosen
    AdaptationSection: TypeAlias = Chosen
else:
    PeftSection = _section(PEFT, "Peft", "finetuning method of CLIP")
    TowerSection = _section(TOWERS, "Tower", "tower that encodes the frames")
    CaptionerSection = _section(CAPTIONERS, "Captioner", "what makes the prefix of a caption from a video's vector")
    ObjectiveSection = _section(OBJECTIVES, "Objective", "training loss")
    TaskSection = _section(TASKS, "Task", "task that is evaluated")
    AdaptationSection = _section(ADAPTATIONS, "Adaptation", "test-time adaptation")
