"""What a model gets wrong on a data set: its worst queries, and how recall hangs on length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.compare.bars import Bar, rank_bars, recall_bars
from adaclip_finetune.compare.model import OpenModel
from adaclip_finetune.compare.strips import Strip, StripMaker
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.evaluate import EvaluationResult
from adaclip_finetune.evaluation.metrics import Metrics

WORST = 20
"""Queries that are shown."""


@dataclass(frozen=True)
class ShownVideo:
    """A video as a query sees it: its score, and what is said of it."""

    video_id: str
    score: float
    captions: Sequence[str]
    strip: Strip


@dataclass(frozen=True)
class Miss:
    """A query whose right video stands at `rank`, and the video that was found first instead."""

    query: str
    rank: int
    expected: ShownVideo
    found: ShownVideo


@dataclass(frozen=True, eq=False)
class ErrorReport:
    """All that the page shows. `lengths` is empty where the length of the videos is not known."""

    label: str
    annotation: str
    metrics: Metrics
    num_videos: int
    num_listed: int
    ranks: list[Bar]
    words: list[Bar]
    lengths: list[Bar]
    misses: list[Miss]


def error_report(model: OpenModel, annotation: str, split: EvaluationSplit, result: EvaluationResult) -> ErrorReport:
    """Reads the frames of the worst queries' videos again; of each the selector shows what it chose."""
    videos = {video.video_id: video for video in load_annotations(annotation)}
    strips, queries, ranks = StripMaker(model, split.store, videos), result.queries, result.metrics.t2v.ranks
    words = np.array([len(text.split()) for text in queries.texts], np.float64)
    return ErrorReport(
        label=model.source.label,
        annotation=annotation,
        metrics=result.metrics,
        num_videos=len(queries.video_ids),
        num_listed=result.num_listed,
        ranks=rank_bars(ranks),
        words=recall_bars(words, ranks, "words"),
        lengths=_by_length(strips, result),
        misses=_misses(strips, result, {name: video.sentences for name, video in videos.items()}),
    )


def _by_length(strips: StripMaker, result: EvaluationResult) -> list[Bar]:
    queries, ranks = result.queries, result.metrics.t2v.ranks
    known = [strips.seconds(name) for name in queries.video_ids]
    seconds = np.array([np.nan if length is None else length for length in known])[queries.video_of_text]
    told: NDArray[np.bool_] = ~np.isnan(seconds)
    return recall_bars(seconds[told], ranks[told], "s") if told.any() else []


def _misses(strips: StripMaker, result: EvaluationResult, captions: dict[str, tuple[str, ...]]) -> list[Miss]:
    """The worst first; of equals the one that the annotation lists first."""
    queries, ranks = result.queries, result.metrics.t2v.ranks
    worst = [int(row) for row in np.argsort(-ranks, kind="stable")[:WORST] if ranks[row] > 1]
    best = _best(result, set(worst))

    def shown(place: int, score: float) -> ShownVideo:
        name = queries.video_ids[place]
        return ShownVideo(name, score, captions[name], strips(name))

    misses = []
    for row in worst:
        own = int(queries.video_of_text[row])
        place, score, own_score = best[row]
        misses.append(Miss(queries.texts[row], int(ranks[row]), shown(own, own_score), shown(place, score)))
    return misses


def _best(result: EvaluationResult, rows: set[int]) -> dict[int, tuple[int, float, float]]:
    """Row → the best video that is not the right one, its score, and the score of the right one."""
    assert result.similarity is not None, "there is one process"
    found, start = {}, 0
    for block in result.similarity:
        for row in rows & set(range(start, start + len(block))):
            scores, own = block[row - start].cpu().clone(), int(result.queries.video_of_text[row])
            own_score, scores[own] = float(scores[own]), -float("inf")
            place = int(scores.argmax())
            found[row] = (place, float(scores[place]), own_score)
        start += len(block)
    return found
