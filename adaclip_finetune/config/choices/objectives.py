"""Settings of the objectives, and their table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from adaclip_finetune.config.base import PathText, Problem, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type
from adaclip_finetune.config.parts import is_folder_of_videos, parts_of


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


if TYPE_CHECKING:
    ObjectiveSection: TypeAlias = Chosen
else:
    ObjectiveSection = section_type(OBJECTIVES, "Objective", "training loss")
