"""`adaclip predict`: its answers are the sorted rows of the similarity matrix; its vectors give the scores."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import Project, matrix_of, trained_run
from safetensors import safe_open

from adaclip_finetune.cli import main


@pytest.fixture(scope="module")
def run(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(project, tmp_path_factory.mktemp("predict") / "work", concat_captions="indep-all")


def saved_by(run: Path) -> tuple[np.ndarray, dict[str, Any]]:
    path = matrix_of(run)
    return np.load(path), json.loads(path.with_suffix(".json").read_text())


def predicted(*words: object, output: Path) -> list[dict[str, Any]]:
    assert main(["predict", *map(str, words), "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.rstrip("\n").split("\n")] if output.suffix == ".jsonl" else []


def test_the_best_videos_are_those_of_the_matrix(run: Path, project: Project, tmp_path: Path) -> None:
    matrix, ids = saved_by(run)
    lines = predicted(run, "--annot", project["test_annot"], "-k", 3, output=tmp_path / "found.jsonl")
    assert [line["query"] for line in lines] == ids["queries"]
    for line, row in zip(lines, matrix, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert [found["video"] for found in line["videos"]] == [ids["videos"][place] for place in best]
        assert [found["score"] for found in line["videos"]] == pytest.approx(row[best], abs=1e-5)
    predicted(run, "--annot", project["test_annot"], "-k", 100, output=tmp_path / "found.csv")
    with (tmp_path / "found.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == matrix.size and {row["query"] for row in rows[:8]} == {ids["queries"][0]}
    assert [row["rank"] for row in rows[:8]] == [str(number) for number in range(1, 9)]
    assert [float(row["score"]) for row in rows[:8]] == pytest.approx(sorted(matrix[0], reverse=True), abs=1e-5)


def test_own_queries_and_vectors(
    run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix, ids = saved_by(run)
    queries, vectors = tmp_path / "q.txt", tmp_path / "v.safetensors"
    asked = [ids["queries"][5], 'ein "Tüpfel",\x0brot\u2028und rund', ids["queries"][2]]
    queries.write_text(f"{asked[0]}\n\n  {asked[1]}\r\n{asked[2]}", encoding="utf-8")
    words = [run, "--annot", project["test_annot"], "--queries", queries, "-k", 8, "--save-embeddings", vectors]
    lines = predicted(*words, output=tmp_path / "found.jsonl")
    assert "queries: 3, the best 8 of 8 videos" in capsys.readouterr().out
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


def test_vectors_that_depend_on_the_query_are_saved_as_frames(project: Project, tmp_path: Path) -> None:
    run = trained_run(project, tmp_path / "work", frame_agg="qscore", num_epochs=1)
    matrix, ids = saved_by(run)
    vectors = tmp_path / "v.safetensors"
    words = [run, "--annot", project["test_annot"], "-k", 1, "--save-embeddings", vectors]
    lines = predicted(*words, output=tmp_path / "found.jsonl")
    assert [line["videos"][0]["video"] for line in lines] == [ids["videos"][place] for place in matrix.argmax(axis=1)]
    with safe_open(vectors, framework="np") as file:
        assert file.get_tensor("videos").shape == (8, project["top_k"], 64)
        assert file.metadata()["per_query"] == "true"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--annot TEST --output x.txt", "must end in .jsonl or .csv"),
        ("--annot TEST --output x.csv -k 0", "-k 0"),
        ("--annot TEST --output x.csv --save-embeddings x.npy", "must end in .safetensors"),
        ("--annot TEST --output x.csv --queries BLANK", "holds no query"),
        ("--annot TEST --output x.csv --queries LATIN", "not UTF-8 at byte 1"),
        ("--annot COPY --output x.csv --save-embeddings BESIDE", "its ids COPY: this file is read"),
    ],
)
def test_refusals(
    words: str, told: str, run: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"TEST": project["test_annot"]}
    annotation = Path(project["test_annot"]).read_bytes()
    contents = {"BLANK": b" \n\n", "LATIN": b"t\xfcr\n", "COPY": annotation}
    for name, content in contents.items():
        names[name] = tmp_path / f"{name}.json"
        names[name].write_bytes(content)
    names["BESIDE"] = tmp_path / "COPY.safetensors"
    capsys.readouterr()
    assert main(["predict", str(run), *[str(names.get(word, word)) for word in words.split()]]) == 2
    captured = capsys.readouterr()
    assert told.replace("COPY", str(names["COPY"])) in captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert names["COPY"].read_bytes() == annotation
