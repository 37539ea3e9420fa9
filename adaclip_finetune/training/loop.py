"""The training loop: phases, epochs, updates. It knows no files; what it has to say goes to its `RunFolder`."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FrameType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.hard_topk import annealed_k, selection_temperature
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft import PeftMethod
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.objective import contrastive_loss
from adaclip_finetune.training.optimizer import build_optimizer, clamp_logit_scale, clip_gradients, learning_rates
from adaclip_finetune.training.run_folder import RunFolder

EpochEnd = Callable[[int, Phase], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed; the update in flight is complete."""


class _Prepared(NamedTuple):
    """What belongs to one set of learning parameters."""

    model: torch.nn.Module  # wrapped for mixed precision, later for several processes
    optimizer: Optimizer
    schedule: LambdaLR


class Trainer:
    """Trains `model` (its unwrapped module) in place."""

    def __init__(
        self,
        config: Config,
        model: VideoRetriever,
        method: PeftMethod,
        data: TrainLoader,
        accelerator: Accelerator,
        run: RunFolder,
    ) -> None:
        self.config, self.model, self.method, self.data = config, model, method, data
        self.accelerator, self.run = accelerator, run
        self.step = 0

    def train(self, epoch_end: EpochEnd, method_changed: Callable[[], None]) -> None:
        """All phases; `epoch_end(epoch, phase)` after each epoch, `method_changed()` when something else learns.

        Raises Interrupted at the next update after Ctrl-C.
        """
        first_epoch = 0
        with _finish_the_update_on_ctrl_c() as interrupted:
            for phase in self.method.phases(self.config.num_epochs, self.config.batch_size):
                self._train_phase(first_epoch, phase, epoch_end, method_changed, interrupted)
                first_epoch += phase.num_epochs

    def _train_phase(
        self,
        first_epoch: int,
        phase: Phase,
        epoch_end: EpochEnd,
        method_changed: Callable[[], None],
        interrupted: threading.Event,
    ) -> None:
        updates = self.updates_per_epoch(phase.batch_size)
        parts: _Prepared | None = None
        for done in range(phase.num_epochs):
            changed = self.method.on_epoch_start(first_epoch + done)
            if changed:
                method_changed()
            if changed or parts is None:
                parts = self._prepare((phase.num_epochs - done) * updates)
            self._train_epoch(first_epoch + done, phase, parts, interrupted)
            epoch_end(first_epoch + done, phase)

    def updates_per_epoch(self, batch_size: int) -> int:
        """Of the weights, in one epoch: one for gradient_accumulation_steps batches, or what is left of them."""
        return math.ceil(self.data.num_batches(batch_size) / self.config.gradient_accumulation_steps)

    def _prepare(self, updates: int) -> _Prepared:
        """A wrapper, an optimizer and a schedule for what learns now; the old ones are let go, never toggled under."""
        self.accelerator.free_memory()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        optimizer, schedule = build_optimizer(self.model, self.config, updates)
        wrapped, prepared = self.accelerator.prepare(self.model, optimizer)
        return _Prepared(wrapped, prepared, schedule)

    def _train_epoch(self, epoch: int, phase: Phase, parts: _Prepared, interrupted: threading.Event) -> None:
        c = self.config
        tau = selection_temperature(epoch, c.init_tau, c.min_tau, c.exp_decay_factor)
        k = annealed_k(epoch, c.num_frm, c.top_k, c.warmup_epochs) if c.use_policy else c.num_frm
        parts.model.train()
        updates = self.updates_per_epoch(phase.batch_size)
        batches = self.data.epoch(epoch, phase.batch_size)
        meter = _Throughput()
        with tqdm(
            total=updates, desc=f"epoch {epoch + 1}/{c.num_epochs}", unit="update", leave=False, disable=None
        ) as bar:
            for window in _windows(batches, c.gradient_accumulation_steps):
                loss = self._accumulate(window, parts.model, k, tau)
                rates = learning_rates(parts.optimizer)
                self._update(parts)
                self.step += 1
                videos = sum(len(batch.videos.video_ids) for batch in window)
                self.run.record(
                    "train",
                    self.step,
                    epoch=epoch + 1,
                    loss=loss,
                    lr=rates,
                    tau=tau,
                    k=k,
                    videos_per_second=meter.videos_per_second(videos),
                    memory_mib=round(peak_memory_mib(self.accelerator.device), 1),
                )
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if self.step % c.n_display == 0:
                    self.run.say(
                        f"  epoch {epoch + 1}  update {self.step}  loss {loss:.4f}  {_rates(rates)}  τ {tau:.2f}"
                    )
                if interrupted.is_set():
                    raise Interrupted

    def _accumulate(self, window: list[TrainBatch], wrapped: torch.nn.Module, k: int, tau: float) -> float:
        """Gradients of one update: each batch weighs by its size, so that an uneven last window is right. Returns the
        loss."""
        pairs = sum(len(batch.videos.video_ids) for batch in window)
        total = 0.0
        for batch in window:
            share = len(batch.videos.video_ids) / pairs
            videos = batch.videos.to(self.accelerator.device, non_blocking=self.config.pin_mem)
            text, video = wrapped(videos, batch.token_ids, k=k, temperature=tau)
            loss = contrastive_loss(self.model.similarity(text, video), _groups(batch.videos.video_ids).to(text.device))
            value = loss.item()
            if not math.isfinite(value):
                raise self._diverged(value, batch)
            self.accelerator.backward(loss * share)
            total += value * share
        return total

    def _update(self, parts: _Prepared) -> None:
        self.method.after_backward(self.step)
        if self.config.grad_norm != -1:
            self.accelerator.unscale_gradients()
            clip_gradients(self.model.parameters(), self.config.grad_norm)
        parts.optimizer.step()
        # fp16's scaler may have skipped the update; the schedule counts real ones.
        if not self.accelerator.optimizer_step_was_skipped:
            parts.schedule.step()
        parts.optimizer.zero_grad()
        clamp_logit_scale(self.model.clip)

    def _diverged(self, value: float, batch: TrainBatch) -> UserError:
        ids = batch.videos.video_ids
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return UserError(
            f"the loss became {value} at update {self.step + 1}, on the videos {shown}.\n"
            "Try a lower learning_rate or coef_lr, precision bf16 instead of fp16 (or fp32), or grad_norm 1. "
            "What was saved before is untouched."
        )


def _windows(batches: Iterable[TrainBatch], size: int) -> Iterator[list[TrainBatch]]:
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


def _groups(video_ids: list[str]) -> Tensor:
    """Numbers the videos of a batch, so that captions of one video can be told: int64 (B,)."""
    numbers = {video_id: number for number, video_id in enumerate(video_ids)}
    return torch.tensor([numbers[video_id] for video_id in video_ids])


def _rates(rates: dict[str, float]) -> str:
    by_part = {name.split("_")[0]: rate for name, rate in rates.items()}
    return "lr " + " ".join(f"{part} {rate:.2e}" for part, rate in by_part.items())


class _Throughput:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def videos_per_second(self, videos: int) -> float:
        """Of the update that just ended, reading included."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return round(videos / max(elapsed, 1e-9), 2)


class _finish_the_update_on_ctrl_c:
    """Within it, the first Ctrl-C only sets the event; the second interrupts at once. Outside the main thread it does
    nothing."""

    def __enter__(self) -> threading.Event:
        self._event = threading.Event()
        self._previous = None
        # A run that was started in the background (`nohup … &`) ignores Ctrl-C, and goes on doing so.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self._event

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        tqdm.write("Ctrl-C: finishing this update, then saving; press again to stop at once")
