"""Row `embedding`: vectors of videos, from pixels in memory and from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.bench.reading import write_video
from adaclip_finetune.bench.step import Bound, EncodeAll, model_settings, random_batch
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import GalleryDataset, VideoBatch, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.session import Session, open_model


def embedding(setup: Setup) -> Iterator[Measured]:
    """Compare the vectors of videos with encoding all frames, and with their bound: CLIP on K frames, the CNN on N.

    Last, videos are read from files while others are encoded, beside the slower of reading and encoding alone.
    """
    sizes = [(4, 2, 1)] if setup.quick else [(16, 8, 4), (32, 8, 2)] if setup.device.type == "cpu" else [(32, 8, 16)]
    with model_settings(setup) as shared:
        for frames, k, batch in sizes:
            size = {"num_frm": frames, "top_k": k, "batch_size": batch, "val_batch_size": batch, "do_inference": True}
            config = load_config(None, shared | size)
            torch.manual_seed(config.seed)
            session = open_model(config, values="random", accelerator=make_accelerator(config))
            session.model.eval().requires_grad_(False)
            videos, reference = random_batch(session, config).videos, EncodeAll(session, config)
            bound = Bound(session, config, videos, others=False)
            session.model.double()
            check("the vectors", _vectors(session, videos), reference.embed(videos), 1e-6)
            session.model.float()
            with setup.autocast(), torch.no_grad():
                alternatives: dict[str, Callable[[], object]] = {
                    "all frames": partial(reference.embed, videos),
                    "bound": bound,
                    "ours": partial(_vectors, session, videos),
                }
                seconds = in_turns(setup, alternatives)
            case = f"{k} of {frames} frames, {batch} videos, {setup.precision}"
            yield Measured(case, seconds, [Aim("ours", "all frames"), Aim("ours", "bound", 0.9)])
        yield _from_files(setup, session, config)


def _from_files(setup: Setup, session: Session, config: Config) -> Measured:
    """Compare reading and encoding videos of ten seconds at the same time with the slower of both alone."""
    size, length, count = ("480x270", 1, 2) if setup.quick else ("640x360", 10, 4)
    with TemporaryDirectory() as name:
        names = [f"v{number}" for number in range(count)]
        first = write_video(Path(name) / "v0.mp4", size, length)
        for other in names[1:]:
            os.link(first, first.with_stem(other))
        dataset = GalleryDataset(names, VideoReader(VideoFolder(first.parent), config, session.model.views()))
        with closing(GalleryLoader(dataset, config)) as loader, setup.autocast(), torch.no_grad():

            def read() -> Iterator[VideoBatch]:
                return (batch.videos for batch in loader.read(range(len(loader))) if batch.videos is not None)

            def encode(batches: Iterable[VideoBatch]) -> Tensor:
                return torch.cat([_vectors(session, videos.to(session.device)).cpu() for videos in batches])

            kept = list(read())
            check("the vectors of files", encode(read()), encode(kept), 1e-6)
            seconds = in_turns(
                setup,
                {"reading": lambda: list(read()), "encoding": partial(encode, kept), "ours": lambda: encode(read())},
            )
    seconds["the slower"] = [max(pair) for pair in zip(seconds["reading"], seconds["encoding"], strict=True)]
    case = f"{config.top_k} of {config.num_frm} frames, {count} files of {length} s, {size}, {setup.precision}"
    return Measured(case, seconds, [Aim("ours", "the slower", 0.9), Aim("ours", "reading"), Aim("ours", "encoding")])


def _vectors(session: Session, videos: VideoBatch) -> Tensor:
    vectors = session.model.encode_video(videos).vector
    assert vectors is not None
    return vectors
