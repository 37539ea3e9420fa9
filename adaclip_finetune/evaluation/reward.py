"""What a reward ranks without any gradient: the baselines that an adaptation by this reward has to beat.

A reward is a weighted mean of the cosines of one or several other models. Everything is computed in float64, in row
blocks, and from the queries' own scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.adaptation.losses import weighted_mean
from adaclip_finetune.evaluation.metrics import Metrics, retrieval_metrics
from adaclip_finetune.evaluation.similarity import SimilarityBlocks

_SMALLEST_STD = 1e-12
_ABOVE_ALL = 3.0  # what lifts a reward, which is -1 at least, above all scores of at most 1, or beyond the greatest


@dataclass(frozen=True)
class Rewarded:
    """Iterates over row blocks (t, V) of the cosines by a model and of the reward, starting afresh each time.

    Without `weights`, all of the `others` count the same. K is `candidates` for a text, `caption_candidates` for a
    video.
    """

    own: SimilarityBlocks
    others: Sequence[SimilarityBlocks]
    weights: Sequence[float]
    candidates: int
    caption_candidates: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.own.text), self.own.rows):
            rows = range(start, min(start + self.own.rows, len(self.own.text)))
            cosines = [other.cosines(rows).double().cpu() for other in self.others]
            yield self.own.cosines(rows).double().cpu(), weighted_mean(cosines, self.weights)

    def alone(self, queries: Queries) -> Metrics:
        """Return the metrics of the reward by itself."""
        return self._metrics(queries, lambda own, reward: reward)

    def reranked(self, queries: Queries) -> Metrics:
        """Return the metrics of the model's ranking in which the K first candidates are ordered by the reward."""
        best = torch.empty(0, dtype=torch.float64)  # of each video
        for own, _ in self:
            best = torch.cat([best.reshape(-1, own.shape[1]), own])
            best = best.topk(min(self.caption_candidates, len(best)), dim=0).values

        def over_texts(own: Tensor, reward: Tensor) -> Tensor:
            return torch.where(own >= best[-1], reward + _ABOVE_ALL, own)

        over_videos = self._metrics(queries, partial(_reranked, candidates=self.candidates))
        return over_videos.with_v2t_of(self._metrics(queries, over_texts))

    def ensemble(self, queries: Queries) -> Metrics:
        """Return the metrics of the mean of model and reward, each standardised over the candidates of a query.

        This mean needs no temperature, as that of two softmaxes would.
        """
        sums = torch.stack([torch.stack([both.sum(dim=1), (both**2).sum(dim=1)]) for both in map(torch.stack, self)])
        mean, square = sums.sum(dim=0)[:, :, None] / len(self.own.text)  # (2, 1, V) of each video
        spread = (square - mean**2).clamp(min=_SMALLEST_STD**2).sqrt()

        def over_texts(own: Tensor, reward: Tensor) -> Tensor:
            scores: Tensor = ((torch.stack([own, reward]) - mean) / spread).mean(dim=0)
            return scores

        return self._metrics(queries, _standardised).with_v2t_of(self._metrics(queries, over_texts))

    def _metrics(self, queries: Queries, score: Callable[[Tensor, Tensor], Tensor]) -> Metrics:
        return retrieval_metrics(_Combined(self, score), queries.video_of_text, queries.texts)


def class_baselines(
    scores: Tensor, others: Sequence[Tensor], weights: Sequence[float], candidates: int
) -> dict[str, Tensor]:
    """Return what a reward makes of the scores (V, C) of classes: `alone`, `reranked` and `ensemble` as of `Rewarded`.

    `others` are the products (V, C) of class vectors and videos by the other models, and K is `candidates`.
    """
    own, reward = scores.double().cpu(), weighted_mean([other.double().cpu() for other in others], weights)
    return {
        "alone": reward,
        "reranked": _reranked(own, reward, candidates),
        "ensemble": _standardised(own, reward),
    }


def _reranked(own: Tensor, reward: Tensor, candidates: int) -> Tensor:
    """Return scores (q, C) by which the first candidates of each query come first, ordered by the reward."""
    limit = own.topk(min(candidates, own.shape[1]), dim=1).values[:, -1:]
    return torch.where(own >= limit, reward + own.amax() + _ABOVE_ALL, own)


def _standardised(own: Tensor, reward: Tensor) -> Tensor:
    """Return the mean of both scores (q, C), each standardised over the candidates of a query."""
    both = torch.stack([own, reward])
    std, mean = torch.std_mean(both, dim=2, correction=0, keepdim=True)
    scores: Tensor = ((both - mean) / std.clamp(min=_SMALLEST_STD)).mean(dim=0)
    return scores


@dataclass(frozen=True)
class _Combined:
    """Iterates over row blocks (t, V) of a score that is made of a model's cosines and the reward."""

    rewarded: Rewarded
    score: Callable[[Tensor, Tensor], Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.score(*pair) for pair in self.rewarded)
