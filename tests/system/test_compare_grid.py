"""`adaclip compare` on a dozen tiny videos: cells, workers, resuming, refusals, and the table recomputed from cells."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import threading
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from adaclip_finetune.cli import main
from adaclip_finetune.compare import grid_cell
from adaclip_finetune.compare.grid import Grid, run_grid
from adaclip_finetune.compare.grid_cell import Cell
from adaclip_finetune.compare.grid_report import summaries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.bootstrap import difference_over_seeds, recall_over_seeds
from adaclip_finetune.peft.report import TrainableReport
from adaclip_finetune.training import optimizer

Project = dict[str, Any]
METHODS = {"full": {"peft": {"method": "full"}}, "heads only": {"freeze_clip": True}}


def write(folder: Path, recipe: Any, **keys: Any) -> Path:
    """Write the config file of a grid into `folder` and return it."""
    path = folder / "grid.json"
    content = {"recipe": recipe, "methods": METHODS, "seeds": 2, "search": {"coef_lr": [0.1, 1]}}
    path.write_text(json.dumps({**content, "output_dir": str(folder / "out"), **keys}))
    return path


def work(words: list[str], log: Path, dies: bool = False) -> None:
    """Run the command in a process of its own. With `dies`, each cell kills its worker in its fourth update."""
    forked.begin(log)
    if dies:
        grid_cell.train_cell = killing  # type: ignore[assignment]
    raise SystemExit(main(words))


def killing(*arguments: Any) -> None:
    """Train a cell, and kill the worker in the fourth update; then wait for the end that must follow."""
    real, calls = optimizer.clamp_logit_scale, list[int]()

    def clamp(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            worker = multiprocessing.parent_process()
            assert worker is not None and worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            threading.Event().wait()
        real(*given)

    optimizer.clamp_logit_scale = clamp
    real_train(*arguments)


real_train = grid_cell.train_cell


def start(path: Path, log: Path, dies: bool = False) -> Any:
    process = forked.context().Process(target=work, args=(["compare", str(path)], log, dies))
    process.start()
    return process


@pytest.fixture(scope="module")
def recipe(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return the project with a tag on the captions of the first three of its eight test videos."""
    entries = json.loads(Path(project["test_annot"]).read_text())
    for entry in list(entries.values())[:3]:
        entry["tags"] = [["first"], []]
    tagged = tmp_path_factory.mktemp("tagged") / "test.json"
    tagged.write_text(json.dumps(entries))
    return project | {"test_annot": str(tagged)}


