"""Evaluations in which the model adapts to each query by the reward of other CLIPs."""

import json
from pathlib import Path
from typing import Any

import pytest
from comparing import evaluated as evaluated_by_command
from comparing import figures, trained_run
from conftest import write_clip_folder
from evaluating import evaluated, killed, outcome, together

from adaclip_finetune.cli import main

Project = dict[str, Any]


@pytest.fixture
def small(project: Project, tmp_path: Path) -> Project:
    """Eight videos in four batches, sixteen texts, and another CLIP that rewards."""
    write_clip_folder(tmp_path / "reward", seed=1)
    settings = {"do_inference": True, "val_batch_size": 2, "concat_captions": "indep-all"}
    return {**project, **settings, "adaptation": by_reward(tmp_path)}


def by_reward(folder: Path, **settings: Any) -> Project:
    """Return the section `adaptation` for the CLIP in `folder`, with steps that change ranks."""
    own = {"reward": [str(folder / "reward"), "self"], "directions": "both", "learning_rate": 0.1, "steps": 2}
    own |= {"candidates": 4, "caption_candidates": 6, "learns": {"method": "bitfit"}}
    return {"method": "clip_reward", "config": {**own, **settings}}


def ranks(found: Project, direction: str) -> list[int]:
    ranks: list[int] = found["figures"]["metrics"][direction]
    return ranks


@pytest.mark.parametrize("changed", [{}, {"policy_backbone": "clip"}, {"frame_agg": "qscore"}], ids=str)
def test_only_the_asked_direction_is_adapted(changed: Project, small: Project, tmp_path: Path) -> None:
    small |= changed
    plain = evaluated({**small, "adaptation": {"method": "none"}})
    for directions in ("t2v", "v2t", "both"):
        found = evaluated({**small, "adaptation": by_reward(tmp_path, directions=directions)})
        for direction in ("t2v", "v2t"):
            is_adapted = directions in (direction, "both")
            assert (ranks(found, direction) != ranks(plain, direction)) == is_adapted, (directions, direction)
        assert (found["matrix"] != plain["matrix"]) == (directions != "v2t")
        found = evaluated({**small, "adaptation": by_reward(tmp_path, directions=directions, steps=0)})
        assert found["figures"] == plain["figures"]


def test_batches_and_interruptions_change_nothing(small: Project, tmp_path: Path) -> None:
    expected, keep = evaluated(small), tmp_path / "embeddings"
    assert evaluated({**small, "val_batch_size": 500})["figures"] == expected["figures"]
    killed(small, keep, 40, tmp_path / "log")
    assert evaluated(small, keep) == expected
    assert evaluated({**small, "adaptation": by_reward(tmp_path, steps=1)}, keep) != expected


def evaluations(small: Project, folder: Path) -> Project:
    """What the test below compares between one process and two together."""
    with_momentum = {**small, "adaptation": by_reward(folder, momentum=0.9)}
    return {"plain": evaluated(small), "momentum": outcome(lambda: evaluated(with_momentum))}


def test_two_processes_find_what_one_finds(small: Project, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(evaluations(small, tmp_path)))
    main, other = together(2, evaluations, small, tmp_path, folder=tmp_path / "two")
    assert main["plain"] == alone["plain"] and other["plain"]["figures"] == alone["plain"]["figures"]
    for found in (main, other):
        assert "momentum" in found["momentum"]["UserError"]
    assert "figures" in alone["momentum"]


def test_a_reward_that_is_not_there_is_named(small: Project, tmp_path: Path) -> None:
    missing = {**small, "adaptation": by_reward(tmp_path / "nowhere")}
    told = outcome(lambda: evaluated(missing))["UserError"]
    assert "adaptation.config.reward" in told and "nowhere" in told


# ---- adaclip evaluate ----


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(project, tmp_path_factory.mktemp("adapted") / "work", concat_captions="indep-all")


ADAPT = ("--adapt", "clip_reward", "--adaptation.config.learns.method", "bitfit", "--adaptation.config.steps", "1")


