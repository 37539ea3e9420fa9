"""What is measured in a run: a split, zero-shot, the model as it is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from adaclip_finetune.config import Config
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import EvaluationSplit, evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.evaluate import EvaluationResult, Evaluator, Figures
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import gather_objects
from adaclip_finetune.report import one_line
from adaclip_finetune.training.build import Session
from adaclip_finetune.training.memory import explain_out_of_memory_in_evaluation
from adaclip_finetune.training.run_folder import RunFolder

EMBEDDINGS = "embeddings"
"""Where an evaluation keeps what it has finished, in the run folder, until the run is finished."""


def read_split(config: Config, annotation: str | None, run: RunFolder, name: str) -> EvaluationSplit:
    """The split to evaluate, with an account of what is left out or repeats frames. Raises UserError."""
    assert annotation is not None, "check_paths refuses this"
    split = evaluation_split(config, annotation)
    if split.left_out:
        run.say(f"{name}: evaluated WITHOUT {len(split.left_out)} of {split.num_listed} videos that cannot be read:")
        run.say(listing(split.left_out))
        run.note_missing(split.left_out)
    if split.short:
        run.say(f"{name}: {len(split.short)} videos have fewer than num_frm {config.num_frm} frames and repeat some")
    return split


def is_better(figures: Figures, best: Figures | None) -> bool:
    """Whether these, on validation, make an epoch the best: strictly, so that ties go to the earlier one."""
    return best is None or figures.metrics.t2v.recall(1) > best.metrics.t2v.recall(1)


def zero_shot(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult | None:
    """Measured with the pretrained towers, before anything learns, and printed first.

    None, and said so, only where the model came from a checkpoint and CLIP itself is not at hand.
    """
    config, pretrained, problem = zero_shot_config(session.config), None, ""
    try:
        pretrained = session.pretrained()
    except UserError as error:
        if session.config.resume is None:
            raise
        problem = str(error)
    # All of the processes measure it, or none.
    problem = next(filter(None, gather_objects(problem)), "")
    if pretrained is None or problem:
        session.run.say(f"WARNING: zero-shot is NOT measured, CLIP as it was before not being at hand. {problem}")
        return None
    model = VideoRetriever(config, pretrained).to(session.accelerator.device)
    with closing(Evaluator(split, config, pretrained, f"zero-shot on {name}")) as evaluator:
        result = measure(session, evaluator, model, session.run.file(f"{EMBEDDINGS}/zero-shot"))
    session.run.say(f"zero-shot on {name} ({config.num_frm} uniform frames, mean)  {one_line(result.metrics)}")
    session.run.record("zero_shot", 0, metrics=result.as_dict())
    return result


def measure_once(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult:
    """The session's model on a split; finished batches are kept, should the run be stopped."""
    with closing(Evaluator(split, session.config, session.loaded, name)) as evaluator:
        return measure(session, evaluator, session.model, session.run.file(f"{EMBEDDINGS}/{name}"))


def measure(
    session: Session, evaluator: Evaluator, model: VideoRetriever, keep: Path | None = None
) -> EvaluationResult:
    """`model` in the session's precision, on its device; memory that does not suffice is told in words."""
    try:
        with session.accelerator.autocast():
            return evaluator(model, keep)
    except (RuntimeError, MemoryError) as error:
        device = session.accelerator.device
        if explained := explain_out_of_memory_in_evaluation(error, session.config, device):
            raise explained from error
        raise
