"""A checkpoint that is evaluated: found with its settings, opened on its device, measured beside its zero-shot CLIP."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from tqdm import tqdm

from adaclip_finetune.compare.options import AS_IT_IS
from adaclip_finetune.compare.table import COSTS, DataSetRows, RowKind, TableRow
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.choices.base import Chosen
from adaclip_finetune.config.parts import DataPart, parts_of
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.annotations import folded, load_annotations
from adaclip_finetune.data.splits import EvaluationSplit, read_listed
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.evaluation.tasks.base import Report, Task
from adaclip_finetune.evaluation.tasks.classification import ClassificationReport
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.hub import local_run
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.zero_shot import zero_shot_config
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.training.device import launched_processes, make_accelerator
from adaclip_finetune.training.measure import build_task, measure, read_split, say_cut
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import find_checkpoint, open_model, open_other
from adaclip_finetune.weights.loaded import LoadedClip
from adaclip_finetune.weights.plain import weights_digest

# Settings that two checkpoints must share for one zero-shot row to serve both, beside the weights of CLIP.
_DECIDING_ZERO_SHOT = (*sorted(names_with("view")), "concat_captions", "precision", "task", "frames_dir", "video_dir",
                       "img_tmpl", "skip_missing")  # fmt: skip


@dataclass
class Candidate:
    """A checkpoint to be evaluated: the label of its row, and its settings, whose `resume` is the weights file."""

    label: str
    config: Config


def find_candidates(
    paths: Sequence[Path],
    settings: Path | None,
    overrides: Mapping[str, Any],
    annotations: Sequence[str],
    retrieval: bool = False,
) -> list[Candidate]:
    """Find the checkpoints of run folders and weights files, and check all annotations, before any model is built.

    `settings` is a file for checkpoints that hold none, and `overrides` replace settings of all checkpoints. Each is
    measured by the task of its run, but all by retrieval if their tasks differ, or with `retrieval`. Raise UserError.
    """
    if launched_processes() > 1:
        raise UserError("evaluate and predict use one process: start them without torchrun and accelerate launch")
    for annotation in annotations:
        load_annotations(annotation)
    found = [_find(path, settings, overrides, annotations[0]) for path in paths]
    labels = [candidate.label for candidate in found]
    retrieval = retrieval or any(candidate.config.task != found[0].config.task for candidate in found)
    for number, candidate in enumerate(found, start=1):
        if retrieval and candidate.config.task.method != "retrieval":
            changed = {"task": load_config().task, "primary": None}
            candidate.config = candidate.config.model_copy(update=changed)
        if labels.count(candidate.label) > 1:
            candidate.label += f" ({number})"
    return found


class OpenCandidate:
    """The model of a candidate on its device, measured on one annotation after the other."""

    def __init__(self, candidate: Candidate) -> None:
        """Raise UserError if the weights do not fit the settings, or the device is not there."""
        self.label = candidate.label
        set_seed(candidate.config.seed)
        self.session = open_model(candidate.config, accelerator=make_accelerator(candidate.config), learn=False)
        self.config = self.session.config  # with the CLIP that the checkpoint was made with
        self._opened: dict[str, Opened] = {}

    def open_other(self, source: str) -> Opened:
        """Return another model, as `training.session.open_other` does, but opened only once."""
        if source not in self._opened:
            self._opened[source] = open_other(source, like=self.config)
        return self._opened[source]

    def read(self, annotation: str) -> EvaluationSplit:
        """Return the split, and tell on stderr which videos are left out (`skip_missing`). Raise UserError."""
        run = RunFolder(self.config, sys.stderr)
        split = read_split(self.config, annotation, run, annotation)
        say_cut(self.session.loaded, self.config, split, annotation, run)
        return split

    def measure(self, split: EvaluationSplit, label: str, adaptation: Chosen | None = None) -> tuple[Task, Report]:
        """Measure the model on a split by the task of its settings; `adaptation` replaces theirs if it is given."""
        config = self.config if adaptation is None else self.config.model_copy(update={"adaptation": adaptation})
        return self._measure(split, config, self.session.loaded, self.session.model, label)

    def similarity_of(self, texts: Sequence[str], task: Retrieval, report: RetrievalReport) -> SimilarityBlocks:
        """Return the similarity of other texts to the gallery of `report`."""
        with self.session.autocast():
            return task.similarity_of(texts, self.session.model, report)

    def add_rows(self, data_set: DataSetRows, split: EvaluationSplit) -> tuple[Task, Report]:
        """Measure zero-shot, if the task can and this CLIP is not in `data_set` yet, and the model, and add their
        rows."""
        tell(f"{self.label} on {data_set.name}")
        baseline = None
        try:
            if self.config.task_settings.has_zero_shot:
                baseline = self._add_zero_shot(data_set, split, self.session.pretrained())
        except UserError as error:
            data_set.remarks.append(f"zero-shot of {self.label} is NOT measured: {error}")
        task, report = self.measure(split, self.label)
        note = seen_by(self.config, data_set.name)
        data_set.models.append(self.row(self.label, task, report, baseline, note))
        return task, report

    def row(self, label: str, task: Task, report: Report, baseline: str | None, note: str) -> TableRow:
        """Return a row of the model. `baseline` is the label of its zero-shot row."""
        counts, checkpoint = self.session.parameters, self.session.checkpoint
        known = checkpoint is not None and "parameters" in checkpoint.metadata
        learned = (counts.clip.percent, counts.all.percent) if known else (None, None)
        row = _row(label, "model", task, report, self.session.gflops.video, learned)
        return replace(row, baseline=baseline, note=note)

    def _add_zero_shot(self, data_set: DataSetRows, split: EvaluationSplit, pretrained: LoadedClip) -> str:
        """Measure the baseline of this model unless `data_set` has the very same one. Return the label of its row."""
        config = zero_shot_config(self.config)
        key = (weights_digest(pretrained.module), *(str(getattr(config, name)) for name in _DECIDING_ZERO_SHOT))
        if key not in data_set.baselines:
            model = VideoRetriever(config, pretrained).to(self.session.device)
            task, report = self._measure(split, config, pretrained, model, "zero-shot")
            label = f"zero-shot, {config.num_frm} frames"
            if number := sum(row.label.startswith(label) for row in data_set.baselines.values()):
                label += f" ({number + 1})"
            row = _row(label, "zero-shot", task, report, count_gflops(model, config.num_frm).video, (0.0, 0.0))
            note = f"{pretrained.source}, {config.num_frm} uniform frames, their mean"
            data_set.baselines[key] = replace(row, note=note)
        return data_set.baselines[key].label

    def _measure(
        self, split: EvaluationSplit, config: Config, loaded: LoadedClip, model: VideoRetriever, label: str
    ) -> tuple[Task, Report]:
        with closing(build_task(config, split, loaded, model, label, self.open_other)) as task:
            return task, measure(self.session, task, model)


def seen_by(config: Config, annotation: str) -> str:
    """Return what a run with these settings learned from, or was chosen on, of the videos and captions in `annotation`.

    Return "" if nothing is known to overlap.
    """
    told = []
    learned = [("it learned from", part.annotation) for part in parts_of(config.train_annot or [])]
    for use, path in [*learned, ("its epoch was chosen on", config.val_annot)]:
        if overlap := overlap_of_files(path, annotation, not config.task_settings.of_classes) if path else "":
            told.append(f"{use} {overlap}")
    return "; ".join(told)


def overlap_of_files(used: str, annotation: str, with_captions: bool = True) -> str:
    """Return what of `annotation` the annotation file `used` also holds, "" if nothing.

    Clips of the same source video (`group`) count as the same video. Without `with_captions`, only videos are compared:
    sentences that name classes are shared by design.
    """
    evaluated = load_annotations(annotation)
    all_ids, all_groups = {video.video_id for video in evaluated}, {video.group for video in evaluated} - {None}
    all_texts = {folded(text) for video in evaluated for text in video.sentences}
    ids, groups, texts = set(), set(), set()
    try:
        for video in read_listed(DataPart(annotation=used)):
            ids |= all_ids & {video.video_id}
            groups |= all_groups & {video.group}
            texts |= all_texts & {folded(text) for text in video.sentences}
    except (UserError, OSError):
        return f"{used}, which cannot be read here, so it is unknown whether that holds these captions"
    videos = [video.video_id in ids or video.group in groups for video in evaluated]
    captions = [folded(text) in texts for video in evaluated for text in video.sentences]
    if not with_captions:
        captions = []
    elif all(videos) and all(captions):
        return "these very captions"
    parts = {"videos": videos, "captions": captions}
    return " and ".join(f"{sum(part):,} of these {len(part):,} {name}" for name, part in parts.items() if any(part))


def tell(text: str) -> None:
    """Print to stderr without tearing a progress bar; stdout is for results."""
    tqdm.write(text, file=sys.stderr)


def _find(given: Path, settings: Path | None, overrides: Mapping[str, Any], annotation: str) -> Candidate:
    # --frames_dir replaces the run's video_dir too, and the reverse; likewise --device and --xpu. Another task
    # has other figures than the one that chose the epoch of the run.
    rivals: dict[str, dict[str, Any]] = {"frames_dir": {"video_dir": None}, "video_dir": {"frames_dir": None}}
    rivals |= {"device": {"xpu": False}, "xpu": {"device": "auto"}}
    rivals |= {"task": {"primary": None}, "task.method": {"primary": None}}
    off = {name: value for given_name in overrides.keys() & rivals for name, value in rivals[given_name].items()}
    given = local_run(given)
    weights = given / "best.safetensors" if given.is_dir() else given
    replaced = {**off, **overrides, **AS_IT_IS, "resume": str(weights), "test_annot": annotation}
    checkpoint, config = find_checkpoint(given, replaced, settings)
    try:
        is_bare = not checkpoint.settings and settings is None and not (given / "config.json").is_file()
        if is_bare and not checkpoint.is_foreign:
            raise UserError("this file holds no settings")
        check_paths(config)
    except UserError as error:
        raise UserError(
            f"{given}: {error}\nSettings of a checkpoint that holds none: --config FILE. "
            "Data and weights that have moved: --frames_dir, --video_dir, --clip_weights"
        ) from error
    place = given.resolve()
    return Candidate(place.name if given.is_dir() else f"{place.parent.name}/{place.name}", config)


def _row(
    label: str, kind: RowKind, task: Task, report: Report, gflops: float, learned: Sequence[float | None]
) -> TableRow:
    measured = report if isinstance(report, RetrievalReport | ClassificationReport) else None
    seconds = measured.video_seconds if measured else report.seconds
    videos_per_second = len(task.split.queries.video_ids) / max(seconds, 1e-9)
    cost = dict(zip(COSTS, (*learned, gflops, videos_per_second), strict=True))
    queries, ranks = measured.queries if measured else task.split.queries, task.ranks(report)
    return TableRow(label, kind, report.as_dict(), task.columns, ranks, queries, task.gallery(report), cost)
