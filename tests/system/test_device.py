"""The choice of device, precision and processes, and its refusals; hardware is replaced by stubs."""

import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from spread import spread

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.processes import gather_objects, rank
from adaclip_finetune.training.device import (
    describe_device,
    launched_processes,
    load_ipex,
    make_accelerator,
    optimize_with_ipex,
    peak_memory_mib,
    total_memory_gib,
)
from adaclip_finetune.training.switches import apply_switches, explain_nondeterminism

CPU = torch.device("cpu")
XPU = torch.device("xpu")
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


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in (LAUNCH | variables).items():
        monkeypatch.setenv(name, value)


# ---- device and precision ----


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_missing_device_is_refused_with_the_way_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.backends.mps if device == "mps" else getattr(torch, device)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no {device} device.* set device to cpu") as error:
        make_accelerator(load_config(None, {"device": device}))
    assert ("ZE_AFFINITY_MASK" in str(error.value)) == (device == "xpu")


def test_precision_may_change_between_runs_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(load_config(None, {"device": "cpu", "precision": precision}))
        assert accelerator.mixed_precision == AcceleratorState().mixed_precision == name
        with accelerator.autocast():
            product = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
        assert (product.dtype == torch.bfloat16) == (precision == "bf16")


def test_the_settings_beat_those_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    }
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(load_config(None, {"device": "cpu"}))
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.device == CPU
    assert {name: os.environ[name] for name in theirs} == theirs, "the environment is as it was"


