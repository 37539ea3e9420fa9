"""All checks of a run, in order. Nothing is changed: no folder is made, and a run that is resumed is only read."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import optuna

from adaclip_finetune.check.cost import check_cost
from adaclip_finetune.check.data import CheckedSplit, check_captions, check_entries, check_overlap, check_videos
from adaclip_finetune.check.report import Finding
from adaclip_finetune.check.sheet import check_sheet
from adaclip_finetune.config import Config
from adaclip_finetune.data.queries import evaluation_queries, fingerprint, train_entries
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import is_alive
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.training.checkpoint import load_snapshot
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.session import Session, open_model
from adaclip_finetune.tuning.run import describe
from adaclip_finetune.weights.checkpoints import read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip
from adaclip_finetune.weights.plain import strict_load


def check_data(config: Config, splits: Sequence[CheckedSplit], deep: bool, sheet: Path | None) -> list[Finding]:
    """Check annotation files by themselves: entries, videos, overlap and captions."""
    clip: LoadedClip | None = None
    with suppress(UserError):  # without weights or a network, the lengths of captions cannot be checked
        clip = _tokenizer(config)
    return [*_audit(config, splits, deep), *_captions_and_sheet(config, splits, clip, sheet)]


def check_run(
    config: Config, splits: Sequence[CheckedSplit], folder: Path | None, deep: bool, sheet: Path | None
) -> list[Finding]:
    """Check all that a run of `config` would do. `folder` is that of a run that is resumed.

    The model is built as the run builds it, except that weights that would have to be downloaded are random.
    """
    resumed = [] if folder is None else list(_check_folder(folder))
    findings = _audit(config, splits, deep) + resumed
    if config.optuna_cfg is not None:
        findings.append(_check_study(config))
    clip: LoadedClip | None = None
    try:
        session = open_model(
            config, values="random", accelerator=make_accelerator(config), learn=not config.do_inference
        )
        session.method.on_epoch_start(0)
        clip = session.loaded
        if folder is not None and not config.do_inference and not resumed:
            findings += _check_snapshot(folder, session, splits)
        if splits[0].good:
            for finding in check_cost(session, splits, folder):  # keep those before an error
                findings.append(finding)
    except UserError as error:
        findings.append(Finding("fails", "model", "run", str(error)))
        with suppress(UserError):
            clip = clip or _tokenizer(config)
    return [*findings, *_captions_and_sheet(config, splits, clip, sheet)]


def _audit(config: Config, splits: Sequence[CheckedSplit], deep: bool) -> list[Finding]:
    findings = [finding for split in splits for finding in check_entries(split)]
    findings += [finding for split in splits for finding in check_videos(split, config, deep)]
    return [*findings, *check_overlap(splits)]


def _captions_and_sheet(
    config: Config, splits: Sequence[CheckedSplit], clip: LoadedClip | None, sheet: Path | None
) -> Iterator[Finding]:
    for split in splits:
        yield from check_captions(split, config, clip)
    if sheet is not None:
        yield check_sheet(sheet, splits, config)


def _tokenizer(config: Config) -> LoadedClip:
    """Return the CLIP of a run as shapes alone, for its tokenizer. Raise UserError if it cannot be built."""
    if config.resume is None:
        return load_clip(config, with_weights=False)
    checkpoint = read_checkpoint(Path(config.resume))
    return load_clip(with_its_clip(checkpoint, config), with_weights=False, from_checkpoint=checkpoint.towers())


def _check_study(config: Config) -> Finding:
    """Check a hyperparameter study as its run does before the first trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return Finding("fine", "search", "run", describe(config)[0])
    except UserError as error:
        return Finding("fails", "search", "run", str(error))


# ---- a run that is resumed ----


def _check_folder(folder: Path) -> Iterator[Finding]:
    """Yield why a run cannot be resumed in its folder: it is finished, or another process writes there."""
    if (folder / "metrics.json").exists():
        best = folder / "best.safetensors"
        advice = f"to train on from its weights, start a new run: --resume {best}" if best.exists() else ""
        yield Finding("fails", "finished", "run", f"resume: the run in {folder} is finished (metrics.json)", {}, advice)
    lock = folder / "lock.json"
    owner = read_json(lock) if lock.exists() else None
    if owner and (owner["host"] != socket.gethostname() or is_alive(owner)):
        message = f"resume: {folder} is locked by process {owner['pid']} on {owner['host']}"
        yield Finding("fails", "locked", "run", message, advice=f"wait for it; if it is gone, delete {lock}")


def _check_snapshot(folder: Path, session: Session, splits: Sequence[CheckedSplit]) -> Iterator[Finding]:
    """Compare what was saved with the model and the data of now. Raise UserError if the snapshot does not fit."""
    snapshot = load_snapshot(folder)
    if snapshot is None:
        message = f"resume: nothing was saved in {folder} yet, so the run starts from the beginning"
        yield Finding("fine", "resume", "run", message)
        return
    strict_load(session.model, snapshot.group("model"), f"resume: update {snapshot.step}")
    if any(split.refused for split in splits):  # reported already, and sure to change the data
        return
    concat, saved = session.config.concat_captions, snapshot.values["data"]
    # As in a run, validation stands for a test annotation that is missing or is the same file.
    validation, test = (evaluation_queries(split.readable(), concat) for split in (splits[1], splits[-1]))
    now = fingerprint(train_entries(splits[0].readable(), concat), validation=validation, test=test)
    if changed := [part for part, digest in now.items() if saved[part] != digest]:
        message = (
            f"resume: the {' and '.join(changed)} data is not what the run in {folder} began with: other captions, "
            "other videos, or others that can be read"
        )
        advice = "restore the old data, or start a new run from its weights"
        yield Finding("fails", "other_data", "run", message, advice=advice)
    else:
        yield Finding("fine", "resume", "run", f"resume: the run in {folder} continues after update {snapshot.step}")
