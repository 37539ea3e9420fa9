"""The selector: gradients, precision and the schedule of K. Golden models hold what its parts compute."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.model.hard_topk import annealed_k, select_frames, selection_temperature
from adaclip_finetune.model.selector import FrameSelector

B, N, F, H = 2, 5, 7, 64


def build(**settings: Any) -> FrameSelector:
    config = load_config(None, {"num_frm": N, "top_k": 2, "hidden_dim": H, "mlp_hidden_dim": 16, **settings})
    torch.manual_seed(0)
    return FrameSelector(config, None, F).eval()


def features(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, F, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rnn", ["transformer", "lstm", "bilstm"])
def test_gradients_of_scores_reach_the_whole_selector(rnn: str) -> None:
    selector = build(rnn=rnn).train()
    selector.temperature = 1.0
    selection = selector(features())
    (selection.weights * torch.randn(B, 2, N, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in selector.named_parameters():
        # A bias that is equal for all frames cannot change the selection.
        if not name.startswith("scorer.2.bias"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_scores_are_float32_under_autocast() -> None:
    selector = build()
    expected = selector(features()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = selector(features().bfloat16().float())
        logits = selector(features()).logits
    assert selection.logits.dtype == selection.weights.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_k_and_temperature_follow_the_epochs_in_training_only() -> None:
    schedule = {"warmup_epochs": 2, "num_epochs": 3, "init_tau": 5.0, "min_tau": 0.5, "exp_decay_factor": 0.045}
    selector = build(**schedule)
    x, noise = features(), -torch.empty(B, N).exponential_(generator=torch.Generator().manual_seed(3)).log()
    for epoch in (0, 2, 1):
        selector.start_epoch(epoch)
        k, temperature = annealed_k(epoch, N, 2, 2), selection_temperature(epoch, 5.0, 0.5, 0.045)
        assert (selector.k, selector.temperature) == (k, temperature)
        selection = selector.train()(x, noise)
        expected = select_frames(selection.logits, k, temperature, noise)
        assert torch.equal(selection.indices, expected.indices) and selection.indices.shape == (B, k)
        assert torch.equal(selection.weights, expected.weights)
        assert selector.eval()(x, noise).indices.tolist() == selection.logits.argsort(descending=True)[:, :2].tolist()
    fresh = build(**schedule)
    assert (fresh.k, fresh.temperature) == (annealed_k(0, N, 2, 2), 5.0)