def test_auto_follows_a_launch_on_the_cpu(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_accelerator(load_config()).device.type == "xpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert make_accelerator(load_config()).device.type == "cpu"
    assert make_accelerator(load_config(None, {"device": "xpu"})).device.type == "xpu", "the setting wins"


@pytest.mark.parametrize(("variables", "settings", "told"), [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED"),
    ({"ACCELERATE_USE_FSDP": "1"}, {}, "FSDP"),
    ({"ACCELERATE_USE_MEGATRON_LM": "yes"}, {}, "MEGATRON_LM"),
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


def test_a_device_that_accelerate_does_not_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.state, "is_xpu_available", lambda *_, **__: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device is xpu, but .* uses cpu"):
        make_accelerator(load_config(None, {"device": "xpu"}))


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
    launch(monkeypatch)
    accelerator = make_accelerator(load_config(None, {"xpu": True, "precision": "bf16"}))
    assert accelerator.device == xpu["device"] == torch.device("xpu", 1)
    assert (accelerator.num_processes, accelerator.process_index) == (2, 1)
    assert xpu["backend"] == "xccl"
    assert xpu["timeout"] == timedelta(hours=2)
    assert accelerator.ddp_handler.find_unused_parameters


def test_processes_that_cannot_join_are_refused(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, LOCAL_RANK="2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this machine has 2 xpu devices"):
        make_accelerator(load_config(None, {"xpu": True}))
    launch(monkeypatch)
    monkeypatch.setattr(accelerate.state, "is_xccl_available", lambda: False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2"):
        make_accelerator(load_config(None, {"xpu": True}))


# ---- one process or several ----


@pytest.mark.parametrize("stray", [
    {"RANK": "0"},
    {"LOCAL_RANK": "0"},
    {"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere.invalid"},
    LAUNCH | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    {"PMI_SIZE": "4"},
    {"WORLD_SIZE": ""},
])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_one_process_opens_no_group(stray: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    assert launched_processes() == 1
    accelerator = make_accelerator(load_config(None, {"device": device}))
    assert accelerator.num_processes == 1
    assert not torch.distributed.is_initialized()
    assert {name: os.environ[name] for name in stray} == stray


def join_twice(result: Path) -> None:
    """Make an accelerator with two precisions in one process of a group, and save what it is."""
    found = []
    for precision, device in (("bf16", "auto"), ("fp32", "cpu")):
        accelerator = make_accelerator(load_config(None, {"precision": precision, "device": device}))
        group = torch.distributed.group.WORLD
        ranks = gather_objects(accelerator.process_index)
        found.append([accelerator.num_processes, accelerator.mixed_precision, torch.distributed.get_backend(), ranks])
    wrapped = accelerator.prepare(torch.nn.Linear(2, 2))
    same = group is torch.distributed.group.WORLD
    text = json.dumps([found, same, type(wrapped).__name__, wrapped.find_unused_parameters])
    result.with_suffix(f".{rank()}").write_text(text)


def test_two_processes_join_once_and_may_change_precision(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert spread(join_twice, 2, log, tmp_path / "found") == [0, 0], log.read_text()
    for number in range(2):
        found, same, wrapper, unused = json.loads((tmp_path / f"found.{number}").read_text())
        assert found == [[2, precision, "gloo", [0, 1]] for precision in ("bf16", "no")]
        assert same and unused and wrapper == "DistributedDataParallel"


# ---- switches ----


def switches() -> list[object]:
    return [
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    ]


def test_switches_are_set_and_undone_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_accelerator(load_config(None, {"device": "cpu"}))
    assert switches() == [False] * 5 and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_accelerator(load_config(None, {"device": "cpu", "tf32": True, "deterministic": True}))
    assert switches() == [True, True, True, True, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    make_accelerator(load_config(None, {"device": "cpu"}))
    assert switches() == [False] * 5


def test_nondeterminism_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_switches(load_config(None, {"deterministic": True}))
    with pytest.raises(RuntimeError) as raised:
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), [2, 2])
    assert "max_unpooling2d" in str(explain_nondeterminism(raised.value))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    error = RuntimeError("... but this operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2")
    assert "CUBLAS_WORKSPACE_CONFIG is :0:0" in str(explain_nondeterminism(error))
    assert explain_nondeterminism(RuntimeError("sizes do not match")) is None
    assert explain_nondeterminism(ValueError("does not have a deterministic implementation")) is None


# ---- Intel's extension ----

FITTING = ".".join(torch.__version__.split(".")[:2]) + ".7+xpu"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install a stand-in for the extension, with a version and a source."""

    def install(version: str, source: str) -> None:
        (tmp_path / "intel_extension_for_pytorch.py").write_text(source)
        folder = tmp_path / f"intel_extension_for_pytorch-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: intel_extension_for_pytorch\nVersion: {version}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    sys.modules.pop("intel_extension_for_pytorch", None)


OPTIMIZE = """
def optimize(model, optimizer, inplace):
    assert model.training and inplace
    model.optimized = True
    return model, optimizer
"""


@pytest.fixture
def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, list[str]]:
    """A model, its optimizer and a list for what is said."""
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters()), []


def test_a_fitting_extension_optimizes_the_model_on_xpu_only(installed: Any, parts: Any) -> None:
    installed(FITTING, OPTIMIZE)
    model, optimizer, said = parts
    assert load_ipex(CPU, said.append) is None and "intel_extension_for_pytorch" not in sys.modules
    ipex = load_ipex(XPU, said.append)
    assert ipex is not None
    assert optimize_with_ipex(ipex, model, optimizer, said.append) == (model, optimizer)
    assert model.optimized and not said


@pytest.mark.parametrize(("version", "source", "message"), [
    (None, "", None),
    ("1.13.0", "raise AssertionError('never imported')", "1.13.0 .*does not fit torch"),
    (FITTING, "raise ImportError('libsycl.so is missing')", "libsycl.so is missing"),
    (FITTING, "import sys; sys.exit(127)", "127"),
    (FITTING, "def optimize(*_, **__): raise RuntimeError('no kernel')", "no kernel"),
])  # fmt: skip
def test_without_a_usable_extension_the_model_stays_as_it_is(
    version: str | None, source: str, message: str | None, installed: Any, parts: Any
) -> None:
    model, optimizer, said = parts
    if version is not None:
        installed(version, source)
    ipex = load_ipex(XPU, said.append)
    assert optimize_with_ipex(ipex, model, optimizer, said.append) == (model, optimizer)
    assert len(said) == (message is not None) and all(re.search(str(message), text) for text in said)


# ---- what a device says of itself ----


def test_the_cpu_describes_itself() -> None:
    assert describe_device(CPU).startswith("cpu: ")
    before = peak_memory_mib(CPU)
    block = bytearray(b"x") * (64 * 2**20)
    assert peak_memory_mib(CPU) >= before > 10 and len(block) == 64 * 2**20
    assert before / 2**10 < total_memory_gib(CPU) < 2**20


def test_memory_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    assert (peak_memory_mib(torch.device("mps")), total_memory_gib(torch.device("mps"))) == (5, 16)
