"""A trained run of the `project` fixture, and `adaclip evaluate` on it, for the tests of evaluate and predict."""

import json
from pathlib import Path
from typing import Any

from adaclip_finetune.cli import main

Project = dict[str, Any]


def only_run(output: Path) -> Path:
    """Return the one run folder of the `project` below an output_dir."""
    (folder,) = (output / "tiny").iterdir()
    return folder


def trained_run(project: Project, folder: Path, **settings: Any) -> Path:
    """Train for two epochs and return the run folder; the similarity on test_annot is saved as <folder>/test.npy."""
    folder.mkdir(exist_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({**project, "output_dir": str(folder / "output"), **settings}))
    assert main(["train", "--config", str(path), "--save_similarity", str(folder / "test.npy")]) == 0
    return only_run(folder / "output")


def matrix_of(run: Path) -> Path:
    """Return the similarity that `trained_run` saved."""
    return run.parents[2] / "test.npy"


def evaluated(*words: object, folder: Path) -> dict[str, Any]:
    """Return what `adaclip evaluate` writes as JSON."""
    target = folder / "found.json"
    assert main(["evaluate", *map(str, words), "--json", str(target)]) == 0
    content: dict[str, Any] = json.loads(target.read_text())
    return content


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a row that metrics.json has too, without intervals."""
    return {
        direction: {name: value for name, value in row[direction].items() if "95%" not in name}
        for direction in ("t2v", "v2t")
        if row[direction] is not None
    }
