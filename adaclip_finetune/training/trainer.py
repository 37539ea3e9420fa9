"""`fit`: one run from settings to figures.

The order of a run is always the same: build, read the data, say what learns, measure zero-shot, train and keep the best
epoch by validation, reload it, evaluate the test annotation once. A run that goes on takes up the thread where its
snapshot left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.queries import fingerprint
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.evaluate import Evaluator, Figures
from adaclip_finetune.weights.clip_weights import strict_load
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.processes import copy_from_main, gather_objects, is_main
from adaclip_finetune.report import draw_curves, one_line, write_importance
from adaclip_finetune.training.build import build_session, note_failed, say_cut, train_loader
from adaclip_finetune.training.checkpoint import load_weights, save_tensors
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.ending import ending_well
from adaclip_finetune.training.loop import Hooks, Trainer
from adaclip_finetune.training.measure import EMBEDDINGS, is_better, measure, measure_once, read_split, zero_shot
from adaclip_finetune.training.outcome import SELECTED_ON_TEST, FitResult, say_and_write
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.snapshot import (
    Snapshot,
    drop_snapshots,
    load_snapshot,
    restore_results,
    save_snapshot,
)

_BEST = "best.safetensors"
_ADAPTER = "adapter.safetensors"
_RESULTS = (_BEST, _ADAPTER)


def fit(config: Config, folder: Path | None = None, opened: Callable[[Path], None] | None = None) -> FitResult:
    """Finetune as `config` says. `folder`: go on with the run that was interrupted there, `config` being its own
    (`continued_config`). `opened` is told the folder of a new run as soon as it is made.

    Raises UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM, when what was learned is saved.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config)
    with StopSignals() as signals, ending_well(run):
        return _Fit(config, run, accelerator, opened).run_all(folder, signals)


