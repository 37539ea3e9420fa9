"""What a run reads and measures: its splits, CLIP before it learns (zero-shot), the model as it is, and the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adaclip_finetune.config import TASKS, Config, implementation
from adaclip_finetune.data.batches import Neighbours
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.frame_vectors import FrameVectors
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.queries import TrainEntry
from adaclip_finetune.data.splits import EvaluationSplit, TrainSplit, evaluation_split, train_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation import build_adaptation
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.tasks.base import Figures, Report, Task
from adaclip_finetune.evaluation.tasks.captioning import CaptioningReport
from adaclip_finetune.evaluation.tasks.classification import ClassificationReport
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, save_similarity
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.zero_shot import zero_shot_config
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.processes import copy_from_main, gather_objects
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import Session, open_other
from adaclip_finetune.weights.loaded import LoadedClip


def train_loader(session: Session, split: TrainSplit) -> TrainLoader:
    """Return the loader of training batches for the model and the objective of a session."""
    config, entries = session.config, split.entries
    listed = isinstance(entries, list)  # JSON Lines and tar shards are not read as a whole before training
    if config.uses_auxiliary and listed and not any(entry.auxiliary for entry in entries):
        raise UserError(
            f"objective auxiliary_captions: no training video of {config.train_annot} has an auxiliary caption.\n"
            'Give captions under the key "auxiliary", or take objective.config.loss v_s, which needs none'
        )
    again = session.objective.second_view(config)
    reader = VideoReader(split.store, config, session.model.views()._replace(vectors=session.vectors))
    second = again and VideoReader(split.store, *again)
    dataset = TrainDataset(split.entries, reader, second, session.objective.second_of_labelled)
    plan = split.plan
    if config.similar_captions > 1:
        plan = replace(plan, neighbours=neighbours(session, split.entries))
    return TrainLoader(dataset, config, session.loaded.tokenize, plan)


@torch.no_grad()
def neighbours(session: Session, entries: Sequence[TrainEntry]) -> Neighbours:
    """Return which training rows have similar captions, by the text tower as it is now, before anything was trained.

    A row's vector is the mean of the unit vectors of its sentences, scaled to length 1.
    """
    config, model = session.config, session.model
    texts = [sentence for entry in entries for sentence in entry.sentences]
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(texts), config.val_batch_size):
        ids = session.loaded.tokenize(texts[start : start + config.val_batch_size], config.max_txt_len)
        parts.append(F.normalize(model.text_tower(ids).sentence.float(), dim=-1))
    model.train(was_training)
    of_rows = torch.split(torch.cat(parts), [len(entry.sentences) for entry in entries])
    vectors = F.normalize(torch.stack([vectors.mean(dim=0) for vectors in of_rows]), dim=-1)
    copy_from_main([vectors])  # all processes must make the same batches
    _, videos = np.unique([entry.video_id for entry in entries], return_inverse=True)
    return Neighbours(config.similar_captions, vectors.cpu().numpy(), videos, config.similar_share)


def readable_train_split(config: Config, run: RunFolder) -> TrainSplit:
    """Return the training split without unreadable videos, which are printed and noted in missing_videos.txt."""
    assert config.train_annot is not None, "check_paths refuses this"
    split = train_split(config, config.train_annot)
    run.note_missing(f"train: {len(split.left_out)} videos cannot be read and are left out", split.left_out)
    return split


def read_split(config: Config, annotation: str | None, run: RunFolder, name: str) -> EvaluationSplit:
    """Return the split to evaluate, called `name` in messages. Raise UserError, also if the task cannot measure it."""
    assert annotation is not None, "check_paths refuses this"
    split = evaluation_split(config, annotation)
    _texts(config, split)
    counts = f"{len(split.left_out)} of {split.num_listed}"
    run.note_missing(f"{name}: evaluated WITHOUT {counts} videos that cannot be read", split.left_out)
    return split


def say_cut(loaded: LoadedClip, config: Config, split: EvaluationSplit, name: str, run: RunFolder) -> None:
    """Print how many texts of the task max_txt_len cuts, if any."""
    texts, limit = _texts(config, split), config.max_txt_len
    if cut := loaded.count_cut(texts, limit):
        what = "class names in templates" if config.task_settings.of_classes else "captions"
        run.say(f"{name}: max_txt_len {limit} cuts {cut} of {len(texts)} {what}")


def _texts(config: Config, split: EvaluationSplit) -> Sequence[str]:
    """Return the texts that the task embeds. Raise UserError for a split that it cannot measure."""
    texts: Sequence[str] = implementation(TASKS, config.task).texts_of(config, split)
    return texts


def build_task(
    config: Config,
    split: EvaluationSplit,
    loaded: LoadedClip,
    model: VideoRetriever,
    label: str,
    opener: Callable[[str], Opened] | None = None,
    vectors: FrameVectors | None = None,
) -> Task:
    """Return the task of the config on a split, for models that see frames as `model` does. Raise UserError.

    `opener` opens the other models that it needs, by default `open_other`. `vectors` are read in place of frames.
    """
    views = model.views()._replace(vectors=vectors)
    task: Task = implementation(TASKS, config.task)(config, split, loaded, views, label)
    task.start(opener or partial(open_other, like=config))
    return task


def refuse_missing_models(config: Config) -> None:
    """Raise UserError for a model of the adaptation that is not there. Nothing is downloaded."""
    build_adaptation(config).start(config, partial(open_other, like=config, values="meta"))


def measure(session: Session, task: Task, model: VideoRetriever, keep: Path | None = None) -> Report:
    """Measure `model` in the session's precision on its device. Raise UserError if it does not fit into memory."""
    with memory_explained(session.config), session.autocast():
        return task(model, keep)


