"""Trackers: where the numbers of metrics.jsonl go, too (`tracker`).

TensorBoard's files are written here. Weights & Biases, MLflow and Trackio are reached through accelerate; their
packages are optional (`pip install adaclip-finetune[wandb]`). All numbers pass through `Trackers.log`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch.utils.tensorboard import SummaryWriter

from adaclip_finetune.config import Config
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

_IDS = "trackers.json"


class Tracked(NamedTuple):
    """A run as trackers see it: its names, its settings as a flat table, and the id that a tracker gave it earlier."""

    folder: Path
    name: str
    group: str | None
    settings: dict[str, Any]
    earlier: str | None


class Tracker(Protocol):
    """Who gets the numbers of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of an update."""

    def end(self, whole: bool) -> None:
        """Close the run. `whole` says whether it reached its end."""


class Service(NamedTuple):
    """What differs between accelerate's trackers: the arguments that start a run, its id, and how it ends."""

    arguments: Callable[[Tracked], dict[str, Any]]
    id_of: Callable[[Any], str]
    end: Callable[[Any, bool], None]


def _wandb(run: Tracked) -> dict[str, Any]:
    return {"name": run.name, "group": run.group, "dir": str(run.folder), "id": run.earlier, "resume": "allow"}


def _mlflow(run: Tracked) -> dict[str, Any]:
    return {"run_name": run.name, "run_id": run.earlier}


def _trackio(run: Tracked) -> dict[str, Any]:
    how = "never" if run.earlier is None else "allow"
    return {"name": run.earlier or run.name, "group": run.group, "resume": how, "embed": False, "config": run.settings}


def _end_mlflow(_run: Any, whole: bool) -> None:
    import_module("mlflow").end_run("FINISHED" if whole else "KILLED")


SERVICES = {
    "wandb": Service(_wandb, lambda run: str(run.id), lambda run, whole: run.finish(exit_code=0 if whole else 1)),
    "mlflow": Service(_mlflow, lambda run: str(run.info.run_id), _end_mlflow),
    "trackio": Service(_trackio, lambda run: str(run.name), lambda run, _whole: run.finish()),
}


class TensorBoard:
    """The TensorBoard files of a run."""

    def __init__(self, folder: Path | str, step: int) -> None:
        """Write to `folder`. What an earlier process wrote there about updates after `step` is hidden."""
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        with suppress(OSError):  # a full disk
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def end(self, whole: bool) -> None:
        with suppress(OSError):
            self._writer.close()


class Accelerated:
    """A run in one of accelerate's trackers."""

    def __init__(self, name: str, project: str, run: Tracked) -> None:
        """Start the run, or continue the earlier one, in a project of the tracker."""
        self._service = SERVICES[name]
        arguments = self._service.arguments(run)
        self._tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
        self._tracker.start()
        if run.earlier is None and "config" not in arguments:
            self._tracker.store_init_configuration(run.settings)

    @property
    def id(self) -> str:
        """The id by which the tracker knows the run."""
        return self._service.id_of(self._tracker.tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log({_plain(name): value for name, value in values.items()}, step=step)

    def end(self, whole: bool) -> None:
        self._service.end(self._tracker.tracker, whole)


class Trackers:
    """The trackers of a run, which no failure of a tracker ends."""

    def __init__(self, config: Config, folder: Path, step: int, trial: bool, say: Callable[[str], None]) -> None:
        """Start the trackers that `config` names, for the run in `folder`, which goes on after update `step`.

        A run that was tracked before is continued. The data set is the project. A `trial` of tuning, or a cell of a
        comparison, is named by the last three parts of its path, as in tiny/20261121-study/trial-0007, and has no
        TensorBoard files. Raise UserError if a tracker does not start. `say` prints that one failed later.
        """
        self._say = say
        self._running: dict[str, Tracker] = {}
        self._failed = set[str]()
        path = folder / _IDS
        ids: dict[str, str] = read_json(path) if path.exists() else {}
        group = "/".join(folder.parts[-3:-1]) if trial else None
        name = f"{group}/{folder.name}" if trial else folder.name
        # The storage of a study may hold a password.
        settings = dict(_flat(config.model_dump(mode="json", exclude={"optuna_cfg"})))
        for tracker in dict.fromkeys(config.tracker):
            try:
                if tracker in SERVICES:
                    run = Tracked(folder, name, group, settings, ids.get(tracker))
                    started = self._running[tracker] = Accelerated(tracker, config.dataset, run)
                    ids[tracker] = started.id
                elif not trial:
                    self._running[tracker] = TensorBoard(config.tensorboard_dir or folder / "tensorboard", step)
            except Exception as error:  # each tracker has errors of its own
                self.end(whole=False)
                raise UserError(f"tracker {tracker} does not start: {error}") from error
        if ids:
            write_durably(path, (json.dumps(ids) + "\n").encode())

    def log(self, values: Mapping[str, float], step: int, again: bool = False) -> None:
        """Give the numbers of an update to all trackers. One that fails gets no more, which is said once.

        Numbers that they got `again`, since the run was resumed, are given only to those that dropped them.
        """
        for name in [name for name in self._running if name not in self._failed and not (again and name in SERVICES)]:
            try:
                self._running[name].log(values, step)
            except Exception as error:  # a server that is gone ends no run
                self._failed.add(name)
                self._say(f"WARNING: tracker {name} failed, so the run goes on without it: {error}")

    def end(self, whole: bool) -> None:
        """Close all trackers. `whole` says whether the run reached its end."""
        for name, tracker in self._running.items():
            try:
                tracker.end(whole)
            except Exception as error:
                self._say(f"WARNING: tracker {name} did not close: {error}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted name → value of nested settings. Lists become text, since not every tracker takes them."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, json.dumps(value) if isinstance(value, list) else value))
    return rows


def _plain(name: str) -> str:
    """Return a name that every tracker accepts: R@1 becomes R_at_1."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))
