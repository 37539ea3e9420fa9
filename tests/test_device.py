"""The choice of device and precision, and its refusals. What needs hardware is not run here."""

import pytest
import torch
from accelerate.state import AcceleratorState

from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.device import describe_device, make_accelerator, peak_memory_mib


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_way_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.backends.mps if device == "mps" else getattr(torch, device)
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no {device} device") as error:
        make_accelerator(load_config(None, {"device": device}))
    assert "choose device auto or cpu" in str(error.value)


def test_xpu_flag_is_the_device() -> None:
    assert load_config(None, {"xpu": True}).device == "xpu"


def test_precision_may_change_between_runs_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(load_config(None, {"device": "cpu", "precision": precision}))
        assert accelerator.mixed_precision == AcceleratorState().mixed_precision == name
        assert accelerator.device == torch.device("cpu")


def test_what_it_says_of_the_cpu() -> None:
    assert describe_device(torch.device("cpu")).startswith("cpu: ")
    before = peak_memory_mib(torch.device("cpu"))
    block = bytearray(b"x") * (64 * 2**20)
    assert peak_memory_mib(torch.device("cpu")) >= before > 10
    assert len(block) == 64 * 2**20
