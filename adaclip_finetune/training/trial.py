"""`run_trial`: one of many runs, which are compared on validation alone.

Neither zero-shot nor test is measured, nothing is kept to go on from, and the weights of the best epoch stay in memory
for the caller to keep or to drop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.evaluation.evaluate import Evaluator, Figures
from adaclip_finetune.peft.base import Phase
from adaclip_finetune.report import one_line
from adaclip_finetune.training.build import Session, build_session, note_failed, train_loader
from adaclip_finetune.training.checkpoint import save_tensors
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.loop import Hooks, Trainer
from adaclip_finetune.training.measure import is_better, measure, read_split, zero_shot
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import StopSignals

OnEpoch = Callable[[int, Figures], None]


@dataclass
class TrialResult:
    """What a trial found at its best epoch, and what it took."""

    best: Figures
    best_epoch: int
    config: Config  # as it was in the end: auto_batch_size settles batch_size
    weights: dict[str, Tensor] = field(repr=False)

    def save(self, path: Path) -> None:
        """The weights of the best epoch, as a run's best.safetensors holds them."""
        about = {"content": "model", "epoch": str(self.best_epoch), "config": self.config.model_dump_json()}
        save_tensors(path, self.weights, about)


def run_trial(config: Config, run: RunFolder, on_epoch: OnEpoch) -> TrialResult:
    """Train, and validate each epoch. `on_epoch(epoch, validation)`, of each epoch (from 1) that may be the best, may
    end the trial by raising.

    Raises UserError for what the user can mend, Interrupted after Ctrl-C or SIGTERM. `run` is closed in the end.
    """
    accelerator = make_accelerator(config)
    with StopSignals(saving=False) as signals, closing(run):
        validation = read_split(config, config.val_annot, run, "validation")
        session = build_session(config, run, accelerator)
        _forget_peak_memory(accelerator.device)
        if session.config.auto_batch_size:
            session.fit_batches()
        loader = train_loader(session.config, session.loaded, run)
        with closing(loader), closing(Evaluator(validation, session.config, session.loaded, "validation")) as evaluator:
            trainer = Trainer(session.config, session.model, session.method, loader, accelerator, run)
            session.open_folder()
            trial = _Trial(session, evaluator, trainer, on_epoch)
            trainer.train(Hooks(trial.epoch_end, session.recount, save=lambda: None), signals)
        return trial.result()


def validation_zero_shot(config: Config, run: RunFolder) -> Figures | None:
    """CLIP as it is, on val_annot; None, and said so, where it is not at hand. Raises as `run_trial` does."""
    accelerator = make_accelerator(config)
    with StopSignals(saving=False):
        validation = read_split(config, config.val_annot, run, "validation")
        measured = zero_shot(build_session(config, run, accelerator), validation, "validation")
    return measured.figures if measured else None


class _Trial:
    """The best epoch so far."""

    def __init__(self, session: Session, evaluator: Evaluator, trainer: Trainer, on_epoch: OnEpoch) -> None:
        self.session, self.evaluator, self.trainer, self.on_epoch = session, evaluator, trainer, on_epoch
        self.best: Figures | None = None
        self.best_epoch = 0
        self.weights: dict[str, Tensor] = {}

    def epoch_end(self, epoch: int, phase: Phase) -> None:
        session, number = self.session, epoch + 1
        note_failed(self.trainer.data, session.run)
        found = measure(session, self.evaluator, session.model).figures
        session.run.record("validation", self.trainer.position.step, epoch=number, metrics=found.as_dict())
        session.run.say(f"epoch {number}/{session.config.num_epochs}  validation  {one_line(found.metrics)}")
        if not phase.may_be_best:  # what IBS learns before it selects must not be taken for IBS
            return
        if is_better(found, self.best):
            self.best, self.best_epoch = found, number
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in session.model.state_dict().items()}
        self.on_epoch(number, found)

    def result(self) -> TrialResult:
        assert self.best is not None, "the last phase of every method may be best"
        found = TrialResult(
            best=self.best,
            best_epoch=self.best_epoch,
            config=self.session.config,
            weights=self.weights,
        )
        about: dict[str, Any] = {"best_epoch": found.best_epoch, "best_validation": found.best.as_dict()}
        self.session.run.write_json("metrics.json", about | {"parameters": self.session.parameters.as_dict()})
        return found


def _forget_peak_memory(device: torch.device) -> None:
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)
