"""BertAdam against published trajectories and its formula; parameter groups, schedule and resuming."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from golden import load_golden
from torch import nn

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.optimizer import (
    BertAdam,
    build_optimizer,
    clamp_logit_scale,
    load_optimizer,
    optimizer_state,
    schedule,
)


class Retriever(nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = nn.Module()
        self.clip.proj = nn.Linear(3, 3)
        self.clip.logit_scale = nn.Parameter(torch.tensor(2.0))


class Objective(nn.Module):
    """A model, and one layer of the objective's own."""

    def __init__(self):
        super().__init__()
        self.retriever = Retriever()
        self.head = nn.Linear(3, 3)

    @property
    def clip(self):
        return self.retriever.clip

    def forward(self, x):
        return self.head(self.clip.proj(x)) * self.clip.logit_scale.exp()


def make_config(**changes):
    fields = ("optim", "learning_rate", "coef_lr", "betas", "weight_decay", "warmup_proportion", "no_warmup")
    defaults = {name: Config.model_fields[name].get_default() for name in fields}
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize("case", range(3))
def test_golden_trajectories(case):
    golden = load_golden("op_bertadam")[case]
    settings = golden["kwargs"]
    p1, p2 = nn.Parameter(golden["p1_init"].clone()), nn.Parameter(golden["p2_init"].clone())
    unused = nn.Parameter(torch.ones(2))
    groups = [
        {"params": [p1, unused], "lr": settings["lr"], "weight_decay": settings["weight_decay"]},
        {"params": [p2], "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = BertAdam(groups, settings["lr"], settings["betas"], settings["weight_decay"])
    constant, warmup, total = settings["t_total"] == -1, settings.get("warmup", 0.1), 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / total, warmup, constant))
    for step in range(20):
        optimizer.zero_grad()
        loss = 0.5 * p1 @ golden["A"] @ p1 - golden["b"] @ p1 + ((p2.flatten() - p1) ** 2).sum()
        assert loss.item() == pytest.approx(golden["loss"][step], rel=1e-6)
        loss.backward()
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(p1.detach(), golden["p1"][step], atol=1e-6, rtol=0)
        torch.testing.assert_close(p2.detach(), golden["p2"][step], atol=1e-6, rtol=0)
        assert scheduler.get_last_lr() == pytest.approx(golden["lr_after_step"][step], abs=1e-12)
    assert torch.equal(unused, torch.ones(2))


def test_schedule():
    assert [schedule(x, 0.1, False) for x in (0, 0.05, 0.1, 0.5, 1)] == pytest.approx(
        [0, 0.5, 0.5 * (1 + math.cos(0.1 * math.pi)), 0.5, 0]
    )
    assert schedule(1.2, 0.1, False) == 0  # never up again
    assert schedule(0, 0.0, False) == 1
    assert all(schedule(x, 0.1, True) == 1 for x in (0, 0.05, 1))


@pytest.mark.parametrize("optim", ["bertadam", "adamw"])
def test_groups_hold_what_learns_and_none_is_empty(optim):
    objective = Objective()
    optimizer, _ = build_optimizer(objective, make_config(optim=optim, no_warmup=True), 10)
    found = {g["name"]: (len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "clip_decay": (2, pytest.approx(1e-7), 0.2),
        "clip_no_decay": (1, pytest.approx(1e-7), 0.0),
        "other_decay": (1, 1e-4, 0.2),
        "other_no_decay": (1, 1e-4, 0.0),
    }
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    objective.clip.requires_grad_(False)
    optimizer, _ = build_optimizer(objective, make_config(optim=optim), 10)
    assert [group["name"] for group in optimizer.param_groups] == ["other_decay", "other_no_decay"]


@pytest.mark.parametrize("optim", ["bertadam", "adamw"])
def test_state_is_saved_and_loaded(optim):
    def train(objective, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
            objective(x).square().sum().backward()
            optimizer.step()
            scheduler.step()

    torch.manual_seed(0)
    config = make_config(optim=optim, coef_lr=1.0, learning_rate=0.01)
    straight, half = Objective(), Objective()
    half.load_state_dict(straight.state_dict())
    train(straight, *build_optimizer(straight, config, 10), range(10))
    first = build_optimizer(half, config, 10)
    train(half, *first, range(5))
    second = build_optimizer(half, config, 10)
    # As a snapshot keeps them: tensors by name, and JSON.
    tensors, groups = optimizer_state(first[0])
    assert {"0/exp_avg", "4/exp_avg_sq"} < tensors.keys()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    groups, updates = json.loads(json.dumps([groups, first[1].state_dict()]))
    load_optimizer(second[0], kept, groups)
    second[1].load_state_dict(updates)
    train(half, *second, range(5, 10))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name]), name


def test_no_updates_are_refused():
    with pytest.raises(UserError, match="train_annot yields no batches"):
        build_optimizer(Objective(), make_config(), 0)


def test_clamp_logit_scale():
    clip = Objective().clip
    clip.logit_scale.data.fill_(5)
    clamp_logit_scale(clip)
    assert clip.logit_scale.item() == pytest.approx(math.log(100))
    clip.logit_scale.data.fill_(4.6052)  # as OpenAI stores it: frozen, it stays
    clip.logit_scale.requires_grad_(False)
    clamp_logit_scale(clip)
    assert clip.logit_scale.item() == pytest.approx(4.6052, abs=1e-6)
