"""Evaluate a checkpoint, or CLIP itself, on test_annot (`--do_inference`)."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import set_seed

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.tasks.base import Report
from adaclip_finetune.training.data import read_split, say_cut
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.measure import build_task, measure_once, write_similarity, zero_shot
from adaclip_finetune.training.memory import sizes_explained
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import StopSignals


def evaluate_only(config: Config, folder: Path | None = None) -> Report:
    """Return the report of `config.resume` on test_annot, or of zero-shot without a checkpoint.

    `folder` is the run folder of an interrupted evaluation to continue. Raise UserError, and Interrupted after Ctrl-C
    or SIGTERM, when the finished batches are saved.
    """
    with sizes_explained(config), StopSignals(), RunFolder(config) as run:
        if folder is not None:
            run.lock(folder)
        accelerator = make_accelerator(config)
        split = read_split(config, config.test_annot, run, "test")
        set_seed(config.seed)
        session = open_model(config, accelerator=accelerator, learn=False)
        config = session.config
        run.say(session.describe())
        say_cut(session.loaded, split.queries.texts, config.max_txt_len, "test", run)
        if folder is None:
            run.open(config, session.where())
        else:
            run.reopen(folder, step=0, size=0)
            run.say(f"resuming {folder}")
        run.record("parameters", 0, **session.parameters.as_dict(), gflops=session.gflops.as_dict())
        baseline = zero_shot(session, split, "test", run)
        rows = {} if baseline is None else {"zero-shot": baseline}
        if session.checkpoint is not None:
            rows[session.checkpoint.path.name], task = measure_once(session, split, "test", run)
        else:
            task = build_task(config, split, session.loaded, session.model, "test")
            run.say("without --resume FILE, this is CLIP as it is")
            if config.adaptation.method != "none" and (adapted := zero_shot(session, split, "test", run, adapted=True)):
                rows[f"zero-shot, {config.adaptation.method}"] = adapted
        report = list(rows.values())[-1]
        write_similarity(config, report, run)
        run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
        run.say(f"\n{task.table({name: row.figures for name, row in rows.items()})}\n{task.gallery(report)}")
        run.drop_unfinished()
        return report
