"""Optimizers and schedules against published trajectories; parameter groups and resuming."""

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
    ClipVipAdamW,
    bert_schedule,
    build_optimizer,
    clamp_logit_scale,
    clip4clip_schedule,
    clip_vip_schedule,
    load_optimizer,
    optimizer_state,
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
    fields += ("adam_epsilon", "lr_schedule", "precision")
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
    factor = (lambda step: 1.0) if constant else (lambda step: bert_schedule(step, total, warmup))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
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


def test_schedule_of_bert():
    assert [bert_schedule(step, 100, 0.1) for step in (0, 5, 10, 50, 100)] == pytest.approx(
        [0, 0.5, 0.5 * (1 + math.cos(0.1 * math.pi)), 0.5, 0]
    )
    assert bert_schedule(120, 100, 0.1) == 0  # never up again
    assert bert_schedule(0, 100, 0.0) == 1


@pytest.mark.parametrize("case", ["50/0.01", "10/0.1", "1000/0.01"])
def test_golden_schedule_of_clip_vip(case):
    total, warmup = int(case.split("/")[0]), float(case.split("/")[1])
    found = [clip_vip_schedule(step, total, warmup, 1e-8) for step in range(total)]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), load_golden("op_clip_vip")["lr " + case.replace("/", "|")]
    )


def test_golden_schedule_of_clip4clip():
    golden = load_golden("op_clip4clip_schedule")
    rate, warmup, total = golden["init_lr"], golden["warmup_proportion"], golden["steps"]
    for step, expected in enumerate(golden["lr_before_step_t"]):
        factor = clip4clip_schedule(step, total, warmup, 1e-8 / rate)
        assert [rate * part * factor for part in golden["lr_mult"]] == pytest.approx(expected, rel=1e-12)
    assert clip4clip_schedule(0, 10, 0.0, 1e-8) == 1


def test_golden_trajectory_of_clip_vips_adamw():
    golden = load_golden("op_clip_vip")
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in golden["start"].items()}
    groups = [
        {"params": [parameters[name] for name in group["params"]], "lr": group["lr"], "initial_lr": group["lr"]}
        | {"weight_decay": group["weight_decay"]}
        for group in golden["groups"]
        if group["params"]
    ]
    optimizer = ClipVipAdamW(groups, golden["learning_rate"], tuple(golden["betas"]), golden["eps"])
    for step in range(golden["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = golden[f"gradients {step}"][name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), golden["grad_norm"])
        assert norm.item() == pytest.approx(golden["gradient_norm_before_clipping"][step])
        for group in optimizer.param_groups:
            factor = clip_vip_schedule(step, golden["steps"], golden["warmup_ratio"], 1e-8 / golden["learning_rate"])
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), golden[f"updated {step}"][name], rtol=1e-6, atol=1e-9)


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
    ours, _ = build_optimizer(objective, make_config(optim="clip_vip_adamw"), 10)
    assert any(objective.clip.logit_scale is one for one in ours.param_groups[1]["params"]), "in clip_no_decay"
    objective.clip.requires_grad_(False)
    optimizer, _ = build_optimizer(objective, make_config(optim=optim), 10)
    assert [group["name"] for group in optimizer.param_groups] == ["other_decay", "other_no_decay"]


@pytest.mark.parametrize("optim", ["bertadam", "adamw", "clip_vip_adamw"])
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


@pytest.mark.parametrize("optim", ["bertadam", "adamw", "clip_vip_adamw"])
def test_an_overflow_of_fp16_is_no_update(optim):
    """The scaler does not call the optimizer then, which is how a skipped update is noticed."""
    objective = Objective()
    optimizer, _ = build_optimizer(objective, make_config(optim=optim, precision="fp16"), 10)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(objective(torch.full((2, 3), torch.inf)).square().sum()).backward()
    scaler.step(optimizer)
    assert not optimizer.state


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


@pytest.mark.parametrize("turned", ["gradient", "all", "moments"])
def test_bertadam_updates_tensors_of_any_memory_layout(turned):
    def turn(tensor):
        return tensor.t().contiguous().t()

    torch.manual_seed(0)
    weight, gradient = torch.randn(3, 5), torch.randn(3, 5)
    results = []
    for changed in (False, True):
        parameter = nn.Parameter(turn(weight) if changed and turned == "all" else weight.clone())
        optimizer = BertAdam([parameter], 0.01, (0.9, 0.98), 0.2)
        for _ in range(2):
            parameter.grad = turn(gradient) if changed and turned in ("gradient", "all") else gradient.clone()
            optimizer.step()
            if changed and turned == "moments":
                optimizer.state[parameter].update({k: turn(v) for k, v in optimizer.state[parameter].items()})
        results.append(parameter.detach())
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
