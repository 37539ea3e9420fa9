"""The training loop: phases, epochs, updates. It knows no files; what it has to say goes to its `RunFolder`.

What an update does is a function of the weights and of (seed, epoch, place in the epoch): nothing is drawn from a
random state that would have to be saved, or that another number of processes would use up differently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import TrainLoader, nothing_readable, updates_per_epoch
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.hard_topk import annealed_k, selection_temperature
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft import PeftMethod
from adaclip_finetune.peft.base import MethodState, Phase
from adaclip_finetune.processes import gather_objects, is_main, rank
from adaclip_finetune.training.device import peak_memory_mib
from adaclip_finetune.training.gather import PairSimilarity
from adaclip_finetune.training.ipex import optimized_for_xpu, usable_ipex
from adaclip_finetune.training.memory import explain_out_of_memory
from adaclip_finetune.training.objective import contrastive_loss
from adaclip_finetune.training.optimizer import (
    advance,
    build_optimizer,
    clamp_logit_scale,
    clip_gradients,
    learning_rates,
    load_optimizer,
    optimizer_tensors,
)
from adaclip_finetune.training.prefetch import prefetched
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import Interrupted, StopSignals
from adaclip_finetune.training.switches import explain_nondeterminism


@dataclass
class Position:
    """How far a run is: `step` updates in all; `batch` batches of `epoch` (from 0), of which the schedule at hand has
    `total_updates`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    total_updates: int = 0


@dataclass(frozen=True)
class Hooks:
    """What a run does beside learning."""

    epoch_end: Callable[[int, Phase], None]  # epoch, from 0
    method_changed: Callable[[], None]  # something else learns from here on
    save: Callable[[], None]  # `Trainer.tensors` and `Trainer.values` as they are now


