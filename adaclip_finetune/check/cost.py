"""What a run would take: time, disk and memory on this machine. Estimates, from a few steps and a few videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adaclip_finetune.check.disk import check_disk
from adaclip_finetune.check.evaluation import try_evaluation
from adaclip_finetune.check.finding import Finding, Severity, plural
from adaclip_finetune.check.memory import Reading, check_memory, gallery
from adaclip_finetune.check.reading import seconds_a_video
from adaclip_finetune.check.source import Split
from adaclip_finetune.check.steps import StepTrial, try_steps
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.extract.options import cores
from adaclip_finetune.training.device import describe_device
from adaclip_finetune.training.session import Session


@dataclass(frozen=True)
class _Times:
    """In seconds, of a batch, an epoch and a run; validation and test are not in it."""

    batch_size: int
    tried: int  # videos of the batch that was measured
    computing_a_batch: float
    reading_a_batch: float
    batch: float
    epoch: float
    run: float


def check_training_cost(
    trial: Session, splits: Sequence[Split], store: FrameStore, readable: Sequence[str], folder: Path | None
) -> Iterator[Finding]:
    """`readable`: the training videos that a run would take, at least one; `store` has them. `folder`: that of a run
    that goes on."""
    train, config = splits[0], trial.config
    good = set(readable)
    videos = [video for video in train.videos if video.video_id in good]
    entries = len(train_entries(videos, config.concat_captions))
    phases = trial.method.phases(config.num_epochs, config.batch_size)
    reading = seconds_a_video(readable, store, config, trial.model.views())
    step = try_steps(trial, min(entries, max(phase.batch_size for phase in phases)))
    yield from check_disk(trial, splits, folder)
    if step.refused:
        severity: Severity = "warning" if config.auto_batch_size else "fails"
        yield Finding(severity, "gpu_memory", "run", step.refused)
        return
    readings = [Reading(step.batch_size, entries), *(gallery(split, config) for split in splits[1:])]
    yield from check_memory(trial, step.peak_bytes, readings)
    yield _time(trial, step, entries, reading)


def check_evaluation_cost(trial: Session, split: Split, folder: Path | None) -> Iterator[Finding]:
    """Disk and memory of do_inference."""
    yield from check_disk(trial, [split], folder)
    evaluation = try_evaluation(trial, split)
    if evaluation.refused:
        yield Finding("fails", "gpu_memory", "run", evaluation.refused)
        return
    yield from check_memory(trial, evaluation.peak_bytes, [gallery(split, trial.config)])


def _time(trial: Session, step: StepTrial, entries: int, reading: float) -> Finding:
    config, device = trial.config, trial.device
    read, compute = reading * step.batch_size, step.seconds
    batch = max(_together(read, compute, config.num_workers, device), 1e-9)
    epoch = batch * entries / step.batch_size
    times = _Times(step.batch_size, step.tried, compute, read, batch, epoch, epoch * config.num_epochs)
    measured = "" if step.tried == step.batch_size else f", extrapolated from {step.tried}"
    message = (
        f"time, an estimate on {describe_device(device)}: {_words(batch)} a batch of {plural(step.batch_size, 'video')}"
        f"{measured} (computing {_words(compute)}, reading {_words(read)} with num_workers {config.num_workers}); "
        f"an epoch {_words(epoch)}, {plural(config.num_epochs, 'epoch')} {_words(times.run)}, evaluations not counted"
    )
    advice = ""
    if read > compute:
        message += ". Reading is the bottleneck"
        more = f"raise num_workers ({cores()} processors here), or " if config.num_workers < cores() else ""
        size = trial.loaded.image.size
        advice = f"{more}extract the frames beforehand, no larger than needed (adaclip extract --frame_size {size})"
    return Finding("fine", "time", "run", message, asdict(times) | {"threads": torch.get_num_threads()}, advice)


def _together(read: float, compute: float, num_workers: int, device: torch.device) -> float:
    """Seconds a batch, when reading goes on while the batch before is computed."""
    if not num_workers:
        return read + compute
    busy = read * min(num_workers, cores()) + (compute * torch.get_num_threads() if device.type == "cpu" else 0.0)
    return max(read, compute, busy / cores())


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
