"""The error analysis of one model on one data set: an HTML file that needs no script, font or picture from elsewhere.

It shows the figures, how recall depends on the length of caption and video, and the queries with the worst ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Template
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.compare.checkpoints import OpenCandidate
from adaclip_finetune.compare.strips import Strip, StripMaker
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.metrics import IntArray
from adaclip_finetune.evaluation.similarity_file import SimilarityFile
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, report_of_matrix

_TEMPLATE = Path(__file__).with_name("error_page.html")
_WORST = 20  # queries that are shown
_RANKS = (1, 5, 10, 20, 50, 100, 1000)  # the last rank of each bar
_GROUPS = 5  # bars of a chart by length


class Bar(NamedTuple):
    """A bar of a chart: `share` in percent, and the number of queries that it stands for."""

    label: str
    share: float
    queries: int


def error_page(model: OpenCandidate, annotation: str, split: EvaluationSplit, report: RetrievalReport) -> str:
    """Return the page of a model that was just measured. Reads the frames of the shown videos again."""
    videos = {video.video_id: video for video in load_annotations(annotation)}
    strips = StripMaker(model, split.store, videos)
    captions = {name: video.sentences for name, video in videos.items()}
    lengths = [strips.seconds(name) for name in report.queries.video_ids]
    return _page(model.label, annotation, report, captions, lengths, strips)


def error_page_of_matrix(file: SimilarityFile) -> str:
    """Return the page of a saved matrix, without frames and without the lengths of videos."""
    names = file.queries.video_ids
    captions: dict[str, list[str]] = {name: [] for name in names}
    for text, video in zip(file.queries.texts, file.queries.video_of_text, strict=True):
        captions[names[video]].append(text)
    return _page(file.path.stem, str(file.path), report_of_matrix(file), captions, [None] * len(names), None)


def rank_bars(ranks: IntArray) -> list[Bar]:
    """Return how many queries have their right answer at rank 1, at 2 to 5, and so on up to the worst rank."""
    bars, first, worst = [], 1, int(ranks.max())
    for last in (*_RANKS, worst):
        if first <= worst and first <= last:
            count = int(((ranks >= first) & (ranks <= last)).sum())
            bars.append(Bar(_range(first, min(last, worst)), 100 * count / len(ranks), count))
            first = last + 1
    return bars


def recall_bars(values: NDArray[np.float64], ranks: IntArray, unit: str) -> list[Bar]:
    """Return R@1 of the queries in at most five groups of similar size by value; equal values stay together."""
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _GROUPS + 1)[1:-1], method="lower"))
    group, bars = np.searchsorted(edges, values, side="left"), []
    for number in np.unique(group):
        here = group == number
        label = f"{_range(values[here].min(), values[here].max())} {unit}"
        bars.append(Bar(label, 100 * float((ranks[here] <= 1).mean()), int(here.sum())))
    return bars


def _page(
    label: str,
    annotation: str,
    report: RetrievalReport,
    captions: Mapping[str, Sequence[str]],
    seconds: Sequence[float | None],
    strips: StripMaker | None,
) -> str:
    queries, ranks = report.queries, report.metrics.t2v.ranks
    words = np.array([len(text.split()) for text in queries.texts], np.float64)
    lengths = np.array(seconds, np.float64)[queries.video_of_text]  # None becomes NaN
    known = ~np.isnan(lengths)
    directions = (
        ("text → video", report.metrics.t2v, intervals(ranks, queries.video_of_text)),
        ("video → text", report.metrics.v2t, intervals(report.metrics.v2t.ranks)),
    )
    template = Template(_TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page: str = template.render(
        label=label,
        annotation=annotation,
        gallery=report.gallery().splitlines(),
        directions=directions,
        charts={
            "Ranks of the right video": rank_bars(ranks),
            "R@1 by length of the caption": recall_bars(words, ranks, "words"),
            "R@1 by length of the video": recall_bars(lengths[known], ranks[known], "s"),
        },
        num_wrong=int((ranks > 1).sum()),
        wrong=_worst(report, captions, strips or (lambda _: Strip())),
        has_frames=strips is not None,
    )
    return page


def _worst(
    report: RetrievalReport, captions: Mapping[str, Sequence[str]], strip_of: Callable[[str], Strip]
) -> list[dict[str, Any]]:
    """Return the queries with the worst ranks, the worst first: query, rank, its own video and the one found first."""
    assert report.similarity is not None, "there is one process"
    queries, ranks = report.queries, report.metrics.t2v.ranks
    worst = [int(row) for row in np.argsort(-ranks, kind="stable")[:_WORST] if ranks[row] > 1]
    scores: dict[int, Tensor] = {}
    start = 0
    for block in report.similarity:
        scores |= {row: block[row - start].cpu() for row in worst if start <= row < start + len(block)}
        start += len(block)

    def ranked(row: int, place: int) -> dict[str, Any]:
        name = queries.video_ids[place]
        return {"name": name, "score": scores[row][place].item(), "captions": captions[name], "strip": strip_of(name)}

    found = []
    for row in worst:
        own = int(queries.video_of_text[row])
        others = scores[row].clone()
        others[own] = -float("inf")
        videos = {"expected": ranked(row, own), "found": ranked(row, int(others.argmax()))}
        found.append({"query": queries.texts[row], "rank": int(ranks[row]), **videos})
    return found


def _range(low: float, high: float) -> str:
    first, last = (f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}" for value in (low, high))
    return first if first == last else f"{first}–{last}"
