"""Every command refuses settings that a checkpoint contradicts, for the same reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign import write_published

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.training.session import open_model
from adaclip_finetune.weights.published import to_published_names

COMMANDS = {
    "train": "train --config SETTINGS --resume WEIGHTS",
    "dry run": "train --config SETTINGS --resume WEIGHTS --dry_run",
    "dry run of an evaluation": "train --config SETTINGS --resume WEIGHTS --dry_run --do_inference",
    "do_inference": "train --config SETTINGS --resume WEIGHTS --do_inference",
    "check": "check --config SETTINGS --resume WEIGHTS",
    "check of an evaluation": "check --config SETTINGS --resume WEIGHTS --do_inference",
    "evaluate": "evaluate WEIGHTS --config SETTINGS --annot TEST",
    "interpolate": "evaluate WEIGHTS --config SETTINGS --annot TEST --val-annot TEST --interpolate 0,1",
    "predict": "predict WEIGHTS --config SETTINGS --annot TEST --output OUTPUT/p.jsonl",
    "index": "index WEIGHTS TEST --config SETTINGS -o OUTPUT/i",
}


@pytest.fixture(scope="module")
def published(project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a published checkpoint whose tensors fit the project's settings."""
    state = to_published_names(open_model(load_config(None, project)).model.state_dict())
    return write_published(tmp_path_factory.mktemp("published") / "such.pth", state, project)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_setting(
    command: str, project: dict[str, Any], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, settings, words = tmp_path / "output", tmp_path / "settings.json", COMMANDS[command]
    output.mkdir()
    given = project | {"hidden_dim": 128, "output_dir": str(output), "save_similarity": str(output / "m.npy")}
    settings.write_text(json.dumps(given))
    names = {"WEIGHTS": published, "SETTINGS": settings, "TEST": project["test_annot"], "OUTPUT": output}
    for name, value in names.items():
        words = words.replace(name, str(value))
    code = main(words.split())
    printed = capsys.readouterr()
    # For `check` the problem is its result, which it prints; every other command fails.
    assert code == (1 if words.startswith("check") else 2)
    said = " ".join((printed.out if code == 1 else printed.err).split())
    assert "hidden_dim is 128, there 64" in said and "--hidden_dim 64" in said and str(published) in said
    assert not list(output.iterdir())
    settings.write_text(json.dumps(given | {"hidden_dim": 64, "num_epochs": 1}))
    assert main(words.split()) == 0


def without_an_end_token(project: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make a CLIP whose text tower attends to all tokens, as SigLIP's does."""
    shutil.copytree(project["clip_weights"], folder / "clip")
    described = json.loads((folder / "clip/open_clip_config.json").read_text())
    described["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (folder / "clip/open_clip_config.json").write_text(json.dumps(described))
    return {"clip_weights": str(folder / "clip"), "word_agg": "mlp", "frame_agg": None}


def nothing_that_learns(project: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put LoRA's matrices into a frozen block, with nothing besides CLIP."""
    lora = {"method": "lora", "config": {"layers": [0]}}
    return {"peft": lora, "freeze_layer_num": 1, "use_policy": False, "frame_agg": None, "num_frm": 2}


@pytest.mark.parametrize(("case", "told"), [(without_an_end_token, "word_agg"), (nothing_that_learns, "left to train")])
def test_what_a_run_cannot_do_is_refused_before_it(
    case: Callable[..., dict[str, Any]],
    told: str,
    project: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {**project, **case(project, tmp_path), "output_dir": str(tmp_path / "out")}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    for words in ([], ["--dry_run"]):
        assert main(["train", "--config", str(tmp_path / "c.json"), *words]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["check", "--config", str(tmp_path / "c.json")]) == 1
    assert told in capsys.readouterr().out
