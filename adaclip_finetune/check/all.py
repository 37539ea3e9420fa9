"""All checks of a run, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.check.captions import check_captions
from adaclip_finetune.check.cost import check_cost
from adaclip_finetune.check.finding import Finding
from adaclip_finetune.check.model import build_trial_model, load_tokenizer
from adaclip_finetune.check.overlap import check_overlap
from adaclip_finetune.check.sheet import draw_sheet
from adaclip_finetune.check.source import Split, refused_entries
from adaclip_finetune.check.videos import check_videos
from adaclip_finetune.config import Config
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.errors import UserError


def check(config: Config, splits: Sequence[Split], deep: bool, estimate: bool, sheet: Path | None) -> list[Finding]:
    """`estimate`: measure what training would take, too; `sheet`: draw a few videos there. Raises UserError for what
    makes a check impossible."""
    stores = [open_store(config, split.videos) for split in splits]
    findings = list(refused_entries(splits))
    readable = []
    for split, store in zip(splits, stores, strict=True):
        found, good = check_videos(split, store, config, deep)
        findings += found
        readable.append(good)
    findings += check_overlap(splits)
    tower = None
    trains = estimate and not config.do_inference and splits[0].trains
    try:
        trial = build_trial_model(config) if trains and readable[0] else None
        tower = trial.loaded if trial else load_tokenizer(config)
        if trial is not None:
            findings += check_cost(trial, splits, stores[0], readable[0])
    except UserError as error:
        findings.append(Finding("fails", "model", "run", str(error)))
    for split in splits:
        findings += check_captions(split, config, tower)
    if sheet is not None:
        count = draw_sheet(sheet, list(zip(splits, stores, readable, strict=True)), config)
        if count:
            findings.append(Finding("fine", "sheet", "run", f"{sheet} shows {count} videos"))
        else:
            findings.append(Finding("warning", "sheet", "run", f"{sheet} is not drawn: there is nothing to show"))
    return findings
