"""The annotation files that are checked: their sound entries, and all that is wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaclip_finetune.check.finding import Finding
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation, sound_entries
from adaclip_finetune.errors import UserError

_LEARNED_FROM = {"train", "training", "trainval"}


@dataclass(frozen=True)
class Split:
    """An annotation file. `trains`: it is learned from, else evaluated; `problems`: why its other entries are
    refused; `chosen_and_judged`: it is both validation and test."""

    name: str
    path: str
    trains: bool
    videos: list[VideoAnnotation]
    problems: list[str]
    chosen_and_judged: bool = False


def splits_of_config(config: Config) -> list[Split]:
    """What a run reads, in its order. One file for validation and test is one split."""
    train, val, test = config.train_annot, config.val_annot, config.test_annot
    if config.do_inference:
        wanted = {"test": test}
    elif val and test and Path(val).resolve() == Path(test).resolve():
        assert train is not None, "check_paths refuses this"
        both = replace(_read("val, test", test, False, config), chosen_and_judged=True)
        return [_read("train", train, True, config), both]
    else:
        wanted = {"train": train, "val": val, "test": test}
    return [_read(name, path, name == "train", config) for name, path in wanted.items() if path is not None]


def splits_of_files(paths: Sequence[str], config: Config) -> list[Split]:
    """Files by themselves, named as they are (and as their folder, where that tells them apart); one with the word
    `train` in this name counts as what is learned from.

    Raises UserError for one that is not there, or is given twice.
    """
    if absent := [path for path in paths if not Path(path).is_file()]:
        raise UserError(f"--annot {absent[0]}: there is no such file in {Path.cwd()}")
    places = [Path(path).resolve() for path in paths]
    if again := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"--annot {again[-1]}: this file is given twice")
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{Path(path).absolute().parent.name}/{name}" for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("--annot: two files have the same name in folders of the same name; rename one")
    return [_read(name, path, _is_learned_from(name), config) for name, path in zip(names, paths, strict=True)]


def refused_entries(splits: Sequence[Split]) -> Iterator[Finding]:
    """A run stops at the first of them."""
    for split in splits:
        if split.problems:
            items = {problem.removeprefix(f"{split.path}: "): "" for problem in split.problems}
            message = f"{len(items)} {'entry is' if len(items) == 1 else 'entries are'} not as the format wants"
            yield Finding("fails", "annotation", split.name, message, items, f"mend {split.path}")


def _is_learned_from(name: str) -> bool:
    """`msrvtt_train9k` is, `restrained` and `constraints` are not."""
    return not _LEARNED_FROM.isdisjoint(re.findall("[a-z]+", name.lower()))


def _read(name: str, path: str, trains: bool, config: Config) -> Split:
    videos, problems = _entries(path)
    subset = config.data_subset if trains else 0
    return Split(name, path, trains, videos[:subset] if subset else videos, problems)


def _entries(path: str) -> tuple[list[VideoAnnotation], list[str]]:
    try:
        return sound_entries(path)
    except UserError as error:
        return [], [str(error)]
