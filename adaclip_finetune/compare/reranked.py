"""Rows of what reranking makes of a model's scores, always beside the model's own and marked for what they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaclip_finetune.compare.known import known_of_queries
from adaclip_finetune.compare.rows import Row
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import DirectionMetrics
from adaclip_finetune.evaluation.rerank import (
    DUAL_SOFTMAX_TEMPERATURE,
    QB_NORM_TEMPERATURE,
    dual_softmax_metrics,
    qb_norm_metrics,
)

TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Those that validation chooses from."""
_DEFAULTS = {"dual_softmax": DUAL_SOFTMAX_TEMPERATURE, "qb_norm": QB_NORM_TEMPERATURE}


@dataclass(frozen=True, eq=False)
class Bank:
    """Logits (B, V) of other texts to the gallery, in row blocks, and the texts."""

    blocks: Iterable[Tensor]
    texts: Sequence[str]


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits (T, V) in row blocks, of which texts and videos they are, and the bank where there is one."""

    name: str
    blocks: Iterable[Tensor]
    queries: Queries
    bank: Bank | None = None


def reranked_rows(
    row: Row, scores: Scores, methods: Sequence[str], temperature: float | None, validation: Scores | None
) -> list[Row]:
    """A row for each of the methods. The temperature is the given one; else the best by T2V R@1 on `validation`; else
    fixed in advance. Raises UserError for scores that are no finite numbers."""
    try:
        return [_reranked(row, scores, method, temperature, validation) for method in methods]
    except ValueError as error:
        raise UserError(f"{scores.name}: {error}") from error


def _reranked(row: Row, scores: Scores, method: str, temperature: float | None, validation: Scores | None) -> Row:
    if temperature is not None:
        how = f"temperature {temperature:g}, as given"
    elif validation is not None:
        temperature = _best_temperature(method, validation)
        known = known_of_queries(validation.queries, scores.queries)
        how = f"temperature {temperature:g}, the best of {len(TEMPERATURES)} on {validation.name}"
        how += f", which holds {known}" if known else ""
    else:
        temperature = _DEFAULTS[method]
        how = f"temperature {temperature:g}, fixed in advance"
    t2v, v2t = _directions(method, scores, temperature)
    label = f"{row.label} + {method} ({'transductive' if method == 'dual_softmax' else 'query bank'})"
    note = f"{_seen(method, scores)}; {how}"
    return Row(label, "reranked", t2v, v2t, row.queries, row.num_listed, note=note)


def _directions(method: str, scores: Scores, temperature: float) -> tuple[DirectionMetrics, DirectionMetrics | None]:
    owners = scores.queries.video_of_text
    if method == "dual_softmax":
        metrics = dual_softmax_metrics(scores.blocks, owners, temperature)
        return metrics.t2v, metrics.v2t
    assert scores.bank is not None, "qb_norm is refused without"
    return qb_norm_metrics(scores.blocks, scores.bank.blocks, owners, temperature), None


def _best_temperature(method: str, validation: Scores) -> float:
    """The default, unless another is strictly better."""
    default = _DEFAULTS[method]
    candidates = [default, *(value for value in TEMPERATURES if value != default)]
    return max(candidates, key=lambda value: _directions(method, validation, value)[0].recall(1))


def _seen(method: str, scores: Scores) -> str:
    if method == "dual_softmax":
        return "sees all test queries at once"
    assert scores.bank is not None
    asked = set(scores.queries.texts)
    both = sum(text in asked for text in scores.bank.texts)
    same = f", {both:,} of them also asked here" if both else ""
    return f"bank of {len(scores.bank.texts):,} training captions{same}; text to video only"
