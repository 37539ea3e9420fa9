"""`task: captioning`: what does the model say about each video, compared with the captions of its annotation?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.choices.adaptations import ClipRewardSettings
from adaclip_finetune.config.choices.tasks import CaptioningSettings
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.evaluation.adaptation.losses import clip_scores as rewards
from adaclip_finetune.evaluation.caption_metrics import PROMPT, caption_figures, clip_scores
from adaclip_finetune.evaluation.embed import EmbeddedBatch, Embeddings, on_main
from adaclip_finetune.evaluation.tasks.base import Figures, Report
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval
from adaclip_finetune.model.captioner import Captioner
from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.printable import printable
from adaclip_finetune.processes import from_main, is_main

AS_IT_IS, PREFERRED = "as it is", "the candidate that the reward prefers"
"""The baselines of an adapted captioner."""

CAPTIONED_AT_ONCE = 32
"""The most videos of which captions are searched at a time: each takes the memory of `beams` texts."""


@dataclass(frozen=True)
class CaptioningFigures:
    """The figures of the captions of a split, in percent, by name."""

    scores: Mapping[str, float]
    videos_evaluated: int
    videos_listed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, each by its name."""
        found = asdict(self)
        return {**found.pop("scores"), **found}

    def as_state(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class CaptioningReport:
    """The caption of each video, which `queries` lists with its references, and the figures.

    `caption_seconds` is the part of `seconds` in which captions were searched, and `video_seconds` that in which the
    videos were read and embedded.

    With an adaptation, `baselines` are the figures without it: of the model as it is, and of the candidate that the
    reward prefers.
    """

    captions: Sequence[str]
    queries: Queries
    scores: Mapping[str, float]
    num_listed: int
    seconds: float
    video_seconds: float
    caption_seconds: float
    adaptation: str = "none"
    baselines: Mapping[str, CaptioningFigures] = field(default_factory=dict)

    @cached_property
    def figures(self) -> CaptioningFigures:
        return CaptioningFigures(self.scores, len(self.captions), self.num_listed)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for metrics.json."""
        others = {name: figures.as_dict() for name, figures in self.baselines.items()}
        return {**self.figures.as_dict(), **({"baselines": others} if others else {})}

    def rows(self) -> list[dict[str, Any]]:
        """Return each video's name, caption and references, for captions.json."""
        names = zip(self.queries.video_ids, self.captions, references_of(self.queries), strict=True)
        return [{"video": name, "caption": caption, "references": right} for name, caption, right in names]


class PromptedRetrieval(Retrieval):
    """Embeds the videos, and the texts as CLIPScore has them."""

    @staticmethod
    def texts_of(config: Config, split: EvaluationSplit) -> Sequence[str]:
        return [PROMPT + text for text in split.queries.texts]


class Captioning(PromptedRetrieval):
    """Captions each video by beam search, and compares the captions with the references and with the video itself."""

    _scorer: tuple[Retrieval, VideoRetriever] | None = None  # the other model behind CLIPScore

    @property
    def _settings(self) -> CaptioningSettings:
        assert isinstance(self.config.task.config, CaptioningSettings)
        return self.config.task.config

    def start(self, open_other: Callable[[str], Opened]) -> None:
        """Open the model behind CLIPScore, if it is another one. Raise UserError if it has no vectors of videos."""
        super().start(open_other)
        if (source := self._settings.scorer) is None:
            return
        try:
            other = open_other(source)
        except UserError as error:
            raise UserError(f"task.config.scorer: {error}") from error
        if not other.retriever.scorer.indexable:
            what = "its videos have no vectors of their own (frame_agg qscore)"
            raise UserError(f"task.config.scorer {source}: {what}; give another model")
        ours = {name: getattr(self.config, name) for name in names_with("machine") | {"skip_missing"}}
        defaults = load_config()
        ours |= {name: getattr(defaults, name) for name in ("task", "primary", "adaptation")}
        about = (other.config.model_copy(update=ours), self.split, other.loaded, other.retriever.views(), self.label)
        self._scorer = PromptedRetrieval(*about), other.retriever

    def close(self) -> None:
        super().close()
        if self._scorer is not None:
            self._scorer[0].close()

    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> CaptioningReport:
        """Caption the videos. Batches that an earlier call kept, with the same weights and settings, are not computed
        again; the figures are the same."""
        started = time.monotonic()
        texts, videos, video_seconds = self._embed(model, keep)
        queries = self._queries(videos)
        kept = from_main(videos.rows() if is_main() else None)
        assert kept is not None
        if not kept.isfinite().all():
            raise NotFinite(f"{self.label}: a vector of a video is not finite; the weights have probably diverged")
        begun = time.monotonic()
        said = {"": self._captions(model, kept, queries, keep)}
        if self._adaptation.directions:
            begun = time.monotonic()
            said = {AS_IT_IS: said[""], **self._adapted_captions(model, kept, queries, keep)}
        caption_seconds = time.monotonic() - begun
        found = {}
        for name, captions in said.items():
            with torch.autocast(model.device.type, enabled=False) if self._scorer else nullcontext():
                clip = self._clip_scores(model, texts, videos, captions, queries, keep)
            scores = on_main(partial(caption_figures, captions, references_of(queries)))
            found[name] = CaptioningFigures(scores | clip, len(captions), self.split.num_listed)
        last = found.pop("")
        times = (time.monotonic() - started, video_seconds, caption_seconds)
        return CaptioningReport(
            said[""], queries, last.scores, self.split.num_listed, *times, self.config.adaptation.method, found
        )

    def one_line(self, figures: Figures) -> str:
        assert isinstance(figures, CaptioningFigures)
        return "  ".join(f"{name} {score:.1f}" for name, score in figures.scores.items())

    def table(self, rows: Mapping[str, Figures]) -> str:
        width, names = max(map(len, rows)), tuple(self.config.figures)
        lines = ["   ".join([" " * width, *names])]
        for name, row in rows.items():
            assert isinstance(row, CaptioningFigures)
            cells = [f"{row.scores[figure]:{len(figure)}.1f}" for figure in names]
            lines.append("   ".join([f"{name:<{width}}", *cells]))
        return "\n".join(lines)

    def gallery(self, report: Report) -> str:
        assert isinstance(report, CaptioningReport)
        missing = report.num_listed - len(report.captions)
        without = f", {missing} of {report.num_listed} MISSING" if missing else ""
        counts = f"{len(report.captions):,} videos{without}, {len(report.queries.texts):,} references"
        speed = f"{report.caption_seconds / max(len(report.captions), 1):.2g} s a video"
        lines = [f"{counts}; {self._settings.beams} beams, {speed}"]
        if report.baselines:
            lines[0] += f", adapted to each video by {report.adaptation}"
            lines += [f"{name}: {self.one_line(figures)}" for name, figures in report.baselines.items()]
        lines += [f"{row['video']}: {row['caption']}" for row in report.rows()[:3]]
        return "\n".join(map(printable, lines))

    @staticmethod
    def figures_from_state(state: Mapping[str, Any]) -> CaptioningFigures:
        return CaptioningFigures(**state)

    def _kept(self, model: VideoRetriever, features: VideoFeatures) -> Tensor:
        """Return the unit vectors of the videos, and behind each those that are captioned: (B, 1 + n, D)."""
        own = model.scorer.keep(features)
        return torch.cat([own[:, None], _captioner(model).inputs(features)], dim=1)

    def _captions(self, model: VideoRetriever, kept: Tensor, queries: Queries, keep: Path | None) -> Sequence[str]:
        """Return the caption of each video that could be read, in every process."""
        size, folder = min(self.config.val_batch_size, CAPTIONED_AT_ONCE), None
        if keep and is_main():
            folder = self._part_folder(model, keep / "captions", readable=queries.video_ids)
        on_main(folder.open if folder else lambda: None)
        found, captioner = Embeddings("captions", len(kept), folder), _captioner(model)

        def search(numbers: Sequence[int]) -> Iterator[EmbeddedBatch]:
            for number in numbers:
                places = torch.arange(len(kept))[number * size : (number + 1) * size]
                ids = captioner.generate(kept[places, 1:].to(model.device), self._settings.beams).cpu()
                yield EmbeddedBatch(places, ids, torch.zeros(0, dtype=torch.int64))

        found.embed(-(-len(kept) // size), search, self.label)
        ids = from_main(found.rows() if is_main() else None)
        assert ids is not None
        return captioner.language_model().texts(ids)

    def _adapted_captions(
        self, model: VideoRetriever, kept: Tensor, queries: Queries, keep: Path | None
    ) -> dict[str, Sequence[str]]:
        """Return the captions of the captioner adapted to each video, "", and those of its candidates that the reward
        prefers before a step was made."""
        self._refuse_several_processes()
        settings, captioner = self.config.adaptation.config, _captioner(model)
        assert isinstance(settings, ClipRewardSettings)
        itself = _CaptionJudge(self, model, kept[:, 0].to(model.device))
        judges = [
            self._judge(number, model.device, queries, keep) if other else itself
            for number, other in enumerate(self._others)
        ]
        folder = self._folder_of_adapted(model, queries, keep)
        found = Embeddings("adapted-captions", len(kept), folder)

        def search(numbers: Sequence[int]) -> Iterator[EmbeddedBatch]:
            for number in numbers:
                vectors = kept[number : number + 1, 1:].to(model.device)
                query = _CaptionQuery(captioner, vectors, number, settings.caption_candidates, judges)
                with torch.no_grad():
                    query.logits()
                    first = rewards(query.cosines(), settings.weights).argmax()
                    preferred = query.ids[first]
                with self._adaptation(model, QueryBatch("v2t", query.logits, query.cosines)):
                    adapted = captioner.generate(vectors, self._settings.beams)[0]
                rows = torch.stack([adapted, preferred])[None].cpu()
                yield EmbeddedBatch(torch.tensor([number]), rows, torch.zeros(0, dtype=torch.int64))

        with self._adaptation.prepared(model):
            found.embed(len(kept), search, self.label)
        ids = from_main(found.rows() if is_main() else None)
        assert ids is not None
        say = captioner.language_model().texts
        return {"": say(ids[:, 0]), PREFERRED: say(ids[:, 1])}

    def _judge(self, number: int, device: torch.device, queries: Queries, keep: Path | None) -> _CaptionJudge:
        """Return another model of the adaptation, which rewards captions of the videos."""
        other = self._others[number]
        assert other is not None
        task, model = other
        if not model.scorer.indexable:
            raise UserError(
                "adaptation.config.reward: with frame_agg qscore videos have no vectors; take another model"
            )
        with torch.autocast(device.type, enabled=False):
            _, videos, _ = task._embed(model.to(device), keep and keep / f"other-{number}")
        self._refuse_other_videos(queries, task._queries(videos))
        rows = from_main(videos.rows() if is_main() else None)
        assert rows is not None
        return _CaptionJudge(task, model, rows.to(device))

    def _clip_scores(
        self,
        model: VideoRetriever,
        texts: Embeddings,
        videos: Embeddings,
        captions: Sequence[str],
        queries: Queries,
        keep: Path | None,
    ) -> dict[str, float]:
        """Return the means of CLIPScore and RefCLIPScore in percent, by this model or the one of `scorer`."""
        task: Retrieval = self
        if self._scorer is not None:
            task, model = self._scorer[0], self._scorer[1].to(model.device)
            texts, videos, _ = task._embed(model, keep and keep / "scorer")
            if task._queries(videos).video_ids != queries.video_ids:
                raise UserError(
                    f"{self.label}: some videos can be read by only one of the model and task.config.scorer"
                )
        prompted = [PROMPT + caption for caption in captions]
        said = Embeddings("caption texts", len(prompted), None)
        said.embed(task._text_batches(prompted), partial(task._embed_texts, model, prompted), self.label)

        def scores() -> dict[str, float]:
            names, readable = self.split.queries.video_ids, set(queries.video_ids)
            mask = [names[video] in readable for video in self.split.queries.video_of_text]
            own = videos.rows() if self._scorer is not None else videos.rows()[:, 0]
            found = clip_scores(said.rows(), own, texts.rows()[mask], torch.from_numpy(queries.video_of_text))
            return {
                name: 100 * float(each.mean()) for name, each in zip(("CLIPScore", "RefCLIPScore"), found, strict=True)
            }

        return on_main(scores)


def references_of(queries: Queries) -> list[list[str]]:
    """Return the texts of each video."""
    return [
        [queries.texts[place] for place in np.flatnonzero(queries.video_of_text == video)]
        for video in range(len(queries.video_ids))
    ]


def _captioner(model: VideoRetriever) -> Captioner:
    assert model.captioner is not None, "the settings refuse this"
    return model.captioner


class _CaptionJudge(NamedTuple):
    """A model that rewards captions, its task, and its unit vectors of the videos (V, D)."""

    task: Retrieval
    model: VideoRetriever
    videos: Tensor

    @torch.no_grad()
    def cosines(self, video: int, captions: Sequence[str]) -> Tensor:
        """Return the cosines (1, K) of a video and captions, in the precision in which the videos were embedded."""
        device, task = self.videos.device, self.task
        with nullcontext() if isinstance(task, Captioning) else torch.autocast(device.type, enabled=False):
            tokens = task.loaded.tokenize(captions, task.config.max_txt_len)
            texts = self.model.encode_text(tokens).sentence.float()
        return self.videos[video : video + 1] @ F.normalize(texts, dim=-1).T


class _CaptionQuery:
    """A video that the captioner adapts to. Its K candidates are the captions that K beams find at the moment."""

    def __init__(
        self, captioner: Captioner, vectors: Tensor, video: int, beams: int, judges: Sequence[_CaptionJudge]
    ) -> None:
        self.captioner, self.vectors, self.video, self.beams, self.judges = captioner, vectors, video, beams, judges
        self.ids = torch.empty(0)

    def logits(self) -> Tensor:
        """Return the mean log probability of each candidate's tokens, (1, K). The candidates are found anew."""
        speaker = self.captioner.language_model()
        self.ids = self.captioner.generate(self.vectors, self.beams, self.beams)
        tokens = speaker.tokens(self.ids)
        losses = speaker.losses(self.captioner(self.vectors).expand(self.beams, -1, -1), tokens)
        return -(losses.sum(dim=1) / tokens.mask.sum(dim=1))[None]

    def cosines(self) -> list[Tensor]:
        """Return the cosines (1, K) of the video and the last candidates by each judge."""
        captions = self.captioner.language_model().texts(self.ids)
        return [judge.cosines(self.video, captions) for judge in self.judges]
