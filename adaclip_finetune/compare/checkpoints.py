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
from adaclip_finetune.compare.seen_data import seen_by
from adaclip_finetune.compare.table import Cost, DataSetRows, RowKind, TableRow
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.evaluation.tasks.base import Report, Task
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.training.device import launched_processes, make_accelerator
from adaclip_finetune.training.measure import build_task, measure, read_split
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import Session, find_checkpoint, open_model
from adaclip_finetune.weights.checkpoints import check_settings
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.loaded import LoadedClip

# Settings that two checkpoints must share for one zero-shot row to serve both, beside the weights of CLIP.
_DECIDING_ZERO_SHOT = ("num_frm", "segment_sampling", "max_txt_len", "concat_captions", "precision", "task",
                       "frames_dir", "video_dir", "img_tmpl", "skip_missing")  # fmt: skip


@dataclass
class Candidate:
    """A checkpoint to be evaluated: the label of its row, and its settings, whose `resume` is the weights file."""

    label: str
    config: Config


def find_candidates(
    paths: Sequence[Path], settings: Path | None, overrides: Mapping[str, Any], annotation: str, retrieval: bool = False
) -> list[Candidate]:
    """Find the checkpoints of run folders and weights files, before any model is built.

    `settings` is a file for checkpoints that hold none, `overrides` replace settings of all checkpoints, and
    `annotation` is what is evaluated first. Each is measured by the task of its run, but all by retrieval if their
    tasks differ, or with `retrieval`. Raises UserError.
    """
    if launched_processes() > 1:
        raise UserError("evaluate and predict use one process: start them without torchrun and accelerate launch")
    found = [_find(path, settings, overrides, annotation) for path in paths]
    if retrieval or any(candidate.config.task != found[0].config.task for candidate in found):
        changed = {"task": load_config().task, "primary": None}
        for candidate in found:
            if candidate.config.task.method != "retrieval":
                candidate.config = candidate.config.model_copy(update=changed)
    labels = [candidate.label for candidate in found]
    for number, candidate in enumerate(found, start=1):
        if labels.count(candidate.label) > 1:
            candidate.label += f" ({number})"
    return found


class OpenCandidate:
    """The model of a candidate on its device, measured on one annotation after the other."""

    def __init__(self, candidate: Candidate) -> None:
        """Raises UserError if the weights do not fit the settings, or the device is not there."""
        self.label = candidate.label
        set_seed(candidate.config.seed)
        self.session: Session = open_model(
            candidate.config, accelerator=make_accelerator(candidate.config), learn=False
        )

    @property
    def config(self) -> Config:
        """The settings, with the CLIP that the checkpoint was made with."""
        return self.session.config

    def read(self, annotation: str) -> EvaluationSplit:
        """Return the split, and tell on stderr which videos are left out (`skip_missing`). Raises UserError."""
        split = read_split(self.config, annotation, RunFolder(self.config, sys.stderr), annotation)
        if cut := self.session.loaded.count_cut(split.queries.texts, self.config.max_txt_len):
            tell(f"{annotation}: max_txt_len {self.config.max_txt_len} cuts {cut} of {len(split.queries.texts)} texts")
        return split

    def measure(self, split: EvaluationSplit, label: str) -> tuple[Task, Report]:
        """Measure the model on a split by the task of its settings."""
        return self._measure(split, self.config, self.session.loaded, self.session.model, label)

    def retrieve(self, split: EvaluationSplit, label: str) -> tuple[Retrieval, RetrievalReport]:
        """Measure the model by retrieval, which the settings must name."""
        task, report = self.measure(split, label)
        assert isinstance(task, Retrieval) and isinstance(report, RetrievalReport)
        return task, report

    def similarity_of(self, texts: Sequence[str], task: Retrieval, report: RetrievalReport) -> SimilarityBlocks:
        """Return the similarity of other texts to the gallery of `report`."""
        with self.session.autocast():
            return task.similarity_of(texts, self.session.model, report)

    def add_rows(self, data_set: DataSetRows, split: EvaluationSplit) -> tuple[Task, Report]:
        """Measure zero-shot, if this CLIP is not in `data_set` yet, and the model, and add their rows."""
        tell(f"{self.label} on {data_set.name}")
        baseline = None
        try:
            baseline = self.add_zero_shot(data_set, split, self.session.pretrained())
        except UserError as error:
            data_set.remarks.append(f"zero-shot of {self.label} is NOT measured: {error}")
        task, report = self.measure(split, self.label)
        note = seen_by(self.config, data_set.name)
        data_set.models.append(self.row(self.label, task, report, baseline, note))
        return task, report

    def row(self, label: str, task: Task, report: Report, baseline: str | None, note: str) -> TableRow:
        """Return a row of the model. `baseline` is the label of its zero-shot row."""
        noted = self.session.checkpoint is not None and "parameters" in self.session.checkpoint.metadata
        # The settings of these methods determine what learned; of others, only the checkpoint can tell.
        known = noted or self.config.peft.method in ("full", "bitfit")
        counts = self.session.parameters
        clip, everything = (counts.clip.percent, counts.all.percent) if known else (None, None)
        cost = Cost(clip, everything, self.session.gflops.video, _videos_per_second(task, report))
        return replace(_row(label, "model", task, report, cost), baseline=baseline, note=note)

    def add_zero_shot(self, data_set: DataSetRows, split: EvaluationSplit, pretrained: LoadedClip, of: str = "") -> str:
        """Measure `pretrained`, which is named in `of`, as baseline of this model unless `data_set` has the very same
        one. Returns the label of its row."""
        config = zero_shot_config(self.config)
        key = (weights_digest(pretrained.module), *(str(getattr(config, name)) for name in _DECIDING_ZERO_SHOT))
        if key not in data_set.baselines:
            model = VideoRetriever(config, pretrained).to(self.session.device)
            task, report = self._measure(split, config, pretrained, model, "zero-shot")
            label = f"zero-shot{of}, {config.num_frm} frames"
            if number := sum(row.label.startswith(label) for row in data_set.baselines.values()):
                label += f" ({number + 1})"
            cost = Cost(0.0, 0.0, count_gflops(model, config.num_frm).video, _videos_per_second(task, report))
            note = f"{pretrained.source}, {config.num_frm} uniform frames, their mean"
            data_set.baselines[key] = replace(_row(label, "zero-shot", task, report, cost), note=note)
        return data_set.baselines[key].label

    def _measure(
        self, split: EvaluationSplit, config: Config, loaded: LoadedClip, model: VideoRetriever, label: str
    ) -> tuple[Task, Report]:
        with closing(build_task(config, split, loaded, model, label)) as task:
            return task, measure(self.session, task, model)


