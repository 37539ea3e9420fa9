"""`task: retrieval`: embed a gallery of videos and its captions, and rank the videos for each caption, and the captions
for each video."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.roles import deciding_vectors, names_with, on_resume
from adaclip_finetune.data.dataset import GalleryDataset, VideoBatch, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit, unreadable_in_evaluation
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.adaptation import build_adaptation
from adaclip_finetune.evaluation.adaptation.base import Direction, QueryBatch
from adaclip_finetune.evaluation.embed import EmbeddedBatch, Embeddings, on_main
from adaclip_finetune.evaluation.metrics import (
    FIGURES,
    DirectionMetrics,
    Metrics,
    one_line,
    results_table,
    retrieval_metrics,
)
from adaclip_finetune.evaluation.parts import PartFolder
from adaclip_finetune.evaluation.similarity import SimilarityBlocks, similarity_blocks
from adaclip_finetune.evaluation.similarity_file import write_similarity_file
from adaclip_finetune.evaluation.tasks.base import Figures, QueryRanks, Report, Task
from adaclip_finetune.model.features import TextFeatures, VideoFeatures
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.processes import copy_from_main, from_main, is_main, world_size
from adaclip_finetune.weights.loaded import LoadedClip
from adaclip_finetune.weights.plain import weights_digest

COLUMNS = (*(f"t2v.{name}" for name in FIGURES), *(f"v2t.{name}" for name in FIGURES))
"""The figures that a comparison shows."""


@dataclass(frozen=True, eq=False)
class RetrievalFigures:
    """The ranks, how many videos of the annotation were evaluated, and text to video by tag."""

    metrics: Metrics
    videos_evaluated: int
    videos_listed: int
    by_tag: Mapping[str, DirectionMetrics] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures of both directions, each beside the number of videos that it was measured on.

        `tags` has the text-to-video figures of each tag, and is present only if there are any.
        """
        of = {"videos_evaluated": self.videos_evaluated, "videos_listed": self.videos_listed}
        found = self.metrics.as_dict()
        tags = {"tags": {tag: own.as_dict() for tag, own in self.by_tag.items()}} if self.by_tag else {}
        return {**found, "t2v": found["t2v"] | of, "v2t": found["v2t"] | of, **tags}

    def as_state(self) -> dict[str, Any]:
        """Return everything, exactly, as JSON can hold it."""
        of = {"videos_evaluated": self.videos_evaluated, "videos_listed": self.videos_listed}
        by_tag = {tag: own.ranks.tolist() for tag, own in self.by_tag.items()}
        return {"metrics": self.metrics.as_state(), **of, "by_tag": by_tag}