def test_the_baselines_stand_beside_an_adapted_model(run: Path, project: Project, tmp_path: Path) -> None:
    words = [run, "--annot", project["test_annot"], *ADAPT, "--reward", project["clip_weights"]]
    table = evaluated_by_command(*words, "--adaptation.config.learning_rate", "0.1", folder=tmp_path)
    zero_shot, model, alone, _, _, itself, adapted = rows = table["rows"]
    assert [row["kind"] for row in rows] == ["zero-shot", "model", *["baseline"] * 4, "adapted"]
    assert figures(model) == figures(json.loads((run / "metrics.json").read_text())["finetuned"])
    assert all(row["v2t"] is None and row["t2v"]["R@1 95%"] for row in rows[2:])
    # This CLIP is the one that the run started from.
    assert alone["t2v"] == {name: zero_shot["t2v"][name] for name in alone["t2v"]}
    assert itself["t2v"]["MeanR"] != model["t2v"]["MeanR"] != adapted["t2v"]["MeanR"]
    assert itself["cost"]["t2v_query_seconds"] > 0 and adapted["cost"]["t2v_query_seconds"] > 0
    assert "adapted to each query" in adapted["note"]
    pairs = {(pair["label"], pair["minus"]) for pair in table["differences_in_R@1"]}
    above = [row["label"] for row in rows[:-1]]
    assert pairs >= {(adapted["label"], label) for label in above} | {(label, above[1]) for label in above[2:]}


def test_inference_of_a_run_adapts_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = tmp_path / "adaptation.json"
    own = {"reward": ["self"], "learns": {"method": "bitfit"}, "steps": 1, "learning_rate": 0.1}
    section.write_text(json.dumps({"method": "clip_reward", "config": own}))
    words = ["--do_inference", "--resume", f"{run}/best.safetensors", "--output_dir", f"{tmp_path}/out"]
    assert main(["train", "--config", f"{run}/config.json", *words, "--adaptation", str(section)]) == 0
    assert "T2V adapted to each query by clip_reward" in capsys.readouterr().out
    (folder,) = (tmp_path / "out" / "tiny").iterdir()
    found, plain = (json.loads((one / "metrics.json").read_text()) for one in (folder, run))
    assert found["zero-shot"]["t2v"] == plain["zero_shot"]["t2v"], "zero-shot stays without adaptation"
    adapted = found["best.safetensors"]
    assert adapted["t2v"] != plain["finetuned"]["t2v"] and adapted["v2t"] == plain["finetuned"]["v2t"]


def test_a_model_is_not_reranked_by_its_own_scores(run: Path, project: Project, tmp_path: Path) -> None:
    words = [
        run,
        "--annot",
        project["test_annot"],
        *ADAPT,
        "--reward",
        "self",
        "--adaptation.config.directions",
        "both",
    ]
    _, model, *baselines, adapted = evaluated_by_command(*words, folder=tmp_path)["rows"]
    assert len(baselines) == 3 and adapted["v2t"] is not None
    for row in baselines:
        for direction in ("t2v", "v2t"):
            assert row[direction] == {name: model[direction][name] for name in row[direction]}, row["label"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((*ADAPT, "--reward", "self", "--rerank", "dual_softmax"), "weights of its own"),
        ((*ADAPT, "--reward", "self", "--interpolate", "0.5"), "--interpolate"),
        (ADAPT, "--reward"),
        (("--reward", "self"), "--adapt"),
        (("--adaptation.config.steps", "1"), "--adapt"),
        ((*ADAPT, "--reward", "nowhere"), "nowhere"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: tuple[str, ...], named: str, run: Path, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--annot", str(project["test_annot"]), *words]) == 2
    captured = capsys.readouterr()
    assert named in captured.err and "Traceback" not in captured.err and not captured.out
    assert f"{run.name} on" not in captured.err, "nothing was measured"


def test_inference_refuses_a_misspelt_reward_before_it_measures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = tmp_path / "adaptation.json"
    section.write_text(json.dumps({"method": "clip_reward", "config": {"reward": ["nowhere"]}}))
    words = ["--do_inference", "--resume", f"{run}/best.safetensors", "--no_output", "--adaptation", str(section)]
    assert main(["train", "--config", f"{run}/config.json", *words]) == 2
    captured = capsys.readouterr()
    assert "adaptation.config.reward" in captured.err and "zero-shot" not in captured.out
