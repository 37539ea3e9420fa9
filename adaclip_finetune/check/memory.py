"""What a run takes of memory, held against what is free here: of the machine, of a GPU, of the shared memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from adaclip_finetune.check.finding import Finding, in_bytes
from adaclip_finetune.check.source import Split
from adaclip_finetune.config import Config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.training.device import describe_device, total_memory_gib
from adaclip_finetune.training.session import Session

_SHARED_MEMORY = Path("/dev/shm")
_AHEAD = 2  # batches that each reading process has ready (torch's own default), beside the one it makes


class Reading(NamedTuple):
    """What a loader reads, in turn: `videos` in all, in batches of `batch`."""

    batch: int
    videos: int


def gallery(split: Split, config: Config) -> Reading:
    """An evaluation's."""
    most = max(1, min(config.val_batch_size, FRAMES_A_GALLERY_BATCH // config.num_frm))
    return Reading(min(most, max(1, len(split.videos))), len(split.videos))


def check_memory(trial: Session, peak_bytes: int, readings: Sequence[Reading]) -> Iterator[Finding]:
    """`peak_bytes`: of the device's memory, on a CPU all that this process holds; `readings`: one after the other."""
    config, device = trial.config, trial.device
    on_cpu = device.type == "cpu"
    ahead = read_ahead(config, trial.model.views(), readings)
    held = peak_bytes if on_cpu else int(psutil.Process().memory_info().rss)
    # What this process holds already is not available any more, and is in `held`.
    free = psutil.virtual_memory().available + int(psutil.Process().memory_info().rss)
    items = {"process": held, "batches read ahead": ahead, "free": free}
    message = (
        f"memory: about {in_bytes(held + ahead)}, of which batches read ahead {in_bytes(ahead)}; "
        f"{in_bytes(free)} are free"
    )
    size = "val_batch_size" if config.do_inference else "batch_size"
    advice = f"lower num_workers, {size} or num_frm" if held + ahead > free else ""
    yield Finding("fails" if advice else "fine", "memory", "run", message, items, advice)
    if config.num_workers and _SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(_SHARED_MEMORY).free
        if ahead > room:
            message = (
                f"reading processes pass {in_bytes(ahead)} through {_SHARED_MEMORY}, which has {in_bytes(room)} free"
            )
            advice = "lower num_workers (0 needs none of it), or enlarge it (docker run --shm-size)"
            items = {"batches read ahead": ahead, "free": room}
            yield Finding("fails", "shared_memory", "run", message, items, advice)
    if not on_cpu:
        total = int(total_memory_gib(device) * 2**30)
        message = f"{describe_device(device)}: about {in_bytes(peak_bytes)} of {in_bytes(total)}"
        more = "" if config.do_inference else ", or --auto_batch_size"
        advice = f"lower {size}{more}" if peak_bytes > total else ""
        items = {"needed": peak_bytes, "total": total}
        yield Finding("fails" if advice else "fine", "gpu_memory", "run", message, items, advice)


def read_ahead(config: Config, views: Views, readings: Sequence[Reading]) -> int:
    """Bytes of the batches that are read before they are needed, at most."""
    one = blank_videos(config.num_frm, views, 1)
    video = one.frames.nbytes + (0 if one.policy_frames is None else one.policy_frames.nbytes)
    batches = config.num_workers * (_AHEAD + 1) + 2  # the one at work, and the one copied ahead
    return video * max(min(batches * reading.batch, reading.videos) for reading in readings)
