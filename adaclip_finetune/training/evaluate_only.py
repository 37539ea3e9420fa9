"""`evaluate_only`: the figures of a checkpoint, or of CLIP itself."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import set_seed

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.tasks.base import Report
from adaclip_finetune.training.data import read_split, say_cut
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.ending import ending_well
from adaclip_finetune.training.measure import EMBEDDINGS, build_task, measure_once, zero_shot
from adaclip_finetune.training.outcome import write_similarity
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.weights.checkpoints import describe


def evaluate_only(config: Config, folder: Path | None = None) -> Report:
    """Figures of `resume` on test_annot; of CLIP itself, zero-shot, where no checkpoint is given. `folder`: continue
    the evaluation that was interrupted there.

    Raises UserError, and Interrupted after Ctrl-C or SIGTERM, when what was embedded is saved.
    """
    run = RunFolder(config)
    with StopSignals(), ending_well(run):
        if folder is not None:
            run.lock(folder)
        return _evaluate_only(config, run, folder)


def _evaluate_only(config: Config, run: RunFolder, folder: Path | None) -> Report:
    accelerator = make_accelerator(config)
    split = read_split(config, config.test_annot, run, "test")
    set_seed(config.seed)
    session = open_model(config, accelerator=accelerator, learn=False)
    if session.checkpoint is not None:
        run.say(describe(session.checkpoint, session.config))
    run.say(session.describe())
    say_cut(session.loaded, split.queries.texts, config.max_txt_len, "test", run)
    if folder is None:
        run.open(session.config, session.where())
    else:
        run.reopen(folder, step=0, size=0)
        run.say(f"going on with {folder}")
    run.record("parameters", 0, **session.parameters.as_dict(), gflops=session.gflops.as_dict())
    baseline = zero_shot(session, split, "test", run)
    rows = {} if baseline is None else {"zero-shot": baseline}
    if session.checkpoint is not None:
        rows[session.checkpoint.path.name], task = measure_once(session, split, "test", run)
    else:
        task = build_task(session.config, split, session.loaded, session.model, "test")
        run.say("no --resume FILE, so this is CLIP as it is")
        if session.config.adaptation.method != "none":
            adapted = zero_shot(session, split, "test", run, adapted=True)
            rows |= {} if adapted is None else {f"zero-shot, {session.config.adaptation.method}": adapted}
    report = list(rows.values())[-1]
    run.say()
    run.say(task.table({name: row.figures for name, row in rows.items()}))
    run.say(task.gallery(report))
    write_similarity(session.config, report, run)
    run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
    run.drop(EMBEDDINGS)
    return report
