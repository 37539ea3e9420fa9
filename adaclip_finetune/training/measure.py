"""What is measured in a run: zero-shot, and the model as it is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from adaclip_finetune.config import TASKS, Config, implementation
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Report, Task
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import gather_objects
from adaclip_finetune.training.memory import explain_out_of_memory_in_evaluation
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import Session
from adaclip_finetune.weights.loaded import LoadedClip

EMBEDDINGS = "embeddings"
"""Where an evaluation keeps what it has finished, in the run folder, until the run is finished."""


def build_task(config: Config, split: EvaluationSplit, loaded: LoadedClip, model: VideoRetriever, label: str) -> Task:
    """The task that the config names, on a split, for models that see frames as `model` does."""
    task: Task = implementation(TASKS, config.task)(config, split, loaded, model.views(), label)
    return task


def zero_shot(
    session: Session, split: EvaluationSplit, name: str, run: RunFolder, adapted: bool = False
) -> Report | None:
    """Measured with the pretrained towers, before anything learns, and printed first; `adapted`: with the config's
    adaptation.

    None, and said so, only where the model came from a checkpoint and CLIP itself is not at hand.
    """
    config, pretrained, problem = zero_shot_config(session.config), None, ""
    label = "zero-shot"
    if adapted:
        config = config.model_copy(update={"adaptation": session.config.adaptation})
        label = f"zero-shot, {config.adaptation.method}"
    try:
        pretrained = session.pretrained()
    except UserError as error:
        if session.checkpoint is None:
            raise
        problem = str(error)
    # All of the processes measure it, or none.
    problem = next(filter(None, gather_objects(problem)), "")
    if pretrained is None or problem:
        run.say(f"WARNING: zero-shot is NOT measured, CLIP as it was before not being at hand. {problem}")
        return None
    model = VideoRetriever(config, pretrained).to(session.device)
    with closing(build_task(config, split, pretrained, model, f"{label} on {name}")) as task:
        report = measure(session, task, model, run.file(f"{EMBEDDINGS}/{label}"))
        run.say(f"{label} on {name} ({config.num_frm} uniform frames, mean)  {task.one_line(report.figures)}")
    run.record("zero_shot" if not adapted else "zero_shot_adapted", 0, metrics=report.as_dict())
    return report


def measure_once(session: Session, split: EvaluationSplit, name: str, run: RunFolder) -> tuple[Report, Task]:
    """The session's model on a split; finished batches are kept, should the run be stopped. The task is closed."""
    with closing(build_task(session.config, split, session.loaded, session.model, name)) as task:
        return measure(session, task, session.model, run.file(f"{EMBEDDINGS}/{name}")), task


def measure(session: Session, task: Task, model: VideoRetriever, keep: Path | None = None) -> Report:
    """`model` in the session's precision, on its device; memory that does not suffice is told in words."""
    try:
        with session.autocast():
            return task(model, keep)
    except (RuntimeError, MemoryError) as error:
        if explained := explain_out_of_memory_in_evaluation(error, session.config, session.device):
            raise explained from error
        raise