@dataclass(frozen=True, eq=False)
class RetrievalReport:
    """The figures of one gallery, and what they were computed from.

    `similarity` is None except on the main process. `frame_usage` (N,) counts how often each candidate frame was
    chosen; it is None without a selector. `video_seconds` is the part of `seconds` in which the gallery was read and
    embedded.

    With an adaptation, `query_seconds` is the time that a query took, in each direction in which the model was adapted
    to its queries, and `others` are the similarities by the adaptation's other models. If texts were such queries, each
    row of `similarity` comes from weights of its own, so that rows cannot be compared.
    """

    metrics: Metrics
    queries: Queries
    similarity: SimilarityBlocks | None
    frame_usage: NDArray[np.int64] | None
    num_listed: int
    seconds: float
    video_seconds: float = 0.0
    adaptation: str = "none"
    query_seconds: Mapping[Direction, float] = field(default_factory=dict)
    others: Sequence[SimilarityBlocks] = ()

    @property
    def figures(self) -> RetrievalFigures:
        ranks, masks = self.metrics.t2v.ranks, self.queries.by_tag()
        by_tag = {tag: DirectionMetrics(ranks[mask]) for tag, mask in masks.items()}
        return RetrievalFigures(self.metrics, len(self.queries.video_ids), self.num_listed, by_tag)

    @property
    def missing(self) -> int:
        """The number of videos in the annotation that were left out, on request (`skip_missing`)."""
        return self.num_listed - len(self.queries.video_ids)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for metrics.json."""
        return self.figures.as_dict()

    def ranks(self) -> dict[str, QueryRanks]:
        """Return the ranks of both directions, each query with its video."""
        t2v = QueryRanks(self.metrics.t2v.ranks, self.queries.video_of_text)
        return {"t2v": t2v, "v2t": QueryRanks(self.metrics.v2t.ranks, None)}

    def gallery(self) -> str:
        """Return the size of the gallery in words, with further lines if captions are shared by several videos, or if
        the model was adapted to the queries."""
        missing = f", {self.missing} of {self.num_listed} MISSING" if self.missing else ""
        counts = f"{len(self.queries.texts):,} captions, {len(self.queries.video_ids):,} videos{missing}"
        lines = [f"{counts}; ties count against", self.metrics.shared_line()]
        for direction, seconds in self.query_seconds.items():
            lines.append(f"{direction.upper()} adapted to each query by {self.adaptation}, {seconds:.2g} s a query")
        return "\n".join(filter(None, lines))


class Retrieval(Task):
    """Measures text-to-video and video-to-text retrieval; ties count against."""

    def __init__(self, config: Config, split: EvaluationSplit, loaded: LoadedClip, views: Views, label: str) -> None:
        super().__init__(config, split, loaded, views, label)
        both = [name for name in ("t2v.R@1", "v2t.R@1") if name in config.figures]
        self.curves = both or self.curves
        self.columns = [name for name in COLUMNS if name in config.figures] or self.columns
        self._texts = self.texts_of(config, split)
        dataset = GalleryDataset(split.queries.video_ids, VideoReader(split.store, config, views))
        self._loader = GalleryLoader(dataset, config)
        self._adaptation = build_adaptation(config)
        self._others: list[tuple[Retrieval, VideoRetriever] | None] = []

    def start(self, open_other: Callable[[str], Opened]) -> None:
        """Open the other models of the adaptation. They embed the same texts and videos, on the same machine."""
        self._adaptation.start(self.config, open_other)
        ours = {name: getattr(self.config, name) for name in names_with("machine") | {"skip_missing"}}
        for other in self._adaptation.others:
            if other is None:
                self._others.append(None)
                continue
            config, model = other.config.model_copy(update=ours), other.retriever
            self._others.append((self._beside(config, other.loaded, model.views()), model))

    def _beside(self, config: Config, loaded: LoadedClip, views: Views) -> Retrieval:
        """Return the task that another model has; `config` holds its settings of everything else."""
        defaults = load_config()
        chosen = {name: getattr(defaults, name) for name in ("task", "primary", "adaptation")}
        return Retrieval(config.model_copy(update=chosen), self.split, loaded, views, self.label)

    def close(self) -> None:
        self._loader.close()
        for other in filter(None, self._others):
            other[0].close()

    def one_line(self, figures: Figures) -> str:
        assert isinstance(figures, RetrievalFigures)
        return one_line(figures.metrics)

    def table(self, rows: Mapping[str, Figures]) -> str:
        metrics = {name: row.metrics for name, row in rows.items() if isinstance(row, RetrievalFigures)}
        return results_table(metrics)

    def gallery(self, report: Report) -> str:
        assert isinstance(report, RetrievalReport)
        return report.gallery()

    def ranks(self, report: Report) -> Mapping[str, QueryRanks]:
        return report.ranks() if isinstance(report, RetrievalReport) else {}

    @staticmethod
    def figures_from_state(state: Mapping[str, Any]) -> Figures:
        ranks = state.get("by_tag", {})  # snapshots before there were tags have none
        by_tag = {tag: DirectionMetrics(np.array(own, np.int64)) for tag, own in ranks.items()}
        return RetrievalFigures(**{**state, "metrics": Metrics.from_state(state["metrics"]), "by_tag": by_tag})

    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> Report:
        """Rank the gallery. Batches that an earlier call kept, with the same weights and settings, are not embedded
        again; the figures are the same."""
        started = time.monotonic()
        texts, videos, video_seconds = self._embed(model, keep)
        queries = self._queries(videos)
        plain = self._similarity(model, texts, videos) if is_main() else None
        found, query_seconds, others = self._adapted(model, plain, queries, keep)
        metrics = on_main(partial(self._metrics, found.get("t2v", plain), found.get("v2t", plain), queries))
        return RetrievalReport(
            metrics,
            queries,
            similarity=found.get("t2v", plain),
            frame_usage=None if model.selector is None else videos.usage.numpy(),
            num_listed=self.split.num_listed,
            seconds=time.monotonic() - started,
            video_seconds=video_seconds,
            adaptation=self.config.adaptation.method,
            query_seconds=query_seconds,
            others=others,
        )

    def _metrics(self, t2v: SimilarityBlocks | None, v2t: SimilarityBlocks | None, queries: Queries) -> Metrics:
        assert t2v is not None and v2t is not None, "this is the main process"
        try:
            metrics = retrieval_metrics(t2v, queries.video_of_text, queries.texts)
            if v2t is t2v:
                return metrics
            return metrics.with_v2t_of(retrieval_metrics(v2t, queries.video_of_text, queries.texts))
        except ValueError as error:
            raise NotFinite(f"{self.label}: {error}; the weights have probably diverged") from error

    def _embed(self, model: VideoRetriever, keep: Path | None) -> tuple[Embeddings, Embeddings, float]:
        """Embed the texts and the gallery, and return both with the seconds that the gallery took."""
        model.eval()
        # Each process has the batch statistics of its own share of the training data.
        copy_from_main(model.buffers())
        folder = self._part_folder(model, keep) if keep and is_main() else None
        on_main(folder.open if folder else lambda: None)
        begun = time.monotonic()
        videos = self._embed_videos(model, folder)
        video_seconds = time.monotonic() - begun
        # Texts of unreadable videos too, so that batches do not depend on which videos failed.
        texts = Embeddings("texts", len(self._texts), folder)
        texts.embed(self._text_batches(self._texts), partial(self._embed_texts, model, self._texts), self.label)
        return texts, videos, video_seconds

    def _queries(self, videos: Embeddings) -> Queries:
        """Return the queries about the videos that could be read."""
        return self.split.queries.within([one for one in self.split.queries.video_ids if one not in videos.failed])

    def similarity_of(self, texts: Sequence[str], model: VideoRetriever, report: RetrievalReport) -> SimilarityBlocks:
        """Return the similarity of other texts to the gallery that `model` was measured on in this one process."""
        assert report.similarity is not None, "there is one process"
        plain = self._with_texts(texts, model, report.similarity)
        if "t2v" not in self._adaptation.directions:
            return plain
        others = [
            other[0]._with_texts(texts, other[1], blocks) if other else plain
            for other, blocks in zip(self._others, report.others, strict=True)
        ]
        with self._adaptation.prepared(model):
            adapted = self._adapt_to_texts(model, texts, plain, others, range(self._adapted_batches(texts)))
            return replace(plain, text=torch.cat([batch.rows for batch in adapted]).to(model.device))

    def _with_texts(self, texts: Sequence[str], model: VideoRetriever, blocks: SimilarityBlocks) -> SimilarityBlocks:
        batches = self._embed_texts(model, texts, range(self._text_batches(texts)))
        bar = tqdm(batches, self.label, self._text_batches(texts), unit="batch", leave=False, disable=None)
        return replace(blocks, text=torch.cat([batch.rows for batch in bar]).to(model.device))

    def _embed_videos(self, model: VideoRetriever, folder: PartFolder | None) -> Embeddings:
        """Embed the gallery to what is kept of it: (V, …)."""
        names = self.split.queries.video_ids
        videos = Embeddings("videos", len(names), folder, keep_failures=self.config.skip_missing)
        videos.embed(len(self._loader), partial(self._embed_video_batches, model), self.label)
        videos.failed = {name: videos.failed[name] for name in names if name in videos.failed}
        if videos.failed and (not self.config.skip_missing or len(videos.failed) == len(names)):
            raise unreadable_in_evaluation(videos.failed, len(names))
        return videos

    def _embed_video_batches(self, model: VideoRetriever, numbers: Sequence[int]) -> Iterator[EmbeddedBatch]:
        place = {name: number for number, name in enumerate(self.split.queries.video_ids)}
        for collated in self._loader.read(numbers):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            places, rows, usage = _integers([]), torch.empty(0), _integers([])
            if collated.videos is not None:
                places = _integers([place[name] for name in collated.videos.video_ids])
                with torch.no_grad():
                    features = model.encode_video(collated.videos.to(model.device, non_blocking=self.config.pin_mem))
                    rows = self._kept(model, features).float().cpu()
                if features.selection is not None:
                    usage = features.selection.indices.flatten().bincount(minlength=self.config.num_frm).cpu()
            yield EmbeddedBatch(places, rows, usage, failed)

    def _kept(self, model: VideoRetriever, features: VideoFeatures) -> Tensor:
        """Return what is kept of the videos of a batch: (B, …)."""
        return model.scorer.keep(features)

    def _text_batches(self, texts: Sequence[str]) -> int:
        return -(-len(texts) // self.config.val_batch_size)

    def _embed_texts(
        self, model: VideoRetriever, texts: Sequence[str], numbers: Sequence[int]
    ) -> Iterator[EmbeddedBatch]:
        size = self.config.val_batch_size
        for number in numbers:
            places = range(len(texts))[number * size : (number + 1) * size]
            tokens = self.loaded.tokenize([texts[place] for place in places], self.config.max_txt_len)
            with torch.no_grad():
                rows = model.encode_text(tokens).sentence.float().cpu()
            yield EmbeddedBatch(_integers(places), rows, _integers([]))

    def _similarity(self, model: VideoRetriever, texts: Embeddings, videos: Embeddings) -> SimilarityBlocks:
        names, text = self.split.queries.video_ids, texts.rows()
        if videos.failed:
            text = text[[names[video] not in videos.failed for video in self.split.queries.video_of_text]]
        block, device = self.config.val_batch_size, model.device
        return similarity_blocks(text.to(device), videos.rows().to(device), model.scorer, block)

    def _part_folder(self, model: VideoRetriever, path: Path, **more: Any) -> PartFolder:
        about = {
            "videos": self.split.queries.video_ids,
            "texts": self._texts,
            "weights": weights_digest(model),
            "device": model.device.type,
            "settings": self.config.model_dump(mode="json", include=deciding_settings()),
        }
        return PartFolder(path, about | more)

    # ---- with an adaptation ----

    def _adapted(
        self, model: VideoRetriever, plain: SimilarityBlocks | None, queries: Queries, keep: Path | None
    ) -> tuple[dict[Direction, SimilarityBlocks | None], dict[Direction, float], list[SimilarityBlocks]]:
        """Return the similarity in each direction whose queries the model is adapted to, the seconds that a query took,
        and the similarities by other models.

        `plain`, of the main process, is the similarity without adaptation, and so are the similarities returned.
        """
        adaptation, device = self._adaptation, model.device
        found: dict[Direction, SimilarityBlocks | None] = {}
        seconds: dict[Direction, float] = {}
        if not adaptation.directions:
            return found, seconds, []
        self._refuse_several_processes()
        start = self._everywhere(model, plain)
        others = [self._of_other(number, device, start, queries, keep) for number in range(len(self._others))]
        folder = self._folder_of_adapted(model, queries, keep)
        names = self.split.queries.video_ids
        with adaptation.prepared(model):
            for direction in adaptation.directions:
                begun = time.monotonic()
                if direction == "t2v":
                    rows = Embeddings("adapted-texts", len(queries.texts), folder)
                    work = partial(self._adapt_to_texts, model, queries.texts, start, others)
                    rows.embed(self._adapted_batches(queries.texts), work, self.label)
                    found[direction] = replace(start, text=rows.rows().to(device)) if is_main() else None
                else:
                    rows = Embeddings("adapted-videos", len(names), folder)
                    work = partial(self._adapt_to_videos, model, queries, start, others)
                    rows.embed(len(self._loader), work, self.label)
                    if len(rows.failed) > len(names) - len(queries.video_ids):  # one that was read before
                        raise unreadable_in_evaluation(rows.failed, len(names))
                    found[direction] = replace(start, videos=rows.rows().to(device)) if is_main() else None
                asked = queries.texts if direction == "t2v" else queries.video_ids
                seconds[direction] = (time.monotonic() - begun) / len(asked)
        return found, seconds, others

    def _refuse_several_processes(self) -> None:
        if self._adaptation.in_order and world_size() > 1:
            raise UserError(
                f"adaptation {self.config.adaptation.method}: what a query gets depends on the queries before it "
                "(momentum), so that one process must adapt; start one, or leave momentum out"
            )

    def _folder_of_adapted(self, model: VideoRetriever, queries: Queries, keep: Path | None) -> PartFolder | None:
        """Return the folder, opened, in which the main process keeps what was adapted."""
        folder = None
        if keep and is_main() and not self._adaptation.in_order:
            digests = [weights_digest(other[1]) for other in filter(None, self._others)]
            folder = self._part_folder(model, keep / "adapted", readable=queries.video_ids, others=digests)
        on_main(folder.open if folder else lambda: None)
        return folder

    def _everywhere(self, model: VideoRetriever, blocks: SimilarityBlocks | None) -> SimilarityBlocks:
        """Return the main process's similarity in every process."""
        rows = from_main(() if blocks is None else (blocks.text.cpu(), blocks.videos.cpu()))
        text, videos = (each.to(model.device) for each in rows)
        return similarity_blocks(text, videos, model.scorer, self.config.val_batch_size)

    def _of_other(
        self, number: int, device: torch.device, own: SimilarityBlocks, queries: Queries, keep: Path | None
    ) -> SimilarityBlocks:
        """Return the similarity by another model, in float32; `own` if it stands for the model itself."""
        other = self._others[number]
        if other is None:
            return own
        task, model = other
        with torch.autocast(device.type, enabled=False):
            report = task(model.to(device), keep and keep / f"other-{number}")
        assert isinstance(report, RetrievalReport)
        self._refuse_other_videos(queries, report.queries)
        return task._everywhere(model, report.similarity)

    def _refuse_other_videos(self, queries: Queries, of_other: Queries) -> None:
        if of_other.video_ids != queries.video_ids:
            differ = set(of_other.video_ids) ^ set(queries.video_ids)
            raise UserError(f"{self.label}: these videos can be read for only one of the models: {sorted(differ)}")

    def _adapted_batches(self, texts: Sequence[str]) -> int:
        return -(-len(texts) // (self._adaptation.queries_at_once or self.config.val_batch_size))

    def _adapt_to_texts(
        self,
        model: VideoRetriever,
        texts: Sequence[str],
        plain: SimilarityBlocks,
        others: Sequence[SimilarityBlocks],
        numbers: Sequence[int],
    ) -> Iterator[EmbeddedBatch]:
        """Embed each text with the model adapted to it. Row i of `plain` and of `others` belongs to text i."""
        size = self._adaptation.queries_at_once or self.config.val_batch_size

        def logits(tokens: Tensor) -> Tensor:
            scores: Tensor = model.scorer(model.encode_text(tokens), plain.videos)
            return scores

        for number in numbers:
            places = range(len(texts))[number * size : (number + 1) * size]
            tokens = self.loaded.tokenize([texts[place] for place in places], self.config.max_txt_len)
            cosines = [other.cosines(texts=places) for other in others]
            asked = QueryBatch("t2v", partial(logits, tokens), partial(list, cosines))
            with self._adaptation(model, asked), torch.no_grad():
                rows = model.encode_text(tokens).sentence.float().cpu()
            yield EmbeddedBatch(_integers(places), rows, _integers([]))

    def _adapt_to_videos(
        self,
        model: VideoRetriever,
        queries: Queries,
        plain: SimilarityBlocks,
        others: Sequence[SimilarityBlocks],
        numbers: Sequence[int],
    ) -> Iterator[EmbeddedBatch]:
        """Embed each video with the model adapted to it. The frames are those that the model chose before."""
        names = {name: number for number, name in enumerate(self.split.queries.video_ids)}
        columns = {name: number for number, name in enumerate(queries.video_ids)}

        def encoded(videos: VideoBatch, selection: Selection | None) -> Tensor:
            return model.scorer.keep(model.encode_video(videos, selection=selection))

        def logits(videos: VideoBatch, selection: Selection | None) -> Tensor:
            scores: Tensor = model.scorer(TextFeatures(plain.text), encoded(videos, selection))
            return scores.T

        for collated in self._loader.read(numbers):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            read, rows = [] if collated.videos is None else collated.videos.video_ids, [torch.empty(0)]
            size = self._adaptation.queries_at_once or max(1, len(read))
            for start in range(0, len(read), size):
                assert collated.videos is not None
                videos = collated.videos.rows(start, start + size).to(model.device)
                with torch.no_grad():
                    selection = model.encode_video(videos).selection
                places = [columns[name] for name in videos.video_ids]
                cosines = [other.cosines(videos=places).T for other in others]
                asked = QueryBatch("v2t", partial(logits, videos, selection), partial(list, cosines))
                with self._adaptation(model, asked), torch.no_grad():
                    rows.append(encoded(videos, selection).float().cpu())
            embedded = torch.cat(rows[1:]) if read else rows[0]
            yield EmbeddedBatch(_integers([names[name] for name in read]), embedded, _integers([]), failed)


def save_similarity(path: Path, result: RetrievalReport) -> None:
    """Write the matrix (rows queries, columns videos) as .npy and its ids beside it as .json, in the main process
    only."""
    if result.similarity is None:
        return
    try:
        write_similarity_file(path, result.similarity, result.queries)
    except OSError as error:
        raise UserError(f"save_similarity: {path} cannot be written ({error})") from error


def deciding_settings() -> set[str]:
    """Return the names of the settings that decide the bits of an embedding. Paths are not among them: files are
    identified by their content."""
    return {*deciding_vectors(), *names_with("data", paths=False), *(names_with("machine") & on_resume("same"))}


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
