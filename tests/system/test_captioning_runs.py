"""Whole runs of `objective: captioning` and `task: captioning`: what learns, what is kept, resumed and evaluated."""

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from comparing import evaluated, trained_run
from evaluating import report_of, together
from golden import load_golden
from safetensors.torch import load_file
from speaking import write_language_model

from adaclip_finetune.cli import main
from adaclip_finetune.config import load_config
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation.clip_reward import policy_gradient_loss
from adaclip_finetune.model.language_model import Tokens, token_losses
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.measure import build_task
from adaclip_finetune.training.memory import StepCost, try_steps
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]
FIGURES = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "CLIPScore", "RefCLIPScore")


@pytest.fixture(scope="module")
def speaking(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return the settings of `project` with a captioner, whose language model has read the captions of training."""
    annotation = json.loads(Path(project["train_annot"]).read_text())
    texts = [text for entry in annotation.values() for text in entry["sentences"]]
    language_model = write_language_model(tmp_path_factory.mktemp("speaking") / "language_model", texts)
    config = {"language_model": str(language_model), "prefix_length": 3, "max_tokens": 24}
    return {
        **project,
        "concat_captions": "indep-one",
        "captioner": {"method": "mlp", "config": config},
        "objective": {"method": "captioning"},
        "task": {"method": "captioning", "config": {"beams": 2}},
        "optim": "adamw",
        "learning_rate": 3e-3,
        "no_warmup": True,
        "val_batch_size": 3,
    }


def with_captioner(settings: Project, **changed: Any) -> Project:
    captioner = settings["captioner"]
    return {**settings, "captioner": {**captioner, "config": {**captioner["config"], **changed}}}


def noted(run: Path, name: str = "metrics.json") -> Any:
    return json.loads((run / name).read_text())


@pytest.fixture(scope="module")
def run(speaking: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retriever that was trained for an epoch, and on it a captioner that learned to tell colours."""
    folder = tmp_path_factory.mktemp("captioned")
    retrieval = {name: value for name, value in speaking.items() if name not in ("captioner", "objective", "task")}
    first = trained_run(retrieval, folder / "retrieval", num_epochs=1)
    more = {
        "resume": str(first / "best.safetensors"),
        "num_epochs": 60,
        "learning_rate": 0.03,
        "output_dir": str(folder / "out"),
    }
    (folder / "settings.json").write_text(json.dumps({**speaking, **more}))
    assert main(["train", "--config", str(folder / "settings.json")]) == 0
    (found,) = (folder / "out/tiny").iterdir()
    return found


def test_only_the_captioner_learns_and_the_best_epoch_is_chosen_by_cider(run: Path) -> None:
    before = load_file(next(run.parents[2].glob("retrieval/output/tiny/*/best.safetensors")))
    after = load_file(run / "best.safetensors")
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == {"mapper", "digest"}

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_epoch = [line["metrics"]["CIDEr"] for line in lines if line["event"] == "validation"]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert losses[-1] < losses[0] and max(by_epoch) > by_epoch[0]
    found = noted(run)
    assert found["best_epoch"] == 1 + by_epoch.index(max(by_epoch)) and found["zero_shot"] is None
    assert set(found["finetuned"]) == {*FIGURES, "videos_evaluated", "videos_listed"}
    assert found["parameters"]["clip"]["trainable"] == 0


def test_captions_are_written_beside_their_references(run: Path, project: Project) -> None:
    rows = noted(run, "captions.json")
    annotation = json.loads(Path(project["test_annot"]).read_text())
    assert {row["video"]: row["references"] for row in rows} == {
        name: entry["sentences"] for name, entry in annotation.items()
    }
    assert len({row["caption"] for row in rows}) > 1, "every video has the same caption"
    log = (run / "train.log").read_text()
    assert f"{rows[0]['video']}: {rows[0]['caption']}" in log and "8 videos, 16 references; 2 beams" in log


def test_evaluate_finds_the_figures_of_the_run_and_the_model_still_searches(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = evaluated(run, "--annot", project["test_annot"], folder=tmp_path)
    (row,) = table["rows"]
    assert {name: row[name] for name in FIGURES} == {name: noted(run)["finetuned"][name] for name in FIGURES}
    assert "CIDEr" in capsys.readouterr().out
    wider = ["--task.config.beams", "4", "--task.config.scorer", str(run.parents[2] / "retrieval/output/tiny")]
    wider[-1] = str(next(Path(wider[-1]).iterdir()))
    (other,) = evaluated(run, "--annot", project["test_annot"], *wider, folder=tmp_path)["rows"]
    assert all(math.isfinite(other[name]) for name in FIGURES)
    of_retrieval = noted(next(run.parents[2].glob("retrieval/output/tiny/*")))["finetuned"]["t2v"]["MeanR"]
    (_, ranked) = evaluated(run, "--annot", project["test_annot"], "--task.method", "retrieval", folder=tmp_path)[
        "rows"
    ]
    assert ranked["t2v"]["MeanR"] == of_retrieval


def test_another_model_gives_the_clip_scores_of_the_model_itself_if_it_is_the_same(
    run: Path, project: Project, tmp_path: Path
) -> None:
    more = ["--task.config.scorer", str(run)]
    (row,) = evaluated(run, "--annot", project["test_annot"], *more, folder=tmp_path)["rows"]
    own = noted(run)["finetuned"]
    assert [row[name] for name in FIGURES] == pytest.approx([own[name] for name in FIGURES], abs=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"grad_cache_chunk": 2, "ema_decay": 0.5},
        {"objective": {"method": "captioning", "config": {"learn_from": "texts"}}, "concat_captions": "indep-all"},
    ],
    ids=["videos part by part", "texts"],
)
def test_a_killed_run_resumes_bit_for_bit(more: Project, speaking: Project, tmp_path: Path) -> None:
    transformer = {"layers": 1, "heads": 4, "vector_tokens": 2, "prefix": "video" if "objective" in more else "frames"}
    given = with_captioner(speaking, **transformer)
    given["captioner"]["method"] = "transformer"
    one, other = killed.whole_and_resumed({**given, **more}, tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("captioner.mapper" in name for name in one) and not any("embed_tokens" in name for name in one)


def test_texts_alone_need_no_videos(speaking: Project, tmp_path: Path) -> None:
    annotation = json.loads(Path(speaking["train_annot"]).read_text())
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({f"nowhere{number}": entry for number, entry in enumerate(annotation.values())}))
    texts = {"method": "captioning", "config": {"learn_from": "texts", "noise_variance": 0.01}}
    given = {**speaking, "train_annot": str(path), "output_dir": str(tmp_path), "num_epochs": 1}
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({**given, "objective": texts}))
    assert main(["check", "--config", str(settings), "--json"]) == 0
    folder = fit(load_config(settings)).folder
    assert folder is not None and not (folder / "missing_videos.txt").exists()
    with pytest.raises(UserError, match="none of its videos can be read"):
        fit(load_config(None, given))


