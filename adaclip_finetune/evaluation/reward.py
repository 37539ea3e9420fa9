"""What a reward ranks without any gradient: the baselines that an adaptation by this reward has to beat.

A reward is a weighted mean of the cosines of one or several other models. Everything is computed in float64, in row
blocks, and from the queries' own scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.metrics import Metrics, retrieval_metrics
from adaclip_finetune.evaluation.similarity import SimilarityBlocks

_SMALLEST_STD = 1e-12
_ABOVE_ALL = 3.0  # what lifts a reward, which is -1 at least, above all cosines


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
        weights = torch.tensor(self.weights or [1.0] * len(self.others), dtype=torch.float64)
        for start in range(0, len(self.own.text), self.own.rows):
            rows = range(start, min(start + self.own.rows, len(self.own.text)))
            cosines = torch.stack([other.cosines(rows).double().cpu() for other in self.others])
            yield self.own.cosines(rows).double().cpu(), torch.tensordot(weights / weights.sum(), cosines, dims=1)

    def alone(self, queries: Queries) -> Metrics:
        """Return the metrics of the reward by itself."""
        return self._metrics(queries, lambda own, reward: reward)

    def reranked(self, queries: Queries) -> Metrics:
        """Return the metrics of the model's ranking in which the K first candidates are ordered by the reward."""
        best = torch.empty(0, dtype=torch.float64)  # of each video
        for own, _ in self:
            best = torch.cat([best.reshape(-1, own.shape[1]), own])
            best = best.topk(min(self.caption_candidates, len(best)), dim=0).values

        def over_videos(own: Tensor, reward: Tensor) -> Tensor:
            limit = own.topk(min(self.candidates, own.shape[1]), dim=1).values[:, -1:]
            return torch.where(own >= limit, reward + _ABOVE_ALL, own)

        def over_texts(own: Tensor, reward: Tensor) -> Tensor:
            return torch.where(own >= best[-1], reward + _ABOVE_ALL, own)

        return self._metrics(queries, over_videos).with_v2t_of(self._metrics(queries, over_texts))

    def ensemble(self, queries: Queries) -> Metrics:
        """Return the metrics of the mean of model and reward, each standardised over the candidates of a query.

        This mean needs no temperature, as that of two softmaxes would.
        """
        sums = torch.stack([torch.stack([both.sum(dim=1), (both**2).sum(dim=1)]) for both in map(torch.stack, self)])
        mean, square = sums.sum(dim=0)[:, :, None] / len(self.own.text)  # (2, 1, V) of each video
        spread = (square - mean**2).clamp(min=_SMALLEST_STD**2).sqrt()

        def over_videos(own: Tensor, reward: Tensor) -> Tensor:
            both = torch.stack([own, reward])
            std, mean = torch.std_mean(both, dim=2, correction=0, keepdim=True)
            scores: Tensor = ((both - mean) / std.clamp(min=_SMALLEST_STD)).mean(dim=0)
            return scores

        def over_texts(own: Tensor, reward: Tensor) -> Tensor:
            scores: Tensor = ((torch.stack([own, reward]) - mean) / spread).mean(dim=0)
            return scores

        return self._metrics(queries, over_videos).with_v2t_of(self._metrics(queries, over_texts))

    def _metrics(self, queries: Queries, score: Callable[[Tensor, Tensor], Tensor]) -> Metrics:
        return retrieval_metrics(_Combined(self, score), queries.video_of_text, queries.texts)


def class_baselines(
    scores: Tensor, others: Sequence[Tensor], weights: Sequence[float], candidates: int
) -> dict[str, Tensor]:
    """Return what a reward makes of the scores (V, C) of classes: `alone`, `reranked` and `ensemble` as of `Rewarded`.

    `others` are the products (V, C) of class vectors and videos by the other models, and K is `candidates`.
    """
    shares = torch.tensor(weights or [1.0] * len(others), dtype=torch.float64)
    own, reward = scores.double().cpu(), torch.stack([other.double().cpu() for other in others])
    reward = torch.tensordot(shares / shares.sum(), reward, dims=1)
    limit = own.topk(min(candidates, own.shape[1]), dim=1).values[:, -1:]
    both = torch.stack([own, reward])
    std, mean = torch.std_mean(both, dim=2, correction=0, keepdim=True)
    return {
        "alone": reward,
        "reranked": torch.where(own >= limit, reward + own.amax() + _ABOVE_ALL, own),
        "ensemble": ((both - mean) / std.clamp(min=_SMALLEST_STD)).mean(dim=0),
    }


@dataclass(frozen=True)
class _Combined:
    """Iterates over row blocks (t, V) of a score that is made of a model's cosines and the reward."""

    rewarded: Rewarded
    score: Callable[[Tensor, Tensor], Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.score(*pair) for pair in self.rewarded)