@pytest.fixture(scope="module")
def whole(recipe: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config file of a grid that two workers have trained at the same time."""
    folder = tmp_path_factory.mktemp("grid")
    path = write(folder, recipe)
    workers = [start(path, folder / f"{number}.log") for number in range(2)]
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0], (folder / "0.log").read_text()
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((path.parent / "out" / "compare.json").read_text())
    return {row["method"]: row for row in content["rows"]}


def test_two_workers_train_each_cell_once_and_keep_no_weights(whole: Path) -> None:
    grid = Grid(whole)
    assert grid.size == len(grid.finished()) == 6 and not grid.left()
    logs = "".join((whole.parent / f"{number}.log").read_text() for number in range(2))
    assert sorted(re.findall(r"^(.*): begun$", logs, re.M)) == sorted(cell.label for cell in grid.finished())
    left = {path.name for cell in grid.finished() for path in cell.folder.iterdir()}
    assert {"result.json", "config.json", "metrics.jsonl"} <= left
    assert not [name for name in left if name.endswith(("safetensors", ".lock")) or name.startswith("last")]
    assert not list(grid.folder.rglob("*.lock"))


def test_a_finished_grid_trains_nothing_and_writes_the_report_again(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["compare.csv", "compare.json", "compare.md", "compare.png"]
    folder = whole.parent / "out"
    before = {name: (folder / name).read_bytes() for name in names[:3]}
    for name in names:
        (folder / name).unlink()
    assert main(["compare", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "begun" not in out and "6 of 6 cells" in out
    assert {name: (folder / name).read_bytes() for name in names[:3]} == before
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_follows_from_the_results_of_the_cells(whole: Path) -> None:
    grid, found = Grid(whole), rows(whole)
    assert list(found) == ["zero-shot", *METHODS]

    def chosen(method: str) -> list[dict[str, Any]]:
        tried = {cell.searched: cell.result() for cell in grid.searching(method)}
        best = max(tried, key=lambda one: tried[one]["validation"]["t2v"]["R@1"])  # of equal ones the first
        assert found[method]["searched"].split()[0] == json.dumps(best)
        return [cell.result() for cell in grid.of(method, best)]

    results = {method: chosen(method) for method in METHODS}
    full = np.array([result["ranks"]["t2v"] for result in results["full"]])
    for method, runs in results.items():
        row, ranks = found[method], np.array([run["ranks"]["t2v"] for run in runs])
        assert row["t2v.R@1"] == pytest.approx(100 * (ranks <= 1).mean()) and row["seeds"] == len(runs) == 2
        for name in ("R@5", "R@10", "MedR"):
            for direction in ("t2v", "v2t"):
                mean = statistics.mean(run["test"][direction][name] for run in runs)
                assert row[f"{direction}.{name}"] == pytest.approx(mean)
        videos = np.unique(runs[0]["video_of_query"], return_inverse=True)[1]
        interval = recall_over_seeds(ranks, videos)[1]
        assert (row["t2v.R@1 low"], row["t2v.R@1 high"]) == pytest.approx(interval)
        before = np.array([runs[0]["zero_shot_ranks"]])
        assert found["zero-shot"]["t2v.R@1"] == pytest.approx(100 * (before <= 1).mean())
        points, (low, high) = difference_over_seeds(ranks, before, videos)
        assert [row[f"minus_zero_shot{end}"] for end in ("", " low", " high")] == pytest.approx([points, low, high])
        if method == "full":
            assert row["minus_reference"] is None
        else:
            assert row["minus_reference"] == pytest.approx(100 * ((ranks <= 1).mean() - (full <= 1).mean()))
        assert row["trainable"] == sum(part["trainable"] for part in runs[0]["parameters"].values())
        assert row["adapter_bytes"] >= 4 * row["trainable"] and row["memory_mib"] > 0 and row["seconds_per_step"] > 0
    assert found["heads only"]["trainable_of_clip"] == 0 < found["full"]["trainable_of_clip"]
    assert found["heads only"]["searched"].endswith("(all equal)"), "nothing of CLIP learns, so its rate is idle"
    with (whole.parent / "out" / "compare.csv").open() as file:
        lines = [(row["tag"], row["method"]) for row in csv.DictReader(file)]
    assert lines == [(tag, method) for tag in ("", "first", "(no tag)") for method in found]
    text = (whole.parent / "out" / "compare.md").read_text()
    assert all(re.search(rf"^\| {name} +\|.*{found[name]['t2v.R@1']:.1f}", text, re.M) for name in found)


def test_the_queries_of_a_tag_have_a_table_of_their_own(whole: Path) -> None:
    """It has the figures of these queries alone; the gallery, and so each rank, is that of the main table."""
    grid, text = Grid(whole), (whole.parent / "out" / "compare.md").read_text()
    content = json.loads((whole.parent / "out" / "compare.json").read_text())
    for tag, part in {"first": slice(0, 3), "(no tag)": slice(3, 8)}.items():
        found = {row["method"]: row for row in content["tags"][tag]}
        assert list(found) == list(rows(whole)) and f"## {tag}: {len(range(8)[part])} captions" in text
        ranks = {}
        for method in METHODS:
            best = grid.chosen(method)
            assert best is not None
            runs = [cell.result() for cell in grid.of(method, best.searched)]
            ranks[method] = np.array([run["ranks"]["t2v"][part] for run in runs])
            row, videos = found[method], np.arange(len(range(8)[part]))
            assert (row["queries"], row["t2v.R@1"]) == (len(videos), pytest.approx(100 * (ranks[method] <= 1).mean()))
            assert row["t2v.MedR"] == pytest.approx(np.median(ranks[method], axis=1).mean())
            assert row["v2t.R@1"] is None and row["trainable"] is not None
            interval = recall_over_seeds(ranks[method], videos)[1]
            assert (row["t2v.R@1 low"], row["t2v.R@1 high"]) == pytest.approx(interval)
            before = np.array([runs[0]["zero_shot_ranks"][part]])
            points, (low, high) = difference_over_seeds(ranks[method], before, videos)
            assert [row[f"minus_zero_shot{end}"] for end in ("", " low", " high")] == pytest.approx([points, low, high])
        points, (low, high) = difference_over_seeds(ranks["heads only"], ranks["full"], videos)
        apart = [found["heads only"][f"minus_reference{end}"] for end in ("", " low", " high")]
        assert apart == pytest.approx([points, low, high])


def test_the_reference_is_chosen_by_name(whole: Path, recipe: Project, tmp_path: Path) -> None:
    path = write(tmp_path, recipe, output_dir=str(whole.parent / "out"), reference="heads only")
    apart = {row.name: row.minus_reference for row in summaries(Grid(path))}
    ours = rows(whole)["heads only"]["minus_reference"]
    assert apart["full"] is not None and apart["full"][0] == pytest.approx(-ours)
    assert apart["heads only"] is None and apart["zero-shot"] is None


def test_a_killed_cell_is_resumed_and_a_locked_one_is_left_to_its_worker(
    whole: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, project, methods={"full": METHODS["full"]}, seeds=1, search={}, keep_weights=True)
    worker = start(path, tmp_path / "log", dies=True)
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    (cell,) = Grid(path).left()
    assert list(cell.folder.glob("last-*"))
    other = Grid(path).left()[0].lock_path
    held = other.read_text()
    other.unlink()
    lock = cell.lock()
    lock.take()  # as another worker would
    assert main(["compare", str(path)]) == 0
    assert "left to other workers: 1" in capsys.readouterr().out and not cell.is_finished
    lock.release()
    other.write_text(held)  # the lock of the process that was killed

    assert main(["compare", str(path)]) == 0
    assert "resumed" in capsys.readouterr().out and "after update 3" in (cell.folder / "train.log").read_text()
    assert {"best.safetensors", "adapter.safetensors"} <= {one.name for one in cell.folder.iterdir()}
    same = next(one for one in Grid(whole).cells.values() if one.folder.match("full/coef_lr=0.1/seed0"))
    assert cell.result()["ranks"] == same.result()["ranks"], "an interruption changes no figure"


def test_a_cell_that_diverges_is_the_worst_of_its_search(project: Project, tmp_path: Path) -> None:
    recipe = project | {"num_epochs": 1}
    search = {"coef_lr": [1e38, 0.1]}
    path = write(tmp_path, recipe, methods={"full": METHODS["full"]}, seeds=1, search=search)
    assert main(["compare", str(path)]) == 0
    (row,) = [row for name, row in rows(path).items() if name == "full"]
    assert row["searched"].startswith("0.1") and "1e+38 failed" in row["note"]
    failed: Cell = Grid(path).searching("full")[0]
    assert "diverged" in failed.result()["failed"] and "Traceback" in (failed.folder / "train.log").read_text()
    shutil.rmtree(Grid(path).searching("full")[1].folder)
    path = write(tmp_path, recipe, methods={"full": METHODS["full"]}, seeds=1, search={"coef_lr": [1e38]})
    assert main(["compare", str(path)]) == 1
    assert "FAILED with every value" in (tmp_path / "out" / "compare.md").read_text()


def test_methods_differ_in_data_and_budget_on_purpose(project: Project, tmp_path: Path) -> None:
    part = {"annotation": project["train_annot"], "subset": 5}
    methods = {"few": {"train_annot": [part]}, "all": {"num_epochs": 1}}
    keys = {"methods": methods, "seeds": 1, "search": {}, "vary": ["train_annot", "num_epochs"]}
    path = write(tmp_path, project, **keys)
    assert main(["compare", str(path)]) == 0
    assert "NOT the same for all: train_annot, num_epochs" in (tmp_path / "out" / "compare.md").read_text()
    logs = (cell.folder / "metrics.jsonl" for cell in Grid(path).finished())
    updates = [sum('"train"' in line for line in log.read_text().splitlines()) for log in logs]
    size, videos = project["batch_size"], len(json.loads(Path(project["train_annot"]).read_text()))
    assert updates == [project["num_epochs"] * (5 // size), -(-videos // size)]


def test_a_method_goes_on_from_the_weights_of_another(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with another tower, whose own parameters begin untrained, and with other updates than the first part has."""
    on = {"after": "first", "num_epochs": 1, "peft": {"method": "full", "config": {"towers": "text"}}}
    methods = {"first": METHODS["full"], "same": on, "change": on | {"tower": {"method": "change"}, "frame_agg": None}}
    path = write(tmp_path, project | {"frame_agg": None}, methods=methods, search={})
    assert main(["compare", str(path)]) == 0
    grid = Grid(path)
    kept = {cell.method for cell in grid.finished() if cell.weights.exists()}
    assert kept == {"first"}, "of other methods no weights are kept"
    assert "change: goes on from the weights of first" in (tmp_path / "out" / "compare.md").read_text()
    for cell in (*grid.of("same", None), *grid.of("change", None)):
        before, after = (TrainableReport.from_dict(one.result()["parameters"]).clip for one in (cell.start, cell))
        assert 0 < after.trainable < before.trainable, "the text tower alone"
        settings = json.loads((cell.folder / "config.json").read_text())
        assert settings["resume"] == str(cell.start.weights) and f"seed{cell.seed}" in settings["resume"]
        assert f"resume: {cell.start.weights} is a checkpoint of ours" in (cell.folder / "train.log").read_text()

    capsys.readouterr()
    grid.of("first", None)[1].weights.unlink()
    assert main(["compare", str(path)]) == 0
    assert "begun" not in capsys.readouterr().out
    path = write(tmp_path, project | {"frame_agg": None}, methods=methods | {"first": {"coef_lr": 1}}, search={})
    with pytest.raises(UserError, match=r"(?s)first.seed0 was trained with other settings.*coef_lr"):
        Grid(path)
    shutil.rmtree(tmp_path / "out" / "cells" / "first")
    with pytest.raises(UserError, match=r"same.seed0 was trained with other settings:\n  after is "):
        Grid(path)
    path = write(tmp_path, project | {"frame_agg": None}, methods=methods, search={})
    (grid.of("same", None)[0].folder / "result.json").unlink()
    with pytest.raises(UserError, match=r"same.seed0 was begun from weights that are gone; delete it"):
        Grid(path)


def test_weights_that_do_not_fit_fail_the_part_that_goes_on_from_them(project: Project, tmp_path: Path) -> None:
    on = {"after": "first", "peft": {"method": "full"}}
    methods = {"first": METHODS["full"], "wider": on | {"hidden_dim": 128}, "fits": on}
    path = write(tmp_path, project | {"num_epochs": 1}, methods=methods, seeds=1, search={})
    assert main(["compare", str(path)]) == 1
    found = {name: Grid(path).of(name, None)[0].result()["failed"] for name in methods}
    assert "does not fit the model" in found.pop("wider") and set(found.values()) == {None}
    shutil.rmtree(Grid(path).of("fits", None)[0].folder)
    Grid(path).of("first", None)[0].weights.unlink()
    with pytest.raises(UserError, match=r"first.seed0.best\.safetensors, which was not kept; delete"):
        Grid(path)


def test_a_part_whose_first_part_failed_fails_with_it(project: Project, tmp_path: Path) -> None:
    methods = {"first": METHODS["full"] | {"coef_lr": 1e38}, "second": {"after": "first"}}
    path = write(tmp_path, project | {"num_epochs": 1}, methods=methods, seeds=1, search={})
    assert main(["compare", str(path)]) == 1
    assert "FAILED with every value: first, seed 0 failed" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize(("keys", "recipe", "message"), [
    ({"method": {}}, {}, r"grid\.json: unknown setting method; did you mean methods"),
    ({"seeds": 0}, {}, r"grid\.json: seeds is 0"),
    ({"methods": {}}, {}, r"methods is \{\}"),
    ({"methods": {"a": {}, "A": {}}}, {}, "upper and lower case"),
    ({"methods": {"a/b": {}}}, {}, 'methods has "a/b", but a name is also that of a folder'),
    ({"methods": {"a": {"peft": {"method": "lora", "config": {"rnk": 1}}}}}, {}, r"methods\.a.*rnk.*peft.config.rank"),
    ({"methods": {"a": {"peft": {"method": "loora"}}}}, {}, r"methods\.a.*peft\.method is \"loora\""),
    ({"methods": {"a": {"seed": 1}}}, {}, r"methods\.a cannot set seed"),
    ({"methods": {"a": {}, "b": {"num_epochs": 7}}}, {}, "num_epochs is 2 for a, but 7 for b"),
    ({"methods": {"a": {}, "b": {"num_epochs": 7}}, "vary": ["batch_size"]}, {}, "or name it in vary"),
    ({"vary": ["test_annot"]}, {}, r"vary\[0\] is \"test_annot\""),
    ({"methods": {"b": {"after": "a"}, "a": {}}}, {}, r'methods\.b\.after is "a"; none is above it'),
    ({"methods": {"a": {}, "b": {"after": "c"}}}, {}, r'methods\.b\.after is "c"; it must be .* above it: a'),
    ({"methods": {"a": {}, "b": {"after": "a"}}}, {}, r"several values of coef_lr are tried; set methods\.a\.coef_lr"),
    ({"methods": {"a": {"resume": "run"}}}, {}, r'methods\.a.*has resume; .* give its name as "after"'),
    ({"reference": "lora"}, {}, r'reference is "lora"; it must be one of full, heads only'),
    ({"search": {"coef_lr": [1, 1]}}, {}, "a list of different values"),
    ({"search": {"coef_lt": [1]}}, {}, r"search\.coef_lt.*unknown setting coef_lt; did you mean coef_lr"),
    ({}, {"top_q": 1}, r"grid\.json: recipe: unknown setting top_q"),
    ({}, {"test_annot": None}, "test_annot is missing"),
    ({}, {"val_annot": None}, "val_annot is required"),
    ({}, {"do_inference": True}, "do_inference; leave it out"),
    ({}, {"clip_weights": "nowhere"}, "clip_weights nowhere"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_any_work(
    keys: Project, recipe: Project, message: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, project | recipe, **keys)
    assert main(["compare", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_method_that_the_model_does_not_allow_is_refused_before_any_cell(project: Project, tmp_path: Path) -> None:
    idle = {"peft": {"method": "lora", "config": {"layers": [7]}}}
    path = write(tmp_path, project, methods={"full": METHODS["full"], "far": idle})
    with pytest.raises(UserError, match=r"methods\.far: .*block 7"):
        run_grid(Grid(path), lambda _: "")
    assert not (tmp_path / "out").exists()


def test_the_shipped_grids_need_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    grid = Grid(Path("cfgs/compare-demo.json"))
    assert len(grid.methods) == 10 and grid.size == 9 * (6 + 4) + 5
    full, heads = grid.searching("full")[0].config, grid.searching("heads only")[0].config
    assert (full.peft.method, full.freeze_layer_num, full.freeze_clip) == ("full", -1, False)
    assert heads.freeze_clip and len(grid.searching("heads only")) == 1, "it sets coef_lr, which nothing uses"
    assert grid.searching("lora+bitfit")[0].config.peft.method == "joined"
    assert grid.reference == "full"
    towers = Grid(Path("cfgs/compare-towers.json"))
    assert len(towers.methods) == 10 and len({cell.config.tower.method for cell in towers.cells.values()}) == 5
    assert {cell.method for cell in towers.cells.values() if cell.config.use_policy} == {
        name for name in towers.methods if name.endswith("Hard-Top-k")
    }


def test_cells_of_a_version_without_a_setting_are_taken(whole: Path) -> None:
    result = next(iter(Grid(whole).cells.values())).folder / "result.json"
    content = result.read_text()
    older = json.loads(content)
    del older["settings"]["policy_size"], older["settings"]["peft"]["config"]["towers"]
    result.write_text(json.dumps(older))
    try:
        assert len(Grid(whole).finished()) == 6
    finally:
        result.write_text(content)


def test_cells_of_other_settings_are_not_mixed_in(whole: Path, recipe: Project) -> None:
    path = write(whole.parent, recipe | {"top_k": 3})
    try:
        with pytest.raises(UserError, match=r"top_k is 3 here, but 2 there\n.*another output_dir, or delete"):
            Grid(path)
    finally:
        write(whole.parent, recipe)
    assert len(Grid(whole).finished()) == 6
