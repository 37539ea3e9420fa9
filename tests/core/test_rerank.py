"""Dual softmax and QB-Norm: order held to products multiplied out with as many digits as it takes; no ties made."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.rerank import DualSoftmax, QueryBankNorm, dual_softmax_metrics, qb_norm_metrics


def logits(texts: int, videos: int, seed: int = 0, highest: float = 41.0) -> torch.Tensor:
    """Like CLIP's: float32, the right pairs (text i to video i) a little higher, few negative."""
    random = np.random.default_rng(seed)
    values = random.normal(15, 6, (texts, videos))
    values[np.arange(texts), np.arange(texts) % videos] += 8
    return torch.from_numpy((values * highest / values.max()).astype(np.float32))


def exact_products(matrix: np.ndarray, temperature: str, dim: int) -> list[list[Decimal]]:
    """logit · softmax(logit / temperature), to 60 digits, however small."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -(10**9), 10**9
        values = [[Decimal(float(x)) for x in row] for row in (matrix if dim else matrix.T)]
        products = []
        for row in values:
            powers = [(x / Decimal(temperature)).exp() for x in row]
            products.append([x * power / sum(powers) for x, power in zip(row, powers, strict=True)])
        return products if dim else [list(column) for column in zip(*products, strict=True)]


def order(rows: list[list[Decimal]]) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda place: row[place]) for row in rows]


@pytest.mark.parametrize("temperature", ["0.02", "0.5", "1", "30"])
def test_dual_softmax_has_the_order_of_the_exact_products(temperature: str) -> None:
    matrix = logits(24, 17)
    assert (matrix < 0).any()
    blocks = [matrix[:10], matrix[10:]]
    by_text = torch.cat(list(DualSoftmax(blocks, float(temperature))))
    assert by_text.argsort(dim=1).tolist() == order(exact_products(matrix.numpy(), temperature, dim=0))
    by_video = torch.cat(list(DualSoftmax(blocks, float(temperature), over_texts=False)))
    columns = [list(row) for row in zip(*exact_products(matrix.numpy(), temperature, dim=1), strict=True)]
    assert by_video.argsort(dim=0).T.tolist() == order(columns)


def test_float32_products_tie_and_ours_do_not() -> None:
    """The usual form at temperature 1/50: nearly everything is 0, and a rank that ignores ties is flattered."""
    matrix, owners = logits(300, 300, seed=1), np.arange(300)
    naive = matrix * (matrix * 50).softmax(dim=0)
    assert (naive == 0).float().mean() > 0.5
    own = naive.diagonal()[:, None]
    ignoring_ties = 100 * (1 + (naive > own).sum(dim=1) <= 10).float().mean()
    ours = torch.cat(list(DualSoftmax([matrix], 1 / 50)))
    assert all(len(row.unique()) == 300 for row in ours)
    found = dual_softmax_metrics([matrix], owners, 1 / 50).t2v
    assert ignoring_ties > found.recall(10) + 2
    assert retrieval_metrics([naive], owners).t2v.recall(10) < found.recall(10) - 2


def test_extreme_logits_keep_their_order() -> None:
    matrix = torch.tensor([[1e4, -1e4, 0.0, 1e-30], [-1e4, 1e4, -0.0, -1e-30], [3.0, 2.0, 0.0, 1.0]])
    for over_texts in (True, False):
        found = torch.cat(list(DualSoftmax([matrix], 0.01, over_texts)))
        assert found.isfinite().all()
        assert (found.sign() == matrix.sign()).all()


def test_each_direction_has_its_own_queries() -> None:
    """v2t is t2v of the transposed matrix, where each video has one text; a video without any asks nothing."""
    matrix = logits(12, 12, seed=2)
    found = dual_softmax_metrics([matrix], np.arange(12), 2.0)
    turned = dual_softmax_metrics([matrix.T], np.arange(12), 2.0)
    assert found.v2t.ranks.tolist() == turned.t2v.ranks.tolist()
    assert found.t2v.ranks.tolist() == turned.v2t.ranks.tolist()
    silent = torch.cat([matrix, torch.full((12, 1), 1e3)], dim=1)
    assert dual_softmax_metrics([silent], np.arange(12), 2.0).v2t.ranks.tolist() == found.v2t.ranks.tolist()


def test_qb_norm_is_the_papers_formula() -> None:
    matrix, bank, beta = logits(20, 15, seed=3).double(), logits(40, 15, seed=4).double(), 0.2
    found = torch.cat(list(QueryBankNorm([matrix[:7], matrix[7:]], [bank[:11], bank[11:]], 1 / beta)))
    hubs = set(bank.argmax(dim=1).tolist())
    some = set(matrix.argmax(dim=1).tolist())
    assert some & hubs and some - hubs, "both cases are there"
    for row, values in zip(found, matrix, strict=True):
        expected = values.clone()
        if int(values.argmax()) in hubs:
            expected = (beta * values).exp() / (beta * bank).exp().sum(dim=0)
        assert row.argsort().tolist() == expected.argsort().tolist()
    ranks = qb_norm_metrics([matrix], [bank], np.arange(20) % 15, 1 / beta).ranks
    own = found.gather(1, torch.arange(20)[:, None] % 15)
    assert ranks.tolist() == (found >= own).sum(dim=1).tolist()


def test_a_hub_is_pushed_back() -> None:
    """Video 0 is high for every query: dual softmax and QB-Norm find the right ones behind it."""
    matrix = torch.eye(6) * 2 + torch.tensor([4.0, 0, 0, 0, 0, 0])
    owners = np.arange(6)
    assert retrieval_metrics([matrix], owners).t2v.recall(1) == pytest.approx(100 / 6)
    assert dual_softmax_metrics([matrix], owners, 0.2).t2v.recall(1) == 100
    assert qb_norm_metrics([matrix], [matrix + 0.1], owners, 0.2).recall(1) == 100


def test_what_cannot_be_is_refused() -> None:
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            DualSoftmax([torch.eye(2)], temperature)
    with pytest.raises(ValueError, match="no finite number"):
        DualSoftmax([torch.tensor([[1.0, float("inf")]])], 1.0)
    with pytest.raises(ValueError, match="no rows"):
        QueryBankNorm([torch.eye(2)], [], 1.0)
