"""`evaluate_only`: the figures of a checkpoint, or of CLIP itself."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.evaluate import EvaluationResult
from adaclip_finetune.training.build import build_session, say_cut
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.ending import ending_well
from adaclip_finetune.training.measure import EMBEDDINGS, measure_once, read_split, zero_shot
from adaclip_finetune.training.outcome import say_table, write_similarity
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals


def evaluate_only(config: Config, folder: Path | None = None) -> EvaluationResult:
    """Figures of `resume` on test_annot; of CLIP itself, zero-shot, where no checkpoint is given. `folder`: go on with
    the evaluation that was interrupted there.

    Raises UserError, and Interrupted after Ctrl-C or SIGTERM, when what was embedded is saved.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config)
    with StopSignals(), ending_well(run):
        return _evaluate_only(config, run, accelerator, folder)


def _evaluate_only(config: Config, run: RunFolder, accelerator: Accelerator, folder: Path | None) -> EvaluationResult:
    if folder is not None:
        run.lock(folder)
    split = read_split(config, config.test_annot, run, "test")
    session = build_session(config, run, accelerator)
    say_cut(session.loaded, split.queries.texts, config.max_txt_len, "test", run)
    if folder is None:
        session.open_folder()
    else:
        run.reopen(folder, step=0, size=0)
        run.say(f"going on with {folder}")
        session.record()
    baseline = zero_shot(session, split, "test")
    rows = {} if baseline is None else {"zero-shot": baseline}
    if config.resume:
        rows[Path(config.resume).name] = measure_once(session, split, "test")
    else:
        run.say("no --resume FILE, so this is CLIP as it is")
    result = list(rows.values())[-1]
    run.say()
    say_table({name: row.metrics for name, row in rows.items()}, result, run)
    write_similarity(config, result, run)
    run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
    run.drop(EMBEDDINGS)
    return result
