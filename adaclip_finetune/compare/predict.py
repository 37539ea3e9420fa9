"""`adaclip predict`: the best videos for each query with their scores, and the vectors behind them."""

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

from adaclip_finetune.compare.checkpoints import OpenCandidate, find_candidates
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport


@dataclass(frozen=True, eq=False)
class Predictions:
    """The `k` best videos of each query. `missing` videos of the annotation could not be read."""

    queries: list[str]
    videos: list[str]
    missing: int
    similarity: SimilarityBlocks
    k: int

    def __iter__(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """Yield each query with its best videos and their scores, best first; of equal ones in annotation order."""
        queries = iter(self.queries)
        for block in self.similarity:
            scores, places = block.cpu().sort(dim=1, descending=True, stable=True)
            for found, row in zip(scores[:, : self.k].tolist(), places[:, : self.k].tolist(), strict=True):
                yield next(queries), list(zip([self.videos[place] for place in row], found, strict=True))

    def as_json_lines(self) -> str:
        """Return one JSON object a query."""
        found = [{"query": query, "videos": [{"video": v, "score": s} for v, s in best]} for query, best in self]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)

    def as_csv(self) -> str:
        """Return one line a query and video."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("query", "rank", "video", "score"))
        writer.writerows((query, rank, *found) for query, best in self for rank, found in enumerate(best, start=1))
        return text.getvalue()

    def vectors(self) -> tuple[bytes, str]:
        """Return the vectors as safetensors and the ids of their rows as JSON.

        `queries` (T, D) and `videos` (V, D) are float32 unit vectors; `scale` times their product, plus `bias` for a
        CLIP that has one, is the score. If a video's vector depends on the query (`per_query`), `videos` are the
        vectors of its frames (V, K, D), not normalised.
        """
        texts, videos, scorer = self.similarity.text, self.similarity.videos, self.similarity.scorer
        tensors = {"queries": F.normalize(texts.float(), dim=-1), "videos": videos.float()}
        metadata = {"scale": repr(float(scorer.scale())), "per_query": "false" if scorer.indexable else "true"}
        if (bias := scorer.logit_bias()) is not None:
            metadata["bias"] = repr(float(bias))
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        ids = {"queries": self.queries, "videos": self.videos}
        return content, json.dumps(ids, ensure_ascii=False, indent=1) + "\n"


def predict(
    checkpoint: Path,
    annotation: str,
    queries: Sequence[str] | None,
    k: int,
    settings: Path | None,
    overrides: Mapping[str, Any],
) -> Predictions:
    """Rank the videos of the annotation for its captions, or for the given queries. Raise UserError."""
    (candidate,) = find_candidates([checkpoint], settings, overrides, [annotation], retrieval=True)
    model = OpenCandidate(candidate)
    task, report = model.measure(model.read(annotation), annotation)
    assert isinstance(task, Retrieval) and isinstance(report, RetrievalReport) and report.similarity is not None
    texts, similarity = report.queries.texts, report.similarity
    if queries is not None:
        texts, similarity = list(queries), model.similarity_of(queries, task, report)
    return Predictions(texts, report.queries.video_ids, report.missing, similarity, k)
