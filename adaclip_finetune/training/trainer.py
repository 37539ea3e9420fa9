"""`fit`: one run from settings to figures; `evaluate_only`: a checkpoint's, or CLIP's own.

The order of a run is always the same: build, read the data, say what learns, measure zero-shot, train and keep the best
epoch by validation, reload it, evaluate the test annotation once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import EvaluationSplit, evaluation_split
from adaclip_finetune.evaluation.evaluate import EvaluationResult, Evaluator
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.report import draw_curves, one_line, write_importance
from adaclip_finetune.training.build import Session, build_session, say_cut, train_loader
from adaclip_finetune.training.checkpoint import load_weights, save_tensors
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.loop import Interrupted, Trainer
from adaclip_finetune.training.outcome import SELECTED_ON_TEST, FitResult, say_and_write, say_table, write_similarity
from adaclip_finetune.training.run_folder import RunFolder, environment

OnEpoch = Callable[[int, EvaluationResult], None]


def fit(config: Config, on_epoch: OnEpoch | None = None) -> FitResult:
    """Finetune as `config` says. `on_epoch(epoch, validation)`, epochs from 1, may end the run by raising (a pruned
    trial).

    Raises UserError for what the user can mend, Interrupted after Ctrl-C, when what was learned is saved.
    """
    run = RunFolder(config)
    try:
        return _Fit(config, run, on_epoch).run_all()
    finally:
        run.close()


def evaluate_only(config: Config) -> EvaluationResult:
    """Figures of `resume` on test_annot; of CLIP itself, zero-shot, where no checkpoint is given. Raises UserError."""
    run = RunFolder(config)
    try:
        split = _split(config, config.test_annot, run, "test")
        session = build_session(config, run, make_accelerator(config))
        say_cut(session.loaded, split.queries.texts, config.max_txt_len, "test", run)
        _open(run, session)
        rows = {"zero-shot": _zero_shot(session, split, "test")}
        if config.resume:
            rows[Path(config.resume).name] = _evaluate_once(session, split, "test")
        else:
            run.say("no --resume FILE, so this is CLIP as it is")
        result = list(rows.values())[-1]
        run.say()
        say_table(rows, run)
        run.write_json("metrics.json", {name: row.as_dict() for name, row in rows.items()})
        write_similarity(config, result, run)
        return result
    finally:
        run.close()


class _Fit:
    """One run, step by step. It holds what the steps share."""

    def __init__(self, config: Config, run: RunFolder, on_epoch: OnEpoch | None) -> None:
        self.config, self.run, self.on_epoch = config, run, on_epoch
        self.best: EvaluationResult | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}  # only with no_output: else it lies in the run folder

    def run_all(self) -> FitResult:
        config, run = self.config, self.run
        validation = _split(config, config.val_annot, run, "validation")
        name = "test" if config.test_annot else "validation"
        split = _split(config, config.test_annot, run, name) if config.test_annot else validation
        self.session = session = build_session(config, run, make_accelerator(config))
        loader = train_loader(config, session.loaded, run)
        say_cut(session.loaded, split.queries.texts, config.max_txt_len, name, run)
        _open(run, session)
        selected_on_test = _same_captions(config)
        if selected_on_test:
            run.say(f"WARNING: every figure of this run is {SELECTED_ON_TEST}")
        zero_shot = _zero_shot(session, split, name)
        with closing(loader), closing(Evaluator(validation, config, session.loaded, "validation")) as evaluator:
            self._train(loader, evaluator)
        best = self._reload_best()
        final = _evaluate_once(session, split, name)
        result = FitResult(
            zero_shot=zero_shot,
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
        return result

    def _train(self, loader: TrainLoader, evaluator: Evaluator) -> None:
        session, run = self.session, self.run
        trainer = Trainer(self.config, session.model, session.method, loader, session.accelerator, run)

        def epoch_end(epoch: int, phase: Phase) -> None:
            self._validate(epoch + 1, trainer.step, phase, evaluator)

        try:
            trainer.train(epoch_end, lambda: self._method_changed(trainer.step))
        except Interrupted:
            self._save_interrupted(trainer.step)
            raise
        finally:
            if path := run.file("curves.png"):
                draw_curves(path, run.events)
            if loader.failed:
                run.say(
                    f"left out of their batches, because they could not be read any more:\n{listing(loader.failed)}"
                )
                run.note_missing(loader.failed)

    def _validate(self, epoch: int, step: int, phase: Phase, evaluator: Evaluator) -> None:
        result = _evaluate(self.session, evaluator)
        seconds = round(result.seconds, 3)
        self.run.record("validation", step, epoch=epoch, metrics=result.as_dict(), eval_seconds=seconds)
        # Strictly better: ties go to the earlier epoch.
        better = phase.may_be_best and (self.best is None or _score(result) > _score(self.best))
        mark = "  ← best so far" if better else ""
        self.run.say(f"epoch {epoch}/{self.config.num_epochs}  validation  {one_line(result.metrics)}{mark}")
        if better:
            self.best, self.best_epoch = result, epoch
            self.run.record("best", step, epoch=epoch)
            self._keep_best()
        if self.config.save_last:
            self._save("last.safetensors", self.session.model.state_dict(), epoch)
        if self.on_epoch is not None:
            self.on_epoch(epoch, result)

    def _keep_best(self) -> None:
        model, method = self.session.model, self.session.method
        if self.run.path is None:
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            return
        self._save("best.safetensors", model.state_dict(), self.best_epoch)
        # After --resume, what the method may change is not all that differs from the pretrained CLIP.
        if not self.config.resume:
            self._save("adapter.safetensors", method.trainable_state(model), self.best_epoch, content="adapter")

    def _reload_best(self) -> EvaluationResult:
        assert self.best is not None, "the last phase of every method may be best"
        path = self.run.file("best.safetensors")
        if path is None:
            self.session.model.load_state_dict(self.best_state)
        else:
            load_weights(path, self.session.model)
        return self.best

    def _method_changed(self, step: int) -> None:
        """Say what learns from here on, and keep the table of a method that chose by importance."""
        self.session.recount()
        self.run.say(f"from here on\n{self.session.parameters}")
        self.run.record("parameters", step, **self.session.parameters.as_dict())
        table, picture = self.run.file("ibs_parameters.csv"), self.run.file("ibs_parameters.png")
        rows = self.session.method.parameter_rows()
        if rows and table and picture:
            write_importance(table, picture, rows)

    def _save_interrupted(self, step: int) -> None:
        path = self.run.file("last.safetensors")
        if path is None:
            self.run.say(f"stopped after update {step}; nothing is kept (no_output)")
            return
        self._save(path.name, self.session.model.state_dict(), epoch=None)
        self.run.say(f"stopped after update {step}. To start a new run from these weights, add --resume {path}")

    def _save(self, name: str, tensors: Mapping[str, Tensor], epoch: int | None, content: str = "model") -> None:
        if path := self.run.file(name):
            config = self.config.model_dump_json()
            save_tensors(path, tensors, {"content": content, "epoch": str(epoch), "config": config})


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
    run.open()
    run.write_json("environment.json", environment(session.device))
    run.record("parameters", 0, **session.parameters.as_dict(), gflops=session.gflops.as_dict())


def _zero_shot(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult:
    """Measured with the pretrained towers, before anything learns, and printed first."""
    config, pretrained = zero_shot_config(session.config), session.pretrained()
    model = VideoRetriever(config, pretrained).to(session.accelerator.device)
    with (
        closing(Evaluator(split, config, pretrained, f"zero-shot on {name}")) as evaluator,
        session.accelerator.autocast(),
    ):
        result = evaluator(model)
    session.run.say(f"zero-shot on {name} ({config.num_frm} uniform frames, mean)  {one_line(result.metrics)}")
    session.run.record("zero_shot", 0, metrics=result.as_dict())
    return result


def _evaluate_once(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult:
    with closing(Evaluator(split, session.config, session.loaded, name)) as evaluator:
        return _evaluate(session, evaluator)


def _evaluate(session: Session, evaluator: Evaluator) -> EvaluationResult:
    with session.accelerator.autocast():
        return evaluator(session.model)


def _score(result: EvaluationResult) -> float:
    return result.metrics.t2v.recall(1)


def _same_captions(config: Config) -> bool:
    """Whether val_annot and test_annot are one: the same file, or the same content under two names."""
    if not config.val_annot or not config.test_annot:
        return False
    one, other = Path(config.val_annot), Path(config.test_annot)
    return one.resolve() == other.resolve() or load_annotations(one) == load_annotations(other)
