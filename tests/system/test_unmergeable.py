"""A method that cannot be merged: checkpoints name it, and it is attached wherever they are read."""

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import PEFT, BitFitSettings, Choice, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.base import PeftMethod, clip_of, learning
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]


class Bottleneck(PeftMethod):
    """Adds the output of a small network behind the image tower."""

    mergeable = False

    def attach(self, clip: nn.Module) -> None:
        down, up = nn.Linear(64, 4), nn.Linear(4, 64)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        visual: Any = clip.visual
        visual.behind = nn.Sequential(down, nn.GELU(), up)
        visual.register_forward_hook(lambda module, _, out: out + module.behind(out))

    def choose(self, model: nn.Module) -> None:
        for name, parameter in learning(clip_of(model)):
            parameter.requires_grad_(name.startswith("visual.behind."))


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the method in place of BitFit."""
    module = ModuleType("bottleneck")
    module.Bottleneck = Bottleneck  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adaclip_finetune.peft.bottleneck", module)
    monkeypatch.setitem(PEFT, "bitfit", Choice(BitFitSettings, "peft.bottleneck:Bottleneck"))


@pytest.mark.usefixtures("method")
def test_it_is_attached_wherever_its_checkpoint_is_read(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**project, "peft": {"method": "bitfit"}, "coef_lr": 1.0, "freeze_layer_num": -1}
    result = fit(load_config(None, {**given, "output_dir": str(tmp_path / "out")}))
    run = result.folder
    assert run is not None
    with safe_open(run / "best.safetensors", "pt") as file:
        assert file.metadata()["method"] == "bitfit" and "clip.visual.behind.2.weight" in file.keys()  # noqa: SIM118
        assert bool(file.get_tensor("clip.visual.behind.2.weight").any())
    (tmp_path / "moved").mkdir()
    shutil.copy(run / "best.safetensors", tmp_path / "moved")
    merged = load_retriever(tmp_path / "moved", clip_weights=None)  # needs no pretrained weights
    adapter = load_retriever(run / "adapter.safetensors")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors = [model.model.clip.encode_image(pixels) for model in (merged, adapter)]
    torch.testing.assert_close(*vectors)
    assert main(["evaluate", str(run), "--annot", str(project["test_annot"])]) == 0
    assert main(["export", str(run), "--format", "open_clip", "-o", str(tmp_path / "exported")]) == 2
    assert "bitfit" in capsys.readouterr().err and not (tmp_path / "exported").exists()
    for name in ("best.safetensors", "adapter.safetensors"):
        with pytest.raises(UserError, match=r"peft\.method bitfit .* peft\.method full"):
            fit(load_config(None, {**given, "peft": {"method": "full"}, "resume": str(run / name), "no_output": True}))
        settings = {**given, "resume": str(run / name), "output_dir": str(tmp_path / name), "num_epochs": 1}
        assert fit(load_config(None, settings)).folder is not None
