"""The choice of device, precision and processes, and its refusals. What needs hardware runs on stubs of it here."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.device import (
    describe_device,
    launched_processes,
    make_accelerator,
    peak_memory_mib,
    total_memory_gib,
)
from adaclip_finetune.training.ipex import optimized_for_xpu, usable_ipex
from adaclip_finetune.training.switches import apply_switches, explain_nondeterminism

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
XPU = torch.device("xpu")
LAUNCH = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher's variables at first; nothing of a stub, and no switch, stays behind."""
    for name in [name for name in os.environ if name in LAUNCH or name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    apply_switches(load_config())


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two XPUs that can be chosen, asked and joined into a group, and nothing else; tells what was asked of them."""
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
def test_a_device_that_is_not_there_is_refused_with_the_way_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.backends.mps if device == "mps" else getattr(torch, device)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no {device} device") as error:
        make_accelerator(load_config(None, {"device": device}))
    assert "choose device auto or cpu" in str(error.value)
    assert ("ZE_AFFINITY_MASK" in str(error.value)) == (device == "xpu")


def test_xpu_flag_is_the_device() -> None:
    assert load_config(None, {"xpu": True}).device == "xpu"


def test_precision_may_change_between_runs_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(load_config(None, {"device": "cpu", "precision": precision}))
        assert accelerator.mixed_precision == AcceleratorState().mixed_precision == name
        assert accelerator.device == CPU


def test_bf16_on_the_cpu_computes_in_bf16() -> None:
    accelerator = make_accelerator(load_config(None, {"device": "cpu", "precision": "bf16"}))
    with accelerator.autocast():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_our_settings_beat_those_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.device == CPU
    assert {name: os.environ[name] for name in theirs} == theirs, "the environment is as it was"


def test_auto_follows_a_launch_on_the_cpu(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_accelerator(load_config()).device.type == "xpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert make_accelerator(load_config()).device.type == "cpu"
    assert make_accelerator(load_config(None, {"device": "xpu"})).device.type == "xpu", "ours wins"


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_other_engines_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"ask for {engine}"):
        make_accelerator(load_config(None, {"device": "cpu"}))


def test_what_accelerate_refuses_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.state, "is_xpu_available", lambda *_, **__: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"xpu was asked for, but .* takes cpu"):
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


def test_more_processes_than_devices_are_refused(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, LOCAL_RANK="2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this machine shows 2 xpu devices"):
        make_accelerator(load_config(None, {"xpu": True}))


def test_processes_that_cannot_join_are_refused(xpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    monkeypatch.setattr(accelerate.state, "is_xccl_available", lambda: False)
    with pytest.raises(UserError, match="2 processes were started, but on xpu they cannot work together"):
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


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    (LAUNCH | {"MASTER_ADDR": ""}, "but MASTER_ADDR not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    (LAUNCH | {"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', not a number"),
])  # fmt: skip
def test_half_a_launch_is_refused(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        make_accelerator(load_config(None, {"device": "cpu"}))


MEMBER = """
import json, sys, torch, torch.distributed as dist
from adaclip_finetune.config import load_config
from adaclip_finetune.processes import gather_objects
from adaclip_finetune.training.device import make_accelerator

found = []
for precision, device in (("bf16", "auto"), ("fp32", "cpu")):
    accelerator = make_accelerator(load_config(None, {"precision": precision, "device": device}))
    group = dist.group.WORLD
    found.append([accelerator.num_processes, accelerator.process_index, accelerator.mixed_precision,
                  accelerator.device.type, dist.get_backend(), gather_objects(accelerator.process_index)])
same = group is dist.group.WORLD
wrapped = accelerator.prepare(torch.nn.Linear(2, 2))
print(json.dumps([found, same, type(wrapped).__name__, wrapped.find_unused_parameters]))
dist.destroy_process_group()
"""


def test_two_processes_join_once_and_may_change_precision() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **LAUNCH, "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for rank, member in enumerate(members):
        out, err = member.communicate(timeout=120)
        assert member.returncode == 0, err
        found, same, wrapper, unused = json.loads(out)
        assert found == [[2, rank, precision, "cpu", "gloo", [0, 1]] for precision in ("bf16", "no")]
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
    assert switches() == [False, False, False, False, False]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_accelerator(load_config(None, {"device": "cpu", "tf32": True, "deterministic": True}))
    assert switches() == [True, True, True, True, False]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    make_accelerator(load_config(None, {"device": "cpu"}))
    assert switches() == [False, False, False, False, False]


def test_a_given_workspace_of_cublas_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    apply_switches(load_config(None, {"deterministic": True}))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_form_is_said_in_words() -> None:
    apply_switches(load_config(None, {"deterministic": True}))
    with pytest.raises(RuntimeError) as raised:
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), [2, 2])
    explained = explain_nondeterminism(raised.value)
    assert isinstance(explained, UserError)
    assert "no deterministic form of max_unpooling2d" in str(explained)
    assert "Train without deterministic" in str(explained)


def test_cublas_without_its_variable_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    error = RuntimeError("... but this operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2")
    assert "CUBLAS_WORKSPACE_CONFIG is :0:0" in str(explain_nondeterminism(error))
    assert explain_nondeterminism(RuntimeError("sizes do not match")) is None
    assert explain_nondeterminism(ValueError("does not have a deterministic implementation")) is None


# ---- Intel's extension ----

FITTING = ".".join(torch.__version__.split(".")[:2]) + ".7+xpu"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs a stand-in for the extension, of a version and a source."""

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


def test_a_fitting_extension_optimizes_the_model_on_xpu_only(installed: Any) -> None:
    installed(FITTING, OPTIMIZE)
    said: list[str] = []
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    assert usable_ipex(CPU, said.append) is None
    assert "intel_extension_for_pytorch" not in sys.modules
    ipex = usable_ipex(XPU, said.append)
    assert ipex is not None
    assert optimized_for_xpu(ipex, model, optimizer, said.append) == (model, optimizer)
    assert model.optimized
    assert not said


def test_without_the_extension_nothing_is_said_or_changed() -> None:
    said: list[str] = []
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    assert usable_ipex(XPU, said.append) is None
    assert optimized_for_xpu(None, model, optimizer, said.append) == (model, optimizer)
    assert not said


@pytest.mark.parametrize(("version", "source", "message"), [
    ("1.13.0", "raise AssertionError('never imported')", "1.13.0 does not fit torch"),
    (FITTING, "raise ImportError('libsycl.so is missing')", "cannot be imported .*libsycl.so is missing"),
    (FITTING, "import sys; sys.exit(127)", "cannot be imported .*127"),
])  # fmt: skip
def test_an_extension_of_no_use_is_named_and_ignored(version: str, source: str, message: str, installed: Any) -> None:
    installed(version, source)
    said: list[str] = []
    assert usable_ipex(XPU, said.append) is None
    assert len(said) == 1
    assert re.search(message, said[0])


def test_an_extension_that_fails_leaves_the_model_as_it_is(installed: Any) -> None:
    installed(FITTING, "def optimize(*_, **__): raise RuntimeError('no kernel')")
    said: list[str] = []
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    ipex = usable_ipex(XPU, said.append)
    assert optimized_for_xpu(ipex, model, optimizer, said.append) == (model, optimizer)
    assert said == ["intel_extension_for_pytorch could not optimize the model (no kernel); it is trained as it is"]


# ---- what a device says of itself ----


def test_what_it_says_of_the_cpu() -> None:
    assert describe_device(CPU).startswith("cpu: ")
    before = peak_memory_mib(CPU)
    block = bytearray(b"x") * (64 * 2**20)
    assert peak_memory_mib(CPU) >= before > 10
    assert len(block) == 64 * 2**20
    assert before / 2**10 < total_memory_gib(CPU) < 2**20


def test_memory_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    assert peak_memory_mib(torch.device("mps")) == 5
    assert total_memory_gib(torch.device("mps")) == 16
