"""The choice of device, precision and processes, and its refusals; hardware is replaced by stubs."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.device import (
    apply_switches,
    describe_device,
    launched_processes,
    make_accelerator,
    peak_memory_mib,
    total_memory_gib,
)

CPU = torch.device("cpu")
LAUNCH = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the variables of a launcher first, and the state of stubs and switches afterwards."""
    for name in [name for name in os.environ if name in LAUNCH or name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    apply_switches(load_config())


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two XPUs that can only be chosen, asked and joined into a group, and what was asked of them."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Stub Arc")
    for name in ("is_xpu_available", "is_xccl_available"):
        monkeypatch.setattr(accelerate.state, name, lambda *_, **__: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: asked.update(options))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    return asked


# ---- device and precision ----


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_missing_device_is_refused_with_the_way_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.backends.mps if device == "mps" else getattr(torch, device)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device: no {device} device.* cpu"):
        make_accelerator(load_config(None, {"device": device}))


def test_precision_may_change_between_runs_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(load_config(None, {"device": "cpu", "precision": precision}))
        assert accelerator.mixed_precision == AcceleratorState().mixed_precision == name
        with accelerator.autocast():
            product = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
        assert (product.dtype == torch.bfloat16) == (precision == "bf16")


def test_the_settings_beat_those_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(load_config(None, {"device": "cpu"}))
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)


def test_auto_follows_a_launch_on_the_cpu(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_accelerator(load_config()).device.type == "xpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert make_accelerator(load_config()).device.type == "cpu"


@pytest.mark.parametrize(("variables", "settings", "told"), [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED"),
    ({"ACCELERATE_USE_FSDP": "1"}, {}, "FSDP"),
    ({name: value for name, value in LAUNCH.items() if name != "MASTER_ADDR"}, {}, "MASTER_ADDR"),
    ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE"),
    ({}, {"precision": "fp16"}, "fp16"),
])  # fmt: skip
def test_what_cannot_work_is_refused(
    variables: dict[str, str], settings: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        make_accelerator(load_config(None, {"device": "cpu", **settings}))


# ---- XPU, on a stub ----


def test_xpu_in_one_process(xpu: dict[str, Any]) -> None:
    accelerator = make_accelerator(load_config(None, {"xpu": True, "precision": "bf16"}))
    assert (accelerator.device.type, accelerator.num_processes) == ("xpu", 1)
    with accelerator.autocast():
        assert torch.is_autocast_enabled("xpu")
        assert torch.get_autocast_dtype("xpu") == torch.bfloat16
    assert "backend" not in xpu, "one process opens no group"
    assert peak_memory_mib(accelerator.device) == 3
    assert describe_device(accelerator.device) == "xpu: Stub Arc"


def test_xpu_in_several_processes(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    config = load_config(None, {"xpu": True, "precision": "bf16"})
    accelerator = make_accelerator(config)
    assert accelerator.device == xpu["device"] == torch.device("xpu", 1)
    assert (accelerator.num_processes, accelerator.process_index) == (2, 1)
    assert (xpu["backend"], xpu["timeout"]) == ("xccl", timedelta(hours=2))
    assert accelerator.ddp_handler.find_unused_parameters
    monkeypatch.setattr(accelerate.state, "is_xccl_available", lambda: False)
    with pytest.raises(UserError, match="WORLD_SIZE 2"):
        make_accelerator(config)
    monkeypatch.setattr(accelerate.state, "is_xpu_available", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"device xpu.* uses device cpu"):
        make_accelerator(config)


# ---- one process or several ----


@pytest.mark.parametrize("stray", [
    {"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere.invalid"},
    LAUNCH | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    {"PMI_SIZE": "4", "WORLD_SIZE": ""},
])  # fmt: skip
def test_one_process_opens_no_group(stray: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == 1
    assert make_accelerator(load_config()).num_processes == 1
    assert not torch.distributed.is_initialized()


# ---- switches ----


def test_switches_are_set_and_undone_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for on in (True, False):
        make_accelerator(load_config(None, {"device": "cpu", "tf32": on, "deterministic": on}))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == on
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == on
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# ---- what a device says of itself ----


def test_devices_describe_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_device(CPU).startswith("cpu: ")
    assert 10 / 2**10 < peak_memory_mib(CPU) / 2**10 < total_memory_gib(CPU) < 2**20
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    assert (peak_memory_mib(torch.device("mps")), total_memory_gib(torch.device("mps"))) == (5, 16)
