"""One run from settings to figures, read from top to bottom: set-up, epochs, steps, validation, end.

`Trainer` trains, validates each epoch and remembers the best one in memory: all that a tuning trial needs
(`run_trial`). `FullRun` (`fit`) adds what only a run of its own has: zero-shot first, snapshots to resume from, weights
on disk, and the test split once at the end.

An update is a function of the weights and of (seed, epoch, place in the epoch). No random state needs to be saved, and
the number of processes changes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from adaclip_finetune import report
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import same_captions
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import nothing_readable, updates_per_epoch
from adaclip_finetune.data.queries import fingerprint
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.tasks.base import Figures
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.peft.base import MethodState, Phase
from adaclip_finetune.processes import copy_from_main, gather_objects, is_main, rank
from adaclip_finetune.training import checkpoint, device, optimizer
from adaclip_finetune.training.checkpoint import ADAPTER, BEST, Snapshot, save_tensors
from adaclip_finetune.training.data import note_failed, read_split, say_cut, train_loader
from adaclip_finetune.training.measure import (
    EMBEDDINGS,
    SELECTED_ON_TEST,
    FitResult,
    build_task,
    measure,
    measure_once,
    report_fit,
    zero_shot,
)
from adaclip_finetune.training.memory import explain_out_of_memory, fitting_batch_size, sizes_explained
from adaclip_finetune.training.run_folder import RunFolder, closing_run
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import Interrupted, StopSignals
from adaclip_finetune.weights.checkpoints import read_checkpoint
from adaclip_finetune.weights.clip_weights import save_tokenizer
from adaclip_finetune.weights.plain import strict_load

OnEpoch = Callable[[int, Figures], None]


@sizes_explained
def fit(config: Config, folder: Path | None = None, opened: Callable[[Path], None] | None = None) -> FitResult:
    """Finetune as `config` says and return what was found.

    `folder` is the folder of an interrupted run to resume, whose own settings `config` must be (`continued_config`).
    `opened` is called with the folder of a new run as soon as it exists. Raise UserError for what the user can fix, and
    Interrupted after Ctrl-C or SIGTERM, when everything is saved.
    """
    run = RunFolder(config)
    with StopSignals() as signals, closing_run(run), ExitStack() as stack:
        if folder is not None:
            run.lock(folder)
        return FullRun(config, run, signals, stack).fit(folder, opened)


@sizes_explained
def run_trial(config: Config, run: RunFolder, on_epoch: OnEpoch) -> TrialResult:
    """Train and validate only, and return the best epoch, whose weights stay in memory. Close `run` at the end.

    `on_epoch(epoch, figures)` is called after each validation (epochs count from 1) of an epoch that may be the best;
    it may raise to end the trial. Raise UserError for what the user can fix, and Interrupted after Ctrl-C or SIGTERM.
    """
    with StopSignals(saving=False) as signals, closing(run), ExitStack() as stack:
        trainer = Trainer(config, run, signals, stack, on_epoch)
        trainer.open_folder()
        trainer.train()
        best, session = trainer.require_best(), trainer.session
        about = {"best_epoch": trainer.best_epoch, "best_validation": best.as_dict()}
        run.write_json("metrics.json", about | {"parameters": session.parameters.as_dict()})
        return TrialResult(best, trainer.best_epoch, trainer.config, trainer.best_state, session.description())


def validation_zero_shot(config: Config, run: RunFolder) -> Figures | None:
    """Return the zero-shot figures on val_annot, None (after a warning) if the pretrained CLIP is not available."""
    with StopSignals(saving=False):
        accelerator = device.make_accelerator(config)
        validation = read_split(config, config.val_annot, run, "validation")
        measured = zero_shot(open_model(config, accelerator=accelerator), validation, "validation", run)
    return measured.figures if measured else None


def chosen_on_test(config: Config) -> bool:
    """Return whether val_annot, which chooses the best epoch, and test_annot hold the same captions."""
    if not config.val_annot or not config.test_annot:
        return False
    return same_captions(Path(config.val_annot), Path(config.test_annot))


@dataclass
class TrialResult:
    """The best epoch of a trial. `config` is complete: auto_batch_size has settled batch_size."""

    best: Figures
    best_epoch: int
    config: Config
    weights: dict[str, Tensor] = field(repr=False)
    about: dict[str, str] = field(repr=False)

    def save(self, path: Path) -> None:
        """Write the weights of the best epoch as the best.safetensors of a run."""
        save_tensors(path, self.weights, {"content": "model", "epoch": str(self.best_epoch), **self.about})


@dataclass
class Position:
    """How far a run is: `step` updates in total, and `batch` batches of `epoch` (counted from 0).

    `total_updates` is the length of the current learning rate schedule.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    total_updates: int = 0


