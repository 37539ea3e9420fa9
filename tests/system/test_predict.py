"""`adaclip predict`: its answers are the rows of the similarity matrix, sorted; its vectors give the scores."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import Project, trained_run
from safetensors import safe_open

from adaclip_finetune.cli import main


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(project, tmp_path_factory.mktemp("predict") / "work", concat_captions="indep-all")


def matrix_of(run: Path) -> tuple[np.ndarray, dict[str, Any]]:
    path = run.parents[2] / "test.npy"
    return np.load(path), json.loads(path.with_suffix(".json").read_text())


def predicted(*words: object, output: Path) -> None:
    assert main(["predict", *map(str, words), "--output", str(output)]) == 0


def test_the_best_videos_are_those_of_the_matrix(run: Path, project: Project, tmp_path: Path) -> None:
    matrix, ids = matrix_of(run)
    output = tmp_path / "found.jsonl"
    predicted(run, "--annot", project["test_annot"], "-k", 3, output=output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["query"] for line in lines] == ids["queries"]
    for line, row in zip(lines, matrix, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert [found["video"] for found in line["videos"]] == [ids["videos"][place] for place in best]
        assert [found["score"] for found in line["videos"]] == pytest.approx(row[best], abs=1e-5)


def test_csv_and_more_videos_than_there_are(run: Path, project: Project, tmp_path: Path) -> None:
    matrix, ids = matrix_of(run)
    output = tmp_path / "found.csv"
    predicted(run, "--annot", project["test_annot"], "-k", 100, output=output)
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == matrix.size
    first = rows[: len(ids["videos"])]
    assert [row["rank"] for row in first] == [str(number) for number in range(1, 9)]
    assert {row["query"] for row in first} == {ids["queries"][0]}
    assert [float(row["score"]) for row in first] == pytest.approx(sorted(matrix[0], reverse=True), abs=1e-5)


def test_own_queries_and_vectors(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix, ids = matrix_of(run)
    queries, output, vectors = tmp_path / "q.txt", tmp_path / "found.jsonl", tmp_path / "v.safetensors"
    asked = [ids["queries"][5], 'ein "Tüpfel",\x0brot\u2028und rund', ids["queries"][2]]
    queries.write_text(f"{asked[0]}\n\n  {asked[1]}\r\n{asked[2]}", encoding="utf-8")
    words = [run, "--annot", project["test_annot"], "--queries", queries, "-k", 8, "--save-embeddings", vectors]
    predicted(*words, output=output)
    assert "3 queries, the best 8 of 8 videos" in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [line["query"] for line in lines] == asked
    with safe_open(vectors, framework="np") as file:
        texts, videos, scale = file.get_tensor("queries"), file.get_tensor("videos"), float(file.metadata()["scale"])
    named = json.loads(vectors.with_suffix(".json").read_text(encoding="utf-8"))
    assert named == {"queries": asked, "videos": ids["videos"]}
    assert np.linalg.norm(texts, axis=1) == pytest.approx(1) and np.linalg.norm(videos, axis=1) == pytest.approx(1)
    scores = scale * texts @ videos.T
    assert scores[0] == pytest.approx(matrix[5], abs=1e-4) and scores[2] == pytest.approx(matrix[2], abs=1e-4)
    for line, row in zip(lines, scores, strict=True):
        told = {found["video"]: found["score"] for found in line["videos"]}
        assert [told[name] for name in named["videos"]] == pytest.approx(row, abs=1e-4)


def test_videos_that_depend_on_the_query(project: Project, tmp_path: Path) -> None:
    run = trained_run(project, tmp_path / "work", frame_agg="qscore", num_epochs=1)
    matrix, ids = matrix_of(run)
    output, vectors = tmp_path / "found.jsonl", tmp_path / "v.safetensors"
    predicted(run, "--annot", project["test_annot"], "-k", 1, "--save-embeddings", vectors, output=output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["videos"][0]["video"] for line in lines] == [ids["videos"][place] for place in matrix.argmax(axis=1)]
    with safe_open(vectors, framework="np") as file:
        assert file.get_tensor("videos").shape == (8, project["top_k"], 64)
        assert file.metadata()["per_query"] == "true"


def test_an_annotation_is_not_overwritten(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation = tmp_path / "test.json"
    annotation.write_text(Path(project["test_annot"]).read_text())
    words = [run, "--annot", annotation, "--output", tmp_path / "x.csv"]
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--save-embeddings", str(tmp_path / "test.safetensors")]) == 2
    told = capsys.readouterr().err
    assert f"the ids beside --save-embeddings, {annotation}: is read by the same command" in told
    assert annotation.read_text() == Path(project["test_annot"]).read_text() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "--annot", "TEST", "--output", "x.txt"], "must end in .jsonl or .csv"),
        (["RUN", "--annot", "TEST"], "--output"),
        (["RUN", "--output", "x.csv"], "--annot"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "-k", "0"], "-k 0: must be a whole number >= 1"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "-k", "ten"], "invalid int value"),
        (["RUN", "--annot", "TEST", "--output", "no/folder/x.csv"], "no such folder to write into"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "--save-embeddings", "x.npy"], "must end in .safetensors"),
        (["RUN", "--annot", "none.json", "--output", "x.csv"], "--annot none.json: there is no such file"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "--queries", "none.txt"], "none.txt: there is no such file"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "--queries", "BLANK"], "holds no query"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "--queries", "LATIN"], "not UTF-8 at byte 1"),
        (["RUN", "--annot", "TEST", "--output", "x.csv", "--queries", "LONG"], "line 2: has 10,001 letters"),
        (
            ["RUN", "--annot", "TEST", "--output", "x.csv", "--save-embeddings", "WEIGHTS"],
            "would write into the run folder",
        ),
    ],
)
def test_refusals(
    words: list[str], told: str, run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"BLANK": b" \n\n", "LATIN": b"t\xfcr\n", "LONG": b"a\n" + b"a" * 10_001}
    names: dict[str, Any] = {"RUN": run, "TEST": project["test_annot"], "WEIGHTS": run / "best.safetensors"}
    for name, content in contents.items():
        names[name] = tmp_path / f"{name}.txt"
        names[name].write_bytes(content)
    capsys.readouterr()
    assert main(["predict", *[str(names.get(word, word)) for word in words]]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "Traceback" not in captured.err and captured.out == ""
