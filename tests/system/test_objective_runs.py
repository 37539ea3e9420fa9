"""Objectives in whole runs: the default, SigLIP's bias, and several processes that share one batch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TINY_CLIP
from safetensors.torch import load_file, save_file
from spread import spread

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.objectives.contrastive import Contrastive
from adaclip_finetune.objectives.sigmoid import Sigmoid
from adaclip_finetune.processes import is_main, rank, world_size
from adaclip_finetune.training.backward import Backward
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.weights.loaded import LOGIT_BIAS

Project = dict[str, Any]
SIGMOID = {"method": "sigmoid"}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an open_clip folder of a tiny CLIP with a logit_bias, as SigLIP has one."""
    folder = tmp_path_factory.mktemp("siglip")
    model_cfg = {
        "embed_dim": 64,
        "init_logit_bias": -7,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_the_default_is_what_the_towers_were_trained_with(project: Project, siglip: Path) -> None:
    assert type(open_model(load_config(None, project)).objective) is Contrastive
    session = open_model(load_config(None, {**project, "clip_weights": str(siglip)}))
    bias = session.model.scorer.logit_bias()
    assert type(session.objective) is Sigmoid and bias is not None and bias.item() == -7
    chosen = {**project, "clip_weights": str(siglip), "objective": {"method": "contrastive"}}
    assert type(open_model(load_config(None, chosen)).objective) is Contrastive


def test_a_new_bias_learns_and_is_kept_and_interpolated(project: Project, tmp_path: Path) -> None:
    given = {**project, "objective": SIGMOID, "peft": {"method": "bitfit"}, "output_dir": str(tmp_path), "coef_lr": 1.0}
    folder = fit(load_config(None, given)).folder
    assert folder is not None
    learned = float(load_file(folder / "best.safetensors")["clip.logit_bias"])
    assert learned != LOGIT_BIAS and abs(learned - LOGIT_BIAS) < 1
    for name in ("best.safetensors", "adapter.safetensors"):
        bias = load_retriever(folder / name).model.scorer.logit_bias()
        assert bias is not None and bias.item() == learned
    annotations = ["--annot", project["test_annot"], "--val-annot", project["val_annot"]]
    assert main(["evaluate", str(folder), *annotations, "--interpolate", "0,0.5,1"]) == 0
    # A contrastive run may start from it as well.
    given |= {"objective": {"method": "contrastive"}, "resume": str(folder / "best.safetensors")}
    assert fit(load_config(None, given)).folder is not None


def learning(given: Project) -> int:
    return open_model(load_config(None, given)).parameters.clip.trainable


def test_the_bias_learns_from_every_kind_of_start(project: Project, tmp_path: Path) -> None:
    given = {**project, "objective": SIGMOID, "peft": {"method": "bitfit"}, "num_epochs": 1}
    given["output_dir"] = str(tmp_path)
    of_bitfit = learning({**given, "objective": None})
    assert learning(given) == of_bitfit + 1
    assert learning({**given, "freeze_clip": True}) == 1
    with_bias = fit(load_config(None, given)).folder
    without = fit(load_config(None, {**given, "objective": None})).folder
    assert with_bias is not None and without is not None
    for folder in (with_bias, without):
        for name in ("best.safetensors", "adapter.safetensors"):
            assert learning({**given, "resume": str(folder / name)}) == of_bitfit + 1
    session = open_model(load_config(None, {**given, "resume": str(without / "best.safetensors")}))
    assert session.model.clip.get_parameter("logit_bias").item() == LOGIT_BIAS


def test_the_bias_is_no_candidate_of_ibs(project: Project, tmp_path: Path) -> None:
    ibs = {"method": "ibs", "config": {"num_pre_epochs": 1, "retain_ratio": 0.1}}
    given = {**project, "objective": SIGMOID, "peft": ibs, "output_dir": str(tmp_path), "coef_lr": 1.0}
    folder = fit(load_config(None, given)).folder
    assert folder is not None and "logit_bias" not in (folder / "ibs_parameters.csv").read_text()
    assert float(load_file(folder / "best.safetensors")["clip.logit_bias"]) != LOGIT_BIAS


def test_a_named_backbone_with_a_new_bias_is_found_again(project: Project, tmp_path: Path) -> None:
    folder = Path(project["clip_weights"])
    (tmp_path / "tiny-of-a-test.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-of-a-test.json")
    weights = {"clip_backbone": "tiny-of-a-test", "clip_weights": str(folder / "open_clip_model.safetensors")}
    given = {**project, **weights, "objective": SIGMOID, "output_dir": str(tmp_path), "num_epochs": 1}
    run = fit(load_config(None, given)).folder
    assert run is not None
    again = {**given, "clip_weights": None, "resume": str(run / "best.safetensors"), "do_inference": True}
    session = open_model(load_config(None, again), learn=False)
    assert session.model.scorer.logit_bias() is not None
    assert load_retriever(run, clip_weights=None).model.scorer.logit_bias() is not None


def _gradients(settings: Project, shares: list[int], chunk: int, result: Path) -> None:
    """Write loss and gradients, in float64, of one batch of sum(shares) videos that the processes share.

    A process computes at most `chunk` of them at a time, all if it is 0.
    """
    config = load_config(None, settings)
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    session = open_model(config, accelerator=accelerator)
    objective = session.objective.double()
    shares = shares if world_size() > 1 else [sum(shares)]
    rows = slice(sum(shares[: rank()]), sum(shares[: rank() + 1]))
    count = sum(shares)
    ids = [f"v{number % 4}" for number in range(count)]  # some videos occur twice
    pixels = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (count, config.num_frm, 3, 32, 32), generator=pixels, dtype=torch.uint8)[rows]
    indices = torch.arange(config.num_frm).expand(len(frames), -1)
    texts = session.loaded.tokenize([f"a thing of number {number}" for number in range(count)], config.max_txt_len)
    videos = VideoBatch(frames, indices >= 0, None, indices, ids[rows])
    captions = [f"thing {number % 3}" for number in range(count)]  # and some captions
    second, labelled = objective.second_view(config) and videos, torch.arange(count) % 3 != 0
    batch = TrainBatch(videos, captions[rows], texts[rows], torch.zeros(indices.shape), second, labelled[rows])
    if config.uses_auxiliary:
        having = torch.tensor([0 < number < count - 1 for number in range(count)])  # the last process has none
        ids = texts.roll(2, 0)  # of other videos' sentences
        second = replace(videos, frames=frames[:, -1:], frame_mask=indices[:, :1] >= 0)
        batch = replace(batch, second=second, auxiliary_ids=ids[rows], has_auxiliary=having[rows])
    pairs = list(zip(ids, captions, strict=True))
    group = Group([pairs[sum(shares[:n]) : sum(shares[: n + 1])] for n in range(len(shares))])
    wrapped = accelerator.prepare(objective).train()  # which the backward pass needs as well
    loss = Backward(accelerator, objective, wrapped, chunk)(batch, group, int)
    if is_main():
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        torch.save({"loss": loss, "gradients": gradients}, result)


