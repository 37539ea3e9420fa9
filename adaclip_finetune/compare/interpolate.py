"""Interpolation between zero-shot CLIP and a finetuned one (WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of
zero-shot models"): CLIP's parameters are mixed, the selector and the aggregator stay those of the finetuned model.

Validation chooses the share of the finetuned weights, and the test is evaluated with that share alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, lerp

from adaclip_finetune.compare.checkpoints import OpenCandidate, find_candidates, tell
from adaclip_finetune.compare.evaluate import check_annotations
from adaclip_finetune.compare.seen_data import seen_by
from adaclip_finetune.compare.table import DataSetRows
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip

ZERO_SHOT = "zero-shot"

ClipState = Mapping[str, Tensor]


class SharePoint(NamedTuple):
    """The figures on validation with the share `alpha` of the finetuned weights, and the same as a line of text.

    `score` is the primary figure, negative if lower is better.
    """

    alpha: float
    figures: Mapping[str, Any]
    line: str
    score: float


def interpolate(
    zero_shot: str,
    finetuned: Path,
    alphas: Sequence[float],
    validation: str,
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
) -> tuple[list[SharePoint], list[DataSetRows]]:
    """Return the curve on validation, and for each annotation the rows of zero-shot, finetuned and the best mix.

    `zero_shot` is that word for the CLIP of the model's own settings, or CLIP weights on disk. If these are of another
    CLIP, both are measured: the finetuned model is compared with its own, the mix with the one that it starts from.
    Raises UserError.
    """
    check_annotations(validation, *annotations)
    (candidate,) = find_candidates([finetuned], settings, overrides, validation)
    model = OpenCandidate(candidate)
    clip, towers = model.session.model.clip, _towers(model, zero_shot)
    end = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
    start = _start(model, towers, end)
    splits = {annotation: model.read(annotation) for annotation in annotations}
    curve, validation_split = [], model.read(validation)
    for alpha in alphas:
        clip.load_state_dict(mixed(start, end, alpha))
        task, report = model.measure(validation_split, "validation")
        figures, line = report.as_dict(), task.one_line(report.figures)
        score = value(figures, task.primary) * (1 if task.greater_is_better else -1)
        curve.append(SharePoint(alpha, figures, line, score))
        tell(f"α {alpha:g} on {validation}: {line}")
    best, data_sets = best_point(curve), []
    for annotation, split in splits.items():
        data_set = DataSetRows(annotation)
        clip.load_state_dict(end)
        model.add_rows(data_set, split)
        baseline = model.add_zero_shot(data_set, split, towers, f" of {zero_shot}")
        clip.load_state_dict(mixed(start, end, best.alpha))
        task, report = model.measure(split, "interpolated")
        note = f"WiSE-FT from {towers.source} to {model.label}: the best of {len(curve)} shares on {validation}"
        note += f"; of the finetuned: {seen}" if (seen := seen_by(model.config, annotation)) else ""
        data_set.models.append(model.row(f"interpolated, α = {best.alpha:g}", task, report, baseline, note))
        data_sets.append(data_set)
    return curve, data_sets


def mixed(start: ClipState, end: ClipState, alpha: float) -> dict[str, Tensor]:
    """Return (1 − alpha) · start + alpha · end, exactly the ends at 0 and 1; integer tensors are those of `end`."""
    return {
        name: lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }


def best_point(curve: Sequence[SharePoint]) -> SharePoint:
    """Return the best point by the primary figure; among equal ones the lowest T2V mean rank, then the first."""
    return max(curve, key=lambda point: (point.score, -point.figures.get("t2v", {}).get("MeanR", 0)))


def _towers(model: OpenCandidate, zero_shot: str) -> LoadedClip:
    if zero_shot == ZERO_SHOT:
        return model.session.pretrained()
    if not Path(zero_shot).exists():
        raise UserError(f"--interpolate {zero_shot}: neither the word {ZERO_SHOT} nor a file or folder of CLIP weights")
    return load_clip(model.config.model_copy(update={"clip_weights": zero_shot}))


def _start(model: OpenCandidate, towers: LoadedClip, end: ClipState) -> ClipState:
    """Return the weights of `towers` on the model's device. Raises UserError if they have other names or shapes."""
    start = {name: tensor.to(model.session.device) for name, tensor in towers.module.state_dict().items()}
    if "logit_bias" in end:  # changes no rank; finetuning with the sigmoid loss adds it to a CLIP that has none
        start.setdefault("logit_bias", end["logit_bias"])
    here, there = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (end, start))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"--interpolate: the CLIP of {towers.source} has another architecture than that of {model.label}: "
                f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            )
    return start
