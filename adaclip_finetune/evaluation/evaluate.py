"""Embed a gallery and its queries, and rank: the path from an annotation to figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.queries import Queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import Metrics, retrieval_metrics
from adaclip_finetune.evaluation.similarity import SimilarityBlocks, similarity_blocks
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Figures of one gallery. `frame_usage` (N,): how often each candidate frame was chosen, None without a
    selector."""

    metrics: Metrics
    queries: Queries
    similarity: SimilarityBlocks
    frame_usage: NDArray[np.int64] | None
    num_listed: int
    seconds: float

    @property
    def missing(self) -> int:
        """Videos of the annotation that were left out, on request (`skip_missing`)."""
        return self.num_listed - len(self.queries.video_ids)

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json. How many of the gallery's videos were evaluated stands beside the figures of each
        direction."""
        of = {"videos_evaluated": len(self.queries.video_ids), "videos_listed": self.num_listed}
        return {name: {**direction, **of} for name, direction in self.metrics.as_dict().items()}


class Evaluator:
    """Evaluates models on one split, time and again; its reading processes live until `close`."""

    def __init__(self, split: EvaluationSplit, config: Config, loaded: LoadedClip, label: str) -> None:
        self.split, self.config, self.label = split, config, label
        self._tokenize = loaded.tokenize
        dataset = GalleryDataset(split.queries.video_ids, VideoReader(split.store, config, loaded.image))
        self._loader = GalleryLoader(dataset, config)

    def close(self) -> None:
        """End the reading processes."""
        self._loader.close()

    @torch.no_grad()
    def __call__(self, model: VideoRetriever) -> EvaluationResult:
        """Puts the model into evaluation mode and leaves it there; autocast is the caller's. Raises UserError."""
        started = time.monotonic()
        model.eval()
        videos, video_ids, usage = self._embed_videos(model)
        queries = self.split.queries.within(video_ids)
        gallery: Tensor | Callable[[Tensor], Tensor] = videos
        if model.aggregator.query_dependent:
            gallery = lambda text: model.aggregator(videos, text)  # noqa: E731
        similarity = similarity_blocks(
            self._embed_texts(model, queries.texts), gallery, model.logit_scale(), self.config.val_batch_size
        )
        try:
            metrics = retrieval_metrics(similarity, queries.video_of_text)
        except ValueError as error:
            raise UserError(f"{self.label}: {error}; the weights have probably diverged") from error
        seconds = time.monotonic() - started
        return EvaluationResult(metrics, queries, similarity, usage, self.split.num_listed, seconds)

    def _embed_texts(self, model: VideoRetriever, texts: list[str]) -> Tensor:
        size = self.config.val_batch_size
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        return torch.cat([model.encode_text(self._tokenize(part, self.config.max_txt_len)).float() for part in parts])

    def _embed_videos(self, model: VideoRetriever) -> tuple[Tensor, list[str], NDArray[np.int64] | None]:
        """The gallery's vectors (V, D), or its frames (V, K, D) if they depend on the query; names; frame usage
        (N,)."""
        device = model.logit_scale().device
        usage = torch.zeros(self.config.num_frm, dtype=torch.int64, device=device)
        parts: list[Tensor] = []
        video_ids: list[str] = []
        with tqdm(
            total=len(self.split.queries.video_ids), desc=self.label, unit="video", leave=False, disable=None
        ) as bar:
            for batch in self._loader:
                embedding = model.encode_video(batch.to(device, non_blocking=self.config.pin_mem))
                parts.append((embedding.frames if embedding.video is None else embedding.video).float())
                if embedding.selection is not None:
                    usage += torch.bincount(embedding.selection.indices.flatten(), minlength=len(usage))
                video_ids += batch.video_ids
                bar.update(len(batch))
        return torch.cat(parts), video_ids, None if model.selector is None else usage.cpu().numpy()


def save_similarity(path: Path, result: EvaluationResult) -> None:
    """Write the matrix (rows queries, columns videos) as .npy and its ids beside it as .json, a block at a time."""
    queries = result.queries
    ids = {
        "queries": queries.texts,
        "videos": queries.video_ids,
        "video_of_query": queries.video_of_text.tolist(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(queries.texts), len(queries.video_ids))
        matrix = open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        start = 0
        for block in result.similarity:
            matrix[start : start + len(block)] = block.float().cpu().numpy()
            start += len(block)
        matrix.flush()
        path.with_suffix(".json").write_text(json.dumps(ids, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"save_similarity: {path} cannot be written ({error})") from error
