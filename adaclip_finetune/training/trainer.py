"""`fit`: one run from settings to figures; `evaluate_only`: a checkpoint's, or CLIP's own.

The order of a run is always the same: build, read the data, say what learns, measure zero-shot, train and keep the best
epoch by validation, reload it, evaluate the test annotation once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import EvaluationSplit, evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.evaluate import EvaluationResult, Evaluator, save_similarity
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.peft.ibs import ImportanceSelection
from adaclip_finetune.peft.report import TrainableReport
from adaclip_finetune.report import draw_curves, draw_frame_usage, one_line, results_table, write_importance
from adaclip_finetune.training.build import Session, build_session, say_cut, train_loader
from adaclip_finetune.training.checkpoint import load_weights, save_tensors
from adaclip_finetune.training.loop import Interrupted, Trainer
from adaclip_finetune.training.run_folder import RunFolder, environment

OnEpoch = Callable[[int, EvaluationResult], None]
SELECTED_ON_TEST = "selected on test (val_annot and test_annot hold the same captions)"


@dataclass(frozen=True, eq=False)
class FitResult:
    """What a run found. `final` is on test_annot, on val_annot where no test was given; `folder` is None with no_output."""

    zero_shot: EvaluationResult
    final: EvaluationResult
    best_validation: EvaluationResult
    best_epoch: int
    parameters: TrainableReport
    folder: Path | None


def fit(config: Config, on_epoch: OnEpoch | None = None) -> FitResult:
    """Finetune as `config` says. `on_epoch(epoch, validation)`, epochs from 1, may end the run by raising (a pruned trial).

    Raises UserError for what the user can mend, Interrupted after Ctrl-C, when what was learned is saved.
    """
    run = RunFolder(config)
    try:
        return _Fit(config, run, on_epoch).run_all()
    finally:
        run.close()


def evaluate_only(config: Config) -> EvaluationResult:
    """Figures of `resume` on test_annot; of CLIP itself, zero-shot, where no checkpoint is given."""
    run = RunFolder(config)
    try:
        split = _split(config, config.test_annot, run, "test")
        session = build_session(config, run)
        _open(run, session)
        zero_shot = _zero_shot(session, split, "test")
        rows = {"zero-shot": zero_shot}
        if config.resume:
            rows[Path(config.resume).name] = _evaluate(session, Evaluator(split, config, session.loaded, "test"))
        else:
            run.say("No --resume FILE: the figures are those of CLIP as it is, mean over uniform frames.")
        last = list(rows.values())[-1]
        run.say(f"\n{results_table({name: result.metrics for name, result in rows.items()})}\n{_gallery(last)}")
        run.write_json("metrics.json", {name: result.as_dict() for name, result in rows.items()})
        _save_similarity(config, last, run)
        return last
    finally:
        run.close()


class _Fit:
    """One run, step by step. It holds what the steps share."""

    def __init__(self, config: Config, run: RunFolder, on_epoch: OnEpoch | None) -> None:
        self.config, self.run, self.on_epoch = config, run, on_epoch
        self.selected_on_test = _same_captions(config.val_annot, config.test_annot)
        self.best: EvaluationResult | None = None
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}

    def run_all(self) -> FitResult:
        config, run = self.config, self.run
        validation = _split(config, config.val_annot, run, "validation")
        final = _split(config, config.test_annot, run, "test") if config.test_annot else validation
        self.final_name = "test" if config.test_annot else "validation"
        self.session = build_session(config, run)
        loader = train_loader(config, self.session.loaded, run)
        say_cut(self.session.loaded, final.queries.texts, config.max_txt_len, self.final_name, run)
        _open(run, self.session)
        if self.selected_on_test:
            run.say(f"WARNING: {SELECTED_ON_TEST}: every figure of this run is selected on test")
        zero_shot = _zero_shot(self.session, final, self.final_name)
        self._train(loader, Evaluator(validation, config, self.session.loaded, "validation"))
        return self._finish(zero_shot, Evaluator(final, config, self.session.loaded, self.final_name))

    def _train(self, loader: TrainLoader, evaluator: Evaluator) -> None:
        session = self.session
        trainer = Trainer(self.config, session.model, session.method, loader, session.accelerator, self.run)

        def epoch_end(epoch: int, phase: Phase) -> None:
            self._validate(epoch, trainer.step, phase, evaluator)

        try:
            trainer.train(epoch_end, self._method_changed)
        except Interrupted:
            self._save_interrupted(trainer.step)
            raise
        finally:
            self._draw_curves()
            if loader.failed:
                self.run.say(f"Left out of their batches because they could not be read:\n{listing(loader.failed)}")
                self.run.note_missing(loader.failed)

    def _validate(self, epoch: int, step: int, phase: Phase, evaluator: Evaluator) -> None:
        result = _evaluate(self.session, evaluator)
        self.run.record("validation", step, epoch=epoch + 1, metrics=result.as_dict(), eval_seconds=round(result.seconds, 3))
        # Ties go to the earlier epoch.
        better = phase.may_be_best and (self.best is None or _score(result) > _score(self.best))
        mark = "  ← best so far" if better else ""
        self.run.say(f"epoch {epoch + 1}/{self.config.num_epochs}  validation  {one_line(result.metrics)}{mark}")
        if better:
            self.best, self.best_epoch = result, epoch + 1
            self.run.record("best", step, epoch=epoch + 1)
            self._keep_best(epoch + 1)
        if self.config.save_last:
            self._save("last.safetensors", self.session.model.state_dict(), epoch + 1)
        if self.on_epoch is not None:
            self.on_epoch(epoch + 1, result)

    def _keep_best(self, epoch: int) -> None:
        model = self.session.model
        if self.run.file("best.safetensors") is None:
            self.best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            return
        self._save("best.safetensors", model.state_dict(), epoch)
        # After --resume, what the method may change is no longer all that differs from the pretrained CLIP.
        if not self.config.resume:
            self._save("adapter.safetensors", self.session.method.trainable_state(model), epoch, content="adapter")

    def _finish(self, zero_shot: EvaluationResult, evaluator: Evaluator) -> FitResult:
        assert self.best is not None, "the last phase of every method may be best"
        self._reload_best()
        final = _evaluate(self.session, evaluator)
        self._write_results(zero_shot, final)
        self._say_results(zero_shot, final)
        _save_similarity(self.config, final, self.run)
        return FitResult(zero_shot, final, self.best, self.best_epoch, self.session.parameters, self.run.path)

    def _reload_best(self) -> None:
        path = self.run.file("best.safetensors")
        if path is None:
            self.session.model.load_state_dict(self.best_state)
        else:
            load_weights(path, self.session.model)

    def _write_results(self, zero_shot: EvaluationResult, final: EvaluationResult) -> None:
        assert self.best is not None
        results = {
            "evaluated_on": self.final_name,
            "selected_on": "test" if self.selected_on_test else "validation",
            "best_epoch": self.best_epoch,
            "zero_shot": zero_shot.as_dict(),
            "finetuned": final.as_dict(),
            "best_validation": self.best.as_dict(),
            "parameters": self.session.parameters.as_dict(),
            "gflops": self.session.gflops.as_dict(),
        }
        self.run.write_json("metrics.json", results)
        if (path := self.run.file("frame_usage.png")) and final.frame_usage is not None:
            draw_frame_usage(path, final.frame_usage, len(final.queries.video_ids), self.config.top_k)

    def _say_results(self, zero_shot: EvaluationResult, final: EvaluationResult) -> None:
        say, clip, whole = self.run.say, self.session.parameters.clip, self.session.parameters.all
        table = results_table({"zero-shot": zero_shot.metrics, "finetuned": final.metrics})
        rule = SELECTED_ON_TEST.upper() if self.selected_on_test else ""
        say(f"\n{self.final_name}, best epoch {self.best_epoch} of {self.config.num_epochs}   {rule}")
        say(table)
        say(_gallery(final))
        say(f"learned: {clip.trainable:,} of {clip.total:,} parameters of CLIP ({clip.percent:.3f} %), "
            f"{whole.trainable:,} of {whole.total:,} in all ({whole.percent:.3f} %)")  # fmt: skip
        if _score(final) <= _score(zero_shot):
            say("This finetune does not beat zero-shot: try more epochs, another learning_rate or coef_lr, or more data.")
        if self.run.path is not None:
            say(f"\nrun folder: {self.run.path}   (config.json, metrics.json, curves.png, frame_usage.png, best.safetensors …)")
            say("next: evaluate it on other captions with\n  python train.py "
                f"--config {self.run.path}/config.json --do_inference --resume {self.run.path}/best.safetensors --test_annot FILE")  # fmt: skip

    def _method_changed(self) -> None:
        """IBS has selected: say what, and keep its table."""
        method = self.session.method
        self.session.recount()
        self.run.say(f"from here on:\n{self.session.parameters}")
        table, picture = self.run.file("ibs_parameters.csv"), self.run.file("ibs_parameters.png")
        if isinstance(method, ImportanceSelection) and table and picture:
            write_importance(table, picture, method.parameter_rows())

    def _save_interrupted(self, step: int) -> None:
        path = self.run.file("last.safetensors")
        if path is None:
            self.run.say(f"Stopped after update {step}; nothing is kept (no_output).")
            return
        self._save(path.name, self.session.model.state_dict(), None)
        self.run.say(f"Stopped after update {step}. To start a new run from these weights, add  --resume {path}")

    def _save(self, name: str, tensors: Mapping[str, Tensor], epoch: int | None, content: str = "model") -> None:
        if (path := self.run.file(name)) is not None:
            config = self.config.model_dump_json()
            save_tensors(path, tensors, {"content": content, "epoch": str(epoch), "config": config})

    def _draw_curves(self) -> None:
        if path := self.run.file("curves.png"):
            draw_curves(path, self.run.events)


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


def _zero_shot(session: Session, split: EvaluationSplit, name: str) -> EvaluationResult:
    """Measured with the pretrained towers, before anything learns, and printed first."""
    config, pretrained = zero_shot_config(session.config), session.pretrained()
    model = VideoRetriever(config, pretrained).to(session.accelerator.device)
    evaluator = Evaluator(split, config, pretrained, f"zero-shot on {name}")
    with session.accelerator.autocast():
        result = evaluator(model)
    session.run.say(f"zero-shot on {name} ({config.num_frm} uniform frames, mean)  {one_line(result.metrics)}")
    session.run.record("zero_shot", 0, metrics=result.as_dict())
    return result


def _evaluate(session: Session, evaluator: Evaluator) -> EvaluationResult:
    with session.accelerator.autocast():
        return evaluator(session.model)


def _save_similarity(config: Config, result: EvaluationResult, run: RunFolder) -> None:
    if config.save_similarity:
        save_similarity(Path(config.save_similarity), result)
        run.say(f"similarity (rows queries, columns videos): {config.save_similarity}, ids beside it in JSON")


def _score(result: EvaluationResult) -> float:
    return result.metrics.t2v.recall(1)


def _gallery(result: EvaluationResult) -> str:
    videos = len(result.queries.video_ids)
    missing = f", {result.missing} of {result.num_listed} videos MISSING" if result.missing else ""
    return f"{len(result.queries.texts)} captions, {videos} videos{missing}; ties count against"


def _same_captions(one: str | None, other: str | None) -> bool:
    """Whether two annotations are one: the same file, or a copy of it."""
    if not one or not other:
        return one == other or not other
    return Path(one).resolve() == Path(other).resolve() or _digest(one) == _digest(other)


def _digest(path: str) -> str:
    try:
        content: Any = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
