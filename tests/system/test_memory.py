"""Explanations of too little memory, and the batch size that fits, on a model that refuses larger ones."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives import build_objective
from adaclip_finetune.training import memory, session
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.memory import (
    StepCost,
    explain_out_of_memory,
    fitting_batch_size,
    is_out_of_memory,
    memory_explained,
    try_steps,
)
from adaclip_finetune.training.session import open_model
from adaclip_finetune.weights.clip_weights import load_clip

Project = dict[str, Any]
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB"


# ---- the explanations ----


def raised_by(make: Any, *sizes: Any) -> Exception:
    with pytest.raises((RuntimeError, ValueError, MemoryError)) as raised:
        make(*sizes)
    return raised.value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(CUDA_MESSAGE), "2.00 GiB"),
        (raised_by(torch.empty, 2**50), f"{2**52} bytes"),
        (raised_by(nn.Linear, 2**53, 2**53), "overflowed"),
        (raised_by(np.zeros, (2**31, 3, 224, 224)), "PiB"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("Caught _ArrayMemoryError in worker\nUnable to allocate 1. TiB for an array"), "1. TiB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), "17 GB"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_every_way_to_run_out_of_memory_is_explained(error: BaseException, told: str | None, project: Project) -> None:
    assert is_out_of_memory(error) == (told is not None)
    config, expected = load_config(None, project), type(error) if told is None else UserError
    with pytest.raises(expected) as raised, memory_explained(config):
        raise error
    assert told is None or told in str(raised.value)


def test_a_model_that_does_not_fit_is_told_with_its_size(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(session, "VideoRetriever", allocate)
    with pytest.raises(UserError, match=r"out of memory.* bytes.*hidden_dim 65536"):
        open_model(load_config(None, {**project, "hidden_dim": 65536}))
    monkeypatch.setattr(session, "VideoRetriever", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        open_model(load_config(None, project))


def test_it_says_what_decides_and_what_to_change(project: Project) -> None:
    message = str(explain_out_of_memory(torch.OutOfMemoryError(CUDA_MESSAGE), load_config(None, project)))
    for fact in ("batch_size 4", "num_frm 6", "precision fp32", CUDA_MESSAGE):
        assert fact in message
    for way_out in ("--precision bf16", "--gradient_checkpointing", "smaller num_frm", "smaller batch_size"):
        assert way_out in message


# ---- the batch size that fits ----


class SmallDevice:
    """A model on a CPU that runs out of memory above `limit` videos, with a record of the sizes tried."""

    def __init__(self, settings: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.limit = load_config(None, settings), 0
        self.loaded = load_clip(self.config)
        torch.manual_seed(0)
        self.objective = build_objective(self.config, VideoRetriever(self.config, self.loaded))
        self.tried: list[int] = []
        self.k: set[int] = set()
        self.gradients: list[bool] = []
        self.said: list[str] = []
        self.objective.retriever.register_forward_pre_hook(self.on_step)
        monkeypatch.setattr(memory, "has_memory_limit", lambda device: True)

    def on_step(self, model: nn.Module, given: tuple[Any, ...]) -> None:
        (batch,) = given
        assert model.training and len(batch) == len(batch.token_ids) == len(batch.noise)
        assert batch.token_ids.argmax(dim=1).eq(self.config.max_txt_len - 1).all(), "captions of full length"
        self.tried.append(len(batch))
        self.k.add(int(self.objective.retriever.schedule()["k"]))
        self.gradients.append(any(parameter.grad is not None for parameter in model.parameters()))
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    def fit(self, limit: int, batch_size: int) -> int:
        self.limit = limit
        given = (self.config, self.objective, self.loaded.tokenize, make_accelerator(self.config), self.said.append)
        return fitting_batch_size(*given, batch_size)


@pytest.fixture
def small(project: Project, monkeypatch: pytest.MonkeyPatch) -> SmallDevice:
    return SmallDevice(project, monkeypatch)


@pytest.mark.parametrize(("limit", "batch_size", "tried"), [(32, 16, [16]), (5, 11, [11, 5]), (2, 5, [5, 2])])
@pytest.mark.parametrize("accumulated", [1, 8])
def test_the_batch_is_halved_until_a_step_fits(
    limit: int, batch_size: int, tried: list[int], accumulated: int, small: SmallDevice
) -> None:
    small.config = small.config.model_copy(update={"gradient_accumulation_steps": accumulated})
    assert small.fit(limit, batch_size) == tried[-1]
    assert list(dict.fromkeys(small.tried)) == tried
    # Two steps that fit; an accumulated batch is tried on top of the gradients of an earlier one.
    expected = [False] * 2 if accumulated == 1 else [False, True] * 2
    assert small.gradients == [False] * (len(tried) - 1) + expected
    assert bool(small.said) == (len(tried) > 1)
    assert all(f"batch of {batch_size} " in line and f"is {tried[-1]} " in line for line in small.said)


def test_where_no_batch_fits_it_says_what_to_change(small: SmallDevice) -> None:
    with pytest.raises(UserError, match="batch_size 2, num_frm 6") as error:
        small.fit(1, 8)
    assert small.tried == [8, 4, 2] and "2.00 GiB" in str(error.value)


def test_it_tries_the_largest_k_and_changes_no_weight_or_buffer(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"policy_backbone": "mobilenet_v3_large", "policy_weights": "random", "freeze_cnn": False}
    given = {**network, "num_frm": 3, "top_k": 1, "warmup_epochs": 2, "no_warmup": True, "learning_rate": 1e10}
    small = SmallDevice(project | given, monkeypatch)
    state = copy.deepcopy(small.objective.state_dict())
    assert any(name.endswith("num_batches_tracked") for name in state), "a step changes these statistics"
    assert small.fit(2, 4) == 2 and small.k == {2}
    assert all(torch.equal(state[name], tensor) for name, tensor in small.objective.state_dict().items())
    assert all(parameter.grad is None for parameter in small.objective.parameters())


def test_processes_agree_on_the_smallest(small: SmallDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, the other one fits no more than three videos of its own."""

    def gather(value: str) -> list[str]:
        return [value, "the other is full" if small.tried[-1] > 3 else ""]

    monkeypatch.setattr(memory, "world_size", lambda: 2)
    monkeypatch.setattr(memory, "gather_objects", gather)
    assert small.fit(8, 17) == 4
    assert list(dict.fromkeys(small.tried)) == [9, 4, 2], "a share of each: 17, 8 and 4 together"
    monkeypatch.undo()
    small.tried.clear()
    assert small.fit(0, 64) == 64 and not small.tried, "a CPU has no limit to probe"
    assert "auto_batch_size" in small.said[-1] and "CPU" in small.said[-1]


def test_a_step_costs_memory_in_proportion_to_its_batch(small: SmallDevice) -> None:
    small.limit = 8
    accelerator = make_accelerator(small.config)
    costs = [try_steps(small.config, small.objective, small.loaded.tokenize, accelerator, size) for size in (4, 8)]
    four, eight = (cost for cost in costs if isinstance(cost, StepCost))
    assert 1.8 * four.kept_bytes < eight.kept_bytes < 2.2 * four.kept_bytes
    assert four.seconds > 0 and four.peak_bytes > four.kept_bytes
    assert try_steps(small.config, small.objective, small.loaded.tokenize, accelerator, 9) == CUDA_MESSAGE
