"""`fit`: one run from settings to figures; `evaluate_only`: a checkpoint's, or CLIP's own.

The order of a run is always the same: build, read the data, say what learns, measure zero-shot, train and keep the best
epoch by validation, reload it, evaluate the test annotation once. A run that goes on takes up the thread where its
snapshot left it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.queries import fingerprint
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import EvaluationSplit, evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.evaluate import EvaluationResult, Evaluator, Figures
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.clip_weights import strict_load
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.processes import copy_from_main, explain_lost_process, is_main
from adaclip_finetune.report import draw_curves, one_line, write_importance
from adaclip_finetune.training.build import Session, build_session, say_cut, train_loader
from adaclip_finetune.training.checkpoint import load_weights, save_tensors
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.loop import Hooks, Trainer
from adaclip_finetune.training.memory import explain_out_of_memory_in_evaluation
from adaclip_finetune.training.outcome import SELECTED_ON_TEST, FitResult, say_and_write, say_table, write_similarity
from adaclip_finetune.training.run_folder import RunFolder, environment
from adaclip_finetune.training.signals import Interrupted, StopSignals
from adaclip_finetune.training.snapshot import (
    Snapshot,
    drop_snapshots,
    load_snapshot,
    restore_results,
    save_snapshot,
)

OnEpoch = Callable[[int, EvaluationResult], None]

_BEST = "best.safetensors"
_ADAPTER = "adapter.safetensors"
_RESULTS = (_BEST, _ADAPTER)


def fit(config: Config, on_epoch: OnEpoch | None = None, folder: Path | None = None) -> FitResult:
    """Finetune as `config` says. `on_epoch(epoch, validation)`, epochs from 1, may end the run by raising (a pruned
    trial). `folder`: go on with the run that was interrupted there, `config` being its own (`continued_config`).

    Raises UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM, when what was learned is saved.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config)
    with StopSignals() as signals, _ending_well(run):
        return _Fit(config, run, accelerator, on_epoch).run_all(folder, signals)


def evaluate_only(config: Config, folder: Path | None = None) -> EvaluationResult:
    """Figures of `resume` on test_annot; of CLIP itself, zero-shot, where no checkpoint is given. `folder`: go on with
    the evaluation that was interrupted there.

    Raises UserError, and Interrupted after Ctrl-C or SIGTERM, when what was embedded is saved.
    """
    accelerator = make_accelerator(config)
    run = RunFolder(config)
    with StopSignals(), _ending_well(run):
        return _evaluate_only(config, run, accelerator, folder)


def _evaluate_only(config: Config, run: RunFolder, accelerator: Accelerator, folder: Path | None) -> EvaluationResult:
    if folder is not None:
        _lock(run, folder)
    split = _split(config, config.test_annot, run, "test")
    session = build_session(config, run, accelerator)
    say_cut(session.loaded, split.queries.texts, config.max_txt_len, "test", run)
    if folder is None:
        _open(run, session)
    else:
        run.reopen(folder, step=0, size=0)
        run.say(f"going on with {folder}")
        _record_session(run, session)
    zero_shot = _zero_shot(session, split, "test")
    rows = {} if zero_shot is None else {"zero-shot": zero_shot}
    if config.resume:
        rows[Path(config.resume).name] = _evaluate_once(session, split, "test")
    else:
        run.say("no --resume FILE, so this is CLIP as it is")
    result = list(rows.values())[-1]
    run.say()
    say_table({name: row.metrics for name, row in rows.items()}, result, run)
    run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
    write_similarity(config, result, run)
    run.drop(_EMBEDDINGS)
    return result


class _Fit:
    """One run, step by step. It holds what the steps share."""

    def __init__(self, config: Config, run: RunFolder, accelerator: Accelerator, on_epoch: OnEpoch | None) -> None:
        self.config, self.run, self.accelerator, self.on_epoch = config, run, accelerator, on_epoch
        self.best: Figures | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}  # only with no_output: else it lies in the run folder
        self.saved_step = -1

    def run_all(self, folder: Path | None, signals: StopSignals) -> FitResult:
        config, run = self.config, self.run
        if folder is not None:
            _lock(run, folder)
        validation = _split(config, config.val_annot, run, "validation")
        name = "test" if config.test_annot else "validation"
        split = _split(config, config.test_annot, run, name) if config.test_annot else validation
        self.session = session = build_session(config, run, self.accelerator)
        if config.auto_batch_size:
            self.config = config = session.fit_batches()
        loader = train_loader(config, session.loaded, run)
        self.data = fingerprint(loader.dataset.entries, validation.queries)
        self.trainer = Trainer(config, session.model, session.method, loader, self.accelerator, run)
        say_cut(session.loaded, split.queries.texts, config.max_txt_len, name, run)
        snapshot = self._open(folder)
        selected_on_test = _same_captions(config)
        if selected_on_test:
            run.say(f"WARNING: every figure of this run is {SELECTED_ON_TEST}")
        if snapshot is None:
            zero_shot = _zero_shot(session, split, name)
            self.zero_shot = zero_shot.figures if zero_shot else None
        else:
            self._restore(snapshot)
        with closing(loader), closing(Evaluator(validation, config, session.loaded, "validation")) as evaluator:
            self._train(loader, evaluator, signals)
        best = self._reload_best()
        final = _evaluate_once(session, split, name)
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
        run.drop(_EMBEDDINGS)
        return result

    def _open(self, folder: Path | None) -> Snapshot | None:
        """The run folder, a new one or the one to go on in, and where to go on from."""
        if folder is None:
            _open(self.run, self.session)
            return None
        snapshot = load_snapshot(folder)
        if snapshot is None:
            self.run.reopen(folder, step=0, size=0)
            self.run.say(f"going on with {folder}: nothing was saved there yet, so from the beginning")
            _record_session(self.run, self.session)
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
                draw_curves(path, self.run.events)

    def _epoch_end(self, epoch: int, phase: Phase, loader: TrainLoader, evaluator: Evaluator) -> None:
        if failed := loader.take_failed():
            self.run.say(f"left out of their batches, because they could not be read any more:\n{listing(failed)}")
            self.run.note_missing(failed)
        self._validate(epoch + 1, phase, evaluator)

    def _validate(self, epoch: int, phase: Phase, evaluator: Evaluator) -> None:
        result, step = _evaluate(self.session, evaluator, self.session.model), self.trainer.position.step
        seconds = round(result.seconds, 3)
        self.run.record("validation", step, epoch=epoch, metrics=result.as_dict(), eval_seconds=seconds)
        # Strictly better: ties go to the earlier epoch.
        better = phase.may_be_best and (self.best is None or _score(result.figures) > _score(self.best))
        mark = "  ← best so far" if better else ""
        self.run.say(f"epoch {epoch}/{self.config.num_epochs}  validation  {one_line(result.metrics)}{mark}")
        if better:
            self.best, self.best_epoch = result.figures, epoch
            self.run.record("best", step, epoch=epoch)
            self._keep_best()
        if self.config.save_last:
            self._save("last.safetensors", self.session.model.state_dict(), epoch)
        if self.on_epoch is not None:
            self.on_epoch(epoch, result)

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


