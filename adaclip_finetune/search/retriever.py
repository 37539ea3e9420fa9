"""A trained model as whoever searches needs it: texts, pictures and videos to vectors of one space.

    model = load_retriever("output/my/20260101-120000-bitfit")
    vector = model.encode_text(["two dogs run along the water"])  # (1, D)

Whatever it gives is float32, on the CPU and of length 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adaclip_finetune.config.roles import deciding_vectors
from adaclip_finetune.data.dataset import VideoBatch, VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.preprocess import to_square
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.search.frame_weights import Weighed, weighed_frames
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.picture import open_picture, seen_pixels
from adaclip_finetune.search.videos import VideoFiles
from adaclip_finetune.training.session import Session, find_checkpoint, open_for_use
from adaclip_finetune.weights.digest import weights_digest


def load_retriever(source: str | Path, **settings: Any) -> Retriever:
    """The model of a run folder, or of a checkpoint. `settings` are laid over its own: device, precision, clip_weights
    … A checkpoint of another system needs those that its file does not tell. Raises UserError.
    """
    try:
        checkpoint, config = find_checkpoint(source, settings)
        return Retriever(Path(source), open_for_use(config, checkpoint))
    except UserError as error:
        raise UserError(str(error).removeprefix("resume: ")) from error


def retriever_of(index: VideoIndex, source: str | Path | None = None, **settings: Any) -> Retriever:
    """The model that the index was made with; `source` tells where it is, should it have moved. Raises UserError if it
    is not there, or is another one."""
    where = Path(index.about.run if source is None else source)
    if not where.exists():
        told = "" if source else f", which {index.folder} was made with,"
        raise UserError(f"the model {where}{told} is not there; say where it is: --model RUN_OR_CHECKPOINT")
    model = load_retriever(where, **(_still_there(index.about.settings) | settings))
    index.check_model(model.fingerprint)
    return model


class Retriever:
    """Encodes; `fingerprint` tells it from any other model."""

    def __init__(self, source: Path, session: Session) -> None:
        self.source, self.config, self.loaded, self.model = source, session.config, session.loaded, session.model
        self._autocast = session.autocast
        self.fingerprint = _fingerprint(session)

    @property
    def width(self) -> int:
        """D."""
        return embedding_width(self.model.clip)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(Q, D); what is longer than max_txt_len is cut."""
        with torch.no_grad(), self._autocast():
            return _normalised(self.model.encode_text(self.loaded.tokenize(texts, self.config.max_txt_len)).sentence)

    def encode_image(self, image: Image.Image | str | Path) -> Tensor:
        """(D,), that of a video of this one frame. Raises UserError for a file that is no picture."""
        pixels = seen_pixels(open_picture(Path(image)) if isinstance(image, str | Path) else image)[None]
        frame = torch.from_numpy(to_square(pixels, self.loaded.image)).to(self.device)
        with torch.no_grad(), self._autocast():
            return _normalised(self.model.encode_image(frame))[0]

    def encode_video(self, path: str | Path) -> tuple[Tensor, list[int], list[float]]:
        """The vector (D,), the frames (from 0) that it was made of, and their weights (sum 1). Raises UserError for a
        file that is no video."""
        path = Path(path)
        reader = VideoReader(VideoFiles(path.parent, {path.name: path.name}), self.config, self.model.views())
        try:
            found = collate([reader.read(path.name)]).videos
        except FrameError as error:
            raise UserError(f"{error.path}: {error.reason}") from error
        assert found is not None
        vectors, (weighed,) = self.embed(found)
        return vectors[0], weighed.frames, weighed.weights

    def embed(self, batch: VideoBatch) -> tuple[Tensor, list[Weighed]]:
        """Vectors (B, D) of a batch that `VideoReader` read as the model's settings ask, and what frames they were made
        of. Raises UserError if they depend on the query."""
        self.refuse_query_dependent()
        with torch.no_grad(), self._autocast():
            features = self.model.encode_video(batch.to(self.device))
            assert features.vector is not None
            return _normalised(features.vector), weighed_frames(features, batch.frame_indices)

    def refuse_query_dependent(self) -> None:
        """Raises UserError where a video has no vector before there is a query."""
        if not self.model.scorer.indexable:
            raise UserError(
                f"{self.source}: its frame_agg {self.config.frame_agg} weighs the frames of a video anew for every "
                "query, so there is no vector to keep and no index to make. Train with frame_agg mlp, transformer or "
                "none; `adaclip evaluate` measures this one"
            )


def _still_there(settings: dict[str, Any]) -> dict[str, Any]:
    """Without a path to weights that are gone: a run that moved may bring its own."""
    lost = settings.get("clip_weights") is not None and not Path(settings["clip_weights"]).exists()
    return {name: value for name, value in settings.items() if not (lost and name == "clip_weights")}


def _fingerprint(session: Session) -> str:
    """SHA-256 over all that decides a vector: weights, the settings that say how they are used, activation, and how
    pictures are prepared."""
    quick = any(type(module).__name__ == "QuickGELU" for module in session.model.clip.modules())
    # Which CLIP it is, the weights tell.
    settings = set(deciding_vectors() - {"clip_backbone"})
    facts = {
        "weights": weights_digest(session.model),
        "settings": session.config.model_dump(mode="json", include=settings),
        "image": asdict(session.loaded.image),
        "quick_gelu": quick,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
