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
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.layers import read_object
from adaclip_finetune.config.roles import deciding_vectors
from adaclip_finetune.data.dataset import VideoBatch, VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.preprocess import normalise, to_square
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.parts import weights_digest
from adaclip_finetune.model import clip as towers
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.checkpoints import Checkpoint, check_settings, read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.search.frame_weights import Weighed, weighed_frames
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.picture import open_picture, seen_pixels
from adaclip_finetune.search.videos import VideoFiles
from adaclip_finetune.training.checkpoint import fill
from adaclip_finetune.training.device import make_accelerator

BEST = "best.safetensors"


def load_retriever(source: str | Path, **settings: Any) -> Retriever:
    """The model of a run folder, or of a checkpoint. `settings` are laid over its own: device, precision, clip_weights
    … A checkpoint of another system needs those that its file does not tell. Raises UserError.
    """
    path = Path(source) / BEST if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise UserError(f"{source}: there is no {path.name}; give the folder of a run that was trained, or its {BEST}")
    try:
        checkpoint = read_checkpoint(path)
        config = with_its_clip(checkpoint, _config(Path(source), checkpoint, settings))
        if checkpoint.is_foreign:
            check_settings(checkpoint, config)
        _refuse_lost_clip(path, config)
        accelerator = make_accelerator(config)
        loaded = load_clip(config, from_checkpoint=checkpoint.towers())
        # A checkpoint brings the CNN's weights too, so that none need be fetched.
        model = VideoRetriever(config.model_copy(update={"policy_weights": "random"}), loaded)
        fill(model, checkpoint)
    except UserError as error:
        raise UserError(str(error).removeprefix("resume: ")) from error
    return Retriever(Path(source), config, loaded, model.to(accelerator.device).eval(), accelerator)


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

    def __init__(
        self, source: Path, config: Config, loaded: LoadedClip, model: VideoRetriever, accelerator: Accelerator
    ) -> None:
        self.source, self.config, self.loaded, self.model = source, config, loaded, model
        self._accelerator = accelerator
        self.fingerprint = _fingerprint(config, loaded, model)

    @property
    def width(self) -> int:
        """D."""
        return towers.embedding_width(self.model.clip)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.logit_scale().device

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(Q, D); what is longer than max_txt_len is cut."""
        with torch.no_grad(), self._accelerator.autocast():
            return _normalised(self.model.encode_text(self.loaded.tokenize(texts, self.config.max_txt_len)))

    def encode_image(self, image: Image.Image | str | Path) -> Tensor:
        """(D,), that of a video of this one frame. Raises UserError for a file that is no picture."""
        pixels = seen_pixels(open_picture(Path(image)) if isinstance(image, str | Path) else image)[None]
        spec, clip = self.loaded.image, self.model.clip
        frame = torch.from_numpy(to_square(pixels, spec)).to(self.device)
        with torch.no_grad(), self._accelerator.autocast():
            frames = towers.encode_images(clip, normalise(frame, spec.mean, spec.std)).float()[None]  # (1, 1, D)
            if self.model.header is not None:
                frames = self.model.header(frames)
            return _normalised(frames[0])[0]

    def encode_video(self, path: str | Path) -> tuple[Tensor, list[int], list[float]]:
        """The vector (D,), the frames (from 0) that it was made of, and their weights (sum 1). Raises UserError for a
        file that is no video."""
        path = Path(path)
        reader = VideoReader(VideoFiles(path.parent, {path.name: path.name}), self.config, self.loaded.image)
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
        with torch.no_grad(), self._accelerator.autocast():
            embedding = self.model.encode_video(batch.to(self.device))
            assert embedding.video is not None
            return _normalised(embedding.video), weighed_frames(self.model, embedding, batch.frame_indices)

    def refuse_query_dependent(self) -> None:
        """Raises UserError where a video has no vector before there is a query."""
        if self.model.aggregator.query_dependent:
            raise UserError(
                f"{self.source}: its frame_agg {self.config.frame_agg} weighs the frames of a video anew for every "
                "query, so there is no vector to keep and no index to make. Train with frame_agg mlp, transformer or "
                "none; `adaclip evaluate` measures this one"
            )


def _config(source: Path, checkpoint: Checkpoint, given: dict[str, Any]) -> Config:
    """The settings of the run: of its folder, else those in the file."""
    own: Any = {} if checkpoint.is_foreign else checkpoint.settings
    if (source / "config.json").is_file():
        own = read_object(source / "config.json")
    if own.get("clip_backbone") == Config.model_fields["clip_backbone"].default:
        # A default does not decide which CLIP it is: the tensors do.
        own = {name: value for name, value in own.items() if name != "clip_backbone"}
    return load_config(None, own | given)


def _refuse_lost_clip(path: Path, config: Config) -> None:
    if config.clip_weights is not None and not Path(config.clip_weights).exists():
        raise UserError(
            f"{path}: the clip_weights that the run began with, {config.clip_weights}, are not there (looked for in "
            f"{Path.cwd()}). They say what the tensors do not: activation, heads and preprocessing. Run this where "
            "they are, or say where: --clip_weights PATH"
        )


def _still_there(settings: dict[str, Any]) -> dict[str, Any]:
    """Without a path to weights that are gone: a run that moved may bring its own."""
    lost = settings.get("clip_weights") is not None and not Path(settings["clip_weights"]).exists()
    return {name: value for name, value in settings.items() if not (lost and name == "clip_weights")}


def _fingerprint(config: Config, loaded: LoadedClip, model: VideoRetriever) -> str:
    """SHA-256 over all that decides a vector: weights, the settings of selection and aggregation, activation, and how
    pictures are prepared."""
    quick = any(type(module).__name__ == "QuickGELU" for module in model.clip.modules())
    facts = {
        "weights": weights_digest(model),
        # The weights say which CLIP it is; its name may be a default that nobody meant.
        "settings": config.model_dump(mode="json", include=set(deciding_vectors() - {"clip_backbone"})),
        "image": asdict(loaded.image),
        "quick_gelu": quick,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
