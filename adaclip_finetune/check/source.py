"""The annotation files that are checked: their sound entries, and all that is wrong with the others.

`load_annotations` stops at the first entry that it refuses. To hear of all of them without a second opinion on what
is right, it is given halves of the file, and halves of those that it refuses.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaclip_finetune.check.finding import Finding
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

VAL_AND_TEST = "val, test"  # one file for both


@dataclass(frozen=True)
class Split:
    """An annotation file. `trains`: it is learned from, else evaluated; `problems`: why its other entries are
    refused."""

    name: str
    path: str
    trains: bool
    videos: list[VideoAnnotation]
    problems: list[str]


def splits_of_config(config: Config) -> list[Split]:
    """What a run reads, in its order. One file for validation and test is one split."""
    train, val, test = config.train_annot, config.val_annot, config.test_annot
    if config.do_inference:
        wanted = {"test": test}
    elif val and test and Path(val).resolve() == Path(test).resolve():
        wanted = {"train": train, VAL_AND_TEST: test}
    else:
        wanted = {"train": train, "val": val, "test": test}
    return [_read(name, path, name == "train", config) for name, path in wanted.items() if path is not None]


def splits_of_files(paths: Sequence[str], config: Config) -> list[Split]:
    """Files by themselves, named as they are (and as their folder, where that tells them apart); one with `train` in
    this name counts as what is learned from.

    Raises UserError for one that is not there.
    """
    if absent := [path for path in paths if not Path(path).is_file()]:
        raise UserError(f"--annot {absent[0]}: there is no such file in {Path.cwd()}")
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{Path(path).absolute().parent.name}/{name}" for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("--annot: two files have the same name in folders of the same name; rename one")
    return [_read(name, path, "train" in name.lower(), config) for name, path in zip(names, paths, strict=True)]


def refused_entries(splits: Sequence[Split]) -> Iterator[Finding]:
    """A run stops at the first of them."""
    for split in splits:
        if split.problems:
            items = {problem.removeprefix(f"{split.path}: "): "" for problem in split.problems}
            message = f"{len(items)} {'entry is' if len(items) == 1 else 'entries are'} not as the format wants"
            yield Finding("fails", "annotation", split.name, message, items, f"mend {split.path}")


def _read(name: str, path: str, trains: bool, config: Config) -> Split:
    videos, problems = _entries(path)
    subset = config.data_subset if trains else 0
    return Split(name, path, trains, videos[:subset] if subset else videos, problems)


def _entries(path: str) -> tuple[list[VideoAnnotation], list[str]]:
    try:
        return load_annotations(path), []
    except UserError as error:
        first = str(error)
    try:
        content = read_json(path)
    except UserError:  # a name that stands twice, or no JSON at all
        content = None
    if not isinstance(content, dict) or not content:
        return [], [first]
    with tempfile.TemporaryDirectory() as folder:
        return _halves(list(content.items()), path, Path(folder) / "part.json")


def _halves(entries: list[tuple[str, Any]], path: str, part: Path) -> tuple[list[VideoAnnotation], list[str]]:
    part.write_text(json.dumps(dict(entries)), encoding="utf-8")
    try:
        return load_annotations(part), []
    except UserError as error:
        if len(entries) == 1:
            return [], [str(error).replace(str(part), path)]
    middle = len(entries) // 2
    (videos, problems), (more, others) = (_halves(half, path, part) for half in (entries[:middle], entries[middle:]))
    return videos + more, problems + others
