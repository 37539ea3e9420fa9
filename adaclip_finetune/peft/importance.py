"""The arithmetic of importance-based selection: how much tensors changed, and which of them are retained.

A tensor that changes much in a short full finetuning is taken to be important. Tensors of different sizes change on
different scales; with `normalization`, k-means first groups them by size and change, and each is compared within its
group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.config import IbsSettings
from adaclip_finetune.errors import UserError

_log = logging.getLogger(__name__)
# Values up to this share of their group's median are negligible: their logarithms would dominate mean and deviation.
_NEGLIGIBLE = 1e-3

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class TensorImportance:
    """A row of `ibs_parameters.csv`. `group` and `normalized` are None without normalization."""

    name: str
    group: int | None
    dim: int
    importance: float
    normalized: float | None
    retained: bool


def snapshot(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter on the CPU, which saves the accelerator's memory.

    The meta tensors of a dry run have no values to copy and are returned as they are.
    """
    parameter = parameter.detach()
    return parameter if parameter.is_meta else parameter.to("cpu", copy=True)


def importance(before: Tensor, after: Tensor, metric: str) -> float:
    """Return how much a tensor changed. `l2norm`: ‖w - w₀‖/√dim. `angle`: degrees between w and w₀; 0 for a scalar.

    It is computed in float64 on the CPU. The angle is 2·atan2(‖u - v‖, ‖u + v‖) of the unit vectors (Kahan), which is
    exact for tiny angles too. The angle from or to a zero vector is 90°, and between two of them 0°.
    """
    w0, w = (tensor.detach().cpu().double().flatten() for tensor in (before, after))
    if metric == "l2norm":
        return float((w - w0).norm()) / math.sqrt(w.numel())
    if after.ndim == 0:
        return 0.0
    u, v = _unit(w0), _unit(w)
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def select_tensors(moved: Mapping[str, tuple[float, int]], settings: IbsSettings) -> list[TensorImportance]:
    """Return a row for each candidate, sorted by name. `moved` maps a name to (importance, number of parameters).

    Tensors are retained from the highest value down, as long as the parameters retained so far are fewer than
    round(retain_ratio x candidate parameters). Equal values rank by name. Raise UserError for an importance that is not
    finite.
    """
    rows = [TensorImportance(name, None, dim, value, None, False) for name, (value, dim) in sorted(moved.items())]
    for row in rows:
        if not math.isfinite(row.importance):
            raise UserError(
                f"peft ibs: the importance of {row.name} is {row.importance}: training diverged in the first phase; "
                "lower learning_rate or coef_lr"
            )
    if not any(row.importance for row in rows):
        _log.warning(
            "peft ibs: no tensor changed in the first phase, so the first ones by name are retained; "
            "train longer before selecting (num_pre_epochs), or raise learning_rate x coef_lr"
        )
    if settings.normalization:
        rows = _normalize(rows, settings.num_groups)
    retained = _retained_names(rows, settings.retain_ratio)
    return [replace(row, retained=row.name in retained) for row in rows]


def _retained_names(rows: list[TensorImportance], retain_ratio: float) -> set[str]:
    budget = round(retain_ratio * sum(row.dim for row in rows))
    names: set[str] = set()
    size = 0
    # The sort is stable, so equal values stay sorted by name.
    for row in sorted(rows, key=lambda row: -(row.importance if row.normalized is None else row.normalized)):
        if size >= budget:
            break
        names.add(row.name)
        size += row.dim
    return names


def _normalize(rows: list[TensorImportance], num_groups: int) -> list[TensorImportance]:
    values = np.array([row.importance for row in rows])
    groups = _groups(np.log([row.dim for row in rows]), values, num_groups)
    normalized = np.empty_like(values)
    for group in np.unique(groups):
        normalized[groups == group] = standardized(values[groups == group])
    return [
        replace(row, group=int(group), normalized=float(value))
        for row, group, value in zip(rows, groups, normalized, strict=True)
    ]


def standardized(values: FloatArray) -> FloatArray:
    """Return exp((ln v - mean)/sd) for the values of one group, with mean and population sd of ln v.

    Negligible values do not count in mean and sd. If sd is 0 (one tensor, or equal values), the result is 1, and 0 for
    negligible values.
    """
    counted = values > _NEGLIGIBLE * np.median(values)
    if not counted.any():
        return np.zeros_like(values)
    logs = np.log(values, out=np.full_like(values, -np.inf), where=values > 0)
    if np.ptp(logs[counted]) == 0:
        return counted.astype(np.float64)
    result: FloatArray = np.exp((logs - logs[counted].mean()) / logs[counted].std())
    return result


def _groups(log_dims: FloatArray, values: FloatArray, num_groups: int) -> IntArray:
    """Return k-means labels of the points (ln dim, importance), with at most as many groups as distinct points."""
    from sklearn.cluster import KMeans  # takes a second to import, and only IBS needs it

    points = np.stack([log_dims, values], axis=1)
    clusters = min(num_groups, len(np.unique(points, axis=0)))
    labels: IntArray = KMeans(clusters, random_state=0, n_init="auto").fit_predict(points)
    return labels


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm != 0 else torch.zeros_like(vector)
