"""Studies for tests: their settings, and a training of milliseconds that takes the place of the real one."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import forked
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import Interrupted
from adaclip_finetune.training.trainer import TrialResult
from adaclip_finetune.tuning import run, study


@dataclass
class QuickFigures:
    """T2V R@1 is best at a learning rate of 1e-3, and rises with the epochs."""

    learning_rate: float
    epoch: int = 0

    def as_dict(self) -> dict[str, Any]:
        distance = abs(math.log10(self.learning_rate) + 3)
        return {"t2v": {"R@1": 50 + 10 * self.epoch - 10 * distance, "MeanR": 9.0 - self.epoch + distance}}

    as_state = as_dict


def quick_trial(config: Config, folder: RunFolder, on_epoch: Callable[[int, Any], None]) -> TrialResult:
    """Stand in for `run_trial`."""
    folder.open(config, "cpu")
    folder.record("train", 1, memory_mib=1.0)
    for epoch in range(1, config.num_epochs + 1):
        on_epoch(epoch, QuickFigures(config.learning_rate, epoch))
    best = QuickFigures(config.learning_rate, config.num_epochs)
    return TrialResult(best, config.num_epochs, config, weights={}, about={})


def settings(project: dict[str, Any], folder: Path, optuna_cfg: dict[str, Any] | None = None, **others: Any) -> Config:
    """Settings of a study of the learning rate in the SQLite file o.db of the folder."""
    space = {"learning_rate": {"range": [1e-5, 1e-2], "log": True}}
    cfg = {"n_trials": 3, "storage": f"sqlite:///{folder}/o.db", "opt_params": space, **(optuna_cfg or {})}
    return load_config(None, {**project, "output_dir": str(folder / "out"), **others, "optuna_cfg": cfg})


def storage_of(config: Config) -> Any:
    """Return the storage of a config as another process would open it."""
    assert config.optuna_cfg is not None
    url = config.optuna_cfg.storage
    return url if "://" in url else JournalStorage(JournalFileBackend(url))


def study_of(config: Config) -> optuna.Study:
    """Return the one study in the storage of a config."""
    return optuna.load_study(study_name=None, storage=storage_of(config))


def states(config: Config) -> list[str]:
    """Return the names of the states of all trials."""
    return [trial.state.name for trial in study_of(config).trials]


def start_worker(config: Config, log: Path, began: Event, may_end: Event) -> Any:
    """Start a process that tunes with quick trials and quick heartbeats. Each trial sets `began` and waits for
    `may_end`."""
    process = forked.context().Process(
        target=_work, args=(config.model_dump(exclude_unset=True), log, began, may_end), daemon=True
    )
    process.start()
    return process


def use_quick_trials(setattr_: Callable[[Any, str, Any], None]) -> None:
    """Put the quick training in the place of the real one, by the setattr of a monkeypatch or the builtin one."""
    setattr_(run, "run_trial", quick_trial)
    setattr_(study, "validation_zero_shot", lambda *_: QuickFigures(1e-6))
    setattr_(run, "draw", lambda *_: None)
    setattr_(run, "clear_device_cache", lambda **_: None)


def _work(given: dict[str, Any], log: Path, began: Event, may_end: Event) -> None:
    forked.begin(log)
    use_quick_trials(setattr)

    def held_trial(*arguments: Any) -> TrialResult:
        began.set()
        may_end.wait()
        return quick_trial(*arguments)

    run.run_trial = held_trial  # type: ignore[attr-defined]
    study.HEARTBEAT_S, study.SILENCE_S = 1, 2
    try:
        run.tune(load_config(None, given))
    except UserError as error:
        sys.exit(str(error))
    except Interrupted as stop:
        sys.exit(stop.exit_code)
