"""One run from settings to figures, read from top to bottom: set-up, epochs, steps, validation, best, end.

`fit` is a whole run: zero-shot first, snapshots to continue from, the test annotation once at the end. `run_trial` is
the same trainer as one of many that are compared on validation alone.

What an update does is a function of the weights and of (seed, epoch, place in the epoch): nothing is drawn from a
random state that would have to be saved, or that another number of processes would use up differently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import same_captions
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import nothing_readable, updates_per_epoch
from adaclip_finetune.data.queries import fingerprint
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import Figures
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.peft.base import MethodState, Phase
from adaclip_finetune.processes import copy_from_main, gather_objects, is_main, rank
from adaclip_finetune.report import draw_curves, write_importance
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.data import note_failed, read_split, say_cut, train_loader
from adaclip_finetune.training.device import forget_peak_memory, make_accelerator, peak_memory_mib
from adaclip_finetune.training.ending import ending_well
from adaclip_finetune.training.ipex import optimized_for_xpu, usable_ipex
from adaclip_finetune.training.measure import EMBEDDINGS, build_task, measure, measure_once, zero_shot
from adaclip_finetune.training.memory import explain_out_of_memory, fitting_batch_size
from adaclip_finetune.training.optimizer import (
    advance,
    build_optimizer,
    clamp_logit_scale,
    clip_gradients,
    learning_rates,
    load_optimizer,
    optimizer_tensors,
)
from adaclip_finetune.training.outcome import SELECTED_ON_TEST, FitResult, say_and_write
from adaclip_finetune.training.prefetch import prefetched
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import Interrupted, StopSignals
from adaclip_finetune.training.snapshot import Snapshot, drop_snapshots, load_snapshot, restore_results, save_snapshot
from adaclip_finetune.training.switches import explain_nondeterminism
from adaclip_finetune.weights.checkpoints import describe, read_checkpoint
from adaclip_finetune.weights.clip_weights import save_tokenizer
from adaclip_finetune.weights.plain import strict_load

_BEST = "best.safetensors"
_ADAPTER = "adapter.safetensors"
_RESULTS = (_BEST, _ADAPTER)

OnEpoch = Callable[[int, Figures], None]


def fit(config: Config, folder: Path | None = None, opened: Callable[[Path], None] | None = None) -> FitResult:
    """Finetune as `config` says. `folder`: continue the run that was interrupted there, `config` being its own
    (`continued_config`). `opened` is told the folder of a new run as soon as it is made.

    Raises UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM, when what was learned is saved.
    """
    run = RunFolder(config)
    with StopSignals() as signals, ending_well(run), ExitStack() as stack:
        if folder is not None:
            run.lock(folder)
        trainer = Trainer(config, run, signals, stack)
        return trainer.fit(folder, opened)


def run_trial(config: Config, run: RunFolder, on_epoch: OnEpoch) -> TrialResult:
    """Train, and validate each epoch. Neither zero-shot nor test is measured, nothing is kept to continue from, and the
    weights of the best epoch stay in memory. `on_epoch(epoch, validation)`, of each epoch (from 1) that may be the
    best, may end the trial by raising.

    Raises UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM. `run` is closed in the end.
    """
    with StopSignals(saving=False) as signals, closing(run), ExitStack() as stack:
        trainer = Trainer(config, run, signals, stack, on_epoch)
        return trainer.trial()


@dataclass
class TrialResult:
    """What a trial found at its best epoch, and what it took."""

    best: Figures
    best_epoch: int
    config: Config  # as it was in the end: auto_batch_size settles batch_size
    weights: dict[str, Tensor] = field(repr=False)
    about: dict[str, str] = field(repr=False)

    def save(self, path: Path) -> None:
        """The weights of the best epoch, as a run's best.safetensors holds them."""
        save_tensors(path, self.weights, {"content": "model", "epoch": str(self.best_epoch), **self.about})


