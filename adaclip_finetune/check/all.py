"""All checks of a run, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adaclip_finetune.check.captions import check_captions
from adaclip_finetune.check.cost import check_evaluation_cost, check_training_cost
from adaclip_finetune.check.finding import Finding
from adaclip_finetune.check.going_on import check_data, check_folder
from adaclip_finetune.check.model import build_trial_model, load_tokenizer
from adaclip_finetune.check.overlap import check_overlap
from adaclip_finetune.check.sheet import check_sheet
from adaclip_finetune.check.source import Split, refused_entries
from adaclip_finetune.check.videos import Looked, check_videos
from adaclip_finetune.config import Config
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import Session


@dataclass(frozen=True)
class Request:
    """What is checked. `run`: all that a run with these settings would do, not its files alone; `folder`: that of the
    run that goes on; `deep`: every frame is decoded; `sheet`: where a few videos are drawn."""

    config: Config
    splits: Sequence[Split]
    run: bool
    folder: Path | None = None
    deep: bool = False
    sheet: Path | None = None


def check(request: Request) -> list[Finding]:
    """Raises UserError for what makes a check impossible."""
    config, splits = request.config, request.splits
    stores = [open_store(config, split.videos) for split in splits]
    findings = list(refused_entries(splits))
    refused = [] if request.folder is None else list(check_folder(request.folder))
    findings += refused
    if config.optuna_cfg is not None and request.run:
        findings.append(_search(config))
    looked = [check_videos(split, store, config, request.deep) for split, store in zip(splits, stores, strict=True)]
    findings += [finding for look in looked for finding in look.findings]
    findings += check_overlap(splits)
    tower = None
    try:
        trial = build_trial_model(config) if request.run else None
        tower = trial.loaded if trial else load_tokenizer(config)
        if trial is not None:
            if request.folder is not None and not config.do_inference and not refused:
                findings += check_data(request.folder, trial, splits, [look.opened for look in looked])
            for finding in _cost(trial, request, stores, looked):  # those before an error are told, too
                findings.append(finding)
    except UserError as error:
        findings.append(Finding("fails", "model", "run", str(error)))
        with suppress(UserError):  # the texts may be told all the same
            tower = tower or load_tokenizer(config)
    for split in splits:
        findings += check_captions(split, config, tower)
    if request.sheet is not None:
        shown = [(split, store, look.good) for split, store, look in zip(splits, stores, looked, strict=True)]
        findings.append(check_sheet(request.sheet, shown, config))
    return findings


def _cost(
    trial: Session, request: Request, stores: Sequence[FrameStore], looked: Sequence[Looked]
) -> Iterator[Finding]:
    config, splits = request.config, request.splits
    if config.do_inference:
        yield from check_evaluation_cost(trial, splits[0], request.folder)
    elif looked[0].good:
        yield from check_training_cost(trial, splits, stores[0], looked[0].good, request.folder)


def _search(config: Config) -> Finding:
    import optuna

    from adaclip_finetune.tuning.run import describe

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the sampler is tried out, which is nobody's study
    try:
        return Finding("fine", "search", "run", describe(config)[0])
    except UserError as error:
        return Finding("fails", "search", "run", str(error))
