"""What a run takes of disk and memory, held against what is free here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from torch import Tensor

from adaclip_finetune.check.finding import Finding
from adaclip_finetune.check.model import TrialModel
from adaclip_finetune.check.source import Split
from adaclip_finetune.check.steps import StepTrial
from adaclip_finetune.config import Config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.training.device import describe_device, total_memory_gib

_SHARED_MEMORY = Path("/dev/shm")
_AHEAD = 2  # batches that each reading process has ready (torch's own default), beside the one it makes


def check_disk(trial: TrialModel, splits: Iterable[Split]) -> Iterator[Finding]:
    """The run folder at its largest: while a new snapshot is written the one before it is still there, and each keeps
    the best weights of its time."""
    config, model = trial.config, trial.model
    if config.no_output:
        return
    weights = _bytes(model.state_dict().values())
    adapter = 0 if config.resume else _bytes(trial.method.trainable_state(model).values())
    moments = 2 * _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    last = weights if config.save_last else 0
    embeddings = _embeddings(trial, splits)
    needs = {
        "snapshots": 2 * (weights + moments),
        "best.safetensors": 2 * weights,
        "adapter.safetensors": 2 * adapter,
        "last.safetensors": last,
        "embeddings": embeddings,
        "left at the end": weights + adapter + last,
    }
    peak = sum(needs.values()) - needs["left at the end"]
    folder = _existing(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    message = f"disk: the run folder takes up to {_size(peak)}, {_size(needs['left at the end'])} of it for good; "
    message += f"{_size(free)} are free in {folder}"
    advice = "make room, or set output_dir to another disk" if peak > free else ""
    yield Finding("fails" if advice else "fine", "disk", "run", message, {**needs, "peak": peak, "free": free}, advice)


def check_memory(trial: TrialModel, step: StepTrial) -> Iterator[Finding]:
    """Of the machine and, where there is one, of the GPU."""
    config, device = trial.config, trial.accelerator.device
    on_cpu = device.type == "cpu"
    ahead = _read_ahead(config, trial.loaded.image, step.batch_size)
    held = step.peak_bytes if on_cpu else int(psutil.Process().memory_info().rss)
    # What this process holds already is not available any more, and is in `held`.
    free = psutil.virtual_memory().available + int(psutil.Process().memory_info().rss)
    items = {"process": held, "batches read ahead": ahead, "free": free}
    message = f"memory: about {_size(held + ahead)}, of which batches read ahead {_size(ahead)}; {_size(free)} are free"
    advice = "lower num_workers, batch_size or num_frm" if held + ahead > free else ""
    yield Finding("fails" if advice else "fine", "memory", "run", message, items, advice)
    if config.num_workers and _SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(_SHARED_MEMORY).free
        if ahead > room:
            message = f"reading processes pass {_size(ahead)} through {_SHARED_MEMORY}, which has {_size(room)} free"
            advice = "lower num_workers (0 needs none of it), or enlarge it (docker run --shm-size)"
            items = {"batches read ahead": ahead, "free": room}
            yield Finding("fails", "shared_memory", "run", message, items, advice)
    if not on_cpu:
        total = int(total_memory_gib(device) * 2**30)
        message = f"{describe_device(device)}: about {_size(step.peak_bytes)} of {_size(total)}"
        advice = "lower batch_size, or --auto_batch_size" if step.peak_bytes > total else ""
        items = {"needed": step.peak_bytes, "total": total}
        yield Finding("fails" if advice else "fine", "gpu_memory", "run", message, items, advice)


def _read_ahead(config: Config, image: ImageSpec, batch_size: int) -> int:
    """Bytes of the batches that are read before they are needed, in training or in an evaluation."""
    one = blank_videos(config, image, 1)
    video = one.frames.nbytes + (0 if one.policy_frames is None else one.policy_frames.nbytes)
    gallery = max(1, min(config.val_batch_size, FRAMES_A_GALLERY_BATCH // config.num_frm))
    batches = config.num_workers * (_AHEAD + 1) + 2  # the one at work, and the one copied ahead
    return batches * max(batch_size, gallery) * video


def _embeddings(trial: TrialModel, splits: Iterable[Split]) -> int:
    """Bytes of the test's two evaluations, zero-shot and final, which are kept until the run is finished."""
    config, tested = trial.config, list(splits)[-1]
    texts = len(tested.videos) if config.concat_captions == "concat" else sum(len(v.sentences) for v in tested.videos)
    rows = config.top_k if config.use_policy else config.num_frm
    final = rows if trial.model.aggregator.query_dependent else 1
    return 4 * embedding_width(trial.loaded.module) * (2 * texts + (1 + final) * len(tested.videos))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
