"""`--resume <run folder>`: whether that run can go on, and with the data that it began with."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from adaclip_finetune.check.finding import Finding
from adaclip_finetune.check.source import Split
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.queries import evaluation_queries, fingerprint, train_entries
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import is_alive
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.training.session import Session
from adaclip_finetune.training.snapshot import load_snapshot
from adaclip_finetune.weights.plain import strict_load


def check_folder(folder: Path) -> Iterator[Finding]:
    """A run would be refused where another one has the folder, or where it is finished."""
    if (folder / "metrics.json").exists():
        message, best = f"resume: what ran in {folder} is finished (metrics.json)", folder / "best.safetensors"
        advice = f"to train on from its weights, begin a new run: --resume {best}" if best.exists() else ""
        yield Finding("fails", "finished", "run", message, advice=advice)
    lock = folder / "lock.json"
    if not lock.exists():
        return
    try:
        owner = read_json(lock)
        here = owner["host"] == socket.gethostname()
        held = not here or is_alive(owner)
    except (UserError, KeyError, TypeError):
        message = f"resume: {lock} is no lock of a run"
        yield Finding("fails", "locked", "run", message, advice="if no run is going on there, delete it")
        return
    if held:
        where = "this machine" if here else f"{owner['host']}; whether that still runs cannot be told from here"
        message = f"resume: {folder} is being written by process {owner['pid']} on {where}"
        advice = "wait for it, or stop it" if here else f"if it does not, delete {lock}"
        yield Finding("fails", "locked", "run", message, advice=advice)


def check_data(
    folder: Path, trial: Session, splits: Sequence[Split], opened: Sequence[Sequence[str]]
) -> Iterator[Finding]:
    """What was saved, put into the model, and the data of then against that of now. `opened`: of each split
    the videos that a run begins with.

    Raises UserError where the snapshot cannot be read, or does not fit the model.
    """
    snapshot = load_snapshot(folder)
    if snapshot is None:
        message = f"resume: nothing was saved yet in {folder}, so the run goes on from the beginning"
        yield Finding("fine", "going_on", "run", message)
        return
    strict_load(trial.model, snapshot.group("model"), f"resume: update {snapshot.step}")
    if any(split.problems for split in splits):  # told already, and sure to change the data
        return
    readable = [_those(split, set(names)) for split, names in zip(splits, opened, strict=True)]
    concat = trial.config.concat_captions
    # As in a run: without a test annotation, and where they are one file, validation stands for both.
    validation, test = (evaluation_queries(videos, concat) for videos in (readable[1], readable[-1]))
    data = fingerprint(train_entries(readable[0], concat), validation=validation, test=test)
    changed = [part for part, digest in data.items() if snapshot.values["data"][part] != digest]
    if changed:
        message = (
            f"resume: the {' and '.join(changed)} data is not what the run in {folder} began with: other captions, "
            "other videos, or others that can be read"
        )
        advice = "bring the old back, or begin a new run from its weights"
        yield Finding("fails", "other_data", "run", message, advice=advice)
    else:
        yield Finding("fine", "going_on", "run", f"resume: {folder} goes on after update {snapshot.step}")


def _those(split: Split, opened: set[str]) -> list[VideoAnnotation]:
    return [video for video in split.videos if video.video_id in opened]
