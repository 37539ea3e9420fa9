"""Hard-Top-k compared with golden values and with its formula in numpy."""

import numpy as np
import pytest
import torch
from golden import load_golden

from adaclip_finetune.bench.hard_topk import forward_and_backward, loop
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


@pytest.mark.parametrize(("n", "k", "tau"), [(6, 3, 2.5), (12, 12, 0.5), (1, 1, 1.0), (30, 7, 0.1)])
def test_training_draws_without_replacement_by_log_probabilities_and_noise(n: int, k: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = 4 * torch.randn(n, dtype=torch.float64, generator=generator)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    selection = select_frames(logits[None], k, tau, noise[None])
    p = (logits - logits.max()).exp().numpy()
    y = np.log(np.maximum(p / p.sum(), 1e-8)) + noise.numpy()
    a, chosen = np.zeros(n), []
    for _ in range(k):
        y = y + np.log(np.maximum(1 - a, 1e-40))
        a = np.exp((y - y.max()) / tau)
        a /= a.sum()
        chosen.append(max((i for i in range(n) if i not in chosen), key=lambda i: a[i]))
    assert selection.indices[0].tolist() == chosen
    np.testing.assert_allclose(selection.weights[0], np.eye(n)[chosen], atol=1e-12)


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


@pytest.mark.parametrize("temperature", [0.02, 0.5, 5.0])
def test_gradients_are_those_of_autograd(temperature: float) -> None:
    """At a low temperature draws are so certain that nothing remains of a frame, and the minimum stands in."""
    random = torch.Generator().manual_seed(0)
    scores, noise, upstream = (torch.randn(3, *size, generator=random).double() for size in [(8,), (8,), (5, 8)])
    gradients = [
        forward_and_backward(draw, scores, noise, upstream, temperature=temperature)[1] for draw in (hard_top_k, loop)
    ]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
