"""What a study leaves behind and what it prints.

output/<dataset>/<time>-<study>/
    study.csv  best_config.json  *.png
    trial-0000/  config.json  train.log  metrics.jsonl  metrics.json  [best.safetensors, of the best trial alone]
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import FrozenTrial, TrialState

from adaclip_finetune.config import Config
from adaclip_finetune.config.schema import show
from adaclip_finetune.durable import write_durably
from adaclip_finetune.training.trainer import chosen_on_test
from adaclip_finetune.tuning.space import with_values
from adaclip_finetune.tuning.study import FOLDER, ZERO_SHOT

_ATTRIBUTES = ("best_epoch", "seconds", "peak_memory_mib", "trainable_parameters", "reason", "folder")
_PICTURES = {
    "history": "plot_optimization_history",
    "intermediate_values": "plot_intermediate_values",
    "importances": "plot_param_importances",
    "slices": "plot_slice",
    "parallel_coordinates": "plot_parallel_coordinate",
}


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the best completed trial, the earliest of equals, or None before any has completed."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best: FrozenTrial | None = _better(study)(done, key=lambda trial: trial.value, default=None)
    return best


class StudyFolder:
    """The folder of a study, into which several processes may write, and the lines that are printed.

    `path` is None with no_output, `before` the metric of zero-shot CLIP if it was measured.
    """

    def __init__(self, config: Config, study: optuna.Study) -> None:
        self.config, self.study = config, study
        self.before: float | None = study.user_attrs.get(ZERO_SHOT)
        known = study.user_attrs.get(FOLDER)
        self.path = None if config.no_output or known is None else Path(known)

    def of_trial(self, number: int) -> Path | None:
        """Return the folder of one trial."""
        return None if self.path is None else self.path / f"trial-{number:04d}"

    def say_start(self, lines: Sequence[str]) -> None:
        """Print `lines`, and what is known before the first trial."""
        print(*lines, sep="\n")
        if self.path is not None:
            print(f"files: {self.path}")
        if chosen_on_test(self.config):
            print("WARNING: every metric of this study is selected on test")
        if self.before is not None:
            print(f"zero-shot on validation: {self.config.tuned_figure} {self.before:.1f}")

    def say_begin(self, trial: optuna.Trial) -> None:
        """Print the values of a trial that begins."""
        words = ", ".join(f"{name} {_short(chosen)}" for name, chosen in trial.params.items())
        print(f"trial {trial.number}: {words}", flush=True)

    def say_end(self, trial: FrozenTrial) -> None:
        """Print how a trial ended."""
        outcome = str(trial.user_attrs.get("reason", "")).partition("\n")[0]
        if trial.state == TrialState.FAIL:
            outcome = f"failed: {outcome}"
        elif trial.state == TrialState.COMPLETE:
            outcome = f"{trial.value:.1f} at epoch {trial.user_attrs['best_epoch']}, {trial.user_attrs['seconds']:g} s"
        best = best_trial(self.study)
        known = f"   (best so far: {best.value:.1f}, trial {best.number})" if best else ""
        print(f"  {outcome}{known}", flush=True)

    def say_summary(self) -> None:
        """Print what the study found."""
        states = Counter(trial.state for trial in self.study.get_trials(deepcopy=False))
        counts = [states[state] for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)]
        print(f"{sum(counts)} trials: {counts[0]} completed, {counts[1]} pruned, {counts[2]} failed")
        best, before = best_trial(self.study), self.before
        if best is None:
            print("no trial completed, so there are no best values")
            return
        on = "selected on test" if chosen_on_test(self.config) else "on validation"
        compared = "" if before is None else f" (zero-shot {before:.1f})"
        print(f"best: trial {best.number}, {self.config.tuned_figure} {best.value:.1f} {on}{compared}")
        for name, chosen in best.params.items():
            print(f"  {name} {_short(chosen)}")
        if before is not None and _better(self.study)(before, best.value) == before:
            print("No trial is better than zero-shot: widen the ranges, train for more epochs, or use more data.")
        if self.path is not None:
            print(f"study: {self.path} (study.csv, best_config.json, pictures)")
            print(f"next: python train.py --config {self.path / 'best_config.json'}")

    def write(self) -> None:
        """Write study.csv and best_config.json, and delete the weights of all but the best trial."""
        if self.path is None:
            return
        best = best_trial(self.study)
        write_durably(self.path / "study.csv", self._table().encode(), shared=True)
        if best is not None:
            found = with_values(self.config, best.params).model_dump(mode="json", exclude_unset=True)
            content = json.dumps(found, indent=4) + "\n"
            write_durably(self.path / "best_config.json", content.encode(), shared=True)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and (best is None or trial.number != best.number):
                (self.path / f"trial-{trial.number:04d}" / "best.safetensors").unlink(missing_ok=True)

    def _table(self) -> str:
        trials = self.study.get_trials(deepcopy=False)
        names = sorted({name for trial in trials for name in trial.params})
        text = io.StringIO()
        columns = ["trial", "state", "value", *names, *_ATTRIBUTES]
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for trial in trials:
            row = {"trial": trial.number, "state": trial.state.name.lower(), "value": trial.value}
            if trial.state == TrialState.FAIL:
                row["reason"] = "its process died"
            table.writerow({**row, **trial.params, **trial.user_attrs})
        return text.getvalue()


def draw(study: optuna.Study, folder: Path, metric: str) -> None:
    """Draw the study by Optuna's own plots, which need two completed trials of different values."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.value for trial in trials}) < 2:
        return
    for name, function in _PICTURES.items():
        # Optuna sets a style for the whole process, which other pictures of this process must not get.
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "intermediate_values":
                plots.plot_intermediate_values(study).set(xlabel="Epoch", ylabel=f"{metric} on validation")
            else:
                getattr(plots, function)(study, target_name=f"{metric} on validation")
            figure = pyplot.gcf()
            figure.set_size_inches(max(8.0, 2.6 * len(figure.axes)), 5.0)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)


def _better(study: optuna.Study) -> Any:
    """Return the function that chooses the better one of several values: `max` or `min`."""
    return max if study.direction == optuna.study.StudyDirection.MAXIMIZE else min


def _short(chosen: Any) -> str:
    return f"{chosen:.4g}" if isinstance(chosen, float) else show(chosen)