def as_json(config: Any, keep: Path | None = None) -> dict[str, Any]:
    report = report_of(config, keep)
    return {"figures": report.figures.as_state(), "rows": report.rows()}


@pytest.mark.parametrize("prefix", ["video", "frames"])
def test_processes_batches_and_kept_parts_change_nothing(prefix: str, speaking: Project, tmp_path: Path) -> None:
    config = load_config(None, with_captioner(speaking, prefix=prefix))
    expected = as_json(config)
    assert together(2, as_json, config, folder=tmp_path / "two") == [expected] * 2
    assert as_json(config, tmp_path / "keep") == as_json(config, tmp_path / "keep") == expected
    assert len(list((tmp_path / "keep/captions").glob("captions-*"))) == -(-8 // 3)


def test_a_dry_run_and_a_check_count_what_learns(
    speaking: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**speaking, "output_dir": str(tmp_path / "out")}))
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    mapper = 64 * 48 + 48 + 48 * 96 + 96
    assert f"{mapper:,}" in capsys.readouterr().out
    assert main(["check", "--config", str(path), "--json"]) == 0
    assert not (tmp_path / "out").exists()


def test_a_step_costs_memory_in_proportion_to_its_batch(speaking: Project) -> None:
    config = load_config(None, speaking)
    accelerator = make_accelerator(config)
    session = open_model(config, accelerator=accelerator)
    given = (config, session.objective, session.loaded.tokenize, accelerator)
    four, eight = (try_steps(*given, size) for size in (4, 8))
    assert isinstance(four, StepCost) and isinstance(eight, StepCost)
    assert 1.8 * four.kept_bytes < eight.kept_bytes < 2.2 * four.kept_bytes  # without the frozen weights


