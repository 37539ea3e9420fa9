"""A model as mteb measures it: `mteb.evaluate(mteb_model("output/my/RUN"), tasks)`.

mteb is an optional dependency (`pip install adaclip-finetune[mteb]`). Videos are decoded by this package, as in an
index, so torchcodec is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import VideoItem, VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.search_model import SearchModel, load_retriever

_KINDS = ("text", "image", "video")


def mteb_model(source: str | Path, **settings: Any) -> MtebModel:
    """Load a run, a checkpoint or a pretrained CLIP, as `load_retriever` does, for the tasks of mteb on texts, images
    and videos.

    mteb stores its results by the name of `source` and the fingerprint of the model. Raise UserError if mteb is not
    installed, or if the vectors of the model's videos depend on the query.
    """
    try:
        meta = import_module("mteb.models").ModelMeta
    except ImportError as error:
        raise UserError(f"mteb_model needs mteb: pip install 'adaclip-finetune[mteb]' ({error})") from error
    model = load_retriever(source, **settings)
    model.refuse_query_dependent()
    about = {
        "name": f"adaclip-finetune/{Path(source).name.replace(':', '-')}",
        "revision": model.fingerprint,
        "modalities": list(_KINDS),
        "embed_dim": model.width,
        "max_tokens": model.config.max_txt_len,
        "n_parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "framework": ["PyTorch"],
        "use_instructions": False,
    }
    return MtebModel(model, meta.create_empty(overwrites=about))


class MtebModel:
    """An encoder by the protocol of mteb. All vectors are of length 1, so that their dot product is their cosine."""

    def __init__(self, model: SearchModel, meta: Any) -> None:
        self.model, self.mteb_model_meta = model, meta

    def encode(self, inputs: Any, *, show_progress_bar: bool = False, **_about: Any) -> Tensor:
        """Return the vectors (N, D) of the rows of mteb's data loader. A row of several kinds, such as a video with a
        text, has the direction of the sum of their vectors. Raise UserError for a video that cannot be read."""
        kinds = [kind for kind in _KINDS if kind in inputs.dataset.column_names]
        rows = inputs.dataset.select_columns(kinds)
        if "video" in kinds:
            rows = rows.cast_column("video", import_module("datasets").Video(decode=False))
        batches: DataLoader[Any] = DataLoader(
            rows,
            batch_size=inputs.batch_size,
            num_workers=inputs.num_workers,
            collate_fn=_Collator(self.model.config, self.model.model.views()),
        )
        return torch.cat([self._vectors(batch) for batch in tqdm(batches, disable=not show_progress_bar)])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of each of the vectors (N, D) with each of the vectors (M, D), as (N, M)."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosines of pairs of vectors, both (N, D), as (N,)."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

    def _vectors(self, batch: Mapping[str, Any]) -> Tensor:
        parts = []
        if "text" in batch:
            parts.append(self.model.encode_text(batch["text"]))
        if "image" in batch:
            parts.append(torch.stack([self.model.encode_image(image) for image in batch["image"]]))
        if videos := collate(batch.get("video", [])).videos:
            parts.append(self.model.embed(videos)[0])
        return F.normalize(torch.stack(parts).sum(dim=0), dim=-1)


class _Collator:
    """Turn rows of mteb into a batch, with videos read as `config` and `views` say. It runs in the loader's workers."""

    def __init__(self, config: Config, views: Views) -> None:
        self.config, self.views = config, views

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        batch = {kind: [row[kind] for row in rows] for kind in rows[0]}
        if "video" in batch:
            batch["video"] = [self._read(video) for video in batch["video"]]
        return batch

    def _read(self, video: Mapping[str, Any]) -> VideoItem:
        """Read a video that is given by its bytes or its path."""
        with TemporaryDirectory() as folder:
            path = Path(video["path"] or "video.mp4")
            if video["bytes"] is not None:
                path = Path(folder, path.name)
                path.write_bytes(video["bytes"])
            reader = VideoReader(VideoFiles(path.parent, {path.name: path.name}), self.config, self.views)
            try:
                return reader.read(path.name)
            except FrameError as error:
                raise UserError(f"{path.name}: {error.reason}") from error
