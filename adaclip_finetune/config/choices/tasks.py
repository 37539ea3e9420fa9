"""Settings of the tasks, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from adaclip_finetune.config.base import PathText, Problem, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type

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
        None, "class names: a text with one per line, or an annotation; null: those that the split has", unit="file"
    )
    templates: PathText = setting(
        "none",
        "templates of class names, whose vectors are averaged",
        unit="file",
        allowed=f"{', '.join(BUILT_IN_TEMPLATES)}, or a file with one template per line, each with one {{}}",
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


if TYPE_CHECKING:
    TaskSection: TypeAlias = Chosen
else:
    TaskSection = section_type(TASKS, "Task", "task that is evaluated")
