"""Five small videos as frame folders, and loaders of them, for the tests of batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from media import write_frames
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import GalleryDataset, TrainDataset, VideoReader
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.loader import GalleryLoader, TrainLoader
from adaclip_finetune.data.preprocess import ImageSpec, Views
from adaclip_finetune.data.queries import TrainEntry

IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize_mode="squash")
GREY = ImageSpec(10, (0.0,), (1.0,), resize_mode="squash", grey=True)
COUNTS = {"a": 9, "b": 3, "c": 12, "d": 6, "e": 7}


def write_store(folder: Path) -> FrameFolder:
    for video_id, count in COUNTS.items():
        write_frames(folder / video_id, count)
    return FrameFolder(folder, "image_{:05d}.jpg")


def make_config(**values: Any) -> Config:
    defaults = {"num_frm": 4, "top_k": 2, "sampling": "random", "num_workers": 0, "max_txt_len": 7, "val_batch_size": 2}
    return load_config(None, defaults | values)


def make_reader(store: FrameStore, **values: Any) -> VideoReader:
    return VideoReader(store, make_config(**values), Views(IMAGE, GREY))


def make_train_loader(store: FrameStore, auxiliary: str = "", **values: Any) -> TrainLoader:
    """Return a loader of all videos, of which those named by letters of `auxiliary` have an auxiliary caption."""
    entries = [
        TrainEntry(name, tuple(f"{name}{i}" for i in range(3)), (f"also {name}",) if name in auxiliary else ())
        for name in COUNTS
    ]
    reader = make_reader(store, **values)
    return TrainLoader(TrainDataset(entries, reader), reader.config, tokenize)


def make_gallery_loader(store: FrameStore, **values: Any) -> GalleryLoader:
    reader = make_reader(store, **values)
    return GalleryLoader(GalleryDataset(list(COUNTS), reader), reader.config)


def tokenize(texts: Sequence[str], max_len: int) -> Tensor:
    """Return the bytes of each text, so that tests can read it back."""
    return torch.tensor([list(text.encode().ljust(max_len, b"\0"))[:max_len] for text in texts])


def as_lists(batches: Any) -> list[Any]:
    return [
        (b.videos.video_ids, b.token_ids.tolist(), b.videos.frame_indices.tolist(), b.videos.frames.sum().item())
        for b in batches
    ]
