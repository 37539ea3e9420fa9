"""LISA: what is drawn, with which probabilities, and what the optimizer then leaves alone."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.peft import LisaSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.base import MethodState
from adaclip_finetune.peft.lisa import Lisa, probabilities

TENSORS = 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clip = nn.Module()
        for number in range(TENSORS):
            self.clip.register_parameter(f"w{number}", nn.Parameter(torch.ones(3)))
        self.clip.head = nn.Linear(3, 3)


def built(**settings: Any) -> tuple[Model, Lisa]:
    model = Model()
    method = Lisa(LisaSettings(keep_module_keywords=("head",), **settings))
    method.seed = 3
    method.phases(2, 4)
    method.choose(model)
    return model, method


def step(model: Model, method: Lisa, number: int) -> set[str]:
    """Give all tensors a gradient, let the method drop some, and return the names of those of the others."""
    for own in model.parameters():
        own.grad = torch.ones_like(own)
    method.after_backward(number)
    return {name for name, own in model.clip.named_parameters() if own.grad is not None}


def test_a_sample_is_trained_until_the_next_drawing() -> None:
    model, method = built(sampling_interval=3, active_ratio=0.2)
    drawn = [step(model, method, number) for number in range(9)]
    assert all(names >= {"head.weight", "head.bias"} and len(names) == 2 + 2 for names in drawn)
    assert drawn[0] == drawn[1] == drawn[2] and drawn[3] == drawn[5] and len({*map(frozenset, drawn)}) > 1
    assert all(own.requires_grad for own in model.parameters())
    assert method.changed_parameters(model) == set().union(*drawn)


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    (model, method), (other, same) = built(active_ratio=0.3), built(active_ratio=0.3)
    assert step(model, method, 0) == step(other, same, 0)
    same.seed = 4
    assert [step(model, method, 10 * n) for n in range(1, 4)] != [step(other, same, 10 * n) for n in range(1, 4)]


@pytest.mark.parametrize("importance", ["update", "gradient"])
def test_what_changes_more_is_drawn_more_often(importance: Any) -> None:
    model, method = built(active_ratio=0.2, importance=importance, transform="power_2", schedule="const_1")
    with torch.no_grad():
        model.clip.w4 += 5
        model.clip.w7 += 4
    for own in model.parameters():
        own.grad = torch.full_like(own, 1e-3)
    model.clip.w4.grad, model.clip.w7.grad = torch.full((3,), 5.0), torch.full((3,), 4.0)
    method.after_backward(0)
    history = method.sampling_history()
    assert history is not None and history.steps == [0]
    assert set(torch.argsort(history.probabilities[0])[-2:].tolist()) == {4, 7}
    assert history.probabilities[0, 4] / history.probabilities[0, 7] == pytest.approx(25 / 16, rel=1e-3)
    assert history.drawn[0].sum() == 2


def test_the_warm_up_trains_everything_and_then_less_and_less() -> None:
    model, method = built(sampling_interval=2, active_ratio=0.2, warmup_steps=3, warmup_decay=4)
    counts = [len(step(model, method, number)) - 2 for number in range(10)]
    assert counts == [10, 10, 10, 10, 8, 8, 4, 4, 2, 2]


def test_an_interrupted_run_draws_the_same() -> None:
    (model, method), (other, resumed) = built(sampling_interval=3), built(sampling_interval=3)
    for number in range(4):
        step(model, method, number)
        with torch.no_grad():
            model.clip.w1 += 0.1
    state = method.state_dict()
    resumed.load_state_dict(MethodState(state.tensors, json.loads(json.dumps(state.values))))
    other.load_state_dict(model.state_dict())
    assert [step(model, method, n) for n in range(4, 9)] == [step(other, resumed, n) for n in range(4, 9)]
    assert method.changed_parameters(model) == resumed.changed_parameters(other)


@pytest.mark.parametrize(
    ("transform", "weights"),
    [
        ("none", [4, 2, 1, 0]),
        ("power_2", [16, 4, 1, 0]),
        ("exp_2", [np.exp(2), np.exp(1), np.exp(0.5), 1]),
        ("sat_0.1_0.5", [0.5, 0.5, 0.25, 0.1]),
        ("uniform_2", [1, 1, 0, 0]),
    ],
)
def test_transforms(transform: str, weights: list[float]) -> None:
    found = probabilities([8.0, 4.0, 2.0, 0.0], transform, "const_1", 0.0)
    np.testing.assert_allclose(found, np.array(weights) / sum(weights), atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "weight"), [("const_0.6", 0.6), ("linear_0.6", 0.3), ("sin_0.6", 0.6 * 0.5**0.5), ("square_1", 0.25)]
)
def test_schedules_mix_importance_with_equal_chances(schedule: str, weight: float) -> None:
    found = probabilities([1.0, 0.0], "none", schedule, 0.5)
    np.testing.assert_allclose(found, [weight + (1 - weight) / 2, (1 - weight) / 2], atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_importances_that_say_nothing_give_equal_chances(values: list[float]) -> None:
    assert probabilities(values, "none", "const_1", 0.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"transform": "power"}, r"peft\.config\.transform"),
        ({"transform": "sat_0.5_0.1"}, r"peft\.config\.transform"),
        ({"schedule": "linear_2"}, r"peft\.config\.schedule"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        load_config(None, {"peft": {"method": "lisa", "config": settings}})
