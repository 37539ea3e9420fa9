"""Weights between zero-shot CLIP and the finetuned one (WiSE-FT, Wortsman et al. 2022, "Robust fine-tuning of zero-shot
models"): CLIP's parameters are mixed, selector and aggregator stay those of the finetuned model.

The share is chosen on validation, and the test is evaluated with that one alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaclip_finetune.compare.evaluate import Found, check_annotations, measure_on
from adaclip_finetune.compare.known import known_of_file
from adaclip_finetune.compare.model import OpenModel, tell
from adaclip_finetune.compare.rows import Group
from adaclip_finetune.compare.source import find_source
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import Metrics
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip

ZERO_SHOT = "zero-shot"

State = dict[str, Tensor]


class Point(NamedTuple):
    """Figures on validation with the share `alpha` of the finetuned weights. `worth` is the primary figure, negative
    where less is better."""

    alpha: float
    metrics: Metrics
    worth: float


def interpolate(
    zero_shot: str,
    finetuned: Path,
    alphas: Sequence[float],
    validation: str,
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
) -> tuple[list[Point], list[Group]]:
    """The curve on validation, and for each annotation its rows: zero-shot, finetuned, and the best mix.

    `zero_shot`: that word for the CLIP of the model's own settings, or CLIP weights on disk. Where these are another
    CLIP's, zero-shot is measured of both: the finetuned model is compared with its own, the mix with where it begins.
    Raises UserError.
    """
    check_annotations(validation, *annotations)
    source = find_source(finetuned, settings, overrides, validation)
    model = OpenModel(source)
    end = _copied(model.session.model.clip.state_dict())
    towers = _towers(model, zero_shot)
    start = _start(model, towers, end)
    splits = {annotation: model.read(annotation) for annotation in annotations}
    curve = _curve(model, start, end, alphas, validation)
    best = best_point(curve)
    groups = []
    for annotation, split in splits.items():
        found = Found()
        model.session.model.clip.load_state_dict(end)
        measure_on(model, annotation, split, source.label, found)
        begin = model.zero_shot(split, found.baselines, towers, f" of {zero_shot}")
        if begin not in found.baselines:
            found.baselines.append(begin)
        model.session.model.clip.load_state_dict(mixed(start, end, best.alpha))
        result = model.measure(split, "interpolated")
        note = f"WiSE-FT from {towers.source} to {source.label}: the best of {len(curve)} shares on {validation}"
        note += f", which holds {known}" if (known := known_of_file(validation, annotation)) else ""
        note += f"; of the finetuned: {acquainted}" if (acquainted := source.acquainted(annotation)) else ""
        row = model.row(result, f"interpolated, α = {best.alpha:g}", note)
        if best.alpha == 0 and row.cost is not None:  # nothing of CLIP that was learned is left
            row = replace(row, cost=replace(row.cost, percent_of_clip=0.0, percent_of_all=None))
        found.rows.append(replace(row, baseline=begin.row.label))
        groups.append(found.group(annotation))
    return curve, groups


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> State:
    """(1 − alpha) · start + alpha · end, exactly the ends at 0 and 1; what is no float is that of `end`."""
    return {
        name: torch.lerp(start[name], value, alpha) if value.is_floating_point() else value
        for name, value in end.items()
    }


def best_point(curve: Sequence[Point]) -> Point:
    """The best by the primary figure; of equals the lowest mean rank of T2V, then the first."""
    return max(curve, key=lambda point: (point.worth, -point.metrics.t2v.mean_rank))


def curve_lines(curve: Sequence[Point], validation: str) -> list[str]:
    """For the screen: the whole curve, the chosen share marked."""
    lines = [
        f"{validation}, the share α of the finetuned weights:",
        f"{'α':>6}{'T2V R@1':>10}{'R@5':>7}{'V2T R@1':>10}",
    ]
    best = best_point(curve)
    for point in curve:
        t2v, v2t = point.metrics.t2v, point.metrics.v2t
        mark = "  ← chosen" if point is best else ""
        lines.append(f"{point.alpha:6.3g}{t2v.recall(1):10.1f}{t2v.recall(5):7.1f}{v2t.recall(1):10.1f}{mark}")
    return lines


def _curve(model: OpenModel, start: State, end: State, alphas: Sequence[float], validation: str) -> list[Point]:
    session, curve, split = model.session, [], model.read(validation)
    primary = model.config.primary_figure
    for alpha in alphas:
        session.model.clip.load_state_dict(mixed(start, end, alpha))
        metrics = model.measure(split, "validation").metrics
        found = value(metrics.as_dict(), primary)
        curve.append(Point(alpha, metrics, found if model.config.figures[primary] else -found))
        tell(f"α {alpha:g} on {validation}: {primary} {found:.1f}")
    return curve


def _towers(model: OpenModel, zero_shot: str) -> LoadedClip:
    if zero_shot == ZERO_SHOT:
        return model.session.pretrained()
    if not Path(zero_shot).exists():
        raise UserError(f"--interpolate {zero_shot}: neither the word {ZERO_SHOT} nor a file or folder of CLIP weights")
    return load_clip(model.config.model_copy(update={"clip_weights": zero_shot}))


def _start(model: OpenModel, towers: LoadedClip, end: State) -> State:
    device = model.session.device
    start = {name: tensor.to(device) for name, tensor in towers.module.state_dict().items()}
    if "logit_bias" in end:  # a constant, which changes no rank; a CLIP that was no SigLIP began without
        start.setdefault("logit_bias", end["logit_bias"])
    if different := sorted(
        name for name in start.keys() | end.keys() if _shape(start.get(name)) != _shape(end.get(name))
    ):
        raise UserError(
            f"--interpolate: the CLIP of {towers.source} is of another architecture than that of {model.source.label}: "
            f"{different[0]} is {_shape(start.get(different[0]))} there and {_shape(end.get(different[0]))} here"
        )
    return start


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "not there" if tensor is None else tuple(tensor.shape)


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
