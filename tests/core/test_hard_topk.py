"""Hard-Top-k compared with golden values and with its formula in numpy."""

import numpy as np
import pytest
import torch
from golden import load_golden

from adaclip_finetune.model.hard_topk import annealed_k, hard_top_k, select_frames, selection_temperature


def test_golden() -> None:
    cases = load_golden("op_hard_top_k")
    assert len(cases) >= 12
    for case in cases:
        scores = case["logits"].clone().requires_grad_()
        actions, indices = hard_top_k(scores, case["K"], case["tau"], case["noise"])
        (actions * case["weights"]).sum().backward()
        torch.testing.assert_close(actions, case["actions"])
        assert torch.equal(indices, case["indices"])
        torch.testing.assert_close(scores.grad, case["grad"], rtol=1e-4, atol=1e-5)


def numpy_draw(logits: np.ndarray, noise: np.ndarray, k: int, tau: float) -> tuple[list[int], list[np.ndarray]]:
    p = np.exp(logits - logits.max())
    y = np.log(np.maximum(p / p.sum(), 1e-8)) + noise
    a, chosen, relaxed = np.zeros_like(y), [], []
    for _ in range(k):
        y = y + np.log(np.maximum(1 - a, 1e-40))
        a = np.exp((y - y.max()) / tau)
        a /= a.sum()
        chosen.append(max((i for i in range(len(y)) if i not in chosen), key=lambda i: a[i]))
        relaxed.append(a)
    return chosen, relaxed


@pytest.mark.parametrize(("n", "k", "tau"), [(6, 3, 2.5), (12, 12, 0.5), (1, 1, 1.0), (30, 7, 0.1)])
def test_training_draw_follows_the_formula(n: int, k: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = 4 * torch.randn(3, n, dtype=torch.float64, generator=generator)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    upstream = torch.randn(3, k, n, dtype=torch.float64, generator=generator)
    leaf = logits.clone().requires_grad_()
    selection = select_frames(leaf, k, tau, noise)
    for row in range(3):
        chosen, _ = numpy_draw(logits[row].numpy(), noise[row].numpy(), k, tau)
        assert selection.indices[row].tolist() == chosen
        # The forward value is the one-hot row; the gradient is that of the relaxed draw.
        np.testing.assert_allclose(selection.weights[row].detach(), np.eye(n)[chosen], atol=1e-12)
    (selection.weights * upstream).sum().backward()
    step = 1e-6
    shifted = logits.clone()
    shifted[0, 0] += step
    numeric = sum(
        ((a - b) * u.numpy()).sum() / step
        for a, b, u in zip(
            numpy_draw(shifted[0].numpy(), noise[0].numpy(), k, tau)[1],
            numpy_draw(logits[0].numpy(), noise[0].numpy(), k, tau)[1],
            upstream[0],
            strict=True,
        )
    )
    assert leaf.grad is not None
    assert leaf.grad[0, 0].item() == pytest.approx(float(numeric), rel=1e-3, abs=1e-6)


def test_evaluation_takes_the_highest_logits_in_order() -> None:
    selection = select_frames(torch.tensor([[0.1, 3.0, -1.0, 2.0], [1.0, 1.0, 1.0, 0.0]]), 2)
    assert selection.indices.tolist() == [[1, 3], [0, 1]]
    assert selection.weights[0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_impossible_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="k=9"):
        select_frames(torch.zeros(2, 8), 9)
    with pytest.raises(ValueError, match="NaN"):
        select_frames(torch.tensor([[0.0, float("nan")]]), 1)


def test_noise_is_gumbel() -> None:
    torch.manual_seed(0)
    draws = select_frames(torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4), 1, temperature=1.0)
    share = torch.bincount(draws.indices[:, 0], minlength=4) / 20_000
    # The Gumbel-max trick: the first draw is a sample of the softmax.
    torch.testing.assert_close(share, torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(0), atol=0.015, rtol=0)


def test_temperature_schedule() -> None:
    assert selection_temperature(0, 5.0, 0.5, 0.045) == 5.0
    assert selection_temperature(10, 5.0, 0.5, 0.045) == pytest.approx(5.0 * np.exp(-0.45))
    assert selection_temperature(1000, 5.0, 0.5, 0.045) == 0.5


def test_k_anneals_from_n_minus_one_to_top_k() -> None:
    assert [annealed_k(epoch, 16, 4, 4) for epoch in range(6)] == [15, 12, 9, 6, 4, 4]
    assert [annealed_k(epoch, 16, 4, 3) for epoch in range(4)] == [15, 11, 7, 4]
    assert annealed_k(0, 16, 4, 0) == 4
    assert annealed_k(0, 4, 4, 3) == 4