def measure_once(session: Session, split: EvaluationSplit, name: str, run: RunFolder) -> tuple[Report, Task]:
    """Measure the session's model on a split and return the report and the (closed) task.

    Finished batches are kept in the run folder, so that the evaluation can continue after an interruption.
    """
    with closing(build_task(session.config, split, session.loaded, session.model, name)) as task:
        return measure(session, task, session.model, run.file(f"embeddings/{name}")), task


def zero_shot(
    session: Session, split: EvaluationSplit, name: str, run: RunFolder, adapted: bool = False
) -> Report | None:
    """Measure the pretrained CLIP, with the config's adaptation if `adapted`, and print its figures.

    Return None if the task cannot measure it and, after a warning, if the model came from a checkpoint and its
    pretrained CLIP is not available.
    """
    if not session.config.task_settings.has_zero_shot:
        return None
    config, label = zero_shot_config(session.config), "zero-shot"
    if adapted:
        config = config.model_copy(update={"adaptation": session.config.adaptation})
        label = f"zero-shot, {config.adaptation.method}"
    pretrained, problem = None, ""
    try:
        pretrained = session.pretrained()
    except UserError as error:
        if session.checkpoint is None:
            raise
        problem = str(error)
    # Either all processes measure it or none.
    problem = next(filter(None, gather_objects(problem)), "")
    if pretrained is None or problem:
        run.say(f"WARNING: zero-shot is NOT measured, since the pretrained CLIP is not available. {problem}")
        return None
    model = VideoRetriever(config, pretrained).to(session.device)
    with closing(build_task(config, split, pretrained, model, f"{label} on {name}")) as task:
        measured = measure(session, task, model, run.file(f"embeddings/{label}"))
    event = "zero_shot_adapted" if adapted else "zero_shot"
    run.record(event, 0, metrics=measured.as_dict(), split=name)
    run.say(f"{label} on {name} ({config.num_frm} uniform frames, mean)  {task.one_line(measured.figures)}")
    return measured


def finish(
    session: Session, metrics: dict[str, Any], task: Task, zero_shot: Figures | None, final: Report, run: RunFolder
) -> None:
    """Write what a run found into its folder, metrics.json last since it marks a finished run; then print it."""
    config, parameters = session.config, session.parameters
    usage = final.frame_usage if isinstance(final, RetrievalReport | ClassificationReport) else None
    if usage is not None and (path := run.file("frame_usage.png")):
        from adaclip_finetune import report  # imports matplotlib

        report.draw_frame_usage(path, usage, len(task.split.queries.video_ids), config.top_k)
    draw_confusion(final, run)
    write_captions(final, run)
    write_similarity(config, final, run)
    if found := _intervals(task, final):
        metrics["intervals"] = found
    run.write_json("metrics.json", metrics)

    note = ""
    if metrics["selected_on"] == "test":
        note = "   SELECTED ON TEST (val_annot and test_annot hold the same captions)"
    elif metrics["evaluated_on"] == "validation":
        note = "   (no test_annot: these captions chose the epoch, so the figures are optimistic)"
    run.say(f"\n{metrics['evaluated_on']}, best epoch {metrics['best_epoch']} of {config.num_epochs}{note}")
    before = {"zero-shot": zero_shot} if zero_shot else {}
    run.say(f"{task.table({**before, 'finetuned': final.figures})}\n{task.gallery(final)}")
    clip, whole = parameters.clip, parameters.all
    run.say(
        f"trained: {clip.trainable:,} of CLIP's {clip.total:,} parameters ({clip.percent:.3f} %), "
        f"{whole.trainable:,} of {whole.total:,} in all ({whole.percent:.3f} %)"
    )
    if zero_shot and not task.is_better(final.figures, zero_shot):
        run.say(
            "This finetune does not beat zero-shot: try more epochs, another learning_rate or coef_lr, or more data."
        )
    if folder := run.path:
        run.say(
            f"\nrun folder: {folder}\nnext: search your videos with it\n  adaclip index {folder} VIDEOS -o my.index\n"
            "or evaluate it on other captions\n"
            f"  python train.py --config {folder}/config.json --do_inference --resume {folder}/best.safetensors "
            "--test_annot FILE"
        )


def _intervals(task: Task, measured: Report) -> dict[str, list[float]]:
    """Return the 95 % intervals, drawn by video, of the figures that have one, by their names."""
    found = {}
    for part, ranks in task.ranks(measured).items():
        for name, ends in intervals(ranks.ranks, ranks.videos).items():
            if not ranks.names:
                found[f"{part}.{name}"] = list(ends)
            elif name in ranks.names:
                found[ranks.names[name]] = list(ends)
    return found


def draw_confusion(measured: Report, run: RunFolder) -> None:
    """Draw which classes are taken for which, if the task is about classes."""
    if isinstance(measured, ClassificationReport) and (path := run.file("confusion.png")):
        from adaclip_finetune import report  # imports matplotlib

        report.draw_confusion(path, measured.confusion(), measured.classes)


def write_captions(measured: Report, run: RunFolder) -> None:
    """Write the caption of each video beside its references, if the task is about captions."""
    if isinstance(measured, CaptioningReport):
        run.write_json("captions.json", measured.rows())


def write_similarity(config: Config, measured: Report, run: RunFolder) -> None:
    """Write the similarity matrix if `save_similarity` asks for it and the task has one."""
    if config.save_similarity and isinstance(measured, RetrievalReport):
        save_similarity(Path(config.save_similarity), measured)
        run.say(f"similarity (rows queries, columns videos): {config.save_similarity}, with the ids in a JSON file")
