"""Retrieval metrics from row blocks of a similarity matrix: R@K, median and mean rank, text to video and video to text.

Ties count against: rank = 1 + number of other candidates that score at least as high as the right one. A model that
gives every pair the same score therefore has R@1 = 0 and not 100. Ranks are integer counts, so they are exact, and at
most one block is held at a time.

Two videos may have captions with the same text. No model can tell these captions apart, so some of these queries
are lost whatever the model does. `Metrics.excused` has the figures in which such captions do not count against each
other; published figures usually lie between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy  # imports its parts when they are first used
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.data.annotations import folded

RECALLS = (1, 5, 10, 50)
_KEPT = 512 * 2**20  # bytes of a matrix in main memory that is kept for the second pass
FIGURES = ("R@1", "R@5", "R@10", "MedR", "MeanR")

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DirectionMetrics:
    """The rank (from 1) of each query's right answer: of captions in t2v, of the videos that have captions in v2t."""

    ranks: IntArray

    def recall(self, k: int) -> float:
        """Return R@k: the percentage of queries whose right answer is among the first k."""
        return 100 * int(np.count_nonzero(self.ranks <= k)) / len(self.ranks)

    @property
    def median_rank(self) -> float:
        return float(np.median(self.ranks))

    @property
    def mean_rank(self) -> float:
        return float(np.mean(self.ranks))

    def as_dict(self) -> dict[str, float]:
        """Return R@1, R@5, R@10 and R@50 in percent, MedR, MeanR, and the number of queries."""
        recalls = {f"R@{k}": self.recall(k) for k in RECALLS}
        return {**recalls, "MedR": self.median_rank, "MeanR": self.mean_rank, "queries": len(self.ranks)}


