"""The exponential moving average of the weights: its formula, what it covers, and how it replaces the live weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from adaclip_finetune.training.ema import Ema
from adaclip_finetune.weights.plain import plain_state


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    model[2].requires_grad_(False)
    return model


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def change(model: nn.Module) -> dict[str, torch.Tensor]:
    """Change everything in the model, as an update of all parameters would, and return the new values."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)
    return copied(model)


@pytest.mark.parametrize("decay", [0.2, 0.9999])
def test_the_average_is_that_of_the_formula(decay: float) -> None:
    """The decay of update t is (1 + t) / (10 + t), but at most the one that is given."""
    model = small_model()
    expected, ema = copied(model), Ema(model, decay)
    for t in (1, 2, 3):
        d = min(decay, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * live for name, live in change(model).items()}
        ema.update(t)
    averaged = {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert ema.state_dict().keys() == averaged
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, expected[name], rtol=0, atol=1e-12)


def test_only_within_the_context_does_the_model_have_the_average() -> None:
    model = small_model()
    ema = Ema(model, 0.9)
    live = change(model)
    ema.update(1)
    average = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.in_place():
        assert all(tensor.equal(average.get(name, live[name])) for name, tensor in model.state_dict().items())
        assert not model[0].weight.equal(live["0.weight"])
        raise KeyError
    assert all(tensor.equal(live[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.equal(average[name]) for name, tensor in ema.state_dict().items())


def test_it_continues_from_its_state() -> None:
    model = small_model()
    ema = Ema(model, 0.9)
    change(model)
    ema.update(1)
    resumed = Ema(model, 0.9)
    resumed.load_state_dict(ema.state_dict())
    change(model)
    for one in (ema, resumed):
        one.update(2)
    assert all(tensor.equal(ema.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_a_decay_of_0_keeps_no_copies_and_changes_nothing() -> None:
    model = small_model()
    ema, live = Ema(model, 0), change(model)
    ema.update(1)
    with ema.in_place():
        assert not ema.state_dict() and all(tensor.equal(live[name]) for name, tensor in model.state_dict().items())


def test_factors_are_averaged_and_merging_sees_the_average() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.factor

    linear = nn.Linear(2, 2).requires_grad_(False)
    before = linear.weight.clone()
    parametrize.register_parametrization(linear, "weight", Scaled())
    ema = Ema(linear, 0.5)
    linear.get_parameter("parametrizations.weight.0.factor").data.fill_(12)
    ema.update(1)  # d is 2/11, so the factor is 2/11 · 1 + 9/11 · 12 = 10
    with ema.in_place():
        torch.testing.assert_close(plain_state(linear)["weight"], 10 * before)
    torch.testing.assert_close(plain_state(linear)["weight"], 12 * before)
