"""The best videos for each query, with scores; and the vectors behind them, for use elsewhere."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save

from adaclip_finetune.compare.model import OpenModel
from adaclip_finetune.compare.options import write_file
from adaclip_finetune.compare.source import find_source
from adaclip_finetune.evaluation.similarity import SimilarityBlocks

COLUMNS = ("query", "rank", "video", "score")


@dataclass(frozen=True)
class Prediction:
    """A query and its best videos, best first, with the logits of the model's scorer."""

    query: str
    videos: list[str]
    scores: list[float]


@dataclass(frozen=True, eq=False)
class Predicted:
    """What `predict` found; `similarity` holds the vectors that it was computed from."""

    queries: list[str]
    videos: list[str]
    missing: int
    similarity: SimilarityBlocks
    k: int

    def __iter__(self) -> Iterator[Prediction]:
        """Of equal scores, the video that the annotation lists first comes first."""
        start = 0
        for block in self.similarity:
            scores, places = block.cpu().sort(dim=1, descending=True, stable=True)
            for row in range(len(block)):
                names = [self.videos[place] for place in places[row, : self.k].tolist()]
                yield Prediction(self.queries[start + row], names, scores[row, : self.k].tolist())
            start += len(block)


def predict(
    given: Path,
    annotation: str,
    queries: Sequence[str] | None,
    k: int,
    settings: Path | None,
    overrides: Mapping[str, Any],
) -> Predicted:
    """The videos are those of the annotation, the queries its captions unless others are given. Raises UserError."""
    model = OpenModel(find_source(given, settings, overrides, annotation))
    result = model.measure(model.read(annotation), annotation)
    similarity = result.similarity
    assert similarity is not None, "there is one process"
    texts = result.queries.texts
    if queries is not None:
        texts, similarity = list(queries), model.bank(result, queries)
    return Predicted(texts, result.queries.video_ids, result.missing, similarity, k)


def write_predictions(path: Path, predicted: Predicted) -> None:
    """JSON Lines, an object a query; or CSV, a line a query and video, where the name ends so. Raises UserError."""
    text = _as_csv(predicted) if path.suffix == ".csv" else _as_json_lines(predicted)
    write_file("--output", path, text)


def write_embeddings(path: Path, predicted: Predicted) -> None:
    """`queries` (T, D) and `videos` (V, D), of length 1, in float32; the ids beside it in JSON. Raises UserError.

    Where videos depend on the query, `videos` are their frames (V, K, D), not normalised. `scale` times the cosine
    (plus `bias`, for a CLIP that has one) is the score.
    """
    found = predicted.similarity
    tensors = {"queries": F.normalize(found.text.float(), dim=-1), "videos": found.videos.float()}
    bias, per_query = found.scorer.logit_bias(), "false" if found.scorer.indexable else "true"
    metadata = {"scale": repr(float(found.scorer.scale())), "per_query": per_query}
    if bias is not None:
        metadata["bias"] = repr(float(bias))
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_file("--save-embeddings", path, content)
    ids = {"queries": predicted.queries, "videos": predicted.videos}
    text = json.dumps(ids, ensure_ascii=False, indent=1) + "\n"
    write_file("--save-embeddings", path.with_suffix(".json"), text)


def _as_json_lines(predicted: Predicted) -> str:
    lines = []
    for one in predicted:
        found = [{"video": name, "score": score} for name, score in zip(one.videos, one.scores, strict=True)]
        lines.append(json.dumps({"query": one.query, "videos": found}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _as_csv(predicted: Predicted) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for one in predicted:
        for rank, (name, score) in enumerate(zip(one.videos, one.scores, strict=True), start=1):
            writer.writerow([one.query, rank, name, score])
    return text.getvalue()
