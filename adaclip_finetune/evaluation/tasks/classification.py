"""`task: classification`: which of the classes does a video belong to? Each video's only sentence names its class.

A class vector is the mean of the unit vectors of its name in all templates, and the score of a video and a class is the
product of the class vector and the video's unit vector (CLIP, Radford et al. 2021; FitCLIP, Castro and Caba Heilbron
2022, who do not normalise the class vector again).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices import ClassificationSettings
from adaclip_finetune.data.annotations import folded
from adaclip_finetune.data.class_names import in_templates, read_classes, read_templates
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.embed import on_main
from adaclip_finetune.evaluation.metrics import IntArray
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.tasks.base import Figures, QueryRanks, Report
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.scoring import Scorer
from adaclip_finetune.weights.loaded import LoadedClip


@dataclass(frozen=True)
class ClassificationFigures:
    """Top-1 and top-5 accuracy over videos, and the mean over classes of the top-1 accuracy of each, in percent."""

    top1: float
    top5: float
    mean_class: float
    classes: int
    videos_evaluated: int
    videos_listed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, each by its name."""
        return asdict(self)

    as_state = as_dict


@dataclass(frozen=True, eq=False)
class ClassificationReport:
    """The class of each video (V,), the class that the model answers, and the rank of the right one, from 1.

    Classes are numbered as in `classes`. `frame_usage` (N,) counts how often each candidate frame was chosen; it is
    None without a selector. `video_seconds` is the part of `seconds` in which the videos were read and embedded.
    """

    classes: Sequence[str]
    right: IntArray
    answers: IntArray
    ranks: IntArray
    queries: Queries
    frame_usage: NDArray[np.int64] | None
    num_listed: int
    seconds: float
    video_seconds: float = 0.0

    @property
    def figures(self) -> ClassificationFigures:
        top1, top5 = (100 * int(np.count_nonzero(self.ranks <= k)) / len(self.ranks) for k in (1, 5))
        mean_class = float(np.mean([row["top1"] for row in self.by_class()]))
        return ClassificationFigures(top1, top5, mean_class, len(self.classes), len(self.ranks), self.num_listed)

    def confusion(self) -> IntArray:
        """Return how many videos of each class (rows) the model takes for each class (columns): (C, C)."""
        counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        np.add.at(counts, (self.right, self.answers), 1)
        return counts

    def by_class(self) -> list[dict[str, Any]]:
        """Return the accuracy of each class that has videos, and the class that most of its wrong answers name."""
        found = []
        for number, row in enumerate(self.confusion()):
            if videos := int(row.sum()):
                hits, wrong = int(row[number]), np.where(np.arange(len(row)) == number, 0, row)
                other = self.classes[int(wrong.argmax())] if wrong.any() else None
                about = {"class": self.classes[number], "videos": videos, "top1": 100 * hits / videos}
                found.append({**about, "taken_for": other})
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for metrics.json, and under `per_class` those of each class."""
        return {**self.figures.as_dict(), "per_class": self.by_class()}


class Classification(Retrieval):
    """Measures how often the right class has the highest score; ties count against."""

    def __init__(self, config: Config, split: EvaluationSplit, loaded: LoadedClip, views: Views, label: str) -> None:
        super().__init__(config, split, loaded, views, label)
        self._classes, self._settings = _classes(config, split), _settings(config)

    @staticmethod
    def texts_of(config: Config, split: EvaluationSplit) -> Sequence[str]:
        """Return each class in each template.

        Raise UserError for a video of several classes, or of one that is not among `classes`.
        """
        classes = _classes(config, split)
        if len(classes) < 2:
            raise UserError(f"task classification needs two classes or more, but all videos are {classes[0]!r}")
        right_classes(split.queries, classes)
        return in_templates(classes, read_templates(_settings(config).templates))

    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> ClassificationReport:
        """Classify the videos. Batches that an earlier call kept, with the same weights and settings, are not embedded
        again; the figures are the same."""
        started = time.monotonic()
        texts, videos, video_seconds = self._embed(model, keep)
        queries = self._queries(videos)
        right = right_classes(queries, self._classes)

        def answer() -> tuple[IntArray, IntArray]:
            vectors = class_vectors(texts.rows(), len(self._classes), self._settings.normalize)
            device, block = model.device, self.config.val_batch_size
            scores = class_scores(vectors.to(device), videos.rows().to(device), model.scorer, block)
            if scores.isnan().any():
                what = "the score of a video and a class is NaN"
                raise NotFinite(f"{self.label}: {what}; the weights have probably diverged")
            return answers_and_ranks(scores, torch.from_numpy(right).to(device))

        answers, ranks = on_main(answer)
        usage = None if model.selector is None else videos.usage.numpy()
        seconds = time.monotonic() - started
        about = (queries, usage, self.split.num_listed, seconds, video_seconds)
        return ClassificationReport(self._classes, right, answers, ranks, *about)

    def one_line(self, figures: Figures) -> str:
        assert isinstance(figures, ClassificationFigures)
        return f"top-1 {figures.top1:.1f}  top-5 {figures.top5:.1f}  mean over classes {figures.mean_class:.1f}"

    def table(self, rows: Mapping[str, Figures]) -> str:
        width = max(map(len, rows))
        lines = [f"{'':<{width}}   top-1   top-5   mean over classes"]
        for name, row in rows.items():
            assert isinstance(row, ClassificationFigures)
            lines.append(f"{name:<{width}}  {row.top1:6.1f}  {row.top5:6.1f}  {row.mean_class:18.1f}")
        return "\n".join(lines)

    def gallery(self, report: Report) -> str:
        assert isinstance(report, ClassificationReport)
        missing = report.num_listed - len(report.ranks)
        without = f", {missing} of {report.num_listed} MISSING" if missing else ""
        classes, templates = len(report.classes), len(self._texts) // len(report.classes)
        said = f"{len(report.ranks):,} videos{without}, {classes:,} classes, templates {self._settings.templates}"
        return f"{said} ({templates}); ties count against"

    def ranks(self, report: Report) -> Mapping[str, QueryRanks]:
        assert isinstance(report, ClassificationReport)
        return {"top1": QueryRanks(report.ranks, None, {"R@1": "top1", "R@5": "top5"})}

    @staticmethod
    def figures_from_state(state: Mapping[str, Any]) -> ClassificationFigures:
        return ClassificationFigures(**state)


def _settings(config: Config) -> ClassificationSettings:
    assert isinstance(config.task.config, ClassificationSettings)
    return config.task.config


def _classes(config: Config, split: EvaluationSplit) -> list[str]:
    path = _settings(config).classes
    return sorted(split.classes, key=folded) if path is None else read_classes(Path(path))


def right_classes(queries: Queries, classes: Sequence[str]) -> IntArray:
    """Return the number of each video's class (V,). Raise UserError for a video of several classes, or of another."""
    number = {folded(name): place for place, name in enumerate(classes)}
    right: dict[int, str] = {}
    for video, text in zip(queries.video_of_text.tolist(), queries.texts, strict=True):
        where, before = f"video {queries.video_ids[video]!r}", right.setdefault(video, text)
        if folded(before) != folded(text):
            what = f"has several classes, {before!r} and {text!r}"
            raise UserError(f"{where} {what}; task classification measures videos with one class each")
        if folded(text) not in number:
            raise UserError(f"{where}: its class {text!r} is not in task.config.classes; add it to that file")
    return np.array([number[folded(right[video])] for video in range(len(queries.video_ids))], np.int64)


