"""`adaclip evaluate`: figures of checkpoints are those of the run, and the remarks beside them hold."""

import json
import shutil
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import Project, evaluated, figures, matrix_of, trained_run
from golden import load_golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adaclip_finetune import load_retriever
from adaclip_finetune.cli import main
from adaclip_finetune.compare.checkpoints import overlap_of_files
from adaclip_finetune.compare.evaluate import SharePoint, best_point, mixed
from adaclip_finetune.compare.table import DataSetRows, TableRow, as_dict, as_markdown, as_text
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.bootstrap import intervals


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(project, tmp_path_factory.mktemp("evaluate") / "work", concat_captions="indep-all")


@pytest.fixture(scope="module")
def noted(run: Path) -> dict[str, Any]:
    """What the run itself wrote of its figures."""
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def refuse(*words: object) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err and captured.out == ""
        return captured.err

    return refuse


def moved_run(run: Path, folder: Path, **changes: Any) -> Path:
    """Copy the weights and the settings of a run, with some settings changed."""
    folder.mkdir()
    shutil.copy(run / "best.safetensors", folder)
    settings = json.loads((run / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def test_a_run_has_its_own_figures_and_zero_shot_comes_first(
    run: Path, noted: Any, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = evaluated(run, "--annot", project["test_annot"], folder=tmp_path)
    baseline, model = table["rows"]
    assert (baseline["kind"], model["kind"]) == ("zero-shot", "model")
    assert figures(baseline) == figures(noted["zero_shot"]) and figures(model) == figures(noted["finetuned"])
    assert model["shared_captions"] == noted["finetuned"]["shared_captions"]
    clip, everything = noted["parameters"]["clip"], noted["parameters"].values()
    assert model["cost"]["percent_of_clip"] == pytest.approx(100 * clip["trainable"] / clip["total"])
    learned, total = (sum(part[key] for part in everything) for key in ("trainable", "total"))
    assert model["cost"]["percent_of_all"] == pytest.approx(100 * learned / total)
    assert model["cost"]["gflops"] == pytest.approx(noted["gflops"]["video"])
    assert baseline["cost"]["percent_of_all"] == 0 and model["cost"]["videos_per_second"] > 0
    ids = json.loads(matrix_of(run).with_suffix(".json").read_text())
    matrix, videos = np.load(matrix_of(run)), np.array(ids["video_of_query"])
    ranks = (matrix >= matrix[np.arange(len(matrix)), videos][:, None]).sum(axis=1)
    assert model["t2v"]["MeanR 95%"] == list(intervals(ranks, videos)["MeanR"]) != list(intervals(ranks)["MeanR"])
    printed = capsys.readouterr().out
    assert printed.index("zero-shot, 2 frames") < printed.index(run.name)
    # "it is red" and the like are captions of several videos.
    assert f"{noted['finetuned']['shared_captions']['captions']} captions have the same text" in printed


def test_queries_of_a_tag_have_figures_intervals_and_differences_of_their_own(
    run: Path, noted: Any, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads(Path(project["test_annot"]).read_text())
    for entry in entries.values():
        entry["tags"] = [[], ["colour"]]
    path = tmp_path / "tagged.json"
    path.write_text(json.dumps(entries))
    table = evaluated(run, "--annot", path, "--rerank", "dual_softmax", folder=tmp_path)
    for row in table["rows"]:
        assert list(row["tags"]) == ["colour", "(no tag)"] and {tag["queries"] for tag in row["tags"].values()} == {8}
        for name in ("R@1", "R@5", "MeanR"):
            assert statistics.mean(tag[name] for tag in row["tags"].values()) == pytest.approx(row["t2v"][name])
        assert all(tag["R@1 95%"][0] <= tag["R@1"] <= tag["R@1 95%"][1] for tag in row["tags"].values())
    assert figures(table["rows"][1]) == figures(noted["finetuned"]), "the gallery and the other queries stay"
    (difference,) = table["differences_in_R@1"]
    zero_shot, model = (row["tags"]["colour"]["R@1"] for row in table["rows"][:2])
    assert difference["t2v of colour"]["points"] == pytest.approx(model - zero_shot)
    printed = capsys.readouterr().out
    assert printed.count("  colour, 8 captions ") == 3 and "T2V of colour" in printed


def test_checkpoints_of_one_run_are_equal_rows_on_each_data_set(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [run, run / "best.safetensors", run / "adapter.safetensors"]
    data_sets = [project["test_annot"], project["val_annot"]]
    annotations = ["--annot", data_sets[0], "--annot", data_sets[1]]
    found = evaluated(*given, *annotations, "--markdown", tmp_path / "found.md", folder=tmp_path)
    labels = [run.name, f"{run.name}/best.safetensors", f"{run.name}/adapter.safetensors"]
    for number, name in enumerate(data_sets):
        baseline, *models = found["rows"][4 * number : 4 * number + 4]
        assert {row["annotation"] for row in (baseline, *models)} == {name} and baseline["kind"] == "zero-shot"
        assert [row["label"] for row in models] == labels and len({json.dumps(figures(row)) for row in models}) == 1
        listed = [pair for pair in found["differences_in_R@1"] if pair["annotation"] == name]
        pairs = {(pair["label"], pair["minus"]): pair["t2v"] for pair in listed}
        assert set(pairs) == {(label, baseline["label"]) for label in labels} | set(combinations(labels[::-1], 2))
        same, won = pairs[labels[1], labels[0]], pairs[labels[0], baseline["label"]]
        assert (same["points"], same["p"]) == (0, 1)
        assert won["points"] == pytest.approx(models[0]["t2v"]["R@1"] - baseline["t2v"]["R@1"])
        assert won["interval"][0] <= won["points"] <= won["interval"][1]
    # Test and validation share video4 and video5, and the captions that only name a colour.
    learned, part = "it learned from these very captions", "2 of these 8 videos and 10 of these 16 captions"
    assert {row["note"] for row in found["rows"][1:4]} == {f"{learned}; its epoch was chosen on {part}"}
    assert {row["note"] for row in found["rows"][5:]} == {f"{learned}; its epoch was chosen on these very captions"}
    lines = (tmp_path / "found.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[:2] for row in cells[2:]] == [[row["annotation"], row["label"]] for row in found["rows"]]
    # The terminal shows one table too: one head, and columns that end at the same place in all rows.
    printed = capsys.readouterr().out
    assert printed.count("T2V R@1  ") == printed.count("trained of CLIP") == printed.count("95 %: bootstrap") == 1
    assert len({len(line) for line in printed[: printed.index("trained of CLIP")].splitlines() if " [" in line}) == 1


def test_a_published_checkpoint_takes_its_settings_from_a_file(
    run: Path, noted: Any, project: Project, tmp_path: Path, refused: Any
) -> None:
    published = tmp_path / "adaclip.pth"
    assert main(["export", str(run), "--format", "published", "-o", str(published)]) == 0
    words = [published, "--annot", project["test_annot"], "--config"]
    table = evaluated(*words, run.parents[2] / "settings.json", folder=tmp_path)
    assert figures(table["rows"][1]) == figures(noted["finetuned"])
    (tmp_path / "other.json").write_text(json.dumps({**project, "hidden_dim": 128}))
    told = refused(*words, tmp_path / "other.json")
    assert "hidden_dim is 128, there 64" in told and "--config FILE" in told


def test_data_that_moved_is_given_by_a_flag(
    run: Path, noted: Any, project: Project, tmp_path: Path, refused: Any
) -> None:
    """Without CLIP's weights there is no zero-shot, and without the noted parameters their share is not known."""
    gone = {"frames_dir": None, "video_dir": "/nowhere/videos", "train_annot": "gone.json", "clip_weights": None}
    moved = moved_run(run, tmp_path / "moved", **gone, peft={"method": "ibs", "config": {"num_pre_epochs": 1}})
    with safe_open(run / "best.safetensors", "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "parameters"}
    save_file(load_file(run / "best.safetensors"), moved / "best.safetensors", metadata)
    words = [moved, "--annot", project["test_annot"]]
    told = refused(*words)
    assert "video_dir /nowhere/videos" in told and "--frames_dir" in told
    there = ["--frames_dir", project["frames_dir"]]
    assert "clip_weights" in refused(*words, *there, "--interpolate", "0.5")
    found = evaluated(*words, *there, "--val_batch_size", 3, folder=tmp_path)
    (model,) = found["rows"]
    assert any("zero-shot of moved is NOT measured" in said["remark"] for said in found["remarks"])
    assert model["cost"]["percent_of_clip"] is None and not found["differences_in_R@1"]
    assert model["t2v"]["R@1"] == pytest.approx(noted["finetuned"]["t2v"]["R@1"])
    assert "it learned from gone.json, which cannot be read here" in model["note"]


def test_missing_videos_are_an_error_or_told_beside_the_figures(
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
    assert {(row["t2v"]["videos_evaluated"], row["t2v"]["videos_listed"]) for row in table["rows"]} == {(7, 8)}


def test_reranked_rows_stand_below_their_model_and_are_marked(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run, "--annot", project["test_annot"], "--rerank", "dual_softmax"]
    both = ["--rerank", "qb_norm", "--bank", project["train_annot"]]
    table = evaluated(*words, *both, "--val-annot", project["val_annot"], folder=tmp_path)
    _, model, dual, bank = table["rows"]
    assert (dual["kind"], bank["kind"]) == ("reranked", "reranked")
    assert dual["label"] == f"{run.name} + dual_softmax (transductive)" and "sees all test queries" in dual["note"]
    assert dual["note"].endswith(f"the best of 10 on {project['val_annot']}")
    assert bank["label"] == f"{run.name} + qb_norm (query bank)" and bank["v2t"] is None
    assert "bank of 24 training captions" in bank["note"]
    assert not any("+" in found["label"] for found in table["differences_in_R@1"])
    printed = capsys.readouterr().out
    assert printed.index(f"\n{run.name} ") < printed.index("+ dual_softmax (transductive)")
    again = evaluated(*words, folder=tmp_path)["rows"]
    assert figures(again[1]) == figures(model) and "temperature 1, the default" in again[2]["note"]


def test_each_share_is_a_row_that_is_compared_with_its_ends(run: Path, project: Project, tmp_path: Path) -> None:
    words = [run, run / "best.safetensors", "--annot", project["test_annot"]]
    found = evaluated(*words, "--interpolate", "0,0.5,1", folder=tmp_path)
    baseline, *rows = found["rows"]
    labels = [row["label"] for row in rows]
    assert [row["kind"] for row in rows] == [*["model", *["interpolated"] * 3] * 2] and found["validation"] == []
    assert labels[:4] == [run.name, *(f"{run.name}, α = {alpha}" for alpha in ("0", "0.5", "1"))]
    assert figures(rows[3]) == figures(rows[0]) != figures(rows[1])
    assert rows[1]["note"] == "WiSE-FT; " + rows[0]["note"] and rows[1]["cost"]["gflops"] == rows[0]["cost"]["gflops"]
    pairs = [(pair["label"], pair["minus"]) for pair in found["differences_in_R@1"]]
    with_zero_shot = {(label, baseline["label"]) for label in labels}
    before = {(label, labels[0]) for label in labels[1:]} | {(label, labels[4]) for label in labels[5:]}
    assert len(pairs) == len(set(pairs)) and set(pairs) == with_zero_shot | before


def test_interpolation_chooses_on_validation_and_tests_once(
    run: Path, noted: Any, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = ["--val-annot", project["val_annot"], "--annot", project["test_annot"]]
    found = evaluated(run, "--interpolate", "0,0.5,1", *annotations, folder=tmp_path)
    assert [(point["label"], point["alpha"]) for point in found["validation"]] == [
        (run.name, alpha) for alpha in (0, 0.5, 1)
    ]
    for name in ("R@1", "MeanR"):
        assert found["validation"][2]["t2v"][name] == noted["best_validation"]["t2v"][name]
    baseline, model, mix = found["rows"]
    assert figures(baseline) == figures(noted["zero_shot"]) and figures(model) == figures(noted["finetuned"])
    best = max(point["t2v"]["R@1"] for point in found["validation"])
    alpha = float(mix["label"].rpartition("= ")[2])
    assert next(point for point in found["validation"] if point["alpha"] == alpha)["t2v"]["R@1"] == best
    assert f"the best of 3 shares on {project['val_annot']}; it learned from these very captions" in mix["note"]
    assert "← chosen" in capsys.readouterr().out


def test_the_mixed_model_is_kept_and_measured_like_any_other(
    run: Path, noted: Any, project: Project, tmp_path: Path, refused: Any
) -> None:
    """What lies outside of CLIP stays as finetuned."""
    kept, test = tmp_path / "kept", ["--annot", project["test_annot"]]
    words = [run, *test, "--interpolate", "0.4", "--save", kept]
    mix = evaluated(*words, folder=tmp_path)["rows"][-1]
    baseline, again = evaluated(kept, *test, folder=tmp_path)["rows"]
    assert again["label"] == "kept" and figures(again) == figures(mix) != figures(noted["finetuned"])
    assert figures(baseline) == figures(noted["zero_shot"]) and again["cost"]["gflops"] == mix["cost"]["gflops"]
    end, state = load_file(run / "best.safetensors"), load_file(kept / "best.safetensors")
    start = load_file(Path(project["clip_weights"]) / "open_clip_model.safetensors")
    assert state.keys() == end.keys()
    for name, tensor in state.items():
        inside = start.get(name.removeprefix("clip."), end[name])
        torch.testing.assert_close(tensor, 0.6 * inside + 0.4 * end[name])
    assert load_retriever(kept).encode_text(["a red thing"]).shape == (1, 64)
    assert "already exists" in refused(*words)


def test_weights_are_mixed_as_published_and_ties_go_to_the_lower_mean_rank() -> None:
    golden = load_golden("wise")
    start, end, model = (
        golden["model1"],
        golden["model2"],
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)),
    )
    for number, alpha in enumerate(golden["weights"].tolist()):
        state = mixed(start, end, alpha)
        for name, tensor in golden["mixed"][number].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-12)
        model.double().load_state_dict(state)
        torch.testing.assert_close(model(golden["x"]), golden["outputs"][str(number)], rtol=0, atol=1e-12)
    assert all(tensor.equal(start[name]) for name, tensor in mixed(start, end, 0).items())
    assert all(tensor.equal(end[name]) for name, tensor in mixed(start, end, 1).items())
    points = [(0, 50, 5.0), (0.3, 50, 2.5), (0.6, 50, 2.5), (1, 0, 2.0)]
    curve = [SharePoint("run", alpha, {"t2v": {"MeanR": mean_rank}}, "", score) for alpha, score, mean_rank in points]
    assert best_point(curve).alpha == 0.3


def test_statistics_of_batch_norms_are_mixed_and_counters_are_the_finetuned_ones() -> None:
    start, end = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    end(torch.tensor([[1.0, 2.0], [5.0, 2.0]]))  # running mean 0.3 and 0.2, variance 1.7 and 0.9
    state = mixed(start.state_dict(), end.state_dict(), 0.5)
    torch.testing.assert_close(state["running_mean"], torch.tensor([0.15, 0.1]))
    torch.testing.assert_close(state["running_var"], torch.tensor([1.35, 0.95]))
    assert state["num_batches_tracked"] == 1


def test_the_figures_of_any_task_make_a_table() -> None:
    """Columns are the task's own; without ranks there are no intervals and no differences."""
    queries = Queries(["a"], np.array([0]), ["v"])
    data_set = DataSetRows("test.json")
    for label, accuracy in (("one", 50.0), ("other", 75.0)):
        figures = {"accuracy": accuracy, "by": {"F1": 12.5}}
        columns = ("accuracy", "by.F1", "by.absent")
        data_set.models.append(TableRow(label, "model", figures, columns, {}, queries, "4 questions\na remark"))
    head, one, other, *below = as_text([data_set]).splitlines()
    assert head.split() == ["accuracy", "BY", "F1", "absent"] and "test.json: 4 questions" in below
    assert (one.split(), other.split()) == (["one", "50.0", "12.5", "–"], ["other", "75.0", "12.5", "–"])
    assert "one: a remark" in as_markdown([data_set]) and "95 %" not in as_markdown([data_set])
    found = as_dict([data_set])
    assert [row["accuracy"] for row in found["rows"]] == [50, 75] and found["differences_in_R@1"] == []
    data_set.name = "bad\udcff\x1b[31m"  # a file name that is not UTF-8, and steers a terminal
    for text in (as_text([data_set]), as_markdown([data_set])):
        assert "bad\\udcff\\x1b" in text and text.replace("\n", "").isprintable()


def test_overlap_counts_videos_groups_and_captions(tmp_path: Path) -> None:
    def overlap(**videos: dict[str, Any]) -> str:
        (tmp_path / "used.json").write_text(json.dumps(videos))
        return overlap_of_files(str(tmp_path / "used.json"), str(tmp_path / "evaluated.json"))

    evaluated_on = {"a": {"sentences": ["A  dog", "a cat"]}, "b": {"sentences": ["a cow"], "group": "film"}}
    (tmp_path / "evaluated.json").write_text(json.dumps(evaluated_on))
    assert overlap(c={"sentences": ["a bird"]}) == overlap(film={"sentences": ["x"]}) == ""
    assert overlap(c={"sentences": ["a DOG"]}) == "1 of these 3 captions"
    assert overlap(c={"sentences": ["x"], "group": "film"}) == "1 of these 2 videos"
    assert overlap(**evaluated_on, c={"sentences": ["x"]}) == "these very captions"
    assert overlap(a=evaluated_on["a"]) == "1 of these 2 videos and 2 of these 3 captions"
    assert "cannot be read here" in overlap(a={})
    assert "cannot be read here" in overlap_of_files(str(tmp_path / "none.json"), str(tmp_path / "evaluated.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--annot TEST", "RUN_OR_CHECKPOINT"),
        ("RUN", "--annot"),
        ("RUN --annot none.json", "--annot none.json: no such file"),
        ("EMPTY --annot TEST", "best.safetensors not found"),
        ("TEST --annot TEST", "cannot be read"),
        ("RUN --annot TEST --rerank qb_norm", "--bank belong together"),
        ("RUN --annot TEST --temperature 1", "--temperature belongs to --rerank"),
        ("RUN --annot TEST --rerank dual_softmax --temperature 0", "above 0"),
        ("RUN --annot TEST --val-annot TEST", "--val-annot belongs to"),
        ("RUN --annot TEST --val-annot TEST --rerank dual_softmax --temperature 2", "--val-annot would choose"),
        ("RUN --interpolate 0.5 --annot TEST --errors x.html", "goes without --rerank and --errors"),
        ("RUN --annot TEST --save x", "--save needs one mix"),
        ("RUN --interpolate 0,1 --annot TEST --save x", "--save needs one mix"),
        ("RUN RUN --interpolate 0,1 --val-annot TEST --annot TEST --save x", "--save needs one mix"),
        ("RUN --interpolate 1 --annot TEST --save no/such/x", "is not a folder that you can write into"),
        ("RUN RUN --annot TEST --errors x.html", "--errors needs one"),
        ("RUN --annot TEST --json no/such/folder/x.json", "is not a folder that you can write into"),
        ("RUN --annot TEST --json METRICS", "is a run folder"),
        ("RUN --annot TEST --annot TEST", "is given twice"),
        ("RUN --annot TEST --annot BROKEN", "broken.json: video 'video4'"),
        ("RUN --annot TEST --top_k 3", "--top_k"),
        *(
            (f"RUN --interpolate {shares} --annot TEST", f"--interpolate {shares}: must be numbers from 0 to 1")
            for shares in ("zero-shot", "0,1.1", "0;1", "nan", "0,,1")
        ),
    ],
)
def test_refusals(words: str, told: str, run: Path, project: Project, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "broken.json").write_text('{"video4": {"sentences": []}}')
    names: dict[str, Any] = {"RUN": run, "TEST": project["test_annot"], "EMPTY": tmp_path, "METRICS": run / "x.json"}
    names["BROKEN"] = tmp_path / "broken.json"
    assert told in refused(*[names.get(word, word) for word in words.split()])
