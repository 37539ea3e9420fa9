"""Settings of the captioners, and their table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from adaclip_finetune.config.base import Problem, setting
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, section_type


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


if TYPE_CHECKING:
    CaptionerSection: TypeAlias = Chosen
else:
    CaptionerSection = section_type(CAPTIONERS, "Captioner", "what makes the prefix of a caption from a video's vector")
