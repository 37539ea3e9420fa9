"""What a run would take: time, disk and memory on this machine. Estimates, from a few steps and a few videos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from adaclip_finetune.check.finding import Finding, Severity
from adaclip_finetune.check.model import TrialModel
from adaclip_finetune.check.needs import check_disk, check_memory
from adaclip_finetune.check.reading import seconds_a_video
from adaclip_finetune.check.source import Split
from adaclip_finetune.check.steps import StepTrial, try_steps
from adaclip_finetune.data.frames import FrameStore
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.training.device import describe_device


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


def check_cost(trial: TrialModel, splits: Sequence[Split], store: FrameStore, readable: Sequence[str]) -> list[Finding]:
    """`readable`: the training videos that a run would take, at least one; `store` has them."""
    train, config = splits[0], trial.config
    good = set(readable)
    videos = [video for video in train.videos if video.video_id in good]
    entries = len(train_entries(videos, config.concat_captions))
    phases = trial.method.phases(config.num_epochs, config.batch_size)
    reading = seconds_a_video(readable, store, config, trial.loaded.image)
    step = try_steps(trial, min(entries, max(phase.batch_size for phase in phases)))
    findings = list(check_disk(trial, splits))
    if step.refused:
        severity: Severity = "warning" if config.auto_batch_size else "fails"
        return [*findings, Finding(severity, "gpu_memory", "run", step.refused)]
    return [*findings, *check_memory(trial, step), _time(trial, step, entries, reading)]


def _time(trial: TrialModel, step: StepTrial, entries: int, reading: float | None) -> Finding:
    config, device = trial.config, trial.accelerator.device
    read, compute = (reading or 0.0) * step.batch_size, step.seconds
    batch = max(_together(read, compute, config.num_workers, device), 1e-9)
    epoch = batch * entries / step.batch_size
    times = _Times(step.batch_size, step.tried, compute, read, batch, epoch, epoch * config.num_epochs)
    measured = "" if step.tried == step.batch_size else f", extrapolated from {step.tried}"
    told = f"{_words(read)} with num_workers {config.num_workers}" if reading else "not timed, for too few videos"
    message = (
        f"time, an estimate on {describe_device(device)}: {_words(batch)} a batch of {step.batch_size} videos"
        f"{measured} (computing {_words(compute)}, reading {told}); "
        f"an epoch {_words(epoch)}, {config.num_epochs} epochs {_words(times.run)}, evaluations not counted"
    )
    advice = ""
    if read > compute:
        message += ". Reading is the bottleneck"
        advice = (
            f"raise num_workers ({os.cpu_count()} processors here), or extract the frames beforehand, no larger than "
            f"needed (adaclip extract --frame_size {trial.loaded.image.size})"
        )
    return Finding("fine", "time", "run", message, asdict(times) | {"threads": torch.get_num_threads()}, advice)


def _together(read: float, compute: float, num_workers: int, device: torch.device) -> float:
    """Seconds a batch, when reading goes on while the batch before is computed."""
    if not num_workers:
        return read + compute
    busy = read * num_workers + (compute * torch.get_num_threads() if device.type == "cpu" else 0.0)
    return max(read, compute, busy / (os.cpu_count() or 1))


def _words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