def test_a_captioner_that_has_not_learned_is_not_evaluated(speaking: Project, run: Path) -> None:
    retrieval = next(run.parents[2].glob("retrieval/output/tiny/*/best.safetensors"))
    config = load_config(None, {**speaking, "resume": str(retrieval)})
    with pytest.raises(UserError, match="missing: captioner"):
        open_model(config, learn=False)
    open_model(config)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"captioner": None}, "captioner.method"),
        ({"concat_captions": "concat"}, "indep-one"),
        ({"objective": None}, "objective captioning only"),
        ({"peft": {"method": "lisa"}}, "peft.method lisa"),
        ({"peft": [{"method": "bitfit"}, {"method": "adabn"}], "policy_backbone": "resnet50"}, "peft.method adabn"),
        ({"frame_agg": "qscore"}, "qscore"),
        ({"do_inference": True}, "resume"),
        ({"adaptation": {"method": "clip_reward"}}, "not for training"),
        ({"adaptation": {"method": "clip_reward", "config": {"loss": "distillation"}}}, "loss distillation"),
        ({"objective": {"method": "captioning", "config": {"learn_from": "texts"}}}, "prefix is frames"),
    ],
)
def test_impossible_combinations_are_refused(speaking: Project, changed: Project, told: str) -> None:
    given = with_captioner(speaking, prefix="frames")
    with pytest.raises(UserError, match=told):
        load_config(None, {**given, **changed})


def test_a_scorer_that_is_no_model_is_refused(speaking: Project, tmp_path: Path) -> None:
    task = {"method": "captioning", "config": {"scorer": str(tmp_path)}}
    with pytest.raises(UserError, match=r"task\.config\.scorer"):
        as_json(load_config(None, {**speaking, "task": task}))


# ---- adapted to each video ----


def adapted(speaking: Project, run: Path, **config: Any) -> Any:
    """Return the report of the run's captioner on the test split, adapted to each video, and the model."""
    settings = {"reward": ["self"], "caption_candidates": 4, "steps": 3, "learning_rate": 0.3, **config}
    more = {"do_inference": True, "resume": str(run / "best.safetensors")}
    config = load_config(None, {**speaking, **more, "adaptation": {"method": "clip_reward", "config": settings}})
    session = open_model(config, learn=False)
    split = evaluation_split(config, str(config.test_annot))
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    with closing(build_task(config, split, session.loaded, session.model, "test")) as task:
        report: Any = task(session.model)
    after = session.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.grad is not None for parameter in session.model.parameters())
    return report


def test_an_adapted_captioner_is_put_back_and_shown_beside_what_needs_no_step(run: Path, speaking: Project) -> None:
    plain = noted(run)["finetuned"]
    without = adapted(speaking, run, steps=0)
    assert [row["caption"] for row in without.rows()] == [row["caption"] for row in noted(run, "captions.json")]
    with_steps = adapted(speaking, run)
    assert [row["caption"] for row in with_steps.rows()] != [row["caption"] for row in without.rows()]
    for report in (without, with_steps):
        as_it_is, preferred = report.as_dict()["baselines"].values()
        assert {name: as_it_is[name] for name in FIGURES} == {name: plain[name] for name in FIGURES}
        assert set(FIGURES) <= preferred.keys()


def test_evaluate_shows_an_adapted_captioner_beside_its_baselines(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--adaptation.config.caption_candidates", "3", "--adaptation.config.steps", "1"]
    words = ["--adapt", "clip_reward", "--reward", str(project["clip_weights"]), *settings]
    rows = evaluated(run, "--annot", project["test_annot"], *words, folder=tmp_path)["rows"]
    assert [row["kind"] for row in rows] == ["model", "baseline", "baseline", "adapted"]
    assert all(math.isfinite(row[name]) for row in rows for name in FIGURES)
    assert "preferred by the reward" in capsys.readouterr().out


def test_another_clip_rewards_and_the_loss_is_the_published_one(run: Path, speaking: Project) -> None:
    report = adapted(speaking, run, reward=[str(speaking["clip_weights"]), "self"], weights=[0.5, 0.5], steps=1)
    assert len(report.captions) == 8

    for case in load_golden("captioning")["token_losses"]:
        logits = case["logits"].clone().requires_grad_()
        ids, before = case["tokens"], case["prefix_length"] - 1
        losses = token_losses(logits[:, before:-1], Tokens(ids, ids != 0))  # as published, pads count
        scores = case["reward"][None]
        loss = policy_gradient_loss(-losses.mean(dim=1)[None], scores, len(ids))
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, case["grad"], atol=1e-12, rtol=0)
