"""What a model gets wrong on a data set: its worst queries, and how recall hangs on length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.compare.bars import Bar, rank_bars, recall_bars
from adaclip_finetune.compare.model import OpenModel
from adaclip_finetune.compare.strips import Strip, StripMaker
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.metrics import Metrics, retrieval_metrics
from adaclip_finetune.evaluation.similarity_file import SimilarityFile
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport

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
    queries: Queries
    metrics: Metrics
    num_listed: int
    ranks: list[Bar]
    words: list[Bar]
    lengths: list[Bar]
    misses: list[Miss]
    has_frames: bool


def error_report(model: OpenModel, annotation: str, split: EvaluationSplit, result: RetrievalReport) -> ErrorReport:
    """Reads the frames of the worst queries' videos again; of each the selector shows what it chose."""
    assert result.similarity is not None, "there is one process"
    videos = {video.video_id: video for video in load_annotations(annotation)}
    strips = StripMaker(model, split.store, videos)
    seconds = [strips.seconds(name) for name in result.queries.video_ids]
    captions = {name: video.sentences for name, video in videos.items()}
    misses = _misses(result.queries, result.metrics, result.similarity, captions, strips)
    report = _report(model.source.label, annotation, result.queries, result.metrics, misses, seconds)
    return replace(report, num_listed=result.num_listed, has_frames=True)


def error_report_of_matrix(file: SimilarityFile) -> ErrorReport:
    """The same of a saved matrix: no frames, and of the videos no length."""
    queries = file.queries
    metrics = retrieval_metrics(file, queries.video_of_text)
    captions: dict[str, Sequence[str]] = {name: [] for name in queries.video_ids}
    for text, video in zip(queries.texts, queries.video_of_text, strict=True):
        captions[queries.video_ids[video]] = [*captions[queries.video_ids[video]], text]
    misses = _misses(queries, metrics, file, captions, lambda _: Strip())
    return _report(file.path.stem, str(file.path), queries, metrics, misses, [None] * len(queries.video_ids))


def _report(
    label: str,
    annotation: str,
    queries: Queries,
    metrics: Metrics,
    misses: list[Miss],
    seconds: Sequence[float | None],
) -> ErrorReport:
    ranks = metrics.t2v.ranks
    words = np.array([len(text.split()) for text in queries.texts], np.float64)
    lengths = np.array([np.nan if length is None else length for length in seconds])[queries.video_of_text]
    told: NDArray[np.bool_] = ~np.isnan(lengths)
    return ErrorReport(
        label=label,
        annotation=annotation,
        queries=queries,
        metrics=metrics,
        num_listed=len(queries.video_ids),
        ranks=rank_bars(ranks),
        words=recall_bars(words, ranks, "words"),
        lengths=recall_bars(lengths[told], ranks[told], "s") if told.any() else [],
        misses=misses,
        has_frames=False,
    )


def _misses(
    queries: Queries,
    metrics: Metrics,
    blocks: Iterable[Tensor],
    captions: Mapping[str, Sequence[str]],
    strip_of: Callable[[str], Strip],
) -> list[Miss]:
    """The worst first; of equals the one that the annotation lists first."""
    ranks = metrics.t2v.ranks
    worst = [int(row) for row in np.argsort(-ranks, kind="stable")[:WORST] if ranks[row] > 1]
    best = _best(blocks, queries, set(worst))

    def shown(place: int, score: float) -> ShownVideo:
        name = queries.video_ids[place]
        return ShownVideo(name, score, captions[name], strip_of(name))

    misses = []
    for row in worst:
        place, score, own_score = best[row]
        expected = shown(int(queries.video_of_text[row]), own_score)
        misses.append(Miss(queries.texts[row], int(ranks[row]), expected, shown(place, score)))
    return misses


def _best(blocks: Iterable[Tensor], queries: Queries, rows: set[int]) -> dict[int, tuple[int, float, float]]:
    """Row → the best video that is not the right one, its score, and the score of the right one."""
    found, start = {}, 0
    for block in blocks:
        for row in rows & set(range(start, start + len(block))):
            scores, own = block[row - start].cpu().clone(), int(queries.video_of_text[row])
            own_score, scores[own] = float(scores[own]), -float("inf")
            place = int(scores.argmax())
            found[row] = (place, float(scores[place]), own_score)
        start += len(block)
    return found