_EMBEDDINGS = "embeddings"


def _lock(run: RunFolder, folder: Path) -> None:
    run.lock(folder)
    if (folder / "metrics.json").exists():
        raise UserError(
            f"resume: the run in {folder} is finished (metrics.json). To train on from its weights, begin a new run: "
            f"--resume {folder / _BEST}"
        )


@contextmanager
def _ending_well(run: RunFolder) -> Iterator[None]:
    """However a run ends: it is told how to go on, and the folder is let go."""
    try:
        yield
    except Interrupted:
        _say_how_to_go_on(run)
        raise
    except RuntimeError as error:
        if explained := explain_lost_process(error):
            _say_how_to_go_on(run)
            raise explained from error
        raise
    finally:
        run.close()


def _say_how_to_go_on(run: RunFolder) -> None:
    if run.path is None:
        run.say("stopped; nothing is kept, and nothing can go on")
    else:
        run.say(f"stopped. To go on: python train.py --resume {run.path}")


def _split(config: Config, annotation: str | None, run: RunFolder, name: str) -> EvaluationSplit:
    assert annotation is not None, "check_paths refuses this"
    split = evaluation_split(config, annotation)
    if split.left_out:
        run.say(f"{name}: evaluated WITHOUT {len(split.left_out)} of {split.num_listed} videos that cannot be read:")
        run.say(listing(split.left_out))
        run.note_missing(split.left_out)
    if split.short:
        run.say(f"{name}: {len(split.short)} videos have fewer than num_frm {config.num_frm} frames and repeat some")
    return split


def _open(run: RunFolder, session: Session) -> None:
    """Nothing is left to refuse: make the run folder."""
    run.open(session.config)
    run.write_json("environment.json", environment(session.device))
    _record_session(run, session)


def _record_session(run: RunFolder, session: Session) -> None:
    run.record("parameters", 0, **session.parameters.as_dict(), gflops=session.gflops.as_dict())


def _zero_shot(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult | None:
    """Measured with the pretrained towers, before anything learns, and printed first.

    None, and said so, only where the model came from a checkpoint and CLIP itself is not at hand.
    """
    config = zero_shot_config(session.config)
    try:
        pretrained = session.pretrained()
    except UserError as error:
        if session.config.resume is None:
            raise
        session.run.say(f"WARNING: zero-shot is NOT measured, CLIP as it was before not being at hand. {error}")
        return None
    model = VideoRetriever(config, pretrained).to(session.accelerator.device)
    with closing(Evaluator(split, config, pretrained, f"zero-shot on {name}")) as evaluator:
        result = _evaluate(session, evaluator, model, session.run.file(f"{_EMBEDDINGS}/zero-shot"))
    session.run.say(f"zero-shot on {name} ({config.num_frm} uniform frames, mean)  {one_line(result.metrics)}")
    session.run.record("zero_shot", 0, metrics=result.as_dict())
    return result


def _evaluate_once(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult:
    with closing(Evaluator(split, session.config, session.loaded, name)) as evaluator:
        return _evaluate(session, evaluator, session.model, session.run.file(f"{_EMBEDDINGS}/{name}"))


def _evaluate(
    session: Session, evaluator: Evaluator, model: VideoRetriever, keep: Path | None = None
) -> EvaluationResult:
    try:
        with session.accelerator.autocast():
            return evaluator(model, keep)
    except (RuntimeError, MemoryError) as error:
        device = session.accelerator.device
        if explained := explain_out_of_memory_in_evaluation(error, session.config, device):
            raise explained from error
        raise


def _score(figures: Figures) -> float:
    return figures.metrics.t2v.recall(1)


def _same_captions(config: Config) -> bool:
    """Whether val_annot and test_annot are one: the same file, or the same content under two names."""
    if not config.val_annot or not config.test_annot:
        return False
    one, other = Path(config.val_annot), Path(config.test_annot)
    return one.resolve() == other.resolve() or load_annotations(one) == load_annotations(other)
