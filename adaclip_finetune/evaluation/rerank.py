"""Scores corrected by the scores of other queries: dual softmax and QB-Norm, in log space and float64.

Dual softmax (Cheng et al. 2021, "Improving video-text retrieval by multi-stream corpus alignment and dual softmax
loss") multiplies a score by the softmax of the candidate's scores over all queries of the test: it is transductive.
QB-Norm (Bogolin et al. 2022, "Cross modal retrieval with querybank normalisation") divides exp(score) by its sum over a
bank of other queries, such as training captions; its dynamic inverted softmax does so only for queries whose best
candidate is a hub, the best of some query in the bank.

Computed as products in float32, as usual, most of these scores underflow to 0, and ranks depend on how ties are
counted. Here no exponential is taken of a score that is ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from adaclip_finetune.evaluation.metrics import DirectionMetrics, IntArray, Metrics, retrieval_metrics

Blocks = Iterable[Tensor]

# Dual softmax uses the logits as they are, with the temperature that CLIP learned. The paper of QB-Norm multiplies
# cosines by 20; logits are 100 times the cosine where CLIP's scale is at its bound.
DEFAULT_TEMPERATURES = {"dual_softmax": 1.0, "qb_norm": 5.0}

_LOG_OF_SMALLEST = math.log(5e-324)


def dual_softmax_metrics(blocks: Blocks, video_of_text: IntArray, temperature: float) -> Metrics:
    """Return the metrics of the logits (T, V), each multiplied by softmax(logits / temperature) over the queries of its
    direction: all texts in t2v, all videos that have a text in v2t."""
    asked = torch.from_numpy(np.unique(video_of_text))
    by_text = retrieval_metrics(DualSoftmax(blocks, temperature, over_texts=True), video_of_text)
    by_video = retrieval_metrics(DualSoftmax(blocks, temperature, over_texts=False, asked=asked), video_of_text)
    return Metrics(by_text.t2v, by_video.v2t)


def qb_norm_metrics(blocks: Blocks, bank: Blocks, video_of_text: IntArray, temperature: float) -> DirectionMetrics:
    """Return the T2V metrics of the logits (T, V), corrected by those of the bank's texts to the same videos (B, V).
    The other direction would need a bank of videos."""
    return retrieval_metrics(QueryBankNorm(blocks, bank, temperature), video_of_text).t2v


class DualSoftmax:
    """Iterates over row blocks (t, V) in float64 that have exactly the order of the products logit · softmax.

    With `over_texts` the softmax runs down each column, for t2v; else along each row, over the videos with numbers in
    `asked` (default: all), for v2t. The value for a product x is sign(x) · (ln|x| + c), where c is large enough that
    the factor stays positive.
    """

    def __init__(
        self, blocks: Blocks, temperature: float, over_texts: bool = True, asked: Tensor | None = None
    ) -> None:
        self._blocks, self._temperature, self._asked = blocks, temperature, asked
        columns, rows, spread = _log_sums(blocks, temperature)
        self._columns = columns if over_texts else None
        # No product is smaller than the smallest number times the smallest softmax.
        self._offset = 1 - _LOG_OF_SMALLEST + spread + math.log(max(rows, len(columns)))

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._blocks:
            logits = _exact(block)
            scaled = logits / self._temperature
            prior = scaled - (self._row_sums(scaled) if self._columns is None else self._columns)
            yield logits.sign() * torch.where(logits == 0, 0, logits.abs().log() + prior + self._offset)

    def _row_sums(self, scaled: Tensor) -> Tensor:
        return (scaled if self._asked is None else scaled[:, self._asked]).logsumexp(dim=1, keepdim=True)


class QueryBankNorm:
    """Iterates over row blocks (t, V) in float64: ln(exp(logit / temperature) / sum over the bank) for queries whose
    best video is a hub, the logits themselves for the others. Values are comparable within a row only."""

    def __init__(self, blocks: Blocks, bank: Blocks, temperature: float) -> None:
        self._blocks, self._temperature = blocks, temperature
        self._columns, _, _ = _log_sums(bank, temperature)
        self._is_hub = torch.zeros(len(self._columns), dtype=torch.bool)
        for block in bank:
            self._is_hub[block.argmax(dim=1).cpu()] = True

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._blocks:
            logits = _exact(block)
            corrected = self._is_hub[logits.argmax(dim=1)][:, None]
            yield torch.where(corrected, logits / self._temperature - self._columns, logits)


def _log_sums(blocks: Blocks, temperature: float) -> tuple[Tensor, int, float]:
    """Return the logarithm of the sum of exp(logit / temperature) over each column (V,), the number of rows, and the
    largest scaled logit minus the smallest."""
    rows, low, high = 0, math.inf, -math.inf
    parts = torch.tensor(-math.inf, dtype=torch.float64)
    for block in blocks:
        scaled = _exact(block) / temperature
        parts = torch.logaddexp(parts, scaled.logsumexp(dim=0))
        low, high = min(low, float(scaled.min())), max(high, float(scaled.max()))
        rows += len(block)
    return parts, rows, high - low


def _exact(block: Tensor) -> Tensor:
    exact = block.cpu().double()
    if not exact.isfinite().all():
        raise ValueError("the similarity holds a value that is not finite, so nothing can be reranked")
    return exact
