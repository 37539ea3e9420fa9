"""One run from settings to figures, read from top to bottom: set-up, epochs, steps, validation, snapshots, end.

A run measures zero-shot first, trains, validates each epoch, and measures the best one on the test split, once. It
saves snapshots from which it can resume. A tuning trial (`run_trial`) only trains and validates, with its best weights
in memory.

An update is a function of the weights and of (seed, epoch, place in the epoch). No random state needs to be saved, and
the number of processes changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import same_captions
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import nothing_readable
from adaclip_finetune.data.queries import digest_of_queries
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import NotFinite, UserError
from adaclip_finetune.evaluation.tasks.base import Figures, Report
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.peft.base import MethodState, Phase
from adaclip_finetune.processes import copy_from_main, gather_objects, is_main, rank
from adaclip_finetune.training import checkpoint, device, frozen, measure, optimizer
from adaclip_finetune.training.backward import Backward
from adaclip_finetune.training.checkpoint import ADAPTER, BEST, Snapshot, save_tensors
from adaclip_finetune.training.ema import Ema
from adaclip_finetune.training.memory import fitting_batch_size, memory_explained
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import Interrupted, StopSignals
from adaclip_finetune.weights.checkpoints import read_checkpoint
from adaclip_finetune.weights.clip_weights import save_tokenizer
from adaclip_finetune.weights.plain import strict_load

OnEpoch = Callable[[int, Figures], None]


class FitResult(NamedTuple):
    """What a run found: the report of its best epoch on the split `evaluated_on`, and the content of metrics.json.

    `folder` is None with no_output, and `zero_shot` if the pretrained CLIP is not available.
    """

    folder: Path | None
    evaluated_on: str
    final: Report
    zero_shot: Figures | None
    metrics: dict[str, Any]


def fit(
    config: Config,
    folder: Path | None = None,
    opened: Callable[[Path], None] | None = None,
    run: RunFolder | None = None,
) -> FitResult:
    """Finetune as `config` says and return what was found.

    `folder` is the folder of an interrupted run to resume, whose own settings `config` must be (`continued_config`).
    `opened` is called with the folder of a new run as soon as it exists. `run` prints and writes, and is closed at the
    end (default: one that makes its folder in output_dir). Raise UserError for what the user can fix, and Interrupted
    after Ctrl-C or SIGTERM, when everything is saved.
    """
    run = run or RunFolder(config)
    with memory_explained(config), StopSignals() as signals, run, ExitStack() as stack:
        if folder is not None:
            run.lock(folder)
        trainer = Trainer(config, run, signals, stack)
        if folder is None:
            trainer.open_folder()
            if run.path is not None and opened is not None:
                opened(run.path)
        if folder is None or not trainer.resume(folder):
            baseline = measure.zero_shot(trainer.session, trainer.test, trainer.test_name, run)
            trainer.zero_shot = baseline.figures if baseline else None
        return trainer.fit()


def run_trial(config: Config, run: RunFolder, on_epoch: OnEpoch) -> TrialResult:
    """Train and validate only, and return the best epoch, whose weights stay in memory. Close `run` at the end.

    `on_epoch(epoch, figures)` is called after each validation (epochs count from 1) of an epoch that may be the best;
    it may raise to end the trial. Raise UserError for what the user can fix, and Interrupted after Ctrl-C or SIGTERM.
    """
    with memory_explained(config), StopSignals(saving=False) as signals, run, ExitStack() as stack:
        trainer = Trainer(config, run, signals, stack, on_epoch)
        trainer.open_folder()
        trainer.train()
        best, epoch, session = trainer.best, trainer.best_epoch, trainer.session
        assert best is not None, "the last phase of every method may be the best"
        about = {"best_epoch": epoch, "best_validation": best.as_dict(), "parameters": session.parameters.as_dict()}
        run.write_json("metrics.json", about)
        return TrialResult(best, epoch, trainer.config, trainer.best_state, session.description())


def validation_zero_shot(config: Config, run: RunFolder) -> Figures | None:
    """Return the zero-shot figures on val_annot, None (after a warning) if the pretrained CLIP is not available."""
    with StopSignals(saving=False):
        accelerator = device.make_accelerator(config)
        validation = measure.read_split(config, config.val_annot, run, "validation")
        measured = measure.zero_shot(open_model(config, accelerator=accelerator), validation, "validation", run)
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


@contextmanager
def divergence_explained(when: str) -> Iterator[None]:
    """Raise UserError if training diverges within: the one place that says so. `when` names the update."""
    try:
        yield
    except NotFinite as error:
        raise UserError(
            f"training diverged: {error}, {when}.\nTry a lower learning_rate or coef_lr, precision bf16 instead of "
            "fp16 (or fp32), or grad_norm 1. What was saved before is unchanged"
        ) from error


class Trainer:
    """Train a model and validate it after each epoch. With `on_epoch` it is a tuning trial, which saves no weights."""

    # What belongs to one set of learning parameters, made by `prepare`.
    wrapped: torch.nn.Module  # the objective, wrapped for mixed precision and several processes
    optimizer: AcceleratedOptimizer
    schedule: LambdaLR
    backward: Backward
    ema: Ema

    # ---- set-up, in the order in which something can be wrong ----

    def __init__(
        self, config: Config, run: RunFolder, signals: StopSignals, stack: ExitStack, on_epoch: OnEpoch | None = None
    ) -> None:
        """Build everything that `config` names. `stack` closes the data loaders; `on_epoch` as for `run_trial`."""
        self.run, self.signals, self.on_epoch = run, signals, on_epoch
        self.accelerator = device.make_accelerator(config)
        self.validation = measure.read_split(config, config.val_annot, run, "validation")
        self.test, self.test_name = self.validation, "validation"
        if config.test_annot and on_epoch is None:
            self.test, self.test_name = measure.read_split(config, config.test_annot, run, "test"), "test"
        set_seed(config.seed)
        self.session = session = open_model(config, accelerator=self.accelerator)
        run.say(session.describe())
        if config.ema_decay:
            run.say(f"ema_decay {config.ema_decay:g}: figures and saved weights are those of the averaged weights")
        device.forget_peak_memory(self.accelerator.device)
        if session.config.auto_batch_size:
            self._settle_batch_sizes()
        self.config = config = session.config
        self.model, self.objective = session.model, session.objective
        split = measure.readable_train_split(config, run)
        for phase in session.method.phases(config.num_epochs, config.batch_size):
            split.plan.num_batches(phase.batch_size)  # refuses parts that are too small
        session.vectors = frozen.open_vectors(session)
        self.data = measure.train_loader(session, split)
        stack.callback(self.data.close)
        self.task = measure.build_task(
            config, self.validation, session.loaded, self.model, "validation", vectors=session.vectors
        )
        stack.callback(self.task.close)
        measure.say_cut(session.loaded, config, self.test, self.test_name, run)
        evaluated = {"validation": self.validation.queries, "test": self.test.queries}
        self._digests = {"training": split.digest} | {n: digest_of_queries(q) for n, q in evaluated.items()}
        if any(digests != self._digests for digests in gather_objects(self._digests)):
            raise UserError("the processes of this run read different data: other captions, or other readable videos")
        # Updates so far, the epoch (from 0), its finished batches, and the length of the current schedule.
        self.step, self.epoch, self.batch, self.total_updates = 0, 0, 0, 0
        self.zero_shot: Figures | None = None
        self.best: Figures | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}  # of a run that writes no weights
        self._prepared = False
        self._saved_step = -1

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
        self._record_cost()

    def _record_cost(self) -> None:
        """Record how many parameters learn and what a video costs: the first line of metrics.jsonl."""
        parameters, gflops = self.session.parameters.as_dict(), self.session.gflops.as_dict()
        self.run.record("parameters", 0, **parameters, gflops=gflops)

    # ---- epochs ----

    def train(self) -> None:
        """Train all epochs that are left, saving at the end of each one before it is validated.

        After a signal, finish and save the current update and raise Interrupted.
        """
        self._encode_frames()
        if not self.step:
            self.session.method.before_training(self.model, self.data.epoch(0, self.config.batch_size))
        first_epoch = 0
        for phase in self.session.method.phases(self.config.num_epochs, self.config.batch_size):
            epochs = range(first_epoch, first_epoch + phase.num_epochs)
            if self.epoch <= epochs.start and not self.batch:
                self._prepared = False  # Each phase has its own optimizer and schedule.
            for epoch in range(max(epochs.start, self.epoch), epochs.stop):
                updates = self.data.plan.updates(phase.batch_size, self.config.gradient_accumulation_steps)
                # A resumed epoch has already told the method that it began.
                changed = not self.batch and self.session.method.on_epoch_start(epoch)
                if changed:
                    self._say_what_learns()
                if changed or not self._prepared:
                    self.prepare((epochs.stop - epoch) * updates)
                self.model.start_epoch(epoch)
                with self.signals.deferred():
                    self._train_epoch(epoch, phase, updates)
                    self.save()
                self.run.note_missing("left out of their batches: they could not be read", self.data.take_failed())
                with self.ema.in_place():
                    self._validate(epoch + 1, phase)
                self.epoch, self.batch = epoch + 1, 0
            first_epoch = epochs.stop

    def _encode_frames(self) -> None:
        """Encode the frames of all videos that have no vectors in the `embedding_cache`, if the run has one."""
        if self.session.vectors is None:
            return
        reader, queries = self.data.dataset.reader, self.validation.queries
        trained = [entry.video_id for entry in self.data.dataset.entries] if self.config.trains_on_videos else []
        count = frozen.encode_frames(self.session, reader.store, trained, "training videos")
        count += frozen.encode_frames(self.session, self.validation.store, queries.video_ids, "validation videos")
        self.run.say(f"embedding_cache {self.config.embedding_cache}: {count} videos were encoded for it")

    def _say_what_learns(self) -> None:
        """Print and record what learns from here on, after the method changed it."""
        self.session.recount()
        self.run.say(f"from here on\n{self.session.parameters}")
        self.run.record("parameters", self.step, **self.session.parameters.as_dict())
        rows = self.session.method.parameter_rows()
        if rows and (folder := self.run.path) and self.on_epoch is None:
            from adaclip_finetune import report  # imports matplotlib

            report.write_importance(folder / "ibs_parameters.csv", folder / "ibs_parameters.png", rows)

    def prepare(self, updates: int) -> None:
        """Make a new wrapper, optimizer, schedule of `updates` updates and average for the parameters that learn now.

        The wrapper must be new, since `requires_grad` may not change under a live one.
        """
        self.total_updates = updates
        for name in ("wrapped", "optimizer", "schedule", "backward", "ema"):
            vars(self).pop(name, None)  # Free the old ones first; moments are twice as large as what learns.
        self.accelerator.free_memory()
        built, self.schedule = optimizer.build_optimizer(self.objective, self.config, updates)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, built)
        chunk, pinned = self.config.grad_cache_chunk, self.config.pin_mem
        self.backward = Backward(self.accelerator, self.objective, self.wrapped, chunk, pinned)
        self.ema = Ema(self.objective, self.config.ema_decay)
        self._prepared = True

    # ---- steps ----

    def _train_epoch(self, epoch: int, phase: Phase, updates: int) -> None:
        c, per_update = self.config, self.config.gradient_accumulation_steps
        self.wrapped.train()
        shown = {"desc": f"epoch {epoch + 1}/{c.num_epochs}", "unit": "update", "leave": False}
        hidden = None if is_main() else True  # None: shown on a terminal only
        batches = self.data.epoch(epoch, phase.batch_size, self.batch)
        with tqdm(total=updates, initial=self.batch // per_update, disable=hidden, **shown) as bar:
            last = time.monotonic()
            while window := list(islice(batches, per_update)):
                groups = self._exchange(window)
                rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
                terms = self._step(window, groups)
                loss = sum(terms.values())
                self.step, self.batch = self.step + 1, self.batch + len(window)
                seconds, last = time.monotonic() - last, time.monotonic()
                speed = round(sum(map(len, groups)) / max(seconds, 1e-9), 2)
                memory = round(device.peak_memory_mib(self.accelerator.device), 1)
                cost = self.model.schedule() | {"videos_per_second": speed, "memory_mib": memory}
                parts = {"terms": terms} if len(terms) > 1 else {}
                self.run.record("train", self.step, epoch=epoch + 1, loss=loss, **parts, lr=rates, **cost)
                if c.save_every_steps and self.step % c.save_every_steps == 0:
                    self.save()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                if self.step % c.n_display == 0:
                    by_part = {name.split("_")[0]: rate for name, rate in rates.items()}
                    lr = " ".join(f"{part} {rate:.2e}" for part, rate in by_part.items())
                    self.run.say(f"  epoch {epoch + 1}  update {self.step}  loss {loss:.4f}  lr {lr}")

    def _exchange(self, window: list[TrainBatch]) -> list[Group]:
        """Tell the other processes which videos are in this update's batches; stop if any process got a signal."""
        told = gather_objects((self.signals.received, [batch.pairs() for batch in window]))
        stop = next((signum for signum, _ in told if signum is not None), None)
        if stop is not None:
            self.save()
            gather_objects(None)  # A launcher ends the main process, which saves, as soon as another one ends.
            raise Interrupted(stop)
        groups = [Group([pairs[number] for _, pairs in told]) for number in range(len(window))]
        if not all(map(len, groups)):
            raise nothing_readable(self.data.take_failed())
        return groups

    def _step(self, window: list[TrainBatch], groups: list[Group]) -> dict[str, float]:
        """Make one update and return the terms of its loss, which is the mean over all pairs in the window."""
        ids = [name for group in groups for name in group.video_ids]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        terms: dict[str, float] = {}
        with divergence_explained(f"at update {self.step + 1}, on the videos {shown}"):
            for number, (batch, group) in enumerate(zip(window, groups, strict=True)):
                # Processes exchange gradients with the last batch only.
                last = batch is window[-1]
                with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    seeds = partial(self._dropout_seed, number)
                    for name, part in self.backward(batch, group, seeds, len(group) / len(ids)).items():
                        terms[name] = terms.get(name, 0.0) + part
            self._update()
        return terms

    def _dropout_seed(self, batch: int, part: int) -> int:
        """Return the seed of what towers draw by themselves, which depends on the place in the run too."""
        first = int(generator("dropout", self.config.seed, self.step, rank()).integers(2**62))
        return first + 1_000_003 * batch + part

    def _update(self) -> None:
        self.session.method.after_backward(self.step)
        if self.config.grad_norm != -1:
            self.accelerator.unscale_gradients()
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.grad_norm)
        self.optimizer.step()
        optimizer.clamp_logit_scale(self.model.clip)
        # The schedule counts real updates; the gradient scaler of fp16 may have skipped this one.
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            self.ema.update(self.schedule.last_epoch)
        self.optimizer.zero_grad()

    # ---- validation and the best epoch ----

    def _validate(self, epoch: int, phase: Phase) -> None:
        step = self.step
        with divergence_explained(f"after update {step}"):
            measured = measure.measure(self.session, self.task, self.model)
        figures, seconds = measured.figures, round(measured.seconds, 3)
        self.run.record("validation", step, epoch=epoch, metrics=figures.as_dict(), eval_seconds=seconds)
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
        elif self.on_epoch is None and self.config.save_last:
            self._save_weights("last.safetensors", self.session.method.merged_state(self.model), epoch)

    def keep_best(self) -> None:
        """Keep the weights of the best epoch so far: in files, or in memory if the run writes none."""
        method = self.session.method
        if self.on_epoch is not None or self.config.no_output:
            kept = method.merged_state(self.model)
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}
            return
        self._save_weights(BEST, method.merged_state(self.model), self.best_epoch)
        # After --resume FILE, more than what the method may change differs from the pretrained CLIP.
        if not self.config.resume:
            self._save_weights(ADAPTER, method.own_state(self.model), self.best_epoch, "adapter")

    def _save_weights(self, name: str, tensors: dict[str, Tensor], epoch: int, content: str = "model") -> None:
        if path := self.run.file(name):
            save_tensors(path, tensors, {"content": content, "epoch": str(epoch), **self.session.description()})

    # ---- the whole run ----

    def fit(self) -> FitResult:
        """Train, measure the best epoch on the test split once, and write and print what was found."""
        run, selected_on_test = self.run, chosen_on_test(self.config)
        if selected_on_test:
            run.say("WARNING: val_annot and test_annot hold the same captions, so every figure is selected on test")
        try:
            self.train()
            self._load_best()
            final, task = measure.measure_once(self.session, self.test, self.test_name, run)
            run.record("finetuned", self.step, metrics=final.as_dict(), split=self.test_name)
        finally:
            with suppress(OSError):  # a full disk
                if path := run.file("curves.png"):
                    from adaclip_finetune import report  # imports matplotlib

                    report.draw_curves(path, run.events, self.task.curves)
                if (history := self.session.method.sampling_history()) and run.path:
                    from adaclip_finetune import report

                    report.write_sampling(
                        run.path / "lisa_probabilities.csv", run.path / "lisa_probabilities.png", history
                    )
        assert self.best is not None, "the last phase of every method may be the best"
        metrics = {
            "evaluated_on": self.test_name,
            "selected_on": "test" if selected_on_test else "validation",
            "best_epoch": self.best_epoch,
            "zero_shot": self.zero_shot.as_dict() if self.zero_shot else None,
            "finetuned": final.as_dict(),
            "best_validation": self.best.as_dict(),
            "parameters": self.session.parameters.as_dict(),
            "gflops": self.session.gflops.as_dict(),
        }
        measure.finish(self.session, metrics, task, self.zero_shot, final, run)
        run.drop_unfinished()
        return FitResult(run.path, self.test_name, final, self.zero_shot, metrics)

    def _load_best(self) -> None:
        path = self.run.file(BEST)
        if state := self.best_state if path is None else read_checkpoint(path).state:
            strict_load(self.model, state, BEST)
            self.session.method.reset(self.model)
        copy_from_main(self.model.state_dict().values())

    # ---- snapshots: what decides how the run continues ----

    def save(self) -> None:
        """Save a snapshot from which the run can resume, unless this update is saved already."""
        step, scaler = self.step, self.accelerator.scaler
        if self.run.path is None or step == self._saved_step or self.on_epoch is not None:
            return
        method = self.session.method.state_dict()
        moments, parameter_groups = optimizer.optimizer_state(self.optimizer.optimizer)
        groups = {
            "model": self.model.state_dict(),
            "objective": self.objective.own_state(),
            "optimizer": moments,
            "ema": self.ema.state_dict(),
            "method": method.tensors,
        }
        values: dict[str, Any] = {
            "position": [self.step, self.epoch, self.batch, self.total_updates],
            "method": method.values,
            "parameter_groups": parameter_groups,
            "schedule": self.schedule.state_dict(),
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

    def resume(self, folder: Path) -> bool:
        """Take up the run in `folder` where it was saved, and return whether anything was."""
        run, snapshot = self.run, checkpoint.load_snapshot(folder)
        if snapshot is None:
            run.reopen(folder, step=0, size=0)
            run.say(f"resuming {folder} from the beginning: it ended before anything was saved")
            self._record_cost()
            return False
        values, task = snapshot.values, self.task
        if changed := [part for part, digest in self._digests.items() if values["data"][part] != digest]:
            names = " and ".join(changed)
            raise UserError(f"resume: the {names} data (captions, readable videos) is not what the run began with")
        run.reopen(folder, snapshot.step, values["metrics_size"])
        if is_main():
            checkpoint.restore_results(folder, snapshot)
        run.say(f"resuming {folder} after update {snapshot.step}")
        strict_load(self.model, snapshot.group("model"), f"resume: update {snapshot.step}")
        self.objective.load_own_state(snapshot.group("objective"))
        self.step, self.epoch, self.batch, self.total_updates = values["position"]
        self.session.method.load_state_dict(MethodState(snapshot.group("method"), values["method"]))
        self.prepare(self.total_updates)
        moments, parameter_groups = snapshot.group("optimizer"), values["parameter_groups"]
        optimizer.load_optimizer(self.optimizer.optimizer, moments, parameter_groups)
        self.schedule.load_state_dict(values["schedule"])
        self.ema.load_state_dict(snapshot.group("ema"))
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.session.recount()
        self.zero_shot = task.figures_from_state(values["zero_shot"]) if values["zero_shot"] else None
        self.best = task.figures_from_state(values["best"]) if values["best"] else None
        self.best_epoch, self._saved_step = values["best_epoch"], snapshot.step
        return True
