"""Importance-based selection compared with the published one, and in cases that the published one leaves undefined."""

import logging
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tiny_clip
from golden import load_golden
from tiny import VOCABULARY
from torch import nn

from adaclip_finetune.config import IbsSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft import build_method, choose_what_learns
from adaclip_finetune.peft.importance import importance, select_tensors, standardized


def as_groups(names, labels):
    """Return the partition of names by labels, which may be permuted."""
    return {frozenset(n for n, other in zip(names, labels, strict=True) if other == label) for label in set(labels)}


@pytest.mark.parametrize("number", range(5))
def test_golden_selection(number):
    case = load_golden("op_ibs")["cases"][number]
    settings = IbsSettings(**{key: case[key] for key in ("metric", "normalization", "retain_ratio", "num_groups")})
    triples = case["importance_name_value_dim"]
    rows = select_tensors({name: (value, dim) for name, value, dim in reversed(triples)}, settings)
    names = [name for name, _, _ in triples]
    assert [row.name for row in rows] == names
    assert [(row.importance, row.dim) for row in rows] == [(value, dim) for _, value, dim in triples]
    assert sum(row.dim for row in rows) == case["candidates"]
    assert [row.name for row in rows if row.retained] == case["retained"]
    assert sum(row.dim for row in rows if row.retained) == case["retained_parameters"]
    if case["normalization"]:
        assert as_groups(names, [row.group for row in rows]) == as_groups(names, case["group"])
        expected = [value for _, value, _ in case["normalized_name_value_dim"]]
        assert [row.normalized for row in rows] == pytest.approx(expected, rel=1e-9)
    else:
        assert all(row.group is None and row.normalized is None for row in rows)


# ---- importance ----


def test_l2norm_is_the_root_mean_square_of_the_update():
    before, after = torch.randn(5, 7), torch.randn(5, 7)
    update = after.double().numpy() - before.double().numpy()
    assert importance(before, after, "l2norm") == pytest.approx(np.sqrt((update**2).mean()), rel=1e-12)
    assert importance(torch.tensor(2.0), torch.tensor(-1.0), "l2norm") == 3