def tell(text: str) -> None:
    """Print to stderr without tearing a progress bar; stdout is for results."""
    tqdm.write(text, file=sys.stderr)


def _find(given: Path, settings: Path | None, overrides: Mapping[str, Any], annotation: str) -> Candidate:
    weights = given / "best.safetensors" if given.is_dir() else given
    replaced = {**_exclusive(overrides), **AS_IT_IS, "resume": str(weights), "test_annot": annotation}
    checkpoint, config = find_checkpoint(given, replaced, settings)
    try:
        if checkpoint.is_foreign:
            check_settings(checkpoint, config)
        elif not checkpoint.settings and settings is None and not (given / "config.json").is_file():
            raise UserError("this file holds no settings")
        check_paths(config)
    except UserError as error:
        raise UserError(
            f"{given}: {error}\nSettings of a checkpoint that holds none: --config FILE. "
            "Data and weights that have moved: --frames_dir, --video_dir, --clip_weights"
        ) from error
    place = given.resolve()
    return Candidate(place.name if given.is_dir() else f"{place.parent.name}/{place.name}", config)


def _exclusive(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Let --frames_dir replace the run's video_dir too, and the reverse; likewise --device and --xpu."""
    rivals: dict[str, dict[str, Any]] = {"frames_dir": {"video_dir": None}, "video_dir": {"frames_dir": None}}
    rivals |= {"device": {"xpu": False}, "xpu": {"device": "auto"}}
    switched_off = {name: off for given in overrides.keys() & rivals for name, off in rivals[given].items()}
    return {**switched_off, **overrides}


def _row(label: str, kind: RowKind, task: Task, report: Report, cost: Cost) -> TableRow:
    queries = report.queries if isinstance(report, RetrievalReport) else task.split.queries
    figures, ranks = report.as_dict(), task.ranks(report)
    return TableRow(label, kind, figures, task.columns, ranks, queries, task.gallery(report), cost)


def _videos_per_second(task: Task, report: Report) -> float:
    seconds = report.video_seconds if isinstance(report, RetrievalReport) else report.seconds
    return len(task.split.queries.video_ids) / max(seconds, 1e-9)
