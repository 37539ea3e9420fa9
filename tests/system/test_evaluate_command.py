"""`adaclip evaluate`: figures are those of the run, whichever way the checkpoint is given; what is beside them is
true."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import Project, evaluated, figures, trained_run
from conftest import write_clip_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaclip_finetune.cli import main
from adaclip_finetune.commands.evaluate import read_shares
from adaclip_finetune.compare.interpolate import SharePoint, best_point, mixed
from adaclip_finetune.compare.seen_data import overlap_of_files
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.metrics import DirectionMetrics, Metrics


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(project, tmp_path_factory.mktemp("evaluate") / "work", concat_captions="indep-all")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def refuse(*words: object) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and captured.out == ""
        return captured.err

    return refuse


def matrix_of(run: Path) -> Path:
    return run.parents[2] / "test.npy"


def test_figures_are_those_of_the_run_and_zero_shot_comes_first(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = evaluated(run, "--annot", project["test_annot"], folder=tmp_path)
    noted = json.loads((run / "metrics.json").read_text())
    baseline, model = table["rows"]
    assert (baseline["kind"], model["kind"]) == ("zero-shot", "model")
    assert figures(baseline) == noted["zero_shot"] and figures(model) == noted["finetuned"]
    clip, everything = noted["parameters"]["clip"], noted["parameters"].values()
    assert model["cost"]["percent_of_clip"] == pytest.approx(100 * clip["trainable"] / clip["total"])
    learned, total = (sum(part[key] for part in everything) for key in ("trainable", "total"))
    assert model["cost"]["percent_of_all"] == pytest.approx(100 * learned / total)
    assert model["cost"]["gflops"] == pytest.approx(noted["gflops"]["video"])
    assert baseline["cost"]["percent_of_all"] == 0 and model["cost"]["videos_per_second"] > 0
    low, high = model["t2v"]["R@5 95%"]
    assert low <= model["t2v"]["R@5"] <= high and low < high
    ids = json.loads(matrix_of(run).with_suffix(".json").read_text())
    matrix, videos = np.load(matrix_of(run)), np.array(ids["video_of_query"])
    ranks = (matrix >= matrix[np.arange(len(matrix)), videos][:, None]).sum(axis=1)
    assert model["t2v"]["MeanR 95%"] == list(intervals(ranks, videos)["MeanR"]) != list(intervals(ranks)["MeanR"])
    printed = capsys.readouterr().out
    assert printed.index("zero-shot, 2 frames") < printed.index(run.name)
    assert f"R@1 of {run.name} minus zero-shot, 2 frames: T2V" in printed


def test_a_run_its_weights_and_its_adapter_are_the_same_in_one_table_of_several_data_sets(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [run, run / "best.safetensors", run / "adapter.safetensors"]
    annotations = ["--annot", project["test_annot"], "--annot", project["val_annot"]]
    markdown = tmp_path / "found.md"
    found = evaluated(*given, *annotations, "--markdown", markdown, folder=tmp_path)
    data_sets = [project["test_annot"], project["val_annot"]]
    assert [row["annotation"] for row in found["rows"]] == [name for name in data_sets for _ in range(4)]
    for name in data_sets:
        baseline, *models = [row for row in found["rows"] if row["annotation"] == name]
        assert [row["kind"] for row in (baseline, *models)] == ["zero-shot", "model", "model", "model"]
        assert len({json.dumps(figures(row)) for row in models}) == 1
        assert len({json.dumps(row["cost"] | {"videos_per_second": 0}) for row in models}) == 1
        of_name = [pair for pair in found["differences_in_R@1"] if pair["annotation"] == name]
        pairs = {(pair["label"], pair["minus"]): pair for pair in of_name}
        labels = [row["label"] for row in models]
        assert labels[1:] == [f"{run.name}/best.safetensors", f"{run.name}/adapter.safetensors"]
        assert set(pairs) == {(label, baseline["label"]) for label in labels} | {
            (labels[1], labels[0]), (labels[2], labels[0]), (labels[2], labels[1]),
        }  # fmt: skip
        same = pairs[labels[1], labels[0]]["t2v"]
        assert (same["points"], same["p"]) == (0, 1)
        won = pairs[labels[0], baseline["label"]]["t2v"]
        points = models[0]["t2v"]["R@1"] - baseline["t2v"]["R@1"]
        assert won["points"] == pytest.approx(points) and won["interval"][0] <= points <= won["interval"][1]
    # Test and validation share video4 and video5, and what is said of a colour.
    learned, part = "it learned from these very captions", "2 of these 8 videos and 10 of these 16 captions"
    assert {row["note"] for row in found["rows"][1:4]} == {f"{learned}; its epoch was chosen on {part}"}
    assert {row["note"] for row in found["rows"][5:]} == {f"{learned}; its epoch was chosen on these very captions"}
    printed, lines = capsys.readouterr().out, markdown.read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in cells] == ["data set", "---", *(row["annotation"] for row in found["rows"])]
    assert [row[1] for row in cells[2:]] == [row["label"] for row in found["rows"]]
    assert len({len(row) for row in cells}) == 1 and sum(line.startswith("#") for line in lines) == 1
    # On the terminal it is one table too: one head, and columns that end at the same place in all rows.
    assert printed.count("text → video") == printed.count("learned of CLIP") == printed.count("95 %: bootstrap") == 1
    table = printed[: printed.index("learned of CLIP")].splitlines()
    for name in data_sets:
        (place,) = [number for number, line in enumerate(table) if re.match(rf"{name}: \d+ captions, \d videos$", line)]
        assert [line.split("  ")[0] for line in table[place + 1 : place + 5]] == [
            row["label"] for row in found["rows"] if row["annotation"] == name
        ]
    assert len({len(line) for line in table if " [" in line}) == 1
    assert "not corrected for how many they are" in printed


def test_a_published_checkpoint_takes_its_settings_from_a_file(
    run: Path, project: Project, tmp_path: Path, refused: Any
) -> None:
    published = tmp_path / "adaclip.pth"
    assert main(["export", str(run), "--format", "published", "-o", str(published)]) == 0
    settings = run.parents[2] / "settings.json"
    words = [published, "--config", settings, "--annot", project["test_annot"]]
    table = evaluated(*words, folder=tmp_path)
    assert figures(table["rows"][1]) == json.loads((run / "metrics.json").read_text())["finetuned"]
    (tmp_path / "other.json").write_text(json.dumps({**project, "hidden_dim": 128}))
    told = refused(published, "--config", tmp_path / "other.json", "--annot", project["test_annot"])
    assert "hidden_dim is 128, there 64" in told and "--config FILE" in told


@pytest.mark.parametrize("noted", ["[]", "{", '{"parameters": 3}', '{"parameters": {"clip": {"trainable": 1}}}', None])
@pytest.mark.parametrize("told_by_the_weights", [True, False])
def test_what_ibs_selected_is_known_from_its_weights_or_its_folder(
    noted: str | None, told_by_the_weights: bool, run: Path, project: Project, tmp_path: Path
) -> None:
    settings = json.loads((run / "config.json").read_text())
    selected = {"method": "ibs", "config": {"num_pre_epochs": 1}}
    other = tmp_path / "run"
    other.mkdir()
    with safe_open(run / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    if not told_by_the_weights:
        del metadata["parameters"]
    save_file(load_file(run / "best.safetensors"), other / "best.safetensors", metadata)
    (other / "config.json").write_text(json.dumps({**settings, "peft": selected}))
    if noted is None:
        shutil.copy(run / "metrics.json", other)
    else:
        (other / "metrics.json").write_text(noted)
    table = evaluated(other, "--annot", project["val_annot"], folder=tmp_path)
    cost = table["rows"][1]["cost"]
    known = noted is None or told_by_the_weights
    assert (cost["percent_of_clip"] is not None) == (cost["percent_of_all"] is not None) == known
    if known:
        clip = json.loads((run / "metrics.json").read_text())["parameters"]["clip"]
        assert cost["percent_of_clip"] == pytest.approx(100 * clip["trainable"] / clip["total"])


def test_data_that_moved_is_found_by_a_flag(run: Path, project: Project, tmp_path: Path, refused: Any) -> None:
    settings = json.loads((run / "config.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(run / "best.safetensors", moved)
    (moved / "config.json").write_text(json.dumps({**settings, "frames_dir": None, "video_dir": "/nowhere/videos"}))
    told = refused(moved, "--annot", project["test_annot"])
    assert (
        "video_dir /nowhere/videos: there is no such folder" in told and "say where they lie here: --frames_dir" in told
    )
    words = [moved, "--annot", project["test_annot"], "--frames_dir", project["frames_dir"], "--val_batch_size", 3]
    assert main(["evaluate", *map(str, words), "--precision", "bf16"]) == 0
    table = evaluated(*words, folder=tmp_path)
    assert figures(table["rows"][1])["t2v"]["R@1"] == pytest.approx(
        json.loads((run / "metrics.json").read_text())["finetuned"]["t2v"]["R@1"]
    )


def test_missing_videos_are_an_error_or_stand_beside_the_figures(
    run: Path, project: Project, tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(project["frames_dir"], frames)
    shutil.rmtree(frames / "video7")
    words = [run, "--annot", project["test_annot"], "--frames_dir", frames]
    assert "video7" in refused(*words)
    table = evaluated(*words, "--skip_missing", folder=tmp_path)
    printed = capsys.readouterr()
    assert "7 videos, 1 of 8 MISSING" in printed.out and "WITHOUT 1 of 8 videos" in printed.err
    for row in table["rows"]:
        assert (row["t2v"]["videos_evaluated"], row["t2v"]["videos_listed"]) == (7, 8)


def test_without_the_old_clip_zero_shot_is_said_to_be_missing(run: Path, project: Project, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "best.safetensors", alone)
    (alone / "config.json").write_text(json.dumps({**settings, "clip_weights": None}))
    table = evaluated(alone, "--annot", project["test_annot"], folder=tmp_path)
    assert [row["kind"] for row in table["rows"]] == ["model"] and not table["differences_in_R@1"]
    assert any("zero-shot of alone is NOT measured" in said["remark"] for said in table["remarks"])


def test_reranking_stands_below_the_model_and_is_marked(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, "--annot", project["test_annot"], "--rerank", "dual_softmax"]
    both = ["--rerank", "qb_norm", "--bank", project["train_annot"]]
    table = evaluated(*words, *both, "--val-annot", project["val_annot"], folder=tmp_path)
    _, model, dual, bank = table["rows"]
    assert (dual["kind"], bank["kind"]) == ("reranked", "reranked")
    assert dual["label"] == f"{run.name} + dual_softmax (transductive)" and "sees all test queries" in dual["note"]
    assert bank["label"] == f"{run.name} + qb_norm (query bank)" and bank["v2t"] is None
    # The bank of this test holds captions of the test too (8 of its videos, 4 colours of the others): that is told.
    assert "bank of 24 training captions, 20 of them also asked here" in bank["note"]
    assert "the best of 10 on" in dual["note"]
    assert not any("+" in found["label"] for found in table["differences_in_R@1"])
    printed = capsys.readouterr().out
    assert printed.index(f"\n{run.name} ") < printed.index("+ dual_softmax (transductive)")
    again = evaluated(*words, folder=tmp_path)
    assert figures(again["rows"][1]) == figures(model)
    assert "temperature 1, fixed in advance" in again["rows"][2]["note"]
    flattered = evaluated(*words, "--val-annot", project["test_annot"], folder=tmp_path)
    assert flattered["rows"][2]["note"].endswith("test.json, which holds these very captions")
    assert dual["note"].endswith("val.json, which holds 2 of these 8 videos and 10 of these 16 captions")


def test_a_saved_matrix_gives_the_same_table(run: Path, project: Project, tmp_path: Path, refused: Any) -> None:
    words = ["--annot", project["test_annot"], "--rerank", "dual_softmax", "--temperature", 0.3]
    of_model = evaluated(run, *words, folder=tmp_path)
    matrix = matrix_of(run)
    other = tmp_path / "other.npy"
    np.save(other, np.load(matrix)[:, ::-1])
    words = ["--similarity", matrix, "--similarity", other, "--ids", matrix.with_suffix(".json")]
    saved = evaluated(*words, "--rerank", "dual_softmax", "--temperature", 0.3, folder=tmp_path)
    assert [row["label"] for row in saved["rows"]] == [
        "test", "test + dual_softmax (transductive)", "other", "other + dual_softmax (transductive)",
    ]  # fmt: skip
    assert figures(saved["rows"][0]) == figures(of_model["rows"][1])
    assert saved["rows"][0]["t2v"]["R@1 95%"] == of_model["rows"][1]["t2v"]["R@1 95%"]
    assert figures(saved["rows"][1]) == figures(of_model["rows"][2])
    (pair,) = saved["differences_in_R@1"]
    assert (pair["label"], pair["minus"]) == ("other", "test")

    assert any("zero-shot is NOT in this table" in said["remark"] for said in saved["remarks"])
    with_baseline = evaluated(*words, "--zero-shot", other, folder=tmp_path)
    assert [(row["label"], row["kind"]) for row in with_baseline["rows"]] == [
        ("zero-shot (other)", "zero-shot"), ("test", "model"), ("other", "model"),
    ]  # fmt: skip
    pairs = {(pair["label"], pair["minus"]): pair["t2v"] for pair in with_baseline["differences_in_R@1"]}
    assert set(pairs) == {("test", "zero-shot (other)"), ("other", "zero-shot (other)"), ("other", "test")}
    assert pairs["test", "zero-shot (other)"]["points"] == pytest.approx(-pair["t2v"]["points"])
    assert not any("NOT" in said["remark"] for said in with_baseline["remarks"])
    np.save(tmp_path / "fewer.npy", np.load(matrix)[:7])
    assert "fewer.npy: has the shape (7, 8)" in refused(*words, "--zero-shot", tmp_path / "fewer.npy")

    np.save(other, np.where(np.eye(16, 8) > 0, np.inf, np.load(matrix)))
    words = ["--similarity", other, "--ids", matrix.with_suffix(".json"), "--rerank", "dual_softmax"]
    assert "other.npy: the similarity holds a value that is no finite number" in refused(*words)

    np.save(tmp_path / "bank.npy", np.load(matrix)[:5])
    ids = json.loads(matrix.with_suffix(".json").read_text())
    few = {**ids, "queries": ids["queries"][:5], "video_of_query": ids["video_of_query"][:5]}
    (tmp_path / "bank.json").write_text(json.dumps(few))
    bank = ["--rerank", "qb_norm", "--bank", tmp_path / "bank.npy"]
    with_bank = evaluated("--similarity", matrix, *bank, folder=tmp_path)
    assert "bank of 5 training captions" in with_bank["rows"][1]["note"]
    (tmp_path / "bank.json").write_text(json.dumps({**few, "videos": few["videos"][::-1]}))
    assert "its videos are not those of" in refused("--similarity", matrix, *bank)
    assert "has the shape (5, 8)" in refused("--similarity", matrix, "--similarity", tmp_path / "bank.npy",
                                             "--ids", matrix.with_suffix(".json"))  # fmt: skip


def test_interpolation_chooses_on_validation_and_tests_once(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = ["--val-annot", project["val_annot"], "--annot", project["test_annot"]]
    words = ["--interpolate", "zero-shot", run, "--alpha", "0:1:0.5", *annotations]
    found = evaluated(*words, folder=tmp_path)
    assert [point["alpha"] for point in found["validation"]] == [0, 0.5, 1]
    noted = json.loads((run / "metrics.json").read_text())
    whole = noted["best_validation"]["t2v"]
    assert (
        found["validation"][2]["t2v"]["R@1"] == whole["R@1"]
        and found["validation"][2]["t2v"]["MeanR"] == whole["MeanR"]
    )
    table = found
    baseline, model, mix = table["rows"]
    assert figures(baseline) == noted["zero_shot"] and figures(model) == noted["finetuned"]
    best = max(point["t2v"]["R@1"] for point in found["validation"])
    alpha = float(mix["label"].rpartition("= ")[2])
    assert next(point for point in found["validation"] if point["alpha"] == alpha)["t2v"]["R@1"] == best
    part = "2 of these 8 videos and 10 of these 16 captions"
    assert f"the best of 3 shares on {project['val_annot']}, which holds {part}" in mix["note"]
    assert "← chosen" in capsys.readouterr().out
    assert "of the finetuned: it learned from these very captions" in mix["note"]
    # The end of the line is the model itself, and at its beginning nothing is left of what CLIP learned.
    words = ["--interpolate", project["clip_weights"], run, *annotations]
    table = evaluated(*words, "--alpha", "1:1:1", folder=tmp_path)
    assert figures(table["rows"][2]) == figures(table["rows"][1])
    assert table["rows"][2]["cost"]["percent_of_clip"] == table["rows"][1]["cost"]["percent_of_clip"] > 0
    assert evaluated(*words, "--alpha", "0:0:1", folder=tmp_path)["rows"][2]["cost"]["percent_of_clip"] == 0


def test_a_mix_that_begins_with_another_clip_is_compared_with_that_one(
    run: Path, project: Project, tmp_path: Path
) -> None:
    write_clip_folder(tmp_path / "other", seed=5)
    words = ["--val-annot", project["val_annot"], "--annot", project["test_annot"], "--alpha", "0.5:0.5:1"]
    found = evaluated("--interpolate", tmp_path / "other", run, *words, folder=tmp_path)
    own, begin, model, mix = found["rows"]
    assert [row["kind"] for row in found["rows"]] == ["zero-shot", "zero-shot", "model", "model"]
    noted = json.loads((run / "metrics.json").read_text())
    assert figures(own) == noted["zero_shot"] and figures(model) == noted["finetuned"]
    assert (own["label"], begin["label"]) == ("zero-shot, 2 frames", f"zero-shot of {tmp_path / 'other'}, 2 frames")
    assert figures(begin) != figures(own) and str(tmp_path / "other") in begin["note"]
    assert f"WiSE-FT from {tmp_path / 'other'}" in mix["note"]
    pairs = {(pair["label"], pair["minus"]) for pair in found["differences_in_R@1"]}
    assert pairs == {(model["label"], own["label"]), (mix["label"], begin["label"]), (mix["label"], model["label"])}


def test_what_was_known_of_a_data_set(tmp_path: Path) -> None:
    def known(**videos: dict[str, Any]) -> str | None:
        (tmp_path / "known.json").write_text(json.dumps(videos))
        return known_of_file(str(tmp_path / "known.json"), str(tmp_path / "asked.json"))

    asked = {"a": {"sentences": ["A  dog", "a cat"]}, "b": {"sentences": ["a cow"], "group": "film"}}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    assert known(c={"sentences": ["a bird"]}) == known(film={"sentences": ["x"]}) == ""
    assert known(c={"sentences": ["a DOG"]}) == "1 of these 3 captions"
    assert known(c={"sentences": ["x"], "group": "film"}) == known(b={"sentences": ["x"]}) == "1 of these 2 videos"
    assert known(**asked, c={"sentences": ["x"]}) == "these very captions"
    assert known(a=asked["a"]) == "1 of these 2 videos and 2 of these 3 captions"
    (tmp_path / "known.json").write_text("{")
    for unknown in (str(tmp_path / "known.json"), str(tmp_path / "none.json")):
        assert known_of_file(unknown, str(tmp_path / "asked.json")) is None
    assert known_of_file(None, str(tmp_path / "asked.json")) == ""


def test_what_is_written_follows_links(run: Path, project: Project, tmp_path: Path) -> None:
    (tmp_path / "table.md").symlink_to(tmp_path / "elsewhere.md")
    evaluated(run, "--annot", project["test_annot"], "--markdown", tmp_path / "table.md", folder=tmp_path)
    assert (tmp_path / "table.md").is_symlink() and "zero-shot" in (tmp_path / "elsewhere.md").read_text()


def test_what_a_run_learned_from_may_not_be_here(run: Path, project: Project, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    shutil.copytree(run, tmp_path / "moved")
    gone = {"train_annot": "gone/train.json"}
    (tmp_path / "moved" / "config.json").write_text(json.dumps(settings | gone))
    found = evaluated(tmp_path / "moved", "--annot", project["test_annot"], folder=tmp_path)
    assert "it learned from gone/train.json, which cannot be read here" in found["rows"][1]["note"]


def test_weights_are_mixed_as_said() -> None:
    start = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    end = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(5)}
    assert mixed(start, end, 0.25)["w"].tolist() == [1.5, 1.0]
    assert mixed(start, end, 0)["w"].equal(start["w"]) and mixed(start, end, 1)["w"].equal(end["w"])
    assert mixed(start, end, 0.25)["n"] == 5

    def point(alpha: float, *ranks: int) -> Point:
        direction = DirectionMetrics(np.arange(len(ranks)), np.array(ranks))
        metrics = Metrics(direction, direction)
        return Point(alpha, metrics, metrics.t2v.recall(1))

    assert best_point([point(0, 1, 9), point(0.3, 1, 4), point(0.6, 1, 4), point(1, 2, 2)]).alpha == 0.3


def test_shares() -> None:
    assert read_shares("0:1:0.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert read_shares("0.5:0.5:1") == [0.5] and len(read_shares("0:1:0.01")) == 101
    for wrong in ("0:1", "1:0:0.1", "0:2:0.1", "0:1:0", "a:b:c", "0:1:nan", "0:1:0.001", "nan:nan:1", "0:1:1e-320"):
        with pytest.raises(UserError, match="--alpha"):
            read_shares(wrong)


def test_another_clip_cannot_be_mixed_in(run: Path, project: Project, tmp_path: Path, refused: Any) -> None:
    words = ["--val-annot", project["val_annot"], "--annot", project["test_annot"], "--alpha", "0:1:1"]
    assert "neither the word zero-shot" in refused("--interpolate", "nothing", run, *words)
    write_clip_folder(tmp_path / "clip")
    described = tmp_path / "clip" / "open_clip_config.json"
    content = json.loads(described.read_text())
    content["model_cfg"]["vision_cfg"]["layers"] = 1
    described.write_text(json.dumps(content))
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    kept = {
        name: tensor for name, tensor in load_file(weights).items() if "visual.transformer.resblocks.1." not in name
    }
    save_file(kept, weights)
    assert "is of another architecture" in refused("--interpolate", tmp_path / "clip", run, *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a run folder or weights file"),
        (["RUN"], "--annot FILE is needed"),
        (["RUN", "--annot", "none.json"], "--annot none.json: there is no such file"),
        (["EMPTY", "--annot", "TEST"], "best.safetensors not found"),
        (["nowhere", "--annot", "TEST"], "nowhere: There is no such file or folder"),
        (["TEST", "--annot", "TEST"], "cannot be read"),
        (["RUN", "--annot", "TEST", "--similarity", "x.npy"], "exclude each other"),
        (["--similarity", "x.npy"], "x.npy: there is no such file"),
        (["--similarity", "x.npy", "--annot", "TEST"], "--annot does not go with --similarity"),
        (["--similarity", "x.npy", "--num_workers", "1"], "--num_workers belongs to a model"),
        (["--similarity", "x.npy", "--config", "x.json"], "there is no model"),
        (["--similarity", "x.npy", "--interpolate", "zero-shot", "RUN"], "exclude each other"),
        (["RUN", "--annot", "TEST", "--ids", "TEST"], "--ids belongs to --similarity"),
        (["RUN", "--annot", "TEST", "--zero-shot", "x.npy"], "--zero-shot belongs to --similarity"),
        (["RUN", "--annot", "TEST", "--annot", "TEST"], "is given twice"),
        (["--similarity", "x.npy", "--similarity", "./x.npy"], "--similarity x.npy is given twice"),
        (["RUN", "--annot", "TEST", "--rerank", "qb_norm"], "belong together"),
        (["RUN", "--annot", "TEST", "--bank", "TEST"], "--bank belongs to --rerank"),
        (["RUN", "--annot", "TEST", "--rerank", "qb"], "invalid choice"),
        (["RUN", "--annot", "TEST", "--temperature", "1"], "--temperature belongs to --rerank"),
        (["RUN", "--annot", "TEST", "--rerank", "dual_softmax", "--temperature", "0"], "above 0"),
        (["RUN", "--annot", "TEST", "--rerank", "dual_softmax", "--temperature", "nan"], "above 0"),
        (["RUN", "--annot", "TEST", "--rerank", "dual_softmax", "--rerank", "dual_softmax"], "given twice"),
        (["RUN", "--annot", "TEST", "--val-annot", "TEST"], "neither is given"),
        (
            ["RUN", "--annot", "TEST", "--val-annot", "TEST", "--rerank", "dual_softmax", "--temperature", "2"],
            "leave one out",
        ),
        (["--interpolate", "zero-shot", "RUN", "--annot", "TEST"], "needs --val-annot"),
        (["--interpolate", "zero-shot", "RUN", "--annot", "TEST", "--errors", "x.html"], "does not go with"),
        (["RUN", "RUN", "--annot", "TEST", "--errors", "x.html"], "one checkpoint on one annotation"),
        (["RUN", "--annot", "TEST", "--json", "no/such/folder/x.json"], "there is no such folder to write into"),
        (["RUN", "--annot", "EMPTY"], "is a folder, and a file is needed"),
        (["RUN", "--annot", "TEST", "--json", "EMPTY"], "is a folder"),
        (["RUN", "--annot", "TEST", "--json", "TEST"], "is read by the same command, and would be overwritten"),
        (["RUN", "--annot", "TEST", "--json", "x", "--markdown", "./x"], "--json x: is what --markdown writes, too"),
        (["RUN", "--annot", "TEST", "--json", "WEIGHTS"], "would write into the run folder"),
        (["WEIGHTS", "--annot", "TEST", "--json", "METRICS"], "would write into the run folder"),
        (["RUN", "--annot", "TEST", "--errors", "new.mp4"], "must end in .html"),
        (["RUN", "--annot", "TEST", "--json", f"{'b' * 248}.json"], "cannot be written (File name too long)"),
        (["RUN", "--annot", "TEST", "--json", "/dev/null"], "is no plain file"),
        (["RUN", "--annot", "TEST", "--annot", "BROKEN"], "broken.json: video 'video4': \"sentences\" is empty"),
        (
            ["RUN", "--annot", "TEST", "--rerank", "dual_softmax", "--val-annot", "BROKEN"],
            "broken.json: video 'video4'",
        ),
        (["RUN", "--annot", "TEST", "--top_k", "3"], "there is no flag --top_k"),
        (["RUN", "--annot", "TEST", "--frames_dir", "nowhere"], "frames_dir nowhere: there is no such"),
    ],
)
def test_refusals(words: list[str], told: str, run: Path, project: Project, tmp_path: Path, refused: Any) -> None:
    names = {"RUN": run, "TEST": project["test_annot"], "EMPTY": tmp_path, "BROKEN": tmp_path / "broken.json"}
    names |= {"WEIGHTS": run / "best.safetensors", "METRICS": run / "metrics.json"}
    (tmp_path / "broken.json").write_text('{"video4": {"sentences": []}}')
    assert told in refused(*[names.get(word, word) for word in words])


MATRIX = np.array([[2, 1, 0], [1, 0, 2], [0, 1, 2], [3, 1, 2]], np.float32)
IDS = {"queries": ["a", "b", "c", "d"], "videos": ["x", "y", "z"], "video_of_query": [0, 1, 2, 0]}


@pytest.mark.parametrize(
    ("matrix", "ids", "told"),
    [
        (MATRIX[:0], IDS | {"queries": [], "video_of_query": []}, "lists no queries"),
        (MATRIX[:, :0], IDS | {"videos": []}, "lists no videos"),
        (MATRIX, IDS | {"videos": ["x", "y", "x"]}, "videos lists 'x' twice"),
        (MATRIX, IDS | {"video_of_query": [0, 1, 2]}, "has 3 entries for 4 queries"),
        (MATRIX, IDS | {"video_of_query": [0, 1, 3, 0]}, "holds 3, which is no number of a video"),
        (MATRIX, IDS | {"queries": ["a", "b", "c", 4]}, "holds 4, which is no text"),
        (MATRIX, [IDS], "is to hold the lists"),
        (MATRIX[0], IDS, "has the shape (3,)"),
        (MATRIX.astype(int), IDS, "has the dtype int64"),
        (np.where(MATRIX > 2, np.nan, MATRIX), IDS, "row 3, column 0 (query 'd', video 'x') is nan"),
        (np.array([[{}]], object), IDS, "is no .npy file of numbers"),
        (None, IDS, "is no .npy file of numbers, or was cut off"),
    ],
)
def test_matrices_that_cannot_be(matrix: Any, ids: Any, told: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "m.npy").write_bytes(b"hello") if matrix is None else np.save(tmp_path / "m.npy", matrix)
    (tmp_path / "m.json").write_text(json.dumps(ids))
    assert told in refused("--similarity", tmp_path / "m.npy")


def test_names_that_are_no_text_are_shown_and_written(tmp_path: Path) -> None:
    """A file name of other bytes than UTF-8, half a surrogate pair among the ids, and a terminal that takes neither."""
    matrix = os.fsdecode(os.fsencode(tmp_path / "bad") + b"\xff\x1b[31m.npy")
    np.save(matrix, MATRIX)
    (tmp_path / "m.json").write_text(json.dumps(IDS | {"queries": ["a", "\udfff b", "c", "d"]}))
    suffixes = {"json": "json", "markdown": "md", "errors": "html"}
    targets = {name: tmp_path / f"found.{suffix}" for name, suffix in suffixes.items()}
    words = [word for name, path in targets.items() for word in (f"--{name}", path)]
    command = [sys.executable, "-c", "import sys; from adaclip_finetune.cli import main; sys.exit(main())"]
    command += ["evaluate", "--similarity", matrix, "--ids", str(tmp_path / "m.json"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"bad\\udcff\\x1b[31m" in done.stdout and b"\x1b" not in done.stdout
    assert json.loads(targets["json"].read_text())["rows"][0]["label"] == "bad\udcff\x1b[31m"
    assert "\\udfff b" in targets["errors"].read_text(encoding="utf-8")
    assert "\\udcff" in targets["markdown"].read_text(encoding="utf-8")


def test_several_processes_are_refused(
    run: Path, project: Project, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "are for one process" in refused(run, "--annot", project["test_annot"])


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from adaclip_finetune.cli import main
assert main(["{command}", "--help"]) == 0
heavy = set(sys.modules) & {{"torch", "numpy", "scipy", "open_clip", "av", "PIL"}}
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "--skip_missing" in done.stdout
