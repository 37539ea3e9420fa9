"""Dual softmax and QB-Norm: their order is that of products computed with as many digits as needed, without ties."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from adaclip_finetune.evaluation.rerank import DualSoftmax, QueryBankNorm, dual_softmax_metrics, qb_norm_metrics


def logits(texts: int, videos: int, seed: int = 0) -> torch.Tensor:
    """Logits like those of CLIP: float32, at most 41, the right pairs (text i, video i) higher, few negative."""
    random = np.random.default_rng(seed)
    values = random.normal(15, 6, (texts, videos))
    values[np.arange(texts), np.arange(texts) % videos] += 8
    return torch.from_numpy((values * 41 / values.max()).astype(np.float32))


def exact_products(matrix: np.ndarray, temperature: str) -> list[list[Decimal]]:
    """Return logit · softmax(logit / temperature) over each row, to 60 digits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -(10**9), 10**9
        products = []
        for row in matrix:
            values = [Decimal(float(value)) for value in row]
            powers = [(value / Decimal(temperature)).exp() for value in values]
            products.append([value * power / sum(powers) for value, power in zip(values, powers, strict=True)])
        return products


def order(rows: list[list[Decimal]]) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda place: row[place]) for row in rows]


def transposed(rows: list[list[Decimal]]) -> list[list[Decimal]]:
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("temperature", ["0.02", "1", "30"])
def test_dual_softmax_has_the_order_of_the_exact_products(temperature: str) -> None:
    matrix = logits(24, 17)
    assert (matrix < 0).any()
    blocks = [matrix[:10], matrix[10:]]
    by_text = torch.cat(list(DualSoftmax(blocks, float(temperature))))
    assert by_text.argsort(dim=1).tolist() == order(transposed(exact_products(matrix.T.numpy(), temperature)))
    by_video = torch.cat(list(DualSoftmax(blocks, float(temperature), over_texts=False)))
    assert by_video.argsort(dim=0).T.tolist() == order(transposed(exact_products(matrix.numpy(), temperature)))


def test_scores_that_underflow_as_products_do_not_tie() -> None:
    """At temperature 1/50, most products in float32 are 0."""
    matrix = logits(300, 300, seed=1)
    assert (matrix * (matrix * 50).softmax(dim=0) == 0).float().mean() > 0.5
    assert all(len(row.unique()) == 300 for row in torch.cat(list(DualSoftmax([matrix], 1 / 50))))


@pytest.mark.parametrize("over_texts", [True, False])
def test_extreme_logits_keep_their_sign(over_texts: bool) -> None:
    matrix = torch.tensor([[1e4, -1e4, 0.0, 1e-30], [-1e4, 1e4, -0.0, -1e-30], [3.0, 2.0, 0.0, 1.0]])
    found = torch.cat(list(DualSoftmax([matrix], 0.01, over_texts)))
    assert found.isfinite().all() and (found.sign() == matrix.sign()).all()


def test_each_direction_has_its_own_queries() -> None:
    """With one text a video, v2t is t2v of the transposed matrix; a video without a text is not a query."""
    matrix = logits(12, 12, seed=2)
    found = dual_softmax_metrics([matrix], np.arange(12), 2.0)
    turned = dual_softmax_metrics([matrix.T], np.arange(12), 2.0)
    assert found.v2t.ranks.tolist() == turned.t2v.ranks.tolist()
    assert found.t2v.ranks.tolist() == turned.v2t.ranks.tolist()
    silent = torch.cat([matrix, torch.full((12, 1), 1e3)], dim=1)
    assert dual_softmax_metrics([silent], np.arange(12), 2.0).v2t.ranks.tolist() == found.v2t.ranks.tolist()


def test_qb_norm_is_the_formula_of_the_paper() -> None:
    matrix, bank, beta = logits(20, 15, seed=3).double(), logits(40, 15, seed=4).double(), 0.2
    found = torch.cat(list(QueryBankNorm([matrix[:7], matrix[7:]], [bank[:11], bank[11:]], 1 / beta)))
    hubs, best = set(bank.argmax(dim=1).tolist()), set(matrix.argmax(dim=1).tolist())
    assert best & hubs and best - hubs, "both cases occur"
    for row, values in zip(found, matrix, strict=True):
        is_hub = int(values.argmax()) in hubs
        expected = (beta * values).exp() / (beta * bank).exp().sum(dim=0) if is_hub else values
        assert row.argsort().tolist() == expected.argsort().tolist()
    own = found.gather(1, torch.arange(20)[:, None] % 15)
    ranks = qb_norm_metrics([matrix], [bank], np.arange(20) % 15, 1 / beta).ranks
    assert ranks.tolist() == (found >= own).sum(dim=1).tolist()


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        DualSoftmax([torch.tensor([[1.0, float("inf")]])], 1.0)
