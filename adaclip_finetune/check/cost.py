"""What a run would take on this machine: time, memory and disk, estimated from a few steps and a few videos."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from adaclip_finetune.check.data import CheckedSplit
from adaclip_finetune.check.report import Finding, Severity, plural
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH, make_loader, stop_workers
from adaclip_finetune.data.queries import TrainEntry, evaluation_queries, train_entries
from adaclip_finetune.training.device import describe_device, peak_memory_mib, total_memory_gib
from adaclip_finetune.training.memory import (
    StepCost,
    attempt,
    explain_out_of_memory,
    try_steps,
)
from adaclip_finetune.training.session import Session

_READING_SECONDS = 8.0
_READ_VIDEOS = 48  # but at least three for each reading process
_READ_AHEAD = 2  # batches that each reading process has ready (torch's default), beside the one that it reads
_SHARED_MEMORY = Path("/dev/shm")


def check_cost(session: Session, splits: Sequence[CheckedSplit], folder: Path | None) -> Iterator[Finding]:
    """Yield findings about disk, memory and time of a run. Its first split has readable videos.

    `folder` is that of a run that is resumed.
    """
    config, size, entries = session.config, 0, 0
    loaders = [(_gallery_batch(session, split), len(split.videos)) for split in splits if not split.trains]
    if not config.do_inference:
        good = set(splits[0].good)
        videos = [video for video in splits[0].videos if video.video_id in good]
        entries = len(train_entries(videos, config.concat_captions))
        phases = session.method.phases(config.num_epochs, config.batch_size)
        size = min(entries, max(phase.batch_size for phase in phases))
        loaders.append((size, entries))
    yield from _disk(session, splits[-1], folder)
    # If the videos alone do not fit, nothing is tried: Linux would end this process.
    if failing := [finding for finding in _memory(session, 0, loaders) if finding.severity == "fails"]:
        yield from failing
        return
    evaluation = _try_evaluation(session, splits[-1])
    if isinstance(evaluation, str):
        yield Finding("fails", "gpu_memory", "run", evaluation)
        return
    evaluation_seconds, peak = evaluation
    if config.do_inference:
        yield from _memory(session, peak, loaders)
        return
    step = _try_training(session, size)
    if isinstance(step, str):
        severity: Severity = "warning" if config.auto_batch_size else "fails"
        yield Finding(severity, "gpu_memory", "run", step)
        return
    peak = max(peak, step.peak_bytes + step.kept_bytes * (size - step.videos) // step.videos)
    yield from _memory(session, peak, loaders)

    reading = _reading_seconds(session, splits[0])
    compute = step.seconds * size / step.videos + step.update_seconds
    batch = _at_once(reading * size, compute, session)
    seconds = {"computing_a_batch": compute, "reading_a_batch": reading * size, "batch": batch}
    seconds["epoch"] = batch * entries / size
    seconds["validation"] = len(splits[1].videos) * _at_once(reading, evaluation_seconds, session)
    seconds["run"] = config.num_epochs * (seconds["epoch"] + seconds["validation"])
    yield _time(session, step.videos, size, seconds)


# ---- trying it out ----


def _try_training(session: Session, batch_size: int) -> StepCost | str:
    """Return the cost of a step, at the largest K of the run, or why it does not fit into memory.

    A CPU tries two videos.
    """
    config, device, accelerator = session.config, session.device, session.accelerator
    assert accelerator is not None
    session.model.start_epoch(0)
    size = min(2, batch_size) if device.type == "cpu" else batch_size
    cost = try_steps(config, session.objective, session.loaded.tokenize, accelerator, size)
    if isinstance(cost, str):
        tried = config.model_copy(update={"batch_size": size})
        return str(explain_out_of_memory(MemoryError(cost), tried))
    return cost


def _try_evaluation(session: Session, split: CheckedSplit) -> tuple[float, int] | str:
    """Return the seconds a video and the peak memory in bytes of an evaluation, or why a batch does not fit.

    A CPU tries two videos.
    """
    config, model, device = session.config, session.model.eval(), session.device
    tried = _gallery_batch(session, split)
    tried = min(2, tried) if device.type == "cpu" else tried

    @torch.no_grad()
    def evaluate() -> float:
        videos = blank_videos(config.num_frm, model.views(), tried).to(device)
        started = time.monotonic()
        with session.autocast():
            model.encode_video(videos)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.monotonic() - started) / tried

    seconds = attempt(evaluate)
    if isinstance(seconds, str):
        return str(explain_out_of_memory(MemoryError(seconds), config))
    if device.type != "cpu":
        return seconds, int(peak_memory_mib(device) * 2**20)
    # The zero-shot baseline is a CLIP of its own if the model comes from a checkpoint.
    baseline = _bytes(session.loaded.module.state_dict().values()) if config.resume else 0
    return seconds, psutil.Process().memory_info().rss + baseline


def _reading_seconds(session: Session, split: CheckedSplit) -> float:
    """Return seconds a video, read by the loader of a run with all its reading processes at work."""
    config, readers = session.config, max(1, session.config.num_workers)
    chosen = split.good[:: -(-len(split.good) // max(_READ_VIDEOS, 3 * readers))]  # from the whole of the list
    reader = VideoReader(split.store, config, session.model.views())
    dataset = TrainDataset([TrainEntry(video_id, ("",)) for video_id in chosen], reader)
    loader = make_loader(dataset, config, [[(0, index)] for index in range(len(chosen))])
    try:
        batches = iter(loader)  # starts the processes
        times = [time.monotonic()]
        for _ in batches:
            times.append(time.monotonic())
            if times[-1] - times[0] > _READING_SECONDS:
                break
    finally:
        stop_workers(loader)
    # The first video of each process also takes a part of the time in which the process starts.
    first = readers if len(times) > 2 * readers else 0
    return (times[-1] - times[first]) / (len(times) - 1 - first)


# ---- time ----


def _at_once(read: float, compute: float, session: Session) -> float:
    """Return the seconds of reading and computing, which overlap if there are reading processes."""
    if not session.config.num_workers:
        return read + compute
    threads = torch.get_num_threads() if session.device.type == "cpu" else 0
    work = read * min(session.config.num_workers, _processors()) + compute * threads
    return max(read, compute, work / _processors())


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _time(session: Session, tried: int, size: int, seconds: dict[str, float]) -> Finding:
    config, workers, processors = session.config, session.config.num_workers, _processors()
    told = {name: _duration(count) for name, count in seconds.items()}
    measured = "" if tried == size else f", extrapolated from {tried}"
    message = (
        f"time, estimated on {describe_device(session.device)}: {told['batch']} a batch of {plural(size, 'video')}"
        f"{measured} (computing {told['computing_a_batch']}, reading {told['reading_a_batch']} with num_workers "
        f"{workers}), {told['epoch']} an epoch and {told['validation']} its validation; "
        f"{plural(config.num_epochs, 'epoch')}: {told['run']}"
    )
    advice = ""
    if seconds["reading_a_batch"] > seconds["computing_a_batch"]:
        message += ". Reading is the bottleneck"
        more = f"raise num_workers ({processors} processors here), or " if workers < processors else ""
        frame_size = session.loaded.image.size
        advice = f"{more}extract the frames, no larger than needed (adaclip extract --frame_size {frame_size})"
    items = {"batch_size": size, "tried": tried, **seconds, "threads": torch.get_num_threads()}
    return Finding("fine", "time", "run", message, items, advice)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---- memory and disk ----


def _memory(session: Session, peak: int, loaders: Iterable[tuple[int, int]]) -> Iterator[Finding]:
    """Hold memory against what is free. `loaders` gives the batch size and the number of videos of each loader."""
    config, device = session.config, session.device
    size = "val_batch_size" if config.do_inference else "batch_size"
    video = config.num_frm * sum(view.channels * view.size**2 for view in session.model.views() if view)  # a byte each
    batches = config.num_workers * (_READ_AHEAD + 1) + 2  # the one that is computed, and the one copied ahead
    ahead = video * max(min(batches * batch, videos) for batch, videos in loaders)
    held = psutil.Process().memory_info().rss
    process = max(peak, held) if device.type == "cpu" else held
    free = psutil.virtual_memory().available + held
    message = f"memory: about {_size(process + ahead)}, {_size(ahead)} of it for batches read ahead; {_size(free)} free"
    items = {"process": process, "batches read ahead": ahead, "free": free}
    yield _within(process + ahead, free, "memory", message, items, f"lower num_workers, {size} or num_frm")
    if config.num_workers and _SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(_SHARED_MEMORY).free
        message = f"reading processes pass {_size(ahead)} through {_SHARED_MEMORY}, which has {_size(room)} free"
        advice = "lower num_workers (0 needs none of it), or enlarge it (docker run --shm-size)"
        items = {"batches read ahead": ahead, "free": room}
        yield _within(ahead, room, "shared_memory", message, items, advice)
    if device.type != "cpu":
        total = int(total_memory_gib(device) * 2**30)
        message = f"{describe_device(device)}: about {_size(peak)} of {_size(total)}"
        advice = f"lower {size}" + ("" if config.do_inference else ", or give --auto_batch_size")
        yield _within(peak, total, "gpu_memory", message, {"needed": peak, "total": total}, advice)


def _disk(session: Session, tested: CheckedSplit, folder: Path | None) -> Iterator[Finding]:
    """Hold what a run writes, at its largest, against the free space; and say where it may not write.

    While a snapshot is written, the one before it is still there, and each keeps the best weights of its time.
    """
    config, model = session.config, session.model
    weights = _bytes(model.state_dict().values())
    moments = 2 * _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    adapter = 0 if config.resume else _bytes(session.method.own_state(model).values())
    last = weights if config.save_last else 0
    texts = len(evaluation_queries(tested.videos, config.concat_captions).texts)
    matrix = 4 * texts * len(tested.videos) if config.save_similarity else 0
    training = {
        "snapshots": 2 * (weights + moments),
        "best.safetensors": 2 * weights,
        "adapter.safetensors": 2 * adapter,
        "last.safetensors": last,
    }
    places = []
    if not config.no_output:
        needs = {} if config.do_inference else training
        left = 0 if config.do_inference else weights + adapter + last
        places.append(("output_dir", folder or Path(config.output_dir, config.dataset), needs, left))
    if config.save_similarity:
        places.append(("save_similarity", Path(config.save_similarity).parent, {"similarity": matrix}, matrix))
    for setting, wanted, needs, left in places:
        place = next(path for path in (wanted.absolute(), *wanted.absolute().parents) if path.is_dir())
        if not os.access(place, os.W_OK | os.X_OK):
            message = f"{setting}: no permission to write in {place}"
            yield Finding("fails", "closed_folder", "run", message, advice=f"set {setting} to another folder")
        # What a resumed run has written already is replaced; a file with two names counts once.
        files = [path.stat() for path in folder.rglob("*") if path.is_file()] if folder and place == folder else []
        peak, free = sum(needs.values()), shutil.disk_usage(place).free
        message = f"disk ({setting}): up to {_size(peak)}, of which {_size(left)} stay; {_size(free)} free in {place}"
        items = {**needs, "left at the end": left, "peak": peak, "free": free}
        taken = sum({file.st_ino: file.st_size for file in files}.values())
        yield _within(peak, free + taken, "disk", message, items, f"make room, or set {setting} to another disk")


def _within(needed: int, free: int, check: str, message: str, items: dict[str, int], advice: str) -> Finding:
    fits = needed <= free
    return Finding("fine" if fits else "fails", check, "run", message, items, "" if fits else advice)


def _gallery_batch(session: Session, split: CheckedSplit) -> int:
    config = session.config
    return max(1, min(config.val_batch_size, FRAMES_A_GALLERY_BATCH // config.num_frm, len(split.videos)))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(count: int) -> str:
    power, unit = next(((p, u) for p, u in ((30, "GiB"), (20, "MiB")) if count >= 2**p), (10, "KiB"))
    return f"{count / 2**power:.1f} {unit}"