class _Fit:
    """One run, step by step. It holds what the steps share."""

    def __init__(
        self, config: Config, run: RunFolder, accelerator: Accelerator, opened: Callable[[Path], None] | None
    ) -> None:
        self.config, self.run, self.accelerator, self.opened = config, run, accelerator, opened
        self.best: Figures | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}  # only with no_output: else it lies in the run folder
        self.saved_step = -1

    def run_all(self, folder: Path | None, signals: StopSignals) -> FitResult:
        config, run = self.config, self.run
        if folder is not None:
            run.lock(folder)
        validation = read_split(config, config.val_annot, run, "validation")
        name = "test" if config.test_annot else "validation"
        split = read_split(config, config.test_annot, run, name) if config.test_annot else validation
        self.session = session = build_session(config, run, self.accelerator)
        if session.config.auto_batch_size:
            session.fit_batches()
        self.config = config = session.config
        loader = train_loader(config, session.loaded, run)
        self.data = fingerprint(loader.dataset.entries, validation=validation.queries, test=split.queries)
        if any(data != self.data for data in gather_objects(self.data)):
            raise UserError("the processes of this run read different data: other captions, or other readable videos")
        self.trainer = Trainer(config, session.model, session.method, loader, self.accelerator, run)
        say_cut(session.loaded, split.queries.texts, config.max_txt_len, name, run)
        self._begin(folder, split, name)
        selected_on_test = same_captions(config)
        if selected_on_test:
            run.say(f"WARNING: every figure of this run is {SELECTED_ON_TEST}")
        with closing(loader), closing(Evaluator(validation, config, session.loaded, "validation")) as evaluator:
            self._train(loader, evaluator, signals)
        best = self._reload_best()
        final = measure_once(session, split, name)
        result = FitResult(
            zero_shot=self.zero_shot,
            final=final,
            best_validation=best,
            best_epoch=self.best_epoch,
            evaluated_on=name,
            selected_on_test=selected_on_test,
            parameters=session.parameters,
            gflops=session.gflops,
            folder=run.path,
        )
        say_and_write(result, config, run)
        if run.path is not None:
            drop_snapshots(run.path)
        run.drop(EMBEDDINGS)
        return result

    def _begin(self, folder: Path | None, split: EvaluationSplit, name: str) -> None:
        """Open the run folder and measure zero-shot; or take up both, and all else, where the run in `folder` left
        them."""
        if folder is None:
            self.session.open_folder()
            if self.run.path is not None and self.opened is not None:
                self.opened(self.run.path)
        elif snapshot := self._reopen(folder):
            self._restore(snapshot)
            return
        baseline = zero_shot(self.session, split, name)
        self.zero_shot = baseline.figures if baseline else None

    def _reopen(self, folder: Path) -> Snapshot | None:
        """The folder to go on in, and where to go on from; None if nothing was saved there."""
        snapshot = load_snapshot(folder)
        if snapshot is None:
            self.run.reopen(folder, step=0, size=0)
            self.run.say(f"going on with {folder}: nothing was saved there yet, so from the beginning")
            self.session.record()
            return None
        if snapshot.values["data"] != self.data:
            changed = [part for part, digest in self.data.items() if snapshot.values["data"][part] != digest]
            raise UserError(
                f"resume: the {' and '.join(changed)} data is not what the run in {folder} began with: other captions, "
                "other videos, or others that can be read. Bring the old back, or begin a new run from its weights"
            )
        if is_main():
            restore_results(folder, snapshot, _RESULTS)
        self.run.reopen(folder, snapshot.step, snapshot.values["metrics_size"])
        self.run.say(f"going on with {folder} after update {snapshot.step}")
        return snapshot

    def _restore(self, snapshot: Snapshot) -> None:
        values = snapshot.values
        strict_load(self.session.model, snapshot.group("model"), f"resume: update {snapshot.step}")
        self.trainer.restore({name: snapshot.group(name) for name in ("optimizer", "method")}, values)
        self.session.recount()
        self.zero_shot = Figures.from_state(values["zero_shot"]) if values["zero_shot"] else None
        self.best = Figures.from_state(values["best"]) if values["best"] else None
        self.best_epoch = values["best_epoch"]
        self.saved_step = snapshot.step

    def _save_snapshot(self) -> None:
        step = self.trainer.position.step
        if self.run.path is None or step == self.saved_step:
            return
        groups = self.trainer.tensors()
        values: dict[str, Any] = {
            **self.trainer.values(),
            "zero_shot": self.zero_shot.as_state() if self.zero_shot else None,
            "best": self.best.as_state() if self.best else None,
            "best_epoch": self.best_epoch,
            "metrics_size": self.run.flushed_events(),
            "data": self.data,
        }
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        save_snapshot(self.run.path, Snapshot(step, tensors, values), _RESULTS)
        self.saved_step = step

    def _train(self, loader: TrainLoader, evaluator: Evaluator, signals: StopSignals) -> None:
        hooks = Hooks(
            epoch_end=lambda epoch, phase: self._epoch_end(epoch, phase, loader, evaluator),
            method_changed=self._method_changed,
            save=self._save_snapshot,
        )
        try:
            self.trainer.train(hooks, signals)
        finally:
            if path := self.run.file("curves.png"):
                with suppress(OSError):  # a full disk has been told of by then
                    draw_curves(path, self.run.events)

    def _epoch_end(self, epoch: int, phase: Phase, loader: TrainLoader, evaluator: Evaluator) -> None:
        note_failed(loader, self.run)
        self._validate(epoch + 1, phase, evaluator)

    def _validate(self, epoch: int, phase: Phase, evaluator: Evaluator) -> None:
        result, step = measure(self.session, evaluator, self.session.model), self.trainer.position.step
        seconds = round(result.seconds, 3)
        self.run.record("validation", step, epoch=epoch, metrics=result.as_dict(), eval_seconds=seconds)
        better = phase.may_be_best and is_better(result.figures, self.best)
        mark = "  ← best so far" if better else ""
        self.run.say(f"epoch {epoch}/{self.config.num_epochs}  validation  {one_line(result.metrics)}{mark}")
        if better:
            self.best, self.best_epoch = result.figures, epoch
            self.run.record("best", step, epoch=epoch)
            self._keep_best()
        if self.config.save_last:
            self._save("last.safetensors", self.session.model.state_dict(), epoch)

    def _keep_best(self) -> None:
        model, method = self.session.model, self.session.method
        if self.config.no_output:
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            return
        self._save(_BEST, model.state_dict(), self.best_epoch)
        # After --resume, what the method may change is not all that differs from the pretrained CLIP.
        if not self.config.resume:
            self._save(_ADAPTER, method.trainable_state(model), self.best_epoch, content="adapter")

    def _reload_best(self) -> Figures:
        assert self.best is not None, "the last phase of every method may be best"
        model = self.session.model
        if self.config.no_output:
            model.load_state_dict(self.best_state)
        elif path := self.run.file(_BEST):
            load_weights(path, model)
        copy_from_main(model.state_dict().values())
        return self.best

    def _method_changed(self) -> None:
        """Say what learns from here on, and keep the table of a method that chose by importance."""
        self.session.recount()
        self.run.say(f"from here on\n{self.session.parameters}")
        self.run.record("parameters", self.trainer.position.step, **self.session.parameters.as_dict())
        table, picture = self.run.file("ibs_parameters.csv"), self.run.file("ibs_parameters.png")
        rows = self.session.method.parameter_rows()
        if rows and table and picture:
            write_importance(table, picture, rows)

    def _save(self, name: str, tensors: Mapping[str, Tensor], epoch: int, content: str = "model") -> None:
        if path := self.run.file(name):
            config = self.config.model_dump_json()
            save_tensors(path, tensors, {"content": content, "epoch": str(epoch), "config": config})


def same_captions(config: Config) -> bool:
    """Whether val_annot and test_annot are one: the same file, or the same content under two names."""
    if not config.val_annot or not config.test_annot:
        return False
    one, other = Path(config.val_annot), Path(config.test_annot)
    return one.resolve() == other.resolve() or load_annotations(one) == load_annotations(other)
