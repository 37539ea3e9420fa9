"""Settings of the towers, and their table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from adaclip_finetune.config.base import Problem, Settings, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type
from adaclip_finetune.config.choices.peft import PromptSettings


class TowerSettings(ChoiceSettings):
    """Base class of the settings of a tower."""

    learns: ClassVar[bool] = False
    """Whether the tower has parameters of its own, which are trained even if CLIP is frozen."""

    framewise: ClassVar[bool] = False
    """Whether CLIP encodes each frame by itself, and the tower makes its tokens of these vectors."""


class PerFrameSettings(TowerSettings):
    """Encode each frame independently with CLIP's image tower."""

    framewise: ClassVar[bool] = True


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


class ChangeSettings(TowerSettings):
    """Add a learned map of how the frames change, from the first to the last, to their mean."""

    learns: ClassVar[bool] = True
    framewise: ClassVar[bool] = True

    frequencies: int = setting(1, "waves over the frames that are mapped; the first falls from first to last", ge=1)


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
    "change": Choice(ChangeSettings, "model.towers.change:Change"),
    "clustering": Choice(ClusteringSettings, "model.towers.clustering:Clustering"),
    "global_local": Choice(GlobalLocalSettings, "model.towers.global_local:GlobalLocal"),
}


if TYPE_CHECKING:
    TowerSection: TypeAlias = Chosen
else:
    TowerSection = section_type(TOWERS, "Tower", "tower that encodes the frames")
