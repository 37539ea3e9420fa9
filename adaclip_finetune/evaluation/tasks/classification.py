"""`task: classification`: which of the classes does a video belong to? Each video's only sentence names its class.

A class vector is the mean of the unit vectors of its name in all templates, and the score of a video and a class is the
product of the class vector and the video's unit vector (CLIP, Radford et al. 2021; FitCLIP, Castro and Caba Heilbron
2022, who do not normalise the class vector again).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.choices.tasks import ClassificationSettings
from adaclip_finetune.data.annotations import folded
from adaclip_finetune.data.class_names import in_templates, read_classes, read_templates
from adaclip_finetune.data.dataset import Collated, VideoBatch
from adaclip_finetune.data.preprocess import CropFlip, Views
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.data.splits import EvaluationSplit, unreadable_in_evaluation
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.adaptation.base import Direction, QueryBatch
from adaclip_finetune.evaluation.embed import EmbeddedBatch, Embeddings, on_main
from adaclip_finetune.evaluation.metrics import IntArray
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.tasks.base import Figures, QueryRanks, Report
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.evaluation.views import Chosen, chosen_frames, draw_parts, viewed
from adaclip_finetune.model.features import TextFeatures, at_least_float32
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.scoring import Scorer
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.processes import is_main
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
    `scores` (V, C) are what the classes are ranked by; None except on the main process.

    With an adaptation, `query_seconds` is the time that a video took, and `others` are the products (V, C) of class
    vectors and videos by the adaptation's other models.
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
    scores: Tensor | None = None
    adaptation: str = "none"
    query_seconds: Mapping[Direction, float] = field(default_factory=dict)
    others: Sequence[Tensor] = ()

    def ranked_by(self, scores: Tensor) -> ClassificationReport:
        """Return the report of the same videos with other scores (V, C)."""
        answers, ranks = answers_and_ranks(scores, torch.from_numpy(self.right).to(scores.device))
        return replace(self, answers=answers, ranks=ranks, scores=scores)

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
        scores: Tensor | None = None
        if is_main():
            vectors = class_vectors(texts.rows(), len(self._classes), self._settings.normalize)
            device, block = model.device, self.config.val_batch_size
            scores = class_scores(vectors.to(device), videos.rows().to(device), model.scorer, block)
        others: list[Tensor] = []
        query_seconds: dict[Direction, float] = {}
        if self._adaptation.directions:
            scores, others, query_seconds = self._adapted_scores(model, queries, scores, keep)

        def answer() -> tuple[IntArray, IntArray]:
            assert scores is not None, "this is the main process"
            if scores.isnan().any():
                what = "the score of a video and a class is NaN"
                raise NotFinite(f"{self.label}: {what}; the weights have probably diverged")
            return answers_and_ranks(scores, torch.from_numpy(right).to(scores.device))

        answers, ranks = on_main(answer)
        return ClassificationReport(
            self._classes,
            right,
            answers,
            ranks,
            queries,
            None if model.selector is None else videos.usage.numpy(),
            self.split.num_listed,
            seconds=time.monotonic() - started,
            video_seconds=video_seconds,
            scores=scores,
            adaptation=self.config.adaptation.method,
            query_seconds=query_seconds,
            others=others,
        )

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
        adapted = [
            f"\nadapted to each video by {report.adaptation}, {seconds:.2g} s a video"
            for seconds in report.query_seconds.values()
        ]
        return "".join([f"{said} ({templates}); ties count against", *adapted])

    def ranks(self, report: Report) -> Mapping[str, QueryRanks]:
        assert isinstance(report, ClassificationReport)
        return {"top1": QueryRanks(report.ranks, None, {"R@1": "top1", "R@5": "top5"})}

    @staticmethod
    def figures_from_state(state: Mapping[str, Any]) -> ClassificationFigures:
        return ClassificationFigures(**state)

    # ---- with an adaptation ----

    def start(self, open_other: Callable[[str], Opened]) -> None:
        super().start(open_other)
        if self._adaptation.directions and "v2t" not in self._adaptation.directions:
            what = (
                f"adaptation {self.config.adaptation.method} adapts to texts, but task classification asks with videos"
            )
            raise UserError(f"{what}; set adaptation.method to none, or take task.method retrieval")

    def _beside(self, config: Config, loaded: LoadedClip, views: Views) -> Classification:
        chosen = {"task": self.config.task, "primary": self.config.primary, "adaptation": load_config().adaptation}
        return Classification(config.model_copy(update=chosen), self.split, loaded, views, self.label)

    def _adapted_scores(
        self, model: VideoRetriever, queries: Queries, plain: Tensor | None, keep: Path | None
    ) -> tuple[Tensor | None, list[Tensor], dict[Direction, float]]:
        """Return the scores (V, C) of the model adapted to each video, those of `others`, and the seconds of a video.

        `plain`, the scores without adaptation, and those returned are of the main process.
        """
        self._refuse_several_processes()
        names, others = self.split.queries.video_ids, []
        for number, other in enumerate(self._others):
            if other is None:
                scores, scale = plain, model.scorer.scale()
            else:
                task, them = other
                with torch.autocast(model.device.type, enabled=False):
                    report = task(them.to(model.device), keep and keep / f"other-{number}")
                assert isinstance(report, ClassificationReport)
                self._refuse_other_videos(queries, report.queries)
                scores, scale = report.scores, them.scorer.scale()
            others += [] if scores is None else [scores / scale.detach()]
        folder = self._folder_of_adapted(model, queries, keep)
        begun = time.monotonic()
        rows = Embeddings("adapted-classes", len(names), folder)
        with self._adaptation.prepared(model):
            rows.embed(len(self._loader), partial(self._scores_of_adapted, model), self.label)
        if len(rows.failed) > len(names) - len(queries.video_ids):  # one that was read before
            raise unreadable_in_evaluation(rows.failed, len(names))
        seconds = (time.monotonic() - begun) / len(queries.video_ids)
        return rows.rows().to(model.device) if is_main() else None, others, {"v2t": seconds}

    def _scores_of_adapted(self, model: VideoRetriever, numbers: Sequence[int]) -> Iterator[EmbeddedBatch]:
        """Score the classes for each video with the model adapted to views of it."""
        names = {name: number for number, name in enumerate(self.split.queries.video_ids)}
        own = _Judge(self, model, None if self._adaptation.changes_texts else self._fixed_vectors(model))
        others: list[_Judge | None] = []
        for other in self._others:
            if other is None:
                others.append(None)
                continue
            task, them = other
            assert isinstance(task, Classification)
            with torch.autocast(model.device.type, enabled=False):
                others.append(_Judge(task, them, task._fixed_vectors(them)))
        read = [one.task._loader.read_videos(self._loader.indices(numbers)) for one in (own, *filter(None, others))]
        for batches in zip(*read, strict=True):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in batches[0].failures}
            rows, places = [torch.empty(0, len(self._classes))], []
            for name in [] if batches[0].videos is None else batches[0].videos.video_ids:
                places.append(names[name])
                video, *theirs = (_row_of(batch, name, model.device) for batch in batches)
                parts = draw_parts(self._adaptation.views, generator("view", self.config.seed, 0, names[name]))
                chosen, found = chosen_frames(model, video), iter(theirs)
                rewards = [other and (other, next(found)) for other in others]
                query = _Query(own, chosen, parts, self._adaptation.certain, rewards)
                with self._adaptation(model, QueryBatch("v2t", query.logits, query.cosines)), torch.no_grad():
                    rows.append(own.scores(chosen).float().cpu())
            yield EmbeddedBatch(torch.tensor(places, dtype=torch.int64), torch.cat(rows), _NO_USAGE, failed)

    def _fixed_vectors(self, model: VideoRetriever) -> Tensor:
        """Return the class vectors (C, D) by the model as it is."""
        batches = self._embed_texts(model, self._texts, range(self._text_batches(self._texts)))
        texts = torch.cat([batch.rows for batch in batches]).to(model.device)
        return class_vectors(texts, len(self._classes), self._settings.normalize)


class _Judge(NamedTuple):
    """A model, its task, and its class vectors (C, D); None if these change with the model."""

    task: Classification
    model: VideoRetriever
    vectors: Tensor | None

    def scores(self, videos: Chosen) -> Tensor:
        """Return the scores (V, C) of the classes for videos of chosen frames, with gradients."""
        task, vectors = self.task, self.vectors
        if vectors is None:
            tokens = task.loaded.tokenize(task._texts, task.config.max_txt_len)
            texts = at_least_float32(self.model.encode_text(tokens).sentence)
            vectors = class_vectors(texts, len(task._classes), task._settings.normalize)
        kept = self.model.scorer.keep(self.model.encode_video(videos[0], selection=videos[1]))
        return _without_bias(self.model.scorer(TextFeatures(vectors), kept), self.model.scorer, vectors)

    @torch.no_grad()
    def products(self, videos: Chosen) -> Tensor:
        """Return the products (V, C) of class vectors and videos."""
        return self.scores(videos) / self.model.scorer.scale()


class _Query:
    """A video that the model adapts to: the scores of those of its views that `certain` chooses by all their scores.

    The choice is made once, with the model as it is when `logits` is called first. The views of other models show the
    same parts of the frames that these choose themselves.
    """

    def __init__(
        self,
        own: _Judge,
        chosen: Chosen,
        parts: Sequence[CropFlip | None],
        certain: Callable[[Tensor], Tensor],
        rewards: Sequence[tuple[_Judge, VideoBatch] | None],
    ) -> None:
        self._own, self._chosen, self._parts, self._certain, self._rewards = own, chosen, parts, certain, rewards
        self._views: Chosen | None = None
        self._cosines: list[Tensor] = []

    def logits(self) -> Tensor:
        """Return the scores (n, C) of the chosen views."""
        if self._views is None:
            with torch.no_grad():
                scores = self._own.scores(viewed(self._chosen, self._parts))
            shown = [self._parts[view] for view in self._certain(scores).tolist()]
            self._views = viewed(self._chosen, shown)
            for other in self._rewards:
                if other is None:
                    self._cosines.append(self._own.products(self._views))
                    continue
                with torch.autocast(scores.device.type, enabled=False):
                    self._cosines.append(other[0].products(viewed(chosen_frames(other[0].model, other[1]), shown)))
        return self._own.scores(self._views)

    def cosines(self) -> list[Tensor]:
        """Return the products (n, C) of class vectors and these views by each of the other models."""
        return self._cosines


_NO_USAGE = torch.zeros(0, dtype=torch.int64)


def _row_of(batch: Collated, name: str, device: torch.device) -> VideoBatch:
    """Return the video of this name, which all models can read."""
    assert batch.videos is not None
    return batch.videos.at([batch.videos.video_ids.index(name)]).to(device)


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
    return _without_bias(torch.cat(list(blocks)), blocks.scorer, vectors)


def _without_bias(logits: Tensor, scorer: Scorer, vectors: Tensor) -> Tensor:
    """Return the scores (V, C) that belong to the scorer's logits (C, V): it normalises texts, and adds its bias."""
    bias = scorer.logit_bias()
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