class _Prepared(NamedTuple):
    """What belongs to one set of learning parameters."""

    model: torch.nn.Module  # PairSimilarity, wrapped for mixed precision and for several processes
    optimizer: Any  # accelerate's wrapper around the Optimizer
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
        self.position = Position()
        self._parts: _Prepared | None = None
        self._ipex = usable_ipex(accelerator.device, run.say)

    def train(self, hooks: Hooks, signals: StopSignals) -> None:
        """All phases, from where `restore` put the run; saved at the end of each epoch, before `hooks.epoch_end`, and
        every save_every_steps updates.

        Raises Interrupted after a signal, the update in flight being finished and saved.
        """
        first_epoch = 0
        for phase in self.method.phases(self.config.num_epochs, self.config.batch_size):
            epochs = range(first_epoch, first_epoch + phase.num_epochs)
            self._train_phase(epochs, phase, hooks, signals)
            first_epoch = epochs.stop

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What `restore` needs, by group: weights, optimizer, what the method remembers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self._optimizer, self.model),
            "method": self.method.state_dict().tensors,
        }

    def values(self) -> dict[str, Any]:
        """What else `restore` needs, as JSON can hold it."""
        assert self._parts is not None, "saved is within an epoch"
        scaler = self.accelerator.scaler
        return {
            "position": asdict(self.position),
            "method": self.method.state_dict().values,
            "updates_of_schedule": self._parts.schedule.last_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def restore(self, tensors: Mapping[str, dict[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Go on from `tensors` and `values`, the weights being in the model already."""
        self.position = Position(**values["position"])
        self.method.load_state_dict(MethodState(tensors["method"], values["method"]))
        self._parts = self._prepare(self.position.total_updates)
        load_optimizer(self._optimizer, self.model, tensors["optimizer"])
        advance(self._parts.schedule, values["updates_of_schedule"])
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    def updates_per_epoch(self, batch_size: int) -> int:
        """Of the weights."""
        return updates_per_epoch(len(self.data.dataset), batch_size, self.config.gradient_accumulation_steps)

    @property
    def _optimizer(self) -> Optimizer:
        assert self._parts is not None
        optimizer: Optimizer = self._parts.optimizer.optimizer
        return optimizer

    def _train_phase(self, epochs: range, phase: Phase, hooks: Hooks, signals: StopSignals) -> None:
        if self.position.epoch <= epochs.start and not self.position.batch:
            self._parts = None  # a phase has an optimizer and a schedule of its own
        for epoch in range(max(epochs.start, self.position.epoch), epochs.stop):
            # An epoch that was interrupted has asked the method already.
            changed = not self.position.batch and self.method.on_epoch_start(epoch)
            if changed:
                hooks.method_changed()
            if changed or self._parts is None:
                self._parts = self._prepare((epochs.stop - epoch) * self.updates_per_epoch(phase.batch_size))
            with signals.deferred():
                self._train_epoch(epoch, phase, self._parts, hooks, signals)
                hooks.save()
            hooks.epoch_end(epoch, phase)
            self.position.epoch, self.position.batch = epoch + 1, 0

    def _prepare(self, updates: int) -> _Prepared:
        """A wrapper, an optimizer and a schedule for what learns now; the old ones are let go, never toggled under."""
        self.position.total_updates = updates
        self.accelerator.free_memory()
        optimizer, schedule = build_optimizer(self.model, self.config, updates)
        similarity, optimizer = optimized_for_xpu(self._ipex, PairSimilarity(self.model), optimizer, self.run.say)
        wrapped, prepared = self.accelerator.prepare(similarity, optimizer)
        return _Prepared(wrapped, prepared, schedule)

    def _train_epoch(self, epoch: int, phase: Phase, parts: _Prepared, hooks: Hooks, signals: StopSignals) -> None:
        c, position = self.config, self.position
        tau = selection_temperature(epoch, c.init_tau, c.min_tau, c.exp_decay_factor)
        k = annealed_k(epoch, c.num_frm, c.top_k, c.warmup_epochs) if c.use_policy else c.num_frm
        parts.model.train()
        per_update = c.gradient_accumulation_steps
        batches = self.data.epoch(epoch, phase.batch_size, position.batch)
        if per_update == 1:  # who accumulates has no room for a batch that waits
            batches = prefetched(batches, self.accelerator.device)
        meter = _Throughput()
        with tqdm(
            total=self.updates_per_epoch(phase.batch_size),
            initial=position.batch // per_update,
            desc=f"epoch {epoch + 1}/{c.num_epochs}",
            unit="update",
            leave=False,
            disable=None if is_main() else True,
        ) as bar:
            for window in _windows(batches, per_update):
                shares, stop = self._exchange(window, signals)
                if stop is not None:
                    hooks.save()
                    gather_objects(None)  # a launcher ends the main process, which saves, as soon as another one ends
                    raise Interrupted(stop)
                rates = learning_rates(self._optimizer)
                loss = self._learn(window, shares, parts, phase, k, tau)
                position.step, position.batch = position.step + 1, position.batch + len(window)
                videos = sum(len(ids) for share in shares for ids in share)
                self.run.record(
                    "train",
                    position.step,
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
                if position.step % c.n_display == 0:
                    self.run.say(
                        f"  epoch {epoch + 1}  update {position.step}  loss {loss:.4f}  {_rates(rates)}  τ {tau:.2f}"
                    )
                if c.save_every_steps and position.step % c.save_every_steps == 0:
                    hooks.save()

    def _exchange(self, window: list[TrainBatch], signals: StopSignals) -> tuple[list[list[list[str]]], int | None]:
        """What the processes must know of each other before an update: for each batch each one's videos, and the signal
        to stop that any of them got."""
        told = gather_objects((signals.received, [batch.videos.video_ids for batch in window]))
        stop = next((signum for signum, _ in told if signum is not None), None)
        return [[ids[number] for _, ids in told] for number in range(len(window))], stop

    def _learn(
        self,
        window: list[TrainBatch],
        shares: list[list[list[str]]],
        parts: _Prepared,
        phase: Phase,
        k: int,
        tau: float,
    ) -> float:
        """One update; returns its loss."""
        # What a tower may draw by itself (dropout) follows from the place in the run as well.
        torch.manual_seed(int(generator("dropout", self.config.seed, self.position.step, rank()).integers(2**63)))
        try:
            loss = self._accumulate(window, shares, parts.model, k, tau)
            self._update(parts)
        except (RuntimeError, MemoryError) as error:
            explained = explain_out_of_memory(error, self.config, self.accelerator.device, phase.batch_size, k)
            if explained := explained or explain_nondeterminism(error):
                raise explained from error
            raise
        return loss

    def _accumulate(
        self, window: list[TrainBatch], shares: list[list[list[str]]], wrapped: torch.nn.Module, k: int, tau: float
    ) -> float:
        """Gradients of one update: each batch weighs by its size, so that an uneven last window is right. Returns the
        loss."""
        pairs = sum(len(ids) for share in shares for ids in share)
        total = 0.0
        for number, (batch, share) in enumerate(zip(window, shares, strict=True)):
            video_ids = [video_id for ids in share for video_id in ids]
            if not video_ids:
                raise nothing_readable(self.data.take_failed())
            with nullcontext() if number == len(window) - 1 else self.accelerator.no_sync(wrapped):
                there = batch.to(self.accelerator.device, non_blocking=self.config.pin_mem)
                similarity = wrapped(there, [len(ids) for ids in share], k, tau)
                loss = contrastive_loss(similarity, _groups(video_ids).to(similarity.device))
                value = loss.item()
                if not math.isfinite(value):
                    raise self._diverged(value, video_ids)
                self.accelerator.backward(loss * (len(video_ids) / pairs))
            total += value * len(video_ids) / pairs
        return total

    def _update(self, parts: _Prepared) -> None:
        self.method.after_backward(self.position.step)
        if self.config.grad_norm != -1:
            self.accelerator.unscale_gradients()
            clip_gradients(self.model.parameters(), self.config.grad_norm)
        parts.optimizer.step()
        # fp16's scaler may have skipped the update; the schedule counts real ones.
        if not self.accelerator.optimizer_step_was_skipped:
            parts.schedule.step()
        parts.optimizer.zero_grad()
        clamp_logit_scale(self.model.clip)

    def _diverged(self, value: float, ids: list[str]) -> UserError:
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return UserError(
            f"the loss became {value} at update {self.position.step + 1}, on the videos {shown}.\n"
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
