"""Retrieval metrics from row blocks of a similarity matrix: R@K, median and mean rank, text to video and video to text.

Ties count against: rank = 1 + others strictly greater + others equal. A model that gives every pair the same score then
scores R@1 = 0 and not 100. Ranks are counts and so exact; no more than one block is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RECALLS = (1, 5, 10, 50)
_COLUMNS = ("R@1", "R@5", "R@10", "MedR", "MeanR")

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DirectionMetrics:
    """The rank (from 1) of each query's right answer. `queries` are row (t2v) or column (v2t) numbers of the matrix."""

    queries: IntArray
    ranks: IntArray

    def recall(self, k: int) -> float:
        """R@k: percent of the queries whose right answer is among the first k."""
        return 100 * int(np.count_nonzero(self.ranks <= k)) / len(self.ranks)

    @property
    def median_rank(self) -> float:
        return float(np.median(self.ranks))

    @property
    def mean_rank(self) -> float:
        return float(np.mean(self.ranks))

    def as_dict(self) -> dict[str, float]:
        """For JSON: R@1, R@5, R@10 and R@50 in percent, MedR, MeanR, and how many queries they are of."""
        recalls = {f"R@{k}": self.recall(k) for k in RECALLS}
        return {**recalls, "MedR": self.median_rank, "MeanR": self.mean_rank, "queries": len(self.ranks)}

    def as_state(self) -> dict[str, list[int]]:
        """For JSON: all of it, exactly."""
        return {"queries": self.queries.tolist(), "ranks": self.ranks.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, list[int]]) -> DirectionMetrics:
        """What `as_state` gave."""
        return cls(np.array(state["queries"], np.int64), np.array(state["ranks"], np.int64))


@dataclass(frozen=True, eq=False)
class Metrics:
    """Text to video (a query is a caption) and video to text (a query is a video that has captions)."""

    t2v: DirectionMetrics
    v2t: DirectionMetrics

    def as_dict(self) -> dict[str, dict[str, float]]:
        """For JSON."""
        return {"t2v": self.t2v.as_dict(), "v2t": self.v2t.as_dict()}

    def as_state(self) -> dict[str, dict[str, list[int]]]:
        """For JSON: all of it, exactly."""
        return {"t2v": self.t2v.as_state(), "v2t": self.v2t.as_state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, list[int]]]) -> Metrics:
        """What `as_state` gave."""
        return cls(*(DirectionMetrics.from_state(state[direction]) for direction in ("t2v", "v2t")))


def retrieval_metrics(blocks: Iterable[Tensor], video_of_text: Tensor | IntArray | Sequence[int]) -> Metrics:
    """Metrics of a similarity matrix (T, V) given as row blocks (t, V), and the column that each row belongs to (T,).

    A video may have any number of captions. Its v2t rank is the best among them, and only captions of other videos are
    others; without any it is a distractor in t2v and no query in v2t. `blocks` is gone through twice, since the score
    that other captions must reach is known only after all rows were seen: a list or any object that starts afresh, such
    as `similarity_blocks` makes, and not a generator.

    Raises ValueError for NaN (naming the row), a column out of range, or blocks that do not fit `video_of_text`.
    """
    if isinstance(blocks, Iterator):
        raise TypeError("blocks are gone through twice, and an iterator or generator is spent after one pass")
    owners = torch.as_tensor(video_of_text, dtype=torch.int64, device="cpu")
    if owners.ndim != 1 or not len(owners):
        raise ValueError("there are no captions to evaluate")
    t2v_ranks, best_own = _first_pass(blocks, owners)
    v2t_ranks = _rank_videos(blocks, owners, best_own)
    queries = np.unique(owners.numpy())
    return Metrics(
        t2v=DirectionMetrics(np.arange(len(owners)), t2v_ranks),
        v2t=DirectionMetrics(queries, v2t_ranks[queries]),
    )


def results_table(rows: Mapping[str, Metrics]) -> str:
    """A table of `_COLUMNS`, text to video and video to text, one line a model: {"zero-shot": …, "finetuned": …}."""
    width = max(len(name) for name in rows)
    head = f"{'':<{width}}   {'text → video':^36}   {'video → text':^36}"
    names = "".join(f"{name:>7}" for name in _COLUMNS)
    lines = [head, f"{'':<{width}}  {names}    {names}"]
    for name, metrics in rows.items():
        directions = (metrics.t2v.as_dict(), metrics.v2t.as_dict())
        cells = ["".join(f"{direction[column]:7.1f}" for column in _COLUMNS) for direction in directions]
        lines.append(f"{name:<{width}}  {cells[0]}    {cells[1]}")
    return "\n".join(lines)


def one_line(metrics: Metrics) -> str:
    """Both directions' R@1, R@5 and R@10 in one line."""
    parts = []
    for name, direction in (("T2V", metrics.t2v.as_dict()), ("V2T", metrics.v2t.as_dict())):
        parts.append(f"{name} R@1 {direction['R@1']:.1f}  R@5 {direction['R@5']:.1f}  R@10 {direction['R@10']:.1f}")
    return "   ".join(parts)


def _first_pass(blocks: Iterable[Tensor], owners: Tensor) -> tuple[IntArray, Tensor]:
    """The t2v rank of each caption (T,), and the score (V,) of each video's best caption, -inf where it has none."""
    ranks, best_own = torch.empty(len(owners), dtype=torch.int64), torch.empty(0)
    for start, scores, columns in _checked(blocks, owners):
        if start == 0:
            best_own = scores.new_full((scores.shape[1],), float("-inf"))
        own = scores.gather(1, columns[:, None])
        # The right video itself is among those that reach its score: that is the 1 of the rank.
        ranks[start : start + len(scores)] = (scores >= own).sum(dim=1)
        best_own.scatter_reduce_(0, columns, own.squeeze(1), "amax")
    return ranks.numpy(), best_own


def _rank_videos(blocks: Iterable[Tensor], owners: Tensor, best_own: Tensor) -> IntArray:
    """The rank (V,) of each video's best caption among the captions of other videos."""
    ranks = torch.ones(len(best_own), dtype=torch.int64, device=best_own.device)
    for _, scores, columns in _checked(blocks, owners):
        reaching = scores >= best_own
        ranks += reaching.sum(dim=0)
        ranks.index_add_(0, columns, -reaching.gather(1, columns[:, None]).squeeze(1).long())
    ranks_on_cpu: IntArray = ranks.cpu().numpy()
    return ranks_on_cpu


def _checked(blocks: Iterable[Tensor], owners: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each block with its first row and the columns (t,) of its rows; refused where anything does not fit."""
    start, width = 0, None
    for scores in blocks:
        if scores.ndim != 2:
            raise ValueError(f"a block is (t, V), not {tuple(scores.shape)}: a whole matrix is a list of one block")
        columns = owners[start : start + len(scores)]
        width = scores.shape[1] if width is None else width
        if len(columns) < len(scores):
            raise ValueError(f"the similarity has more rows than the {len(owners)} captions")
        if scores.shape[1] != width:
            raise ValueError(f"the block of row {start} has {scores.shape[1]} columns, those before {width}")
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < width:
            raise ValueError(f"rows {start} to {start + len(columns) - 1} belong to videos outside the {width} columns")
        if scores.isnan().any():
            row = start + int(scores.isnan().any(dim=1).nonzero()[0])
            raise ValueError(f"the similarity of row {row} is NaN: nothing can be ranked by it")
        yield start, scores, columns.to(scores.device)
        start += len(scores)
    if start < len(owners):
        raise ValueError(f"the similarity has {start} rows for {len(owners)} captions")