class Trainer:
    """Train a model and validate it after each epoch. Nothing is saved; the best weights stay in memory."""

    # What belongs to one set of learning parameters, made by `prepare`.
    wrapped: torch.nn.Module  # the objective, wrapped for mixed precision and several processes
    optimizer: AcceleratedOptimizer
    schedule: LambdaLR

    # ---- set-up, in the order in which something can be wrong ----

    def __init__(
        self, config: Config, run: RunFolder, signals: StopSignals, stack: ExitStack, on_epoch: OnEpoch | None = None
    ) -> None:
        """Build everything that `config` names. `stack` closes the data loaders; `on_epoch` as for `run_trial`."""
        self.run, self.signals, self.on_epoch = run, signals, on_epoch
        self.accelerator = device.make_accelerator(config)
        self.read_splits(config)
        set_seed(config.seed)
        self.session = session = open_model(config, accelerator=self.accelerator)
        run.say(session.describe())
        device.forget_peak_memory(self.accelerator.device)
        if session.config.auto_batch_size:
            self._settle_batch_sizes()
        self.config = config = session.config
        self.model, self.objective = session.model, session.objective
        self.data = train_loader(config, session.loaded, self.model.views(), run)
        stack.callback(self.data.close)
        self.task = build_task(config, self.validation, session.loaded, self.model, "validation")
        stack.callback(self.task.close)
        self.position = Position()
        self.best: Figures | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self._prepared = False

    def read_splits(self, config: Config) -> None:
        """Read the annotations that are evaluated."""
        self.validation = read_split(config, config.val_annot, self.run, "validation")

    def _settle_batch_sizes(self) -> None:
        """Replace the batch sizes in the settings with those that fit into memory (`auto_batch_size`)."""
        session, peft = self.session, self.session.config.peft
        given = (session.config, session.objective, session.loaded.tokenize, self.accelerator, self.run.say)
        fits = partial(fitting_batch_size, *given)
        peft = peft.model_copy(update={"config": peft.config.with_fitting_batches(fits)})
        found = {"peft": peft, "batch_size": fits(session.config.batch_size), "auto_batch_size": False}
        session.use(session.config.model_copy(update=found))

    def open_folder(self) -> None:
        """Make the run folder, once nothing is left to refuse."""
        self.run.open(self.config, self.session.where())
        if path := self.run.file("tokenizer"):
            save_tokenizer(self.session.loaded, path)
        self.record_cost()

    def record_cost(self) -> None:
        """Record how many parameters learn and what a video costs: the first line of metrics.jsonl."""
        parameters, gflops = self.session.parameters.as_dict(), self.session.gflops.as_dict()
        self.run.record("parameters", 0, **parameters, gflops=gflops)

    # ---- epochs ----

    def train(self) -> None:
        """Train all epochs that are left, saving at the end of each one before it is validated.

        After a signal, finish and save the current update and raise Interrupted.
        """
        if not self.position.step:
            self.session.method.before_training(self.model, self.data.epoch(0, self.config.batch_size))
        first_epoch = 0
        for phase in self.session.method.phases(self.config.num_epochs, self.config.batch_size):
            epochs = range(first_epoch, first_epoch + phase.num_epochs)
            if self.position.epoch <= epochs.start and not self.position.batch:
                self._prepared = False  # Each phase has its own optimizer and schedule.
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
        # A resumed epoch has already told the method that it began.
        changed = not self.position.batch and self.session.method.on_epoch_start(epoch)
        if changed:
            self.say_what_learns()
        if changed or not self._prepared:
            self.prepare((epochs.stop - epoch) * self._updates_per_epoch(phase.batch_size))
        self.model.start_epoch(epoch)

    def say_what_learns(self) -> None:
        """Print and record what learns from here on, after the method changed it."""
        self.session.recount()
        self.run.say(f"from here on\n{self.session.parameters}")
        self.run.record("parameters", self.position.step, **self.session.parameters.as_dict())

    def prepare(self, updates: int) -> None:
        """Make a new wrapper, optimizer and schedule of `updates` updates for the parameters that learn now.

        The wrapper must be new, since `requires_grad` may not change under a live one.
        """
        self.position.total_updates = updates
        for name in ("wrapped", "optimizer", "schedule"):
            vars(self).pop(name, None)  # Free the old ones first; moments are twice as large as what learns.
        self.accelerator.free_memory()
        built, self.schedule = optimizer.build_optimizer(self.objective, self.config, updates)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, built)
        self._prepared = True

    def _updates_per_epoch(self, batch_size: int) -> int:
        return updates_per_epoch(len(self.data.dataset), batch_size, self.config.gradient_accumulation_steps)

    # ---- steps ----

    def _train_epoch(self, epoch: int, phase: Phase) -> None:
        c, position = self.config, self.position
        self.wrapped.train()
        per_update, updates = c.gradient_accumulation_steps, self._updates_per_epoch(phase.batch_size)
        shown = {"desc": f"epoch {epoch + 1}/{c.num_epochs}", "unit": "update", "leave": False}
        hidden = None if is_main() else True  # None: shown on a terminal only
        with tqdm(total=updates, initial=position.batch // per_update, disable=hidden, **shown) as bar:
            last = time.monotonic()
            for window in _windows(self.data.epoch(epoch, phase.batch_size, position.batch), per_update):
                groups = self._exchange(window)
                rates = optimizer.learning_rates(self.optimizer)
                loss = self._step(window, groups, phase)
                position.step, position.batch = position.step + 1, position.batch + len(window)
                seconds, last = time.monotonic() - last, time.monotonic()
                self.run.record(
                    "train",
                    position.step,
                    epoch=epoch + 1,
                    loss=loss,
                    lr=rates,
                    **self.model.schedule(),
                    videos_per_second=round(sum(map(len, groups)) / max(seconds, 1e-9), 2),
                    memory_mib=round(device.peak_memory_mib(self.accelerator.device), 1),
                )
                if c.save_every_steps and position.step % c.save_every_steps == 0:
                    self.save()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if position.step % c.n_display == 0:
                    self._say_progress(epoch, loss, rates)

    def _exchange(self, window: list[TrainBatch]) -> list[Group]:
        """Tell the other processes which videos are in this update's batches; stop if any process got a signal."""
        told = gather_objects((self.signals.received, [batch.videos.video_ids for batch in window]))
        stop = next((signum for signum, _ in told if signum is not None), None)
        if stop is not None:
            self.save()
            gather_objects(None)  # A launcher ends the main process, which saves, as soon as another one ends.
            raise Interrupted(stop)
        return [Group([ids[number] for _, ids in told]) for number in range(len(window))]

    def _step(self, window: list[TrainBatch], groups: list[Group], phase: Phase) -> float:
        """Make one update and return its loss."""
        # What a tower draws by itself (dropout) depends on the place in the run too.
        torch.manual_seed(int(generator("dropout", self.config.seed, self.position.step, rank()).integers(2**63)))
        try:
            loss = self._accumulate(window, groups)
            self._update()
        except NotFinite as error:
            ids = [name for group in groups for share in group.shares for name in share]
            shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
            raise self._diverged(f"{error}, at update {self.position.step + 1}, on the videos {shown}") from error
        except (RuntimeError, MemoryError) as error:
            if "without overflow" in str(error):
                what = f"the change of the weights is beyond float32, at update {self.position.step + 1}"
                raise self._diverged(what) from error
            where = self.accelerator.device
            explained = explain_out_of_memory(error, self.config, where, phase.batch_size, self.model)
            if explained := explained or device.explain_nondeterminism(error):
                raise explained from error
            raise
        return loss

    def _accumulate(self, window: list[TrainBatch], groups: list[Group]) -> float:
        """Compute the gradients of one update and return its loss, the mean over all pairs in the window."""
        pairs, total = sum(map(len, groups)), 0.0
        for number, (batch, group) in enumerate(zip(window, groups, strict=True)):
            if not len(group):
                raise nothing_readable(self.data.take_failed())
            with nullcontext() if number == len(window) - 1 else self.accelerator.no_sync(self.wrapped):
                there = batch.to(self.accelerator.device, non_blocking=self.config.pin_mem)
                terms = list(self.wrapped(there, group).values())
                loss = sum(terms[1:], terms[0])
                value = loss.item()
                if not math.isfinite(value):
                    raise NotFinite(f"the loss became {value}")
                self.accelerator.backward(loss * (len(group) / pairs))
            total += value * len(group) / pairs
        return total

    def _update(self) -> None:
        self.session.method.after_backward(self.position.step)
        if self.config.grad_norm != -1:
            self.accelerator.unscale_gradients()
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.grad_norm)
        self.optimizer.step()
        # The schedule counts real updates; the gradient scaler of fp16 may have skipped this one.
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        optimizer.clamp_logit_scale(self.model.clip)

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"training diverged: {what}.\nTry a lower learning_rate or coef_lr, precision bf16 instead of fp16 (or "
            "fp32), or grad_norm 1. What was saved before is unchanged"
        )

    def _say_progress(self, epoch: int, loss: float, rates: dict[str, float]) -> None:
        by_part = {name.split("_")[0]: rate for name, rate in rates.items()}
        shown = " ".join(f"{part} {rate:.2e}" for part, rate in by_part.items())
        tau = self.model.schedule().get("tau")
        temperature = "" if tau is None else f"  τ {tau:.2f}"
        self.run.say(f"  epoch {epoch + 1}  update {self.position.step}  loss {loss:.4f}  lr {shown}{temperature}")

    # ---- validation and the best epoch ----

    def _validate(self, epoch: int, phase: Phase) -> None:
        try:
            measured = measure(self.session, self.task, self.model)
        except NotFinite as error:
            raise self._diverged(f"{error}, after update {self.position.step}") from error
        figures, step = measured.figures, self.position.step
        self.run.record(
            "validation", step, epoch=epoch, metrics=figures.as_dict(), eval_seconds=round(measured.seconds, 3)
        )
        # What IBS learns before it selects must not be reported as IBS.
        better = phase.may_be_best and self.task.is_better(figures, self.best)
        if better:
            self.best, self.best_epoch = figures, epoch
            self.keep_best()
            self.run.record("best", step, epoch=epoch)
        mark = "  ← best so far" if better else ""
        self.run.say(f"epoch {epoch}/{self.config.num_epochs}  validation  {self.task.one_line(figures)}{mark}")
        if self.on_epoch is not None and phase.may_be_best:
            self.on_epoch(epoch, figures)

    def require_best(self) -> Figures:
        """Return the figures of the best epoch; the last phase of every method has one."""
        assert self.best is not None
        return self.best

    def keep_best(self) -> None:
        """Keep the weights of the best epoch so far."""
        kept = self.session.method.merged_state(self.model)
        self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}

    def save(self) -> None:
        """Save what the run can be resumed from, if anything."""