@pytest.mark.parametrize("degrees", [1e-9, 1e-5, 1e-3, 1, 60, 90, 179.9999, 180])
def test_angles_are_exact_even_if_tiny(degrees):
    """The published arccos of a float32 cosine is 0 for angles below some hundredths of a degree."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1000, generator=generator, dtype=torch.float64)
    other = torch.randn(1000, generator=generator, dtype=torch.float64)
    u = u / u.norm()
    other = other - (other @ u) * u
    angle = math.radians(degrees)
    v = math.cos(angle) * u + math.sin(angle) * other / other.norm()
    assert importance(3 * u, 5 * v, "angle") == pytest.approx(degrees, rel=1e-6)


def test_angles_of_scalars_and_zero_vectors_are_defined():
    zero, vector = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    assert importance(torch.tensor(2.0), torch.tensor(-1.0), "angle") == 0
    assert importance(vector, vector, "angle") == importance(zero, zero, "angle") == 0
    assert importance(zero, vector, "angle") == pytest.approx(90)
    assert importance(vector, zero, "angle") == pytest.approx(90)
    assert importance(vector, -vector, "angle") == pytest.approx(180)


# ---- normalization ----


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.3], [1]),
        ([0.3, 0.3, 0.3], [1, 1, 1]),
        ([0, 0], [0, 0]),
        ([0.3, 0.3, 1e-9], [1, 1, 0]),
        ([0, 0, 5], [0, 0, 1]),
    ],
)
def test_a_group_without_spread_is_defined(values, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert standardized(np.array(values, dtype=float)).tolist() == expected


# ---- selection ----


def retained(moved, **settings):
    rows = select_tensors(moved, IbsSettings(**settings))
    return [row.name for row in rows if row.retained]


def test_the_tensor_that_crosses_the_budget_is_kept():
    moved = {"a": (3.0, 10), "b": (2.0, 50), "c": (1.0, 40)}
    assert retained(moved, normalization=False, retain_ratio=0.1) == ["a"]  # 10 parameters are not fewer than 10
    assert retained(moved, normalization=False, retain_ratio=0.11) == ["a", "b"]
    assert retained(moved, normalization=False, retain_ratio=1.0) == ["a", "b", "c"]
    assert retained(moved, normalization=False, retain_ratio=0.001) == []


@pytest.mark.parametrize("normalization", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 9])
def test_zero_updates_and_few_tensors_are_defined(normalization, num_groups, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = {"a": (0.0, 10), "b": (0.0, 10), "c": (0.0, 20)}
        settings = {"normalization": normalization, "num_groups": num_groups, "retain_ratio": 0.5}
        assert retained(moved, **settings) == ["a", "b"]
        assert "no tensor changed" in caplog.text
        caplog.clear()
        assert retained({**moved, "c": (1e-9, 20)}, **settings) == ["c"]
        assert retained({"only": (1.0, 1)}, **{**settings, "retain_ratio": 1.0}) == ["only"]
    assert not caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("normalization", [False, True])
def test_an_importance_that_is_not_finite_names_the_tensor(value, normalization):
    with pytest.raises(UserError, match=r"visual\.proj is (nan|inf)"):
        select_tensors({"a": (1.0, 10), "visual.proj": (value, 10)}, IbsSettings(normalization=normalization))


# ---- the method on a model ----


@pytest.fixture
def clip():
    return build_tiny_clip(vocabulary=VOCABULARY)


def prepare(clip, freeze_layer_num=0, **settings):
    model = nn.Module()
    model.clip = clip
    model.aggregator = nn.Linear(4, 4)
    peft = SimpleNamespace(method="ibs", config=IbsSettings(**settings))
    config = SimpleNamespace(freeze_layer_num=freeze_layer_num, freeze_clip=False, peft=peft, seed=0)
    method = build_method(config)
    choose_what_learns(method, model, config)
    return model, method


def learning(clip):
    return {name for name, parameter in clip.named_parameters() if parameter.requires_grad}


def move(clip, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in clip.named_parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def test_everything_learns_then_the_retained_and_the_rest_is_reset(clip):
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    _, method = prepare(clip, num_pre_epochs=2, retain_ratio=0.3, keep_module_keywords=("ln_final", "logit_scale"))
    everything = learning(clip)
    kept = {"ln_final.weight", "ln_final.bias", "logit_scale"}
    assert [method.on_epoch_start(0), method.on_epoch_start(1)] == [False, False]
    assert learning(clip) == everything
    assert method.parameter_rows() == []
    move(clip)
    moved = {name: tensor.clone() for name, tensor in clip.state_dict().items()}

    assert method.on_epoch_start(2)
    rows = method.parameter_rows()
    selected = {row.name for row in rows if row.retained}
    assert {row.name for row in rows} == everything - kept
    assert learning(clip) == selected | kept
    assert 0 < len(selected) < len(rows)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, (moved if name in selected | kept else before)[name]), name
    assert [method.on_epoch_start(2), method.on_epoch_start(3)] == [False, False]


def test_each_phase_has_its_batch_size(clip):
    for settings, first in (({}, 16), ({"pre_batch_size": 8}, 8)):
        _, method = prepare(clip, num_pre_epochs=2, **settings)
        before, after = method.phases(30, 16)
        assert (before.num_epochs, before.batch_size, before.may_be_best) == (2, first, False)
        assert (after.num_epochs, after.batch_size, after.may_be_best) == (28, 16, True)


def test_pretrained_values_are_copied_until_the_selection(clip):
    _, method = prepare(clip.bfloat16(), freeze_layer_num=1)
    tensors = method.state_dict().tensors
    assert set(tensors) == learning(clip)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    move(clip)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    method.on_epoch_start(1)
    assert method.state_dict().tensors == {}


def test_nothing_to_select_from_is_refused(clip):
    with pytest.raises(UserError, match="nothing to select from"):
        prepare(clip, freeze_layer_num=2, keep_module_keywords=("ln_", "proj", "logit_scale"))
