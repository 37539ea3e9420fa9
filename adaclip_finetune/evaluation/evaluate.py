"""Embed a gallery and its queries, and rank: the path from an annotation to figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.config.roles import deciding_vectors, names_with, rounding
from adaclip_finetune.data.dataset import GalleryDataset, VideoBatch, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit, unreadable_in_evaluation
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.embed import Embeddings, on_main
from adaclip_finetune.evaluation.metrics import Metrics, retrieval_metrics
from adaclip_finetune.evaluation.parts import Part, PartFolder, names_digest, weights_digest
from adaclip_finetune.evaluation.similarity import SimilarityBlocks, similarity_blocks
from adaclip_finetune.evaluation.similarity_file import write_similarity_file
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import copy_from_main, is_main


@dataclass(frozen=True, eq=False)
class Figures:
    """What an evaluation found, small enough to be remembered: the ranks, and of how many videos they are."""

    metrics: Metrics
    videos_evaluated: int
    videos_listed: int

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json. How many of the gallery's videos were evaluated stands beside the figures of each
        direction."""
        of = {"videos_evaluated": self.videos_evaluated, "videos_listed": self.videos_listed}
        return {name: {**direction, **of} for name, direction in self.metrics.as_dict().items()}

    def as_state(self) -> dict[str, Any]:
        """For JSON: all of it, exactly."""
        of = {"videos_evaluated": self.videos_evaluated, "videos_listed": self.videos_listed}
        return {"metrics": self.metrics.as_state(), **of}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Figures:
        """What `as_state` gave."""
        return cls(**{**state, "metrics": Metrics.from_state(state["metrics"])})


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Figures of one gallery, and what they came from. `similarity` is None except on the main process; `frame_usage`
    (N,): how often each candidate frame was chosen, None without a selector; `video_seconds`: the part of `seconds` in
    which the gallery was read and embedded."""

    metrics: Metrics
    queries: Queries
    similarity: SimilarityBlocks | None
    frame_usage: NDArray[np.int64] | None
    num_listed: int
    seconds: float
    video_seconds: float = 0.0

    @property
    def figures(self) -> Figures:
        return Figures(self.metrics, len(self.queries.video_ids), self.num_listed)

    @property
    def missing(self) -> int:
        """Videos of the annotation that were left out, on request (`skip_missing`)."""
        return self.num_listed - len(self.queries.video_ids)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json; see `Figures`."""
        return self.figures.as_dict()


