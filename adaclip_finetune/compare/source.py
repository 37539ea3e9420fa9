"""From the words of a command to a checkpoint and its settings: a run folder, or a weights file of any known kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaclip_finetune.compare.known import known_of_file
from adaclip_finetune.compare.options import AS_IT_IS
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import find_checkpoint
from adaclip_finetune.weights.checkpoints import check_settings

WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class Source:
    """A checkpoint and its settings, whose `resume` is the weights file. `folder` is its run's, or None."""

    label: str
    config: Config
    folder: Path | None

    def acquainted(self, annotation: str) -> str:
        """How the checkpoint already knows these captions and videos, in words; empty if it does not, as far as is
        known."""
        of = {"it learned from": self.config.train_annot, "its epoch was chosen on": self.config.val_annot}
        return "; ".join(filter(None, (_told(what, known, annotation) for what, known in of.items())))


def find_source(given: Path, settings: Path | None, overrides: Mapping[str, Any], annotation: str) -> Source:
    """`given`: a run folder or a weights file; `settings`: a settings file for checkpoints that bring none;
    `overrides`: flags; `annotation`: what is to be evaluated first.

    Raises UserError for what is not there, and for settings that the checkpoint contradicts.
    """
    folder = given if given.is_dir() else None
    weights = given / WEIGHTS if folder else given
    laid = {**_without_rivals(overrides), **AS_IT_IS, "resume": str(weights), "test_annot": annotation}
    config = _settings(given, settings, laid)
    try:
        check_paths(config)
    except UserError as error:
        raise UserError(
            f"{given}: {error}\nIts settings tell where things lay when it was made; say where they lie here: "
            "--frames_dir, --video_dir, --clip_weights"
        ) from error
    return Source(_label(given, folder), config, folder or (weights.parent if weights.name == WEIGHTS else None))


def _told(what: str, known: str | None, annotation: str) -> str:
    held = known_of_file(known, annotation)
    if held is None:
        return f"{what} {known}, which cannot be read here, so whether that holds these captions is not known"
    return f"{what} {held}" if held else ""


def _settings(given: Path, settings: Path | None, laid: Mapping[str, Any]) -> Config:
    """The checkpoint's own settings: of its run folder, of its metadata, of the file that was given; flags above."""
    try:
        checkpoint, config = find_checkpoint(given, laid, settings)
    except UserError as error:
        raise UserError(str(error).removeprefix("resume: ")) from error  # which is no flag here
    if checkpoint.is_foreign:
        try:
            check_settings(checkpoint, config)
        except UserError as error:
            raise UserError(f"{error}\nWrite them into a settings file, and give it as --config FILE") from error
    elif not checkpoint.settings and settings is None and not (given / "config.json").is_file():
        raise UserError(f"{given}: holds no settings; give those of its run as --config FILE")
    if config.task.method != "retrieval":  # which is what is compared here, whatever chose the run's best epoch
        config = config.model_copy(update={"task": load_config().task, "primary": None})
    return config


def _without_rivals(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Frames come from one place, and one device computes: what is given replaces the other that the settings name."""
    laid = dict(overrides)
    for given, other, nothing in (
        ("frames_dir", "video_dir", None),
        ("video_dir", "frames_dir", None),
        ("device", "xpu", False),
        ("xpu", "device", "auto"),
    ):
        if given in overrides and other not in overrides:
            laid[other] = nothing
    return laid


def _label(given: Path, folder: Path | None) -> str:
    return given.resolve().name if folder else f"{given.resolve().parent.name}/{given.name}"
