"""A trained run of the `project` fixture, and commands on it: for the tests of evaluate and predict."""

import json
from pathlib import Path
from typing import Any

from adaclip_finetune.cli import main

Project = dict[str, Any]


def trained_run(project: Project, folder: Path, **settings: Any) -> Path:
    """The run folder of two epochs; its similarity on test_annot lies beside it, in <folder>/test.npy."""
    folder.mkdir(exist_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({**project, "output_dir": str(folder / "output"), **settings}))
    assert main(["train", "--config", str(path), "--save_similarity", str(folder / "test.npy")]) == 0
    (found,) = (folder / "output" / project["dataset"]).iterdir()
    return found


def evaluated(*words: object, folder: Path) -> dict[str, Any]:
    """What `adaclip evaluate` writes as JSON."""
    target = folder / "found.json"
    assert main(["evaluate", *map(str, words), "--json", str(target)]) == 0
    content: dict[str, Any] = json.loads(target.read_text())
    return content


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row, what metrics.json holds too."""
    return {
        direction: {name: value for name, value in row[direction].items() if "95%" not in name}
        for direction in ("t2v", "v2t")
        if row[direction] is not None
    }
