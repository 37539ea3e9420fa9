"""`SearchModel`: a model that turns texts, pictures and videos into vectors of one space.

    model = load_retriever("output/my/20260101-120000-bitfit")
    vector = model.encode_text(["two dogs run along the water"])  # (1, D)

All vectors are float32, on the CPU, and of length 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adaclip_finetune.config.roles import deciding_vectors
from adaclip_finetune.data.dataset import VideoBatch, VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.preprocess import to_square
from adaclip_finetune.errors import UserError
from adaclip_finetune.hub import on_hub
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.pictures import open_picture, seen_pixels
from adaclip_finetune.search.query import terms_of
from adaclip_finetune.search.stores.base import Searchable
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.training.session import Session, open_any
from adaclip_finetune.weights.plain import weights_digest

_NOTHING_LEFT = 1e-3  # length of a sum of vectors of length 1


class WeightedFrames(NamedTuple):
    """The frames that a video's vector was made of, in order of time."""

    frames: list[int]  # in the video, from 0; empty if the selector chose nothing but the blank frames of a short video
    weights: list[float]  # of sum 1
    best: int  # position in `frames` of the one with the greatest weight


def load_retriever(source: str | Path, **settings: Any) -> SearchModel:
    """Load the model of a run folder, a run on the hub (`hf:owner/name`) or a checkpoint, or a pretrained CLIP:
    `ViT-B/32`, `ViT-SO400M-14-SigLIP:webli`, or a file or folder of weights.

    `settings` override those of the run: device, precision, clip_weights and so on. A checkpoint of another system
    needs the settings that its file does not contain. A CLIP takes `num_frm` uniform frames of a video and the mean of
    their vectors. Raise UserError.
    """
    try:
        return SearchModel(Path(source), open_any(source, settings))
    except UserError as error:
        raise UserError(str(error).removeprefix("resume: ")) from error


def search_model_of(index: Searchable, source: str | Path | None = None, **settings: Any) -> SearchModel:
    """Load the model that an index was made with; `source` says where it is if it has moved. Raise UserError if it is
    missing or is another model."""
    info = index.info
    where = Path(info.run if source is None else source)
    if not (where.exists() or info.has_named_clip or on_hub(where)):
        reason = "" if source else f", with which {index.place} was made,"
        raise UserError(f"the model {where}{reason} is not there; say where it is: --model RUN_OR_CHECKPOINT")
    stored = dict(info.settings)
    if stored.get("clip_weights") and not Path(stored["clip_weights"]).exists():
        del stored["clip_weights"]  # a run that moved may bring its own
    model = load_retriever(where, **stored | settings)
    if model.fingerprint != info.fingerprint:
        raise UserError(
            f"{index.place}: was made with another model ({info.run}, fingerprint {info.fingerprint[:12]}; this one "
            f"has {model.fingerprint[:12]}), and vectors of two models cannot be compared: give the model that it was "
            "made with (--model), or index the videos again"
        )
    return model


