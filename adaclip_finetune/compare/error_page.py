"""The error analysis of one model on one data set: an HTML file that needs no script, font or picture from elsewhere.

It shows the figures, how recall depends on the length of caption and video, and the queries with the worst ranks, with
the frames that the model chose of the right video and of the one that it found first.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Template
from numpy.typing import NDArray
from PIL import Image

from adaclip_finetune.compare.checkpoints import OpenCandidate
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.metrics import IntArray
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport

_TEMPLATE = Path(__file__).with_name("error_page.html")
_WORST = 20  # queries that are shown
_RANKS = {"1": 1, "2–5": 5, "6–10": 10, "11–50": 50, "over 50": np.inf}  # the last rank of each bar
_GROUPS = 5  # bars of a chart by length
_HEIGHT = 96  # pixels of a frame
_FRAMES = 16  # of a video, at most


class Bar(NamedTuple):
    """A bar of a chart: `share` in percent, and the number of queries that it stands for."""

    label: str
    share: float
    queries: int


def error_page(model: OpenCandidate, annotation: str, split: EvaluationSplit, report: RetrievalReport) -> str:
    """Return the page of a model that was just measured. Reads the frames of the shown videos again."""
    queries, ranks = report.queries, report.metrics.t2v.ranks
    captions = {video.video_id: video.sentences for video in load_annotations(annotation)}
    words = np.array([len(text.split()) for text in queries.texts])
    frames = np.array([split.store.count(name) for name in queries.video_ids])[queries.video_of_text]
    directions = (
        ("text → video", report.metrics.t2v, intervals(ranks, queries.video_of_text)),
        ("video → text", report.metrics.v2t, intervals(report.metrics.v2t.ranks)),
    )
    reader = VideoReader(split.store, model.config, model.session.model.views())

    @cache
    def described(name: str) -> dict[str, Any]:
        try:
            return {"name": name, "captions": captions[name], "frames": _chosen_frames(model, reader, name)}
        except FrameError as error:
            return {"name": name, "captions": captions[name], "problem": error.reason}

    wrong = []
    for row, scores in _worst_rows(report):
        own = int(queries.video_of_text[row])
        others = np.delete(np.arange(len(scores)), own)
        top = int(others[scores[others].argmax()])
        expected, found = ({**described(queries.video_ids[place]), "score": scores[place]} for place in (own, top))
        wrong.append({"query": queries.texts[row], "rank": int(ranks[row]), "expected": expected, "found": found})
    template = Template(_TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page: str = template.render(
        label=model.label,
        annotation=annotation,
        gallery=report.gallery().splitlines(),
        directions=directions,
        charts={
            "Ranks of the right video": rank_bars(ranks),
            "R@1 by length of the caption": recall_bars(words, ranks, "words"),
            "R@1 by length of the video": recall_bars(frames, ranks, "frames"),
        },
        num_wrong=int((ranks > 1).sum()),
        wrong=wrong,
    )
    return page


def rank_bars(ranks: IntArray) -> list[Bar]:
    """Return how many queries have their right answer at rank 1, at 2 to 5, and so on."""
    places = np.searchsorted(list(_RANKS.values()), ranks)
    counts = np.bincount(places, minlength=len(_RANKS)).tolist()
    return [Bar(label, 100 * count / len(ranks), count) for label, count in zip(_RANKS, counts, strict=True)]


def recall_bars(values: IntArray, ranks: IntArray, unit: str) -> list[Bar]:
    """Return R@1 of the queries in at most five groups of similar size by value; equal values stay together."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _GROUPS + 1)[1:-1], method="lower"))
    group, bars = np.searchsorted(edges, values), []
    for number in np.unique(group):
        here = group == number
        low, high = values[here].min(), values[here].max()
        label = f"{low:,} {unit}" if low == high else f"{low:,}–{high:,} {unit}"
        bars.append(Bar(label, 100 * float((ranks[here] == 1).mean()), int(here.sum())))
    return bars


def _worst_rows(report: RetrievalReport) -> list[tuple[int, NDArray[Any]]]:
    """Return the queries with the worst ranks, the worst first, with their scores (V,)."""
    assert report.similarity is not None, "there is one process"
    ranks = report.metrics.t2v.ranks
    worst = [int(row) for row in np.argsort(-ranks, kind="stable")[:_WORST] if ranks[row] > 1]
    scores: dict[int, NDArray[Any]] = {}
    start = 0
    for block in report.similarity:
        scores |= {row: block[row - start].cpu().numpy() for row in worst if start <= row < start + len(block)}
        start += len(block)
    return [(row, scores[row]) for row in worst]


@torch.no_grad()
def _chosen_frames(model: OpenCandidate, reader: VideoReader, name: str) -> list[dict[str, Any]]:
    """Return the chosen frames in order: index from 0, picture, and with a selector the percentage of its softmax."""
    batch = collate([reader.read(name)]).videos
    assert batch is not None, "a video that cannot be read raises FrameError"
    indices = batch.frame_indices[0].tolist()  # -1 where a short video is padded
    with model.session.autocast():
        selection = model.session.model.eval().encode_video(batch.to(model.session.device)).selection
    places, shares = list(range(len(indices))), [None] * len(indices)
    if selection is not None:
        places = sorted(selection.indices[0].tolist())
        shares = (100 * selection.logits[0].float().softmax(dim=0)).tolist()
    places = [place for place in places if indices[place] >= 0][:_FRAMES]
    frames = []
    for place, pixels in zip(places, reader.store.read(name, [indices[place] for place in places]), strict=True):
        image, content = Image.fromarray(pixels), io.BytesIO()
        image.resize((max(1, round(image.width * _HEIGHT / image.height)), _HEIGHT)).save(content, "JPEG", quality=80)
        picture = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        frames.append({"index": indices[place], "share": shares[place], "picture": picture})
    return frames