def class_vectors(texts: Tensor, classes: int, normalize: bool) -> Tensor:
    """Return the class vectors (C, D) of text vectors (C · P, D), those of a class in all templates together.

    A class vector is the mean of unit vectors, of length 1 only with `normalize`.
    """
    means = F.normalize(texts, dim=-1).reshape(classes, -1, texts.shape[-1]).mean(dim=1)
    return F.normalize(means, dim=-1) if normalize else means


def class_scores(vectors: Tensor, videos: Tensor, scorer: Scorer, block: int) -> Tensor:
    """Return exp(logit_scale) times the product of class vectors (C, D) and the unit vectors of videos: (V, C).

    `videos` is what the scorer keeps of the videos (V, …). Scores are without gradients, in float32 (float64 for
    float64 vectors); their softmax over the classes is the probability that the model gives to each.
    """
    blocks = similarity_blocks(vectors, videos, scorer, block)
    logits, bias = torch.cat(list(blocks)), blocks.scorer.logit_bias()
    # The scorer normalises texts, and adds its bias afterwards.
    scores: Tensor = (logits if bias is None else logits - bias) * vectors.norm(dim=-1, keepdim=True)
    return scores.T


def answers_and_ranks(scores: Tensor, right: Tensor) -> tuple[IntArray, IntArray]:
    """Return the class with the highest score and the rank of the right class (V,), given scores (V, C).

    Where another class has the score of the right one, the answer is the other one: ties count against.
    """
    own = right[:, None]
    ranks = (scores >= scores.gather(1, own)).sum(dim=1)
    others = scores.scatter(1, own, float("-inf")).argmax(dim=1)
    return torch.where(ranks == 1, right, others).cpu().numpy(), ranks.cpu().numpy()