@dataclass(frozen=True, eq=False)
class Metrics:
    """Text to video (a query is a caption) and video to text (a query is a video that has captions).

    `shared_captions` is the number of captions whose text is also a caption of another video. If there are any,
    `excused` has the metrics in which captions with the same text do not count against each other.
    """

    t2v: DirectionMetrics
    v2t: DirectionMetrics
    shared_captions: int = 0
    excused: Metrics | None = None

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each direction; `shared_captions` is present only if there are any."""
        found: dict[str, dict[str, Any]] = {"t2v": self.t2v.as_dict(), "v2t": self.v2t.as_dict()}
        if self.excused is not None:
            found["shared_captions"] = {"captions": self.shared_captions, "excused": self.excused.as_dict()}
        return found

    def as_state(self) -> dict[str, Any]:
        """Return everything, exactly, as JSON can hold it."""
        excused = None if self.excused is None else self.excused.as_state()
        ranks = {"t2v": self.t2v.ranks.tolist(), "v2t": self.v2t.ranks.tolist()}
        return {**ranks, "shared_captions": self.shared_captions, "excused": excused}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Metrics:
        """Make the metrics from what `as_state` returned."""
        t2v, v2t = (DirectionMetrics(np.array(state[direction], np.int64)) for direction in ("t2v", "v2t"))
        return cls(t2v, v2t, state["shared_captions"], state["excused"] and cls.from_state(state["excused"]))

    def with_v2t_of(self, other: Metrics) -> Metrics:
        """Return these metrics with video to text from `other` metrics of the same captions and videos."""
        excused = self.excused and other.excused and self.excused.with_v2t_of(other.excused)
        return replace(self, v2t=other.v2t, excused=excused)

    def shared_line(self) -> str:
        """Return one line about the captions that several videos share, or "" if there are none."""
        if self.excused is None:
            return ""
        t2v, v2t = self.excused.t2v.recall(1), self.excused.v2t.recall(1)
        return (
            f"{self.shared_captions:,} captions have the same text as a caption of another video; "
            f"if these do not count against each other, R@1 is T2V {t2v:.1f}, V2T {v2t:.1f}"
        )


def retrieval_metrics(
    blocks: Iterable[Tensor], video_of_text: Tensor | IntArray | Sequence[int], texts: Sequence[str] | None = None
) -> Metrics:
    """Return the metrics of a similarity matrix (T, V) given as row blocks (t, V).

    `video_of_text` (T,) is the column that each row belongs to. A video may have any number of captions. Its v2t rank
    is that of the best of them, and only captions of other videos compete; a video without captions is a distractor in
    t2v and no query in v2t. With `texts` (T,), captions shared by several videos are counted, and `excused` is filled.

    `blocks` is iterated twice, because the score that other captions must reach is known only after all rows were seen:
    pass a list or an object that starts afresh, such as `similarity_blocks` returns, not a generator. Blocks of a small
    matrix in main memory are kept instead, which is faster than computing them again. Raises ValueError
    for NaN, naming the row, and for a number of rows other than that of captions.
    """
    owners = torch.as_tensor(video_of_text, dtype=torch.int64, device="cpu")
    if not len(owners):
        raise ValueError("there are no captions to evaluate")
    rows, videos, twins = _same_text(texts or (), owners.numpy())
    t2v, t2v_same = torch.empty_like(owners), torch.zeros_like(owners)
    best_own = all_own = torch.empty(0)
    kept: list[Tensor] = []
    for start, scores, columns in _checked(blocks, owners):
        if scores.device.type == "cpu" and scores.shape[1] * scores.element_size() * len(owners) <= _KEPT:
            kept.append(scores)
        if start == 0:
            best_own = scores.new_full((scores.shape[1],), float("-inf"))  # the score of each video's best caption
            all_own = scores.new_empty(len(owners))
        own = scores.gather(1, columns[:, None])
        all_own[start : start + len(scores)] = own.squeeze(1)
        # The right video itself is among those that reach its score: that is the 1 of the rank.
        t2v[start : start + len(scores)] = _count(_reached(scores, own), dim=1)
        best_own.scatter_reduce_(0, columns, own.squeeze(1), "amax")
        _, row, video = _in_block(rows, videos, start, scores)
        t2v_same.index_add_(0, start + row.cpu(), (scores[row, video] >= own[row, 0]).long().cpu())
    v2t = torch.ones(len(best_own), dtype=torch.int64, device=best_own.device)
    v2t_same = torch.zeros_like(v2t)
    for start, scores, columns in _checked(kept or blocks, owners):
        reaching = _reached(scores, best_own)
        pairs, row, video = _in_block(rows, videos, start, scores)
        # A text has one score, but the last bits of what is computed at two places of a matrix may differ.
        reaching[row, video] = _reached(all_own[twins[pairs].to(scores.device)], best_own[video])
        v2t += _count(reaching, dim=0)
        v2t.index_add_(0, columns, -reaching.gather(1, columns[:, None]).squeeze(1).long())
        v2t_same.index_add_(0, video, reaching[row, video].long())
    asked = np.unique(owners.numpy())
    metrics = Metrics(_direction(t2v), _direction(v2t[asked]))
    if not len(rows):
        return metrics
    excused = Metrics(_direction(t2v - t2v_same), _direction((v2t - v2t_same)[asked]))
    return replace(metrics, shared_captions=len(np.unique(rows)), excused=excused)


def results_table(rows: Mapping[str, Metrics]) -> str:
    """Return a table of R@1, R@5, R@10, MedR and MeanR in both directions, one line for each model."""
    width = max(len(name) for name in rows)
    head = f"{'':<{width}}   {'text → video':^36}   {'video → text':^36}"
    names = "".join(f"{name:>7}" for name in FIGURES)
    lines = [head, f"{'':<{width}}  {names}    {names}"]
    for name, metrics in rows.items():
        directions = (metrics.t2v.as_dict(), metrics.v2t.as_dict())
        cells = ["".join(f"{direction[column]:7.1f}" for column in FIGURES) for direction in directions]
        lines.append(f"{name:<{width}}  {cells[0]}    {cells[1]}")
    return "\n".join(lines)


def one_line(metrics: Metrics) -> str:
    """Return R@1, R@5 and R@10 of both directions in one line."""
    return "   ".join(
        f"{name} R@1 {direction.recall(1):.1f}  R@5 {direction.recall(5):.1f}  R@10 {direction.recall(10):.1f}"
        for name, direction in (("T2V", metrics.t2v), ("V2T", metrics.v2t))
    )


def _reached(scores: Tensor, least: Tensor) -> Tensor:
    """Return 1 where `scores` are at least `least`, else 0, as numbers of their type, which are added up faster than
    truth values."""
    return torch.ge(scores, least, out=torch.empty_like(scores))


def _count(ones: Tensor, dim: int) -> Tensor:
    """Return the number of ones along a dimension, int64."""
    exact = torch.float32 if ones.shape[dim] <= 2**24 else torch.float64  # float32 has whole numbers up to here
    return ones.sum(dim=dim, dtype=torch.promote_types(ones.dtype, exact)).long()


def _direction(ranks: Tensor) -> DirectionMetrics:
    return DirectionMetrics(ranks.cpu().numpy())


def _same_text(texts: Sequence[str], owners: IntArray) -> tuple[Tensor, Tensor, Tensor]:
    """Return, in ascending order, each caption (P,) that has its text in common with another video, that video (P,),
    and its first caption with this text (P,). Case and spaces do not count."""
    numbers: dict[str, int] = {}
    text_of = np.array([numbers.setdefault(folded(text), len(numbers)) for text in texts], np.int64)
    # Each text once for each of its videos.
    (text, video), first = np.unique(np.stack([text_of, owners[: len(texts)]]), axis=1, return_index=True)
    table = scipy.sparse.csr_array((1 + first, (text, video)), (len(numbers), owners.max() + 1))
    found = table[text_of].tocoo()
    other = found.col != owners[found.row]
    rows, videos, twins = (torch.from_numpy(part[other]).long() for part in (found.row, found.col, found.data - 1))
    return rows, videos, twins


def _in_block(rows: Tensor, videos: Tensor, start: int, scores: Tensor) -> tuple[slice, Tensor, Tensor]:
    """Return which pairs of `_same_text` are in a block, their rows, counted from its first one, and their videos."""
    here = slice(*torch.searchsorted(rows, torch.tensor([start, start + len(scores)])).tolist())
    return here, (rows[here] - start).to(scores.device), videos[here].to(scores.device)


def _checked(blocks: Iterable[Tensor], owners: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each block with the number of its first row and the columns (t,) of its rows."""
    start = 0
    for scores in blocks:
        columns = owners[start : start + len(scores)]
        if len(columns) < len(scores):
            raise ValueError(f"the similarity has more rows than the {len(owners)} captions")
        if scores.numel() and scores.max().isnan():  # the maximum of numbers and NaN is NaN
            row = start + int(scores.isnan().any(dim=1).nonzero()[0])
            raise ValueError(f"the similarity of row {row} is NaN, so nothing can be ranked")
        yield start, scores, columns.to(scores.device)
        start += len(scores)
    if start < len(owners):
        raise ValueError(f"the similarity has {start} rows for {len(owners)} captions")