@pytest.mark.parametrize("chunk", [0, 2, 1])
@pytest.mark.parametrize("objective", ["contrastive", "sigmoid", "distillation", "auxiliary_captions", "captioning"])
def test_processes_that_share_a_batch_have_the_gradients_of_one(
    objective: str, chunk: int, project: Project, language_model: Path, tmp_path: Path
) -> None:
    given = {**project, "objective": {"method": objective}, "warmup_epochs": 0, "use_policy": False, "num_frm": 2}
    if objective == "distillation":
        given |= {"train_annot": [{"annotation": "a.json"}, {"annotation": "b.json", "labelled": False}]}
        given["objective"] = {"method": objective, "config": {"fit_temperature": True}}
    if objective == "captioning":
        given["captioner"] = {"method": "mlp", "config": {"language_model": str(language_model), "prefix_length": 2}}
        given["concat_captions"] = "indep-one"
    shares = [3, 2, 1]
    _gradients(given, shares, 0, tmp_path / "one.pt")
    assert spread(_gradients, 3, tmp_path / "log", given, shares, chunk, tmp_path / "three.pt") == [0, 0, 0]
    one, three = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "three"))
    torch.testing.assert_close(three["loss"], one["loss"], rtol=1e-9, atol=1e-9)
    assert one["gradients"].keys() == three["gradients"].keys() and one["gradients"]
    torch.testing.assert_close(three["gradients"], one["gradients"], rtol=1e-7, atol=1e-9)