class Evaluator:
    """Evaluates models on one split, time and again, in all processes together; its reading processes live until
    `close`."""

    def __init__(self, split: EvaluationSplit, config: Config, loaded: LoadedClip, label: str) -> None:
        self.split, self.config, self.label = split, config, label
        self._tokenize = loaded.tokenize
        dataset = GalleryDataset(split.queries.video_ids, VideoReader(split.store, config, loaded.image))
        self._loader = GalleryLoader(dataset, config)

    def close(self) -> None:
        """End the reading processes."""
        self._loader.close()

    @torch.no_grad()
    def __call__(self, model: VideoRetriever, keep: Path | None = None) -> EvaluationResult:
        """Puts the model into evaluation mode and leaves it there; autocast is the caller's.

        With `keep`, a folder (only the main process's counts), finished batches are written there, and those that an
        earlier call with the same weights and settings wrote are not embedded again: the figures are the same. Raises
        UserError, in all processes.
        """
        started = time.monotonic()
        model.eval()
        # Batch statistics of each process are those of its own share of the training.
        copy_from_main(model.buffers())
        folder = self._part_folder(model, keep) if keep and is_main() else None
        on_main(folder.open if folder else lambda: None)
        begun = time.monotonic()
        videos = self._embed_videos(model, folder)
        video_seconds = time.monotonic() - begun
        queries = self.split.queries.within(
            [name for name in self.split.queries.video_ids if name not in videos.failed]
        )
        texts = self._embed_texts(model, folder)
        similarity: SimilarityBlocks | None = None

        def ranks() -> Metrics:
            nonlocal similarity
            similarity = self._similarity(model, texts, videos)
            return self._rank(similarity, queries)

        metrics = on_main(ranks)
        usage = None if model.selector is None else videos.usage.numpy()
        seconds = time.monotonic() - started
        return EvaluationResult(metrics, queries, similarity, usage, self.split.num_listed, seconds, video_seconds)

    def _embed_videos(self, model: VideoRetriever, folder: PartFolder | None) -> Embeddings:
        """The gallery's vectors (V, D), or its frames (V, K, D) if they depend on the query."""
        names = self.split.queries.video_ids
        videos = Embeddings("videos", len(names), folder)
        with tqdm(total=len(names), desc=self.label, unit="video", leave=False, disable=_hidden()) as bar:
            videos.embed(len(self._loader), partial(self._video_parts, model), bar)
        videos.failed = {name: videos.failed[name] for name in names if name in videos.failed}
        if videos.failed and (not self.config.skip_missing or len(videos.failed) == len(names)):
            raise unreadable_in_evaluation(videos.failed, len(names))
        return videos

    def _video_parts(self, model: VideoRetriever, numbers: Sequence[int]) -> Iterator[Part]:
        place = {name: number for number, name in enumerate(self.split.queries.video_ids)}
        for collated in self._loader.read(numbers):
            failed = {error.video_id: f"{error.path}: {error.reason}" for error in collated.failures}
            if collated.videos is None:
                yield Part(_integers([]), torch.empty(0), _integers([]), failed)
            else:
                rows, usage = self._embedded(model, collated.videos)
                yield Part(_integers([place[name] for name in collated.videos.video_ids]), rows, usage, failed)

    def _embedded(self, model: VideoRetriever, batch: VideoBatch) -> tuple[Tensor, Tensor]:
        """Rows (B, …) and frame usage (N,), or (0,) without a selector."""
        device = model.logit_scale().device
        embedding = model.encode_video(batch.to(device, non_blocking=self.config.pin_mem))
        rows = (embedding.frames if embedding.video is None else embedding.video).float().cpu()
        if embedding.selection is None:
            return rows, _integers([])
        return rows, embedding.selection.indices.flatten().bincount(minlength=self.config.num_frm).cpu()

    def _embed_texts(self, model: VideoRetriever, folder: PartFolder | None) -> Embeddings:
        """Vectors (T, D) of all texts, those of unreadable videos too: so batches do not depend on what failed."""
        count, size = len(self.split.queries.texts), self.config.val_batch_size
        texts = Embeddings("texts", count, folder)
        with tqdm(total=count, desc=self.label, unit="text", leave=False, disable=_hidden()) as bar:
            texts.embed(-(-count // size), partial(self._text_parts, model, size), bar)
        return texts

    def _text_parts(self, model: VideoRetriever, size: int, numbers: Sequence[int]) -> Iterator[Part]:
        texts = self.split.queries.texts
        for number in numbers:
            places = range(len(texts))[number * size : (number + 1) * size]
            tokens = self._tokenize([texts[place] for place in places], self.config.max_txt_len)
            yield Part(_integers(places), model.encode_text(tokens).float().cpu(), _integers([]))

    def _similarity(self, model: VideoRetriever, texts: Embeddings, videos: Embeddings) -> SimilarityBlocks:
        names, text = self.split.queries.video_ids, texts.rows()
        if videos.failed:
            text = text[[names[video] not in videos.failed for video in self.split.queries.video_of_text]]
        device = model.logit_scale().device
        aggregate = model.aggregator if model.aggregator.query_dependent else None
        block = self.config.val_batch_size
        return similarity_blocks(text.to(device), videos.rows().to(device), model.logit_scale(), block, aggregate)

    def _rank(self, similarity: SimilarityBlocks, queries: Queries) -> Metrics:
        try:
            return retrieval_metrics(similarity, queries.video_of_text)
        except ValueError as error:
            raise UserError(f"{self.label}: {error}; the weights have probably diverged") from error

    def _part_folder(self, model: VideoRetriever, path: Path) -> PartFolder:
        about = {
            "videos": names_digest(self.split.queries.video_ids),
            "texts": names_digest(self.split.queries.texts),
            "weights": weights_digest(model),
            "device": model.logit_scale().device.type,
            "settings": self.config.model_dump(mode="json", include=_deciding_settings()),
        }
        return PartFolder(path, about, keep_failures=self.config.skip_missing)


def save_similarity(path: Path, result: EvaluationResult) -> None:
    """Write the matrix (rows queries, columns videos) as .npy and its ids beside it as .json, a block at a time: the
    main process does, the others do nothing."""
    if result.similarity is None:
        return
    try:
        write_similarity_file(path, result.similarity, result.queries)
    except OSError as error:
        raise UserError(f"save_similarity: {path} cannot be written ({error})") from error


def _deciding_settings() -> set[str]:
    """The settings that decide an embedding's bits. Files are known by what is in them, not by where they lie."""
    return {*deciding_vectors(), *names_with("data", paths=False), *rounding()}


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _hidden() -> bool | None:
    """Bars are the main process's, on a terminal."""
    return None if is_main() else True