class FullRun(Trainer):
    """A whole run: zero-shot first, snapshots to resume from, weights on disk, and the test split once at the end."""

    def __init__(self, config: Config, run: RunFolder, signals: StopSignals, stack: ExitStack) -> None:
        super().__init__(config, run, signals, stack)
        self.zero_shot: Figures | None = None
        self._saved_step = -1
        self._digests = fingerprint(
            self.data.dataset.entries, validation=self.validation.queries, test=self.test.queries
        )
        if any(digests != self._digests for digests in gather_objects(self._digests)):
            raise UserError("the processes of this run read different data: other captions, or other readable videos")
        say_cut(self.session.loaded, self.test.queries.texts, self.config.max_txt_len, self.test_name, run)

    def read_splits(self, config: Config) -> None:
        super().read_splits(config)
        self.test, self.test_name = self.validation, "validation"
        if config.test_annot:
            self.test, self.test_name = read_split(config, config.test_annot, self.run, "test"), "test"

    def fit(self, folder: Path | None, opened: Callable[[Path], None] | None) -> FitResult:
        """Run, or resume the run in `folder`, to the end; `opened` as for the function `fit`."""
        run = self.run
        if folder is None or not self._resume(folder):
            if folder is None:
                self.open_folder()
                if run.path is not None and opened is not None:
                    opened(run.path)
            baseline = zero_shot(self.session, self.test, self.test_name, run)
            self.zero_shot = baseline.figures if baseline else None
        selected_on_test = chosen_on_test(self.config)
        if selected_on_test:
            run.say(f"WARNING: every figure of this run is {SELECTED_ON_TEST}")
        try:
            self.train()
            self._load_best()
            final, task = measure_once(self.session, self.test, self.test_name, run)
            run.record("finetuned", self.position.step, metrics=final.as_dict(), split=self.test_name)
        finally:
            with suppress(OSError):  # a full disk
                if path := run.file("curves.png"):
                    report.draw_curves(path, run.events, self.task.curves)
                if (history := self.session.method.sampling_history()) and (folder := run.path):
                    report.write_sampling(folder / "lisa_probabilities.csv", folder / "lisa_probabilities.png", history)
        result = FitResult(
            zero_shot=self.zero_shot,
            final=final,
            best_validation=self.require_best(),
            best_epoch=self.best_epoch,
            evaluated_on=self.test_name,
            selected_on_test=selected_on_test,
            parameters=self.session.parameters,
            gflops=self.session.gflops,
            folder=run.path,
        )
        report_fit(result, task, self.config, run)
        if run.path is not None:
            checkpoint.drop_snapshots(run.path)
        run.drop(EMBEDDINGS)
        return result

    def say_what_learns(self) -> None:
        super().say_what_learns()
        rows = self.session.method.parameter_rows()
        if rows and (folder := self.run.path):
            report.write_importance(folder / "ibs_parameters.csv", folder / "ibs_parameters.png", rows)

    # ---- weights ----

    def _validate(self, epoch: int, phase: Phase) -> None:
        super()._validate(epoch, phase)
        if self.config.save_last:
            self._save_weights("last.safetensors", self.session.method.merged_state(self.model), epoch)

    def keep_best(self) -> None:
        method = self.session.method
        if self.config.no_output:
            super().keep_best()
            return
        self._save_weights(BEST, method.merged_state(self.model), self.best_epoch)
        # After --resume FILE, more than what the method may change differs from the pretrained CLIP.
        if not self.config.resume:
            self._save_weights(ADAPTER, method.own_state(self.model), self.best_epoch, "adapter")

    def _load_best(self) -> None:
        path = self.run.file(BEST)
        if state := self.best_state if path is None else read_checkpoint(path).state:
            strict_load(self.model, state, BEST)
            self.session.method.reset(self.model)
        copy_from_main(self.model.state_dict().values())

    def _save_weights(self, name: str, tensors: dict[str, Tensor], epoch: int, content: str = "model") -> None:
        if path := self.run.file(name):
            save_tensors(path, tensors, {"content": content, "epoch": str(epoch), **self.session.description()})

    # ---- snapshots: what decides how the run continues ----

    def save(self) -> None:
        step, scaler = self.position.step, self.accelerator.scaler
        if self.run.path is None or step == self._saved_step:
            return
        method = self.session.method.state_dict()
        groups = {
            "model": self.model.state_dict(),
            "objective": self.objective.own_state(),
            "optimizer": optimizer.optimizer_tensors(self.optimizer.optimizer, self.objective),
            "method": method.tensors,
        }
        values: dict[str, Any] = {
            "position": asdict(self.position),
            "method": method.values,
            "updates_of_schedule": self.schedule.last_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
            "zero_shot": self.zero_shot.as_state() if self.zero_shot else None,
            "best": self.best.as_state() if self.best else None,
            "best_epoch": self.best_epoch,
            "metrics_size": self.run.flushed_events(),
            "data": self._digests,
        }
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        checkpoint.save_snapshot(self.run.path, Snapshot(step, tensors, values))
        self._saved_step = step

    def _resume(self, folder: Path) -> bool:
        """Take up the run in `folder` where it was saved, and return whether anything was."""
        run, snapshot = self.run, checkpoint.load_snapshot(folder)
        if snapshot is None:
            run.reopen(folder, step=0, size=0)
            run.say(f"resuming {folder} from the beginning: it ended before anything was saved")
            self.record_cost()
            return False
        values, task = snapshot.values, self.task
        if changed := [part for part, digest in self._digests.items() if values["data"][part] != digest]:
            raise UserError(
                f"resume: the {' and '.join(changed)} data is not what the run in {folder} began with: other captions, "
                "other videos, or others that can be read. Restore the data, or begin a new run from its weights"
            )
        run.reopen(folder, snapshot.step, values["metrics_size"])
        if is_main():
            checkpoint.restore_results(folder, snapshot)
        run.say(f"resuming {folder} after update {snapshot.step}")
        strict_load(self.model, snapshot.group("model"), f"resume: update {snapshot.step}")
        self.objective.load_own_state(snapshot.group("objective"))
        self.position = Position(**values["position"])
        self.session.method.load_state_dict(MethodState(snapshot.group("method"), values["method"]))
        self.prepare(self.position.total_updates)
        optimizer.load_optimizer(self.optimizer.optimizer, self.objective, snapshot.group("optimizer"))
        optimizer.advance(self.schedule, values["updates_of_schedule"])
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.session.recount()
        self.zero_shot = task.figures_from_state(values["zero_shot"]) if values["zero_shot"] else None
        self.best = task.figures_from_state(values["best"]) if values["best"] else None
        self.best_epoch, self._saved_step = values["best_epoch"], snapshot.step
        return True


def _windows(batches: Iterable[TrainBatch], size: int) -> Iterator[list[TrainBatch]]:
    iterator = iter(batches)
    while window := list(islice(iterator, size)):
        yield window
