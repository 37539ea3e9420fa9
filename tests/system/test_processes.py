"""Several processes train as one process does: the same losses, weights, figures and files."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from spread import spread
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.processes import gather_objects, is_main, rank
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import Trainer, fit

Project = dict[str, Any]

IBS = {"method": "ibs", "config": {"num_pre_epochs": 1, "retain_ratio": 0.2}}
BITFIT = {"method": "bitfit", "config": {"keep_module_keywords": ["logit_scale"]}}


def train_in_float64(settings: Project, result: Path) -> None:
    """Train in float64 and save the losses and the weights in the main process."""
    config = load_config(None, settings)
    run = RunFolder(config)
    with ExitStack() as stack:
        trainer = Trainer(config, run, StopSignals(), stack)
        trainer.model.double()
        trainer.model.unused = nn.Parameter(torch.zeros(3))  # must not keep the other processes waiting
        trainer.train()
    if is_main():
        losses = [event["loss"] for event in run.events if event["event"] == "train"]
        torch.save({"losses": losses, "weights": trainer.model.state_dict()}, result)


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        pytest.param({"batch_size": 5, "num_epochs": 1, "peft": BITFIT}, 2, id="uneven last batch"),
        pytest.param({"batch_size": 5, "peft": IBS, "frame_agg": "qscore"}, 2, id="IBS: rebuilt between phases"),
        pytest.param(
            {"batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 1, "freeze_layer_num": -1,
             "concat_captions": "indep-all", "sampling": "random", "data_subset": 5},
            3,
            id="accumulation, the same video twice in a batch, empty shares",
        ),
        pytest.param(
            {"batch_size": 5, "num_epochs": 1, "freeze_layer_num": -1, "objective": {"method": "sigmoid"},
             "concat_captions": "indep-all", "data_subset": 5},
            3,
            id="sigmoid: a loss that is a sum over processes",
        ),
    ],
)  # fmt: skip
def test_processes_follow_one_process_on_the_whole_batch(
    settings: Project, processes: int, project: Project, tmp_path: Path
) -> None:
    compare_with_one_process({**project, "no_output": True, "seed": 3, **settings}, processes, tmp_path)


def test_processes_share_every_part_of_a_mixture(project: Project, tmp_path: Path) -> None:
    """The second part starts again in the middle of a batch."""
    listed = json.loads(Path(project["train_annot"]).read_text())
    for name, videos in {"a": list(listed)[:8], "b": list(listed)[8:11]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({video: listed[video] for video in videos}))
    parts = [{"annotation": str(tmp_path / f"{name}.json"), "per_batch": rows} for name, rows in (("a", 3), ("b", 2))]
    given = {
        **project,
        "no_output": True,
        "seed": 3,
        "train_annot": parts,
        "batch_size": 5,
        "num_epochs": 1,
        "coef_lr": 1.0,
    }
    compare_with_one_process(given | {"sampling": "random", "concat_captions": "indep-one"}, 2, tmp_path)


def compare_with_one_process(given: Project, processes: int, tmp_path: Path) -> None:
    log, one, several = (tmp_path / name for name in ("log", "one.pt", "several.pt"))
    train_in_float64(given, one)
    assert spread(train_in_float64, processes, log, given, several) == [0] * processes, log.read_text()
    alone, together = torch.load(one), torch.load(several)
    assert len(alone["losses"]) >= 2
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    set_seed(given["seed"])
    start = open_model(load_config(None, given)).model.double().state_dict()
    moved = [name for name, tensor in start.items() if not torch.equal(tensor, alone["weights"][name])]
    assert len(moved) > 20, "nothing was learned: the test shows nothing"
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def fit_it(settings: Project) -> None:
    """Train a whole run."""
    fit(load_config(None, settings))


def test_only_the_main_process_writes_and_the_figures_are_those_of_one(project: Project, tmp_path: Path) -> None:
    given = {**project, "num_epochs": 1}
    fit_it({**given, "output_dir": str(tmp_path / "one")})
    log, several = tmp_path / "log", {**given, "output_dir": str(tmp_path / "two"), "num_workers": 1}
    assert spread(fit_it, 2, log, several) == [0, 0], log.read_text()
    (one,), (two,) = (list((tmp_path / name / "tiny").iterdir()) for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[0]["zero_shot"] == metrics[1]["zero_shot"], "the batches are the same, so the embeddings are"
    assert metrics[0]["finetuned"] == metrics[1]["finetuned"]
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    weights = [load_file(folder / "best.safetensors") for folder in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def break_on_one(settings: Project) -> None:
    """Fail in one process and wait for it in the other."""
    config = load_config(None, settings)
    make_accelerator(config)
    if rank() == 1:
        evaluation_split(config, "absent.json")
    gather_objects("waiting for the other")


def test_a_process_that_dies_ends_the_others_with_its_error_shown(project: Project, tmp_path: Path) -> None:
    codes = spread(break_on_one, 2, tmp_path / "log", project)
    assert all(codes), "no process is still waiting"
    assert "absent.json" in (tmp_path / "log").read_text()