class SearchModel:
    """A model in evaluation mode; `fingerprint` distinguishes it from every other model.

    `untrained`: it is a pretrained CLIP, which has not been finetuned.
    """

    def __init__(self, source: Path, session: Session) -> None:
        self.untrained = session.checkpoint is None
        self.source, self.config, self.loaded, self.model = source, session.config, session.loaded, session.model
        self.autocast = session.autocast
        self.fingerprint = _fingerprint(session)

    @property
    def width(self) -> int:
        """Return D, the width of the vectors."""
        return embedding_width(self.model.clip)

    @property
    def device(self) -> torch.device:
        """Return the device that the model computes on."""
        return self.model.device

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors (Q, D) of texts; words beyond `max_txt_len` are cut off."""
        with torch.no_grad(), self.autocast():
            return _normalised(self.model.encode_text(self.loaded.tokenize(texts, self.config.max_txt_len)).sentence)

    def encode_query(self, queries: Sequence[str]) -> Tensor:
        """Return the vectors (Q, D) of queries, each of which may combine several texts (`terms_of`). Raise UserError
        for texts that cancel each other out."""
        terms = [terms_of(query) for query in queries]
        vectors = iter(self.encode_text([term.text for combined in terms for term in combined]))
        sums = torch.stack([torch.stack([t.weight * next(vectors) for t in combined]).sum(dim=0) for combined in terms])
        for query, length in zip(queries, sums.norm(dim=-1), strict=True):
            if length < _NOTHING_LEFT:
                raise UserError(f"{query}: these texts cancel each other out")
        return F.normalize(sums, dim=-1)

    def count_cut(self, queries: Sequence[str]) -> int:
        """Count the texts of these queries that lose words beyond `max_txt_len`."""
        texts = [term.text for query in queries for term in terms_of(query)]
        return self.loaded.count_cut(texts, self.config.max_txt_len)

    def encode_image(self, image: Image.Image | str | Path) -> Tensor:
        """Return the vector (D,) of a picture, which is that of a video of this one frame. Raise UserError for a file
        that is not a picture."""
        pixels = seen_pixels(open_picture(Path(image)) if isinstance(image, str | Path) else image)[None]
        frame = torch.from_numpy(to_square(pixels, self.loaded.image)).to(self.device)
        with torch.no_grad(), self.autocast():
            return _normalised(self.model.encode_image(frame))[0]

    def encode_video(self, path: str | Path) -> tuple[Tensor, list[int], list[float]]:
        """Return the vector (D,) of a video file, the frames (from 0) that it was made of, and their weights (sum 1).
        Raise UserError for a file that is not a video."""
        path = Path(path)
        reader = VideoReader(VideoFiles(path.parent, {path.name: path.name}), self.config, self.model.views())
        try:
            batch = collate([reader.read(path.name)]).videos
        except FrameError as error:
            raise UserError(f"{error.path}: {error.reason}") from error
        assert batch is not None
        vectors, (weighted,) = self.embed(batch)
        return vectors[0], weighted.frames, weighted.weights

    def frame_vectors(self, batch: VideoBatch) -> tuple[Tensor, Tensor | None]:
        """Return what CLIP and the selector make of videos of one frame each (B, D) and (B, F), as
        `VideoRetriever.frame_vectors` does."""
        with memory_explained(self.config), torch.no_grad(), self.autocast():
            vectors, features = self.model.frame_vectors(batch.to(self.device))
        return vectors[:, 0], None if features is None else features[:, 0]

    def embed(self, batch: VideoBatch) -> tuple[Tensor, list[WeightedFrames]]:
        """Return the vectors (B, D) of a batch that `VideoReader` read, and the frames that they were made of. Raise
        UserError if they depend on the query or are not finite."""
        self.refuse_query_dependent()
        with memory_explained(self.config), torch.no_grad(), self.autocast():
            features = self.model.encode_video(batch.to(self.device))
        assert features.vector is not None
        vectors = _normalised(features.vector)
        if not vectors.isfinite().all():
            raise UserError(f"{self.source}: its vectors are not finite; the weights have probably diverged")
        return vectors, _weighted_frames(features, batch.frame_indices)

    def refuse_query_dependent(self) -> None:
        """Raise UserError if the vector of a video depends on the query, so that it cannot be computed in advance."""
        if not self.model.scorer.indexable:
            raise UserError(
                f"{self.source}: its frame_agg {self.config.frame_agg} weighs the frames of a video anew for every "
                "query, so there are no vectors to put into an index. Train with frame_agg mlp, transformer or none; "
                "`adaclip evaluate` measures this one"
            )


def _weighted_frames(features: VideoFeatures, frame_indices: Tensor) -> list[WeightedFrames]:
    """`frame_indices` (B, N): positions in the video of the frames that were read; -1 for a blank one."""
    weights, indices, preferred = features.frame_weights.cpu(), frame_indices.cpu(), features.frame_weights.cpu()
    if features.selection is not None:
        chosen, preferred = features.selection.indices.cpu(), features.selection.logits.cpu()
        weights, indices, preferred = (values.gather(1, chosen) for values in (weights, indices, preferred))
    return [_merged(*row) for row in zip(indices.tolist(), weights.tolist(), preferred.tolist(), strict=True)]


def _merged(indices: list[int], weights: list[float], preferred: list[float]) -> WeightedFrames:
    """Add up the weights of equal frames, which a short video repeats. Of frames with equal weight, the best is the one
    that the selector preferred."""
    merged: dict[int, tuple[float, float]] = {}
    for index, weight, score in zip(indices, weights, preferred, strict=True):
        if index >= 0:
            weight_so_far, highest = merged.get(index, (0.0, float("-inf")))
            merged[index] = (weight_so_far + weight, max(highest, score))
    frames = sorted(merged)
    total = sum(weight for weight, _ in merged.values()) or 1.0
    heaviest = max(frames, key=lambda frame: (round(merged[frame][0], 6), merged[frame][1]), default=None)
    best = 0 if heaviest is None else frames.index(heaviest)
    return WeightedFrames(frames, [merged[frame][0] / total for frame in frames], best)


def _fingerprint(session: Session) -> str:
    """SHA-256 of all that decides a vector: the weights, the settings that say how they are used, and how pictures are
    prepared."""
    facts = {
        "weights": weights_digest(session.model),
        # The weights themselves say which CLIP it is.
        "settings": session.config.model_dump(mode="json", include=set(deciding_vectors() - {"clip_backbone"})),
        "image": asdict(session.loaded.image),
        "quick_gelu": any(type(module).__name__ == "QuickGELU" for module in session.model.clip.modules()),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
