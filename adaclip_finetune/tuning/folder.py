"""What a study leaves on the disk beside its storage, and what it says.

output/<dataset>/<time>-<study>/
    search.log  study.csv  best_config.json  *.png
    trial-0000/  config.json  train.log  metrics.jsonl  metrics.json  [best.safetensors: in the best trial's alone]
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from adaclip_finetune.config import Config
from adaclip_finetune.config.schema import show
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning.ledger import DEATHS, given_up, place
from adaclip_finetune.tuning.space import with_values
from adaclip_finetune.tuning.study import FOLDER

BEST_CONFIG = "best_config.json"
_ATTRIBUTES = ("best_epoch", "seconds", "peak_memory_mib", "trainable_parameters", "reason", "folder")


class StudyFolder:
    """`path` is None with no_output. Several processes may write here: every file is whole, and the last one stands."""

    def __init__(self, config: Config, study: optuna.Study) -> None:
        self.config = config
        known = study.user_attrs.get(FOLDER)
        self.path = None if config.no_output or known is None else Path(known)
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.path}, where the study writes, cannot be made: {error.strerror}") from error

    def of_trial(self, number: int) -> Path | None:
        """The folder of one trial."""
        return None if self.path is None else self.path / f"trial-{number:04d}"

    def say(self, text: str) -> None:
        """On the screen and in search.log."""
        tqdm.write(text)
        if self.path is None:
            return
        try:
            with (self.path / "search.log").open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error}") from error

    def say_begin(self, study: optuna.Study, number: int, values: Mapping[str, Any], wanted: int) -> None:
        """A trial and what is tried in it."""
        here = place(study.get_trials(deepcopy=False), number) + 1
        words = ", ".join(f"{name} {short(value)}" for name, value in values.items())
        self.say(f"trial {number} ({here} of {wanted}): {words}")

    def write(self, study: optuna.Study) -> None:
        """study.csv and best_config.json as they are now; weights stay in the best trial's folder alone."""
        if self.path is None:
            return
        trials = study.get_trials(deepcopy=False)
        try:
            write_durably(self.path / "study.csv", _table(trials).encode(), shared=True)
            if best := best_trial(study):
                found = with_values(self.config, best.params).model_dump(mode="json", exclude_unset=True)
                write_durably(self.path / BEST_CONFIG, (json.dumps(found, indent=4) + "\n").encode(), shared=True)
        except OSError as error:
            raise UserError(f"{self.path} could not be written: {error}") from error
        for trial in trials:
            if trial.state.is_finished() and (best is None or trial.number != best.number):
                with suppress(OSError):
                    (self.path / f"trial-{trial.number:04d}" / "best.safetensors").unlink(missing_ok=True)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """None before any has completed. The earliest of equals."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(done, key=lambda trial: order(study, trial.value or 0.0, trial.number), default=None)


def order(study: optuna.Study, value: float, number: int) -> tuple[float, int]:
    """By which trials stand in line, the best first."""
    return (-value if study.direction == optuna.study.StudyDirection.MAXIMIZE else value), number


def _table(trials: list[FrozenTrial]) -> str:
    """A row a trial, surplus ones left out."""
    parameters = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "value", *parameters, *_ATTRIBUTES, "tries_again"])
    for trial in trials:
        if "surplus" not in trial.user_attrs:
            again = trial.system_attrs.get("retry_history", [])
            rows.writerow(
                [trial.number, trial.state.name.lower(), "" if trial.value is None else trial.value]
                + [trial.params.get(name, "") for name in parameters]
                + [_attribute(trial, name, trials) for name in _ATTRIBUTES]
                + [again[-1] if again else ""]
            )
    return text.getvalue()


def _attribute(trial: FrozenTrial, name: str, trials: list[FrozenTrial]) -> Any:
    if name == "reason" and given_up(trial, trials):
        return f"its process died, as those of {DEATHS - 1} others that tried this point"
    return trial.user_attrs.get(name, "")


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else show(value)
