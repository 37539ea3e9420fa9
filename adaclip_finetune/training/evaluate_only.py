"""What does not train: the evaluation of a checkpoint, or of CLIP itself (`--do_inference`), and `--dry_run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.tasks.base import Report
from adaclip_finetune.training import measure
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import StopSignals


def evaluate_only(config: Config, folder: Path | None = None) -> Report:
    """Return the report of `config.resume` on test_annot, or of zero-shot without a checkpoint.

    `folder` is the run folder of an interrupted evaluation to continue. Raise UserError, and Interrupted after Ctrl-C
    or SIGTERM, when the finished batches are saved.
    """
    with memory_explained(config), StopSignals(), RunFolder(config) as run:
        if folder is not None:
            run.lock(folder)
        accelerator = make_accelerator(config)
        split = measure.read_split(config, config.test_annot, run, "test")
        set_seed(config.seed)
        session = open_model(config, accelerator=accelerator, learn=False)
        config = session.config
        run.say(session.describe())
        measure.say_cut(session.loaded, config, split, "test", run)
        measure.refuse_missing_models(config)
        if folder is None:
            run.open(config, session.where())
        else:
            run.reopen(folder, step=0, size=0)
            run.say(f"resuming {folder}")
        run.record("parameters", 0, **session.parameters.as_dict(), gflops=session.gflops.as_dict())
        baseline = measure.zero_shot(session, split, "test", run)
        rows = {} if baseline is None else {"zero-shot": baseline}
        if session.checkpoint is not None:
            rows[session.checkpoint.path.name], task = measure.measure_once(session, split, "test", run)
        else:
            task = measure.build_task(config, split, session.loaded, session.model, "test")
            run.say("without --resume FILE, this is CLIP as it is")
            adapts = config.adaptation.method != "none"
            if adapts and (adapted := measure.zero_shot(session, split, "test", run, adapted=True)):
                rows[f"zero-shot, {config.adaptation.method}"] = adapted
        report = list(rows.values())[-1]
        measure.draw_confusion(report, run)
        measure.write_captions(report, run)
        measure.write_similarity(config, report, run)
        run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
        run.say(f"\n{task.table({name: row.figures for name, row in rows.items()})}\n{task.gallery(report)}")
        run.drop_unfinished()
        return report


def dry_run(config: Config, as_json: bool) -> dict[str, Any]:
    """Print what a run would learn, cost and take, as text or as a JSON object on stdout, and return that object.

    Weights that are not on disk are not downloaded; the model is then built without values. Raise UserError.
    """
    run = RunFolder(config.model_copy(update={"no_output": True}), stream=sys.stderr if as_json else sys.stdout)
    session = open_model(config, values="meta", learn=not config.do_inference)
    config, steps = session.config, 0
    if not config.do_inference:
        plan = measure.readable_train_split(config, run).plan
        steps = sum(
            phase.num_epochs * plan.updates(phase.batch_size, config.gradient_accumulation_steps)
            for phase in session.method.phases(config.num_epochs, config.batch_size)
        )
    for annotation in sorted(filter(None, {config.test_annot, None if config.do_inference else config.val_annot})):
        split = measure.read_split(config, annotation, run, annotation)
        kinds = f"{len(split.classes)} classes" if split.classes else f"{len(split.queries.texts)} captions"
        run.say(f"{annotation}: {kinds}, {len(split.queries.video_ids)} videos")
    found = {"parameters": session.parameters.as_dict(), "gflops": session.gflops.as_dict(), "steps": steps}
    if as_json:
        print(json.dumps(found))
    else:
        run.say(f"{config.peft.method}\n{session.parameters}\n{session.gflops}\n{steps} updates")
    return found