@dataclass
class Position:
    """How far a run is: `step` updates in all; `batch` batches of `epoch` (from 0), of which the schedule at hand has
    `total_updates`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    total_updates: int = 0


class _Prepared(NamedTuple):
    """What belongs to one set of learning parameters."""

    objective: torch.nn.Module  # wrapped for mixed precision and for several processes
    optimizer: Any  # accelerate's wrapper around the Optimizer
    schedule: LambdaLR


class Trainer:
    """The parts of one run, built in the order in which something can be wrong with them."""

    # ---- set-up ----

    def __init__(
        self, config: Config, run: RunFolder, signals: StopSignals, stack: ExitStack, on_epoch: OnEpoch | None = None
    ) -> None:
        """`stack` closes what reads; `on_epoch` makes it a trial."""
        self.run, self.signals, self.on_epoch = run, signals, on_epoch
        self.accelerator = make_accelerator(config)
        self.validation = read_split(config, config.val_annot, run, "validation")
        self.test, self.test_name = self.validation, "validation"
        if on_epoch is None and config.test_annot:
            self.test, self.test_name = read_split(config, config.test_annot, run, "test"), "test"
        set_seed(config.seed)
        self.session = session = open_model(config, accelerator=self.accelerator)
        if session.checkpoint is not None:
            run.say(describe(session.checkpoint, session.config))
        run.say(session.describe())
        if on_epoch is not None:
            forget_peak_memory(self.accelerator.device)
        if session.config.auto_batch_size:
            self._fit_batches()
        self.config = config = session.config
        self.model, self.objective = session.model, session.objective
        self.data = train_loader(config, session.loaded, self.model.views(), run)
        stack.callback(self.data.close)
        self.task = build_task(config, self.validation, session.loaded, self.model, "validation")
        stack.callback(self.task.close)
        self.position = Position()
        self.best: Figures | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}  # of a trial, or with no_output: else it lies in the run folder
        self.zero_shot: Figures | None = None
        self._parts: _Prepared | None = None
        self._saved_step = -1
        self._ipex = usable_ipex(self.accelerator.device, run.say)

    def _fit_batches(self) -> None:
        """Settle `auto_batch_size`: the batch sizes that fit into memory stand in the config from here on."""
        session = self.session

        def fits(batch_size: int) -> int:
            return fitting_batch_size(
                session.config, session.objective, session.loaded.tokenize, self.accelerator, self.run.say, batch_size
            )

        peft = session.config.peft
        peft = peft.model_copy(update={"config": peft.config.with_fitting_batches(fits)})
        found = {"peft": peft, "batch_size": fits(session.config.batch_size), "auto_batch_size": False}
        session.use(session.config.model_copy(update=found))

    # ---- the whole of a run, and of a trial ----

    def fit(self, folder: Path | None, opened: Callable[[Path], None] | None) -> FitResult:
        config, run = self.config, self.run
        self._digests = fingerprint(
            self.data.dataset.entries, validation=self.validation.queries, test=self.test.queries
        )
        if any(digests != self._digests for digests in gather_objects(self._digests)):
            raise UserError("the processes of this run read different data: other captions, or other readable videos")
        say_cut(self.session.loaded, self.test.queries.texts, config.max_txt_len, self.test_name, run)
        self._begin(folder, opened)
        selected_on_test = chosen_on_test(config)
        if selected_on_test:
            run.say(f"WARNING: every figure of this run is {SELECTED_ON_TEST}")
        try:
            self.train()
        finally:
            if path := run.file("curves.png"):
                with suppress(OSError):  # a full disk has been told of by then
                    draw_curves(path, run.events, self.task.curves)
        best = self._reload_best()
        final, task = measure_once(self.session, self.test, self.test_name, run)
        result = FitResult(
            zero_shot=self.zero_shot,
            final=final,
            best_validation=best,
            best_epoch=self.best_epoch,
            evaluated_on=self.test_name,
            selected_on_test=selected_on_test,
            parameters=self.session.parameters,
            gflops=self.session.gflops,
            folder=run.path,
        )
        say_and_write(result, task, config, run)
        if run.path is not None:
            drop_snapshots(run.path)
        run.drop(EMBEDDINGS)
        return result

    def trial(self) -> TrialResult:
        self._open_folder()
        self.train()
        assert self.best is not None, "the last phase of every method may be best"
        about: dict[str, Any] = {"best_epoch": self.best_epoch, "best_validation": self.best.as_dict()}
        self.run.write_json("metrics.json", about | {"parameters": self.session.parameters.as_dict()})
        return TrialResult(self.best, self.best_epoch, self.config, self.best_state, self.session.description())

    # ---- epochs ----

    def train(self) -> None:
        """All phases, from where the run is; saved at the end of each epoch, before it is validated, and every
        save_every_steps updates.

        Raises Interrupted after a signal, the update in flight being finished and saved.
        """
        first_epoch = 0
        for phase in self.session.method.phases(self.config.num_epochs, self.config.batch_size):
            epochs = range(first_epoch, first_epoch + phase.num_epochs)
            if self.position.epoch <= epochs.start and not self.position.batch:
                self._parts = None  # a phase has an optimizer and a schedule of its own
            for epoch in range(max(epochs.start, self.position.epoch), epochs.stop):
                self._start_epoch(epoch, epochs, phase)
                with self.signals.deferred():
                    self._train_epoch(epoch, phase)
                    self.save()
                note_failed(self.data, self.run)
                self._validate(epoch + 1, phase)
                self.position.epoch, self.position.batch = epoch + 1, 0
            first_epoch = epochs.stop

    def _start_epoch(self, epoch: int, epochs: range, phase: Phase) -> None:
        """What the method changes, and the schedules of the model."""
        # An epoch that was interrupted has asked the method already.
        changed = not self.position.batch and self.session.method.on_epoch_start(epoch)
        if changed:
            self._tell_what_learns()
        if changed or self._parts is None:
            self._prepare((epochs.stop - epoch) * self._updates_per_epoch(phase.batch_size))
        self.model.start_epoch(epoch)

    def _prepare(self, updates: int) -> None:
        """A wrapper, an optimizer and a schedule for what learns now; the old ones are let go, never toggled under."""
        self.position.total_updates = updates
        self.accelerator.free_memory()
        optimizer, schedule = build_optimizer(self.objective, self.config, updates)
        objective, optimizer = optimized_for_xpu(self._ipex, self.objective, optimizer, self.run.say)
        wrapped, prepared = self.accelerator.prepare(objective, optimizer)
        self._parts = _Prepared(wrapped, prepared, schedule)

    def _tell_what_learns(self) -> None:
        """Say what learns from here on, and keep the table of a method that chose by importance."""
        session, run = self.session, self.run
        session.recount()
        if self.on_epoch is not None:
            return
        run.say(f"from here on\n{session.parameters}")
        run.record("parameters", self.position.step, **session.parameters.as_dict())
        table, picture = run.file("ibs_parameters.csv"), run.file("ibs_parameters.png")
        rows = session.method.parameter_rows()
        if rows and table and picture:
            write_importance(table, picture, rows)

    def _updates_per_epoch(self, batch_size: int) -> int:
        return updates_per_epoch(len(self.data.dataset), batch_size, self.config.gradient_accumulation_steps)

    # ---- steps ----

    def _train_epoch(self, epoch: int, phase: Phase) -> None:
        c, position, parts = self.config, self.position, self._prepared
        parts.objective.train()
        per_update = c.gradient_accumulation_steps
        batches = self.data.epoch(epoch, phase.batch_size, position.batch)
        if per_update == 1:  # who accumulates has no room for a batch that waits
            batches = prefetched(batches, self.accelerator.device)
        meter = _Throughput()
        with tqdm(
            total=self._updates_per_epoch(phase.batch_size),
            initial=position.batch // per_update,
            desc=f"epoch {epoch + 1}/{c.num_epochs}",
            unit="update",
            leave=False,
            disable=None if is_main() else True,
        ) as bar:
            for window in _windows(batches, per_update):
                groups = self._exchange(window)
                rates = learning_rates(self._optimizer)
                loss = self._step(window, groups, phase)
                position.step, position.batch = position.step + 1, position.batch + len(window)
                self.run.record(
                    "train",
                    position.step,
                    epoch=epoch + 1,
                    loss=loss,
                    lr=rates,
                    **self.model.schedule(),
                    videos_per_second=meter.videos_per_second(sum(map(len, groups))),
                    memory_mib=round(peak_memory_mib(self.accelerator.device), 1),
                )
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if position.step % c.n_display == 0:
                    self.run.say(self._progress(epoch, loss, rates))
                if c.save_every_steps and position.step % c.save_every_steps == 0:
                    self.save()

    def _exchange(self, window: list[TrainBatch]) -> list[Group]:
        """What the processes must know of each other before an update: for each batch each one's videos, and whether
        any of them got a signal to stop, in which case the run ends here."""
        told = gather_objects((self.signals.received, [batch.videos.video_ids for batch in window]))
        stop = next((signum for signum, _ in told if signum is not None), None)
        if stop is not None:
            self.save()
            gather_objects(None)  # a launcher ends the main process, which saves, as soon as another one ends
            raise Interrupted(stop)
        return [Group([ids[number] for _, ids in told]) for number in range(len(window))]

    def _step(self, window: list[TrainBatch], groups: list[Group], phase: Phase) -> float:
        """One update; returns its loss."""
        # What a tower may draw by itself (dropout) follows from the place in the run as well.
        torch.manual_seed(int(generator("dropout", self.config.seed, self.position.step, rank()).integers(2**63)))
        try:
            loss = self._accumulate(window, groups)
            self._update()
        except (RuntimeError, MemoryError) as error:
            device = self.accelerator.device
            explained = explain_out_of_memory(error, self.config, device, phase.batch_size, self.model)
            if explained := explained or explain_nondeterminism(error):
                raise explained from error
            raise
        return loss

    def _accumulate(self, window: list[TrainBatch], groups: list[Group]) -> float:
        """Gradients of one update: each batch weighs by its size, so that an uneven last window is right. Returns the
        loss."""
        wrapped, pairs = self._prepared.objective, sum(map(len, groups))
        total = 0.0
        for number, (batch, group) in enumerate(zip(window, groups, strict=True)):
            if not len(group):
                raise nothing_readable(self.data.take_failed())
            with nullcontext() if number == len(window) - 1 else self.accelerator.no_sync(wrapped):
                there = batch.to(self.accelerator.device, non_blocking=self.config.pin_mem)
                terms = list(wrapped(there, group).values())
                loss = sum(terms[1:], terms[0])
                value = loss.item()
                if not math.isfinite(value):
                    raise self._diverged(value, [name for share in group.shares for name in share])
                self.accelerator.backward(loss * (len(group) / pairs))
            total += value * len(group) / pairs
        return total

    def _update(self) -> None:
        parts = self._prepared
        self.session.method.after_backward(self.position.step)
        if self.config.grad_norm != -1:
            self.accelerator.unscale_gradients()
            clip_gradients(self.objective.parameters(), self.config.grad_norm)
        parts.optimizer.step()
        # fp16's scaler may have skipped the update; the schedule counts real ones.
        if not self.accelerator.optimizer_step_was_skipped:
            parts.schedule.step()
        parts.optimizer.zero_grad()
        clamp_logit_scale(self.model.clip)

    def _progress(self, epoch: int, loss: float, rates: Mapping[str, float]) -> str:
        """A line of the log."""
        by_part = {name.split("_")[0]: rate for name, rate in rates.items()}
        shown = " ".join(f"{part} {rate:.2e}" for part, rate in by_part.items())
        tau = self.model.schedule().get("tau")
        temperature = "" if tau is None else f"  τ {tau:.2f}"
        return f"  epoch {epoch + 1}  update {self.position.step}  loss {loss:.4f}  lr {shown}{temperature}"

    def _diverged(self, loss: float, ids: list[str]) -> UserError:
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return UserError(
            f"the loss became {loss} at update {self.position.step + 1}, on the videos {shown}.\n"
            "Try a lower learning_rate or coef_lr, precision bf16 instead of fp16 (or fp32), or grad_norm 1. "
            "What was saved before is untouched."
        )

    # ---- validation and the best epoch ----

    def _validate(self, epoch: int, phase: Phase) -> None:
        report = measure(self.session, self.task, self.model)
        figures, run, step = report.figures, self.run, self.position.step
        seconds = {} if self.on_epoch else {"eval_seconds": round(report.seconds, 3)}
        run.record("validation", step, epoch=epoch, metrics=figures.as_dict(), **seconds)
        # What IBS learns before it selects, say, must not be taken for IBS.
        better = phase.may_be_best and self.task.is_better(figures, self.best)
        mark = "  ← best so far" if better and not self.on_epoch else ""
        run.say(f"epoch {epoch}/{self.config.num_epochs}  validation  {self.task.one_line(figures)}{mark}")
        if better:
            self.best, self.best_epoch = figures, epoch
            self._keep_best()
        if self.on_epoch is not None and phase.may_be_best:
            self.on_epoch(epoch, figures)
        if self.config.save_last and self.on_epoch is None:
            self._save_weights("last.safetensors", self.session.method.merged_state(self.model), epoch)

    def _keep_best(self) -> None:
        method, epoch = self.session.method, self.best_epoch
        if self.on_epoch is not None or self.config.no_output:
            kept = method.merged_state(self.model) if self.on_epoch else self.model.state_dict()
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}
        if self.on_epoch is not None:
            return
        self.run.record("best", self.position.step, epoch=epoch)
        if self.config.no_output:
            return
        self._save_weights(_BEST, method.merged_state(self.model), epoch)
        # After --resume, what the method may change is not all that differs from the pretrained CLIP.
        if not self.config.resume:
            self._save_weights(_ADAPTER, method.own_state(self.model), epoch, "adapter")

    def _reload_best(self) -> Figures:
        assert self.best is not None, "the last phase of every method may be best"
        if self.config.no_output:
            self.model.load_state_dict(self.best_state)
        elif path := self.run.file(_BEST):
            strict_load(self.model, read_checkpoint(path).state, str(path))
            if self.session.method.mergeable:
                self.session.method.reset(self.model)
        copy_from_main(self.model.state_dict().values())
        return self.best

    def _save_weights(self, name: str, tensors: Mapping[str, Tensor], epoch: int, content: str = "model") -> None:
        if path := self.run.file(name):
            about = {"content": content, "epoch": str(epoch), **self.session.description()}
            save_tensors(path, tensors, about)

    # ---- where a run can continue from ----

    def _begin(self, folder: Path | None, opened: Callable[[Path], None] | None) -> None:
        """Open the run folder and measure zero-shot; or take up both, and all else, where the run in `folder` left
        them."""
        if folder is None:
            self._open_folder()
            if self.run.path is not None and opened is not None:
                opened(self.run.path)
        elif snapshot := self._reopen(folder):
            self._restore(snapshot)
            return
        baseline = zero_shot(self.session, self.test, self.test_name, self.run)
        self.zero_shot = baseline.figures if baseline else None

    def _open_folder(self) -> None:
        """Nothing is left to refuse: make the run folder."""
        run, session = self.run, self.session
        run.open(self.config, session.where())
        if path := run.file("tokenizer"):
            save_tokenizer(session.loaded, path)
        self._record_parameters()

    def _record_parameters(self) -> None:
        """What learns, and what it costs, as the first line of metrics.jsonl."""
        gflops = self.session.gflops.as_dict()
        self.run.record("parameters", 0, **self.session.parameters.as_dict(), gflops=gflops)

    def _reopen(self, folder: Path) -> Snapshot | None:
        """The folder to continue in, and where to continue from; None if nothing was saved there."""
        run, snapshot = self.run, load_snapshot(folder)
        if snapshot is None:
            run.reopen(folder, step=0, size=0)
            run.say(f"going on with {folder}: nothing was saved there yet, so from the beginning")
            self._record_parameters()
            return None
        if snapshot.values["data"] != self._digests:
            changed = [part for part, digest in self._digests.items() if snapshot.values["data"][part] != digest]
            raise UserError(
                f"resume: the {' and '.join(changed)} data is not what the run in {folder} began with: other captions, "
                "other videos, or others that can be read. Bring the old back, or begin a new run from its weights"
            )
        if is_main():
            restore_results(folder, snapshot, _RESULTS)
        run.reopen(folder, snapshot.step, snapshot.values["metrics_size"])
        run.say(f"going on with {folder} after update {snapshot.step}")
        return snapshot

    def save(self) -> None:
        """A snapshot of everything that decides how the run goes on."""
        step, scaler = self.position.step, self.accelerator.scaler
        if self.on_epoch is not None or self.run.path is None or step == self._saved_step:
            return
        method = self.session.method.state_dict()
        groups = {
            "model": self.model.state_dict(),
            "objective": self.objective.own_state(),
            "optimizer": optimizer_tensors(self._optimizer, self.objective),
            "method": method.tensors,
        }
        values: dict[str, Any] = {
            "position": asdict(self.position),
            "method": method.values,
            "updates_of_schedule": self._prepared.schedule.last_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
            "zero_shot": self.zero_shot.as_state() if self.zero_shot else None,
            "best": self.best.as_state() if self.best else None,
            "best_epoch": self.best_epoch,
            "metrics_size": self.run.flushed_events(),
            "data": self._digests,
        }
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        save_snapshot(self.run.path, Snapshot(step, tensors, values), _RESULTS)
        self._saved_step = step

    def _restore(self, snapshot: Snapshot) -> None:
        values, task = snapshot.values, self.task
        strict_load(self.model, snapshot.group("model"), f"resume: update {snapshot.step}")
        self.objective.load_own_state(snapshot.group("objective"))
        self.position = Position(**values["position"])
        self.session.method.load_state_dict(MethodState(snapshot.group("method"), values["method"]))
        self._prepare(self.position.total_updates)
        load_optimizer(self._optimizer, self.objective, snapshot.group("optimizer"))
        advance(self._prepared.schedule, values["updates_of_schedule"])
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.session.recount()
        self.zero_shot = task.figures_from_state(values["zero_shot"]) if values["zero_shot"] else None
        self.best = task.figures_from_state(values["best"]) if values["best"] else None
        self.best_epoch, self._saved_step = values["best_epoch"], snapshot.step

    @property
    def _prepared(self) -> _Prepared:
        assert self._parts is not None, "prepared at the start of an epoch"
        return self._parts

    @property
    def _optimizer(self) -> Optimizer:
        optimizer: Optimizer = self._prepared.optimizer.optimizer
        return optimizer


def validation_zero_shot(config: Config, run: RunFolder) -> Figures | None:
    """CLIP as it is, on val_annot; None, and said so, where it is not at hand. Raises as `run_trial` does."""
    with StopSignals(saving=False):
        accelerator = make_accelerator(config)
        validation = read_split(config, config.val_annot, run, "validation")
        session = open_model(config, accelerator=accelerator)
        measured = zero_shot(session, validation, "validation", run)
    return measured.figures if measured else None


def chosen_on_test(config: Config) -> bool:
    """Whether val_annot, which chooses the best epoch, and test_annot hold the same captions."""
    if not config.val_annot or not config.test_annot:
        return False
    return same_captions(Path(config.val_annot), Path(config.test_annot))


def _windows(batches: Iterable[TrainBatch], size: int) -> Iterator[list[TrainBatch]]:
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window


class _Throughput:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def videos_per_second(self, videos: int) -> float:
        """Of the update that just ended, reading included."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return round(videos / max(elapsed, 1e-9), 2)
