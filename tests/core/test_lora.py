"""LoRA compared with its formula, and in every command, from training to tuning its rank."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import open_clip
import optuna
import pytest
import torch
from conftest import build_tiny_clip
from media import write_video
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spread import spread
from torch import Tensor, nn
from transformers import CLIPModel

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices import LoraSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.freezing import apply_freezing
from adaclip_finetune.peft.lora import Lora, LowRank
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.weights.plain import plain_name, plain_state

Project = dict[str, Any]

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = open_clip.tokenize(["a dog runs", "two red cars", "a cat"])
LORA = {"peft": {"method": "lora", "config": {"rank": 2}}, "coef_lr": 1.0}
KINDS = [LoraSettings(rank=2), LoraSettings(rank=2, dora=True), LoraSettings(rank=4, rslora=True, alpha=3.0)]


class Model(nn.Module):
    """A model with CLIP inside, as a method gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = build_tiny_clip()


def attached(settings: LoraSettings) -> tuple[Model, Lora]:
    model, method = Model(), Lora(settings)
    method.attach(model.clip)
    apply_freezing(model.clip, -1, False)
    method.choose(model)
    return model.eval(), method


def disturbed(model: Model) -> Model:
    """Change the learning parameters, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(clip: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return clip.eval().encode_image(PIXELS), clip.encode_text(TOKENS)


@pytest.mark.parametrize("settings", KINDS, ids=["lora", "dora", "rslora"])
def test_attaching_changes_nothing_and_merging_keeps_what_was_learned(settings: LoraSettings) -> None:
    model, method = attached(settings)
    torch.testing.assert_close(outputs(model.clip), outputs(build_tiny_clip()))
    learned = outputs(disturbed(model).clip)
    assert not torch.allclose(learned[0], outputs(build_tiny_clip())[0], atol=1e-3)
    merged = method.merged_state(model)
    plain = Model()
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(outputs(plain.clip), learned)
    method.reset(model)
    torch.testing.assert_close(outputs(model.clip), outputs(build_tiny_clip()))


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(None, False, 2.0), (3.0, False, 1.5), (3.0, True, 3 / 2**0.5)])
def test_the_weight_is_w_plus_scale_times_b_a(alpha: float | None, rslora: bool, scale: float) -> None:
    model, _ = attached(LoraSettings(rank=2, alpha=alpha, rslora=rslora, targets=("fc",)))
    disturbed(model)
    layer = model.clip.visual.transformer.resblocks[1].mlp.c_fc
    update = layer.parametrizations.weight[0]
    original = layer.parametrizations.weight.original
    torch.testing.assert_close(layer.weight, original + scale * update.up[0] @ update.down[0])
    torch.testing.assert_close(original, build_tiny_clip().visual.transformer.resblocks[1].mlp.c_fc.weight)


def test_dora_learns_length_and_direction_separately() -> None:
    model, _ = attached(LoraSettings(rank=2, dora=True, targets=("proj",)))
    disturbed(model)
    layer = model.clip.transformer.resblocks[0].mlp.c_proj
    update = layer.parametrizations.weight[0]
    torch.testing.assert_close(layer.weight.norm(dim=1), update.magnitude[0].abs())
    direction = layer.parametrizations.weight.original + 2.0 * update.up[0] @ update.down[0]
    cosine = nn.functional.cosine_similarity(layer.weight, direction, dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones(64))


def test_only_what_is_targeted_changes() -> None:
    """The target is q in the last block of the image tower, inside one fused weight of q, k and v."""
    model, _ = attached(LoraSettings(rank=2, targets=("q",), towers="image", layers=(1,)))
    disturbed(model)
    changed = {
        name for name, tensor in plain_state(model).items() if not torch.equal(tensor, Model().state_dict()[name])
    }
    assert changed == {"clip.visual.transformer.resblocks.1.attn.in_proj_weight"}
    weight = model.clip.visual.transformer.resblocks[1].attn.in_proj_weight
    moved = (weight != build_tiny_clip().visual.transformer.resblocks[1].attn.in_proj_weight).any(dim=1)
    assert moved[:64].all() and not moved[64:].any()


def test_a_dry_run_counts_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).resolve().parents[2] / "cfgs/lora.json")
    assert main(["train", "--config", recipe, "--dry_run", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Rank 8; 12 blocks of width 768 and 12 of width 512; q, k, v, out of W x W, fc and proj of W x 4W.
    expected = sum(12 * 8 * (4 * 2 * width + 2 * 5 * width) for width in (768, 512))
    assert found["parameters"]["clip"] == {"trainable": expected, "total": 151_277_313 + expected}
    assert found["gflops"]["clip_frame"] == pytest.approx(4.36, abs=0.01)  # that of the merged model


def test_added_parameters_and_keywords_learn() -> None:
    model, _ = attached(LoraSettings(rank=3, keep_module_keywords=("ln_final", "logit_scale")))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = {name for name in learning if plain_name(name) is not None}
    assert plain == {"clip.ln_final.weight", "clip.ln_final.bias", "clip.logit_scale"}
    # Per block and tower: q, k, v, out of 64 x 64; fc 256 x 64; proj 64 x 256.
    added = sum(p.numel() for name, p in model.named_parameters() if name in learning - plain)
    assert added == 2 * 2 * 3 * (4 * (64 + 64) + 2 * (64 + 256))


def test_dropout_drops_inputs_of_the_update_in_training_only() -> None:
    model, _ = attached(LoraSettings(rank=2, targets=("fc",), dropout=0.5))
    disturbed(model)
    layer = model.clip.visual.transformer.resblocks[0].mlp.c_fc
    original = layer.parametrizations.weight.original
    still = layer.weight - original
    torch.testing.assert_close(layer.weight - original, still, rtol=0, atol=0)
    torch.manual_seed(0)
    dropped = layer.train().weight - original
    zero = (dropped == 0).all(dim=0)
    assert 16 <= int(zero.sum()) <= 48  # of 64 inputs
    torch.testing.assert_close(dropped[:, ~zero], 2 * still[:, ~zero])


def test_a_repeated_target_counts_once_and_a_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    model, _ = attached(LoraSettings(rank=2, targets=("q", "q")))
    once, _ = attached(LoraSettings(rank=2, targets=("q",)))
    assert model.state_dict().keys() == once.state_dict().keys()
    weight = torch.zeros(4, 4)
    assert LowRank(weight, [(0, 4)], LoraSettings(rank=2, dora=True))(weight).equal(weight)


def test_a_missing_block_or_tower_is_refused() -> None:
    with pytest.raises(UserError, match=r"peft\.config\.layers names block 2"):
        Lora(LoraSettings(layers=(1, 2))).attach(build_tiny_clip())
    deeper = build_tiny_clip()
    deeper.transformer.resblocks.append(build_tiny_clip().transformer.resblocks[0])
    Lora(LoraSettings(layers=(2,))).attach(deeper)  # which one of the towers has
    assert not any(isinstance(module, LowRank) for module in deeper.visual.modules())
    resnet = open_clip.create_model("RN50", load_weights=False)
    with pytest.raises(UserError, match=r"(?s)peft lora: .*peft\.config\.towers to text"):
        Lora(LoraSettings()).attach(resnet)
    Lora(LoraSettings(towers="text")).attach(resnet)
    assert any(isinstance(module, LowRank) for module in resnet.transformer.modules())
    with pytest.raises(ValidationError, match="targets"):
        LoraSettings(targets=("query",))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "batch_size": 2},
        {"peft": {"method": "lora", "config": {"rank": 2, "dora": True, "dropout": 0.1}}},
        {"policy_backbone": "frozen_clip"},
        {"policy_backbone": "clip"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_it_trains(settings: Project, project: Project, tmp_path: Path) -> None:
    result = fit(load_config(None, {**project, **LORA, "output_dir": str(tmp_path), **settings}))
    assert result.folder is not None
    state = load_file(result.folder / "best.safetensors")
    assert not any("parametrizations" in name for name in state)
    pretrained = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    moved = [name for name, tensor in pretrained.items() if not torch.equal(tensor, state[f"clip.{name}"])]
    assert len(moved) == 2 * 2 * 4 and all("resblocks" in name and name.endswith("weight") for name in moved)


def test_checkpointed_gradients_are_the_same(project: Project, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        given = {**project, **LORA, "output_dir": str(tmp_path), "gradient_checkpointing": checkpointing}
        folder = fit(load_config(None, given)).folder
        assert folder is not None
        states.append(load_file(folder / "best.safetensors"))
    torch.testing.assert_close(*states)


def _fit(settings: Project) -> None:
    fit(load_config(None, settings))


def test_two_processes_learn_what_one_does(project: Project, tmp_path: Path) -> None:
    given = {**project, **LORA, "learning_rate": 1e-4}
    assert spread(_fit, 2, tmp_path / "log", {**given, "output_dir": str(tmp_path / "two")}) == [0, 0]
    _fit({**given, "output_dir": str(tmp_path / "one")})
    one, two = (load_file(next((tmp_path / name / "tiny").iterdir()) / "best.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    output = tmp_path_factory.mktemp("lora")
    assert main(["train", *flags({**project, **LORA, "output_dir": str(output)})]) == 0
    return next((output / "tiny").iterdir())


def flags(settings: Project) -> Iterator[str]:
    for name, value in settings.items():
        if name == "peft":
            yield from ("--peft.method", value["method"], "--peft.config", json.dumps(value["config"]))
        else:
            yield from (f"--{name}", value if isinstance(value, str) else json.dumps(value))


def test_the_command_that_a_run_prints_evaluates_it(
    run: Path, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = re.search(
        r"python train\.py (--config .*best\.safetensors) --test_annot", (run / "train.log").read_text()
    )
    assert printed is not None
    words = [*printed[1].split(), "--test_annot", str(project["test_annot"]), "--no_output"]
    assert main(["train", *words]) == 0
    figures = json.loads((run / "metrics.json").read_text())["finetuned"]["t2v"]
    assert f"best.safetensors  {figures['R@1']:7.1f}" in capsys.readouterr().out


def test_evaluate_tells_the_same_figures_and_what_learned(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.json"
    for given in (run, run / "best.safetensors", run / "adapter.safetensors"):
        assert main(["evaluate", str(given), "--annot", str(project["test_annot"]), "--json", str(table)]) == 0
        row = json.loads(table.read_text())["rows"][-1]
        noted = json.loads((run / "metrics.json").read_text())
        assert row["t2v"]["MeanR"] == noted["finetuned"]["t2v"]["MeanR"]
        learned = noted["parameters"]["clip"]
        assert row["cost"]["percent_of_clip"] == pytest.approx(100 * learned["trainable"] / learned["total"])
    capsys.readouterr()


def test_its_videos_are_indexed_and_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_video(tmp_path / "videos" / f"v{number}.mp4", 20 + 10 * number)
    assert main(["index", str(run), str(tmp_path / "videos"), "-o", str(tmp_path / "i"), "--num_workers", "0"]) == 0
    assert main(["search", str(tmp_path / "i"), "a red thing", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    index, model = VideoIndex.load(tmp_path / "i"), load_retriever(run / "adapter.safetensors")
    hits = index.search(model.encode_text(["a red thing"]), 2)[0]
    assert [hit["id"] for hit in found["hits"]] == [hit.video.id for hit in hits]


def test_adapter_and_merged_weights_are_one_model(run: Path) -> None:
    one, other = load_retriever(run), load_retriever(run / "adapter.safetensors")
    words = ["a red thing", "it is blue"]
    torch.testing.assert_close(one.encode_text(words), other.encode_text(words), rtol=0, atol=1e-5)
    with safe_open(run / "adapter.safetensors", "pt") as file:
        names = set(file.keys())
    inside = {name for name in names if name.startswith("clip.")}
    assert inside and all(".parametrizations." in name and re.search(r"\.(up|down)\.\d$", name) for name in inside)
    assert (run / "adapter.safetensors").stat().st_size < (run / "best.safetensors").stat().st_size / 5


@pytest.mark.parametrize("form", ["open_clip", "huggingface"])
def test_exported_it_loads_elsewhere_with_the_same_vectors(
    form: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["export", str(run), "--format", form, "-o", str(tmp_path / "out")]) == 0
    clip = load_retriever(run).model.clip
    with torch.no_grad():
        expected = clip.encode_image(PIXELS)
        if form == "open_clip":
            module, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
            found = module.eval().encode_image(PIXELS)
        else:
            theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
            found = theirs.visual_projection(theirs.vision_model(PIXELS).pooler_output)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_killed_run_resumes_bit_for_bit(project: Project, tmp_path: Path) -> None:
    given = {**project, **LORA, "peft": {"method": "lora", "config": {"rank": 2, "dropout": 0.2}}}
    states = []
    for name in ("whole", "killed"):
        settings = {**given, "output_dir": str(tmp_path / name), "save_every_steps": 1}
        if name == "killed":
            assert killed.run(settings, tmp_path / "log", "update", 4) == -signal.SIGKILL
            settings = {"resume": str(next((tmp_path / name / "tiny").iterdir()))}
        assert killed.run(settings, tmp_path / "log") == 0, (tmp_path / "log").read_text()
        folder = next((tmp_path / name / "tiny").iterdir())
        states.append(load_file(folder / "best.safetensors") | load_file(folder / "adapter.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_an_adapter_may_lack_the_frozen_copy_of_the_tower(project: Project, tmp_path: Path) -> None:
    given = {**project, "policy_backbone": "frozen_clip", "num_epochs": 1, "output_dir": str(tmp_path / "out")}
    folder = fit(load_config(None, given)).folder
    assert folder is not None
    load_retriever(folder / "adapter.safetensors")
    state = load_file(folder / "best.safetensors")
    with safe_open(folder / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    whole = {name: tensor for name, tensor in state.items() if not name.startswith("selector.backbone.")}
    assert len(whole) < len(state)
    save_file(whole, tmp_path / "best.safetensors", metadata)
    with pytest.raises(UserError, match=r"missing: selector\.backbone\."):
        load_retriever(tmp_path / "best.safetensors")


def test_a_new_run_begins_with_merged_weights_or_an_adapter(run: Path, project: Project, tmp_path: Path) -> None:
    for number, method in enumerate(("lora", "bitfit")):
        given = {**project, "peft": {"method": method}, "num_epochs": 1, "output_dir": str(tmp_path / str(number))}
        given |= {"resume": str(run / ("best.safetensors", "adapter.safetensors")[number]), "learning_rate": 1e-9}
        folder = fit(load_config(None, given)).folder
        assert folder is not None
        torch.testing.assert_close(
            load_file(folder / "best.safetensors"), load_file(run / "best.safetensors"), rtol=1e-3, atol=1e-4
        )


def test_its_rank_can_be_tuned(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {
        "n_trials": 2,
        "storage": f"sqlite:///{tmp_path}/o.db",
        "sampler": {"name": "GridSampler"},
        "opt_params": {"peft.config.rank": {"choices": [1, 2]}},
    }
    given = {**project, **LORA, "num_epochs": 1, "output_dir": str(tmp_path / "out"), "optuna_cfg": search}
    (tmp_path / "c.json").write_text(json.dumps(given))
    assert main(["train", "--config", str(tmp_path / "c.json")]) == 0
    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/o.db").trials
    assert sorted(trial.params["peft.config.rank"] for trial in trials) == [1, 2]
    learned = {trial.params["peft.config.rank"]: trial.user_attrs["trainable_parameters"] for trial in trials}
    # One rank is (64 + 64) for each of q, k, v, out and (64 + 256) for each of fc, proj: in 2 blocks of 2 towers.
    assert learned[2] - learned[1] == 4 * (4 * 128 + 2 * 320)
