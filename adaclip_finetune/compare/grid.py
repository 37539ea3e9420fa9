"""`adaclip compare`: train a grid of methods under one recipe, cell by cell, in any number of worker processes.

A cell is one method with one value of the searched setting and one seed. All values are tried with seed 0; the one that
is best on validation is then trained with the other seeds. A method with `after` goes on from the weights that another
one ends with, each seed from that of its number. A cell is an ordinary run, in a process and a folder of its own
(`grid_cell.py`), and is finished when its result.json exists. These files, and the tags of the test annotation, are all
that the report reads (`grid_report.py`).

<output_dir>/compare.md  compare.csv  compare.json  compare.png
<output_dir>/cells/<method>/<setting>=<value>/seed<k>/    a run folder with result.json
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from adaclip_finetune.compare.grid_cell import Cell, has_snapshot, in_process, train_in_process
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.base import PathText, Settings, setting
from adaclip_finetune.config.layers import load, merged, read_object, validated
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.roles import deciding_values, names_with
from adaclip_finetune.config.schema import show
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.lock import Lock
from adaclip_finetune.training.device import launched_processes
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.signals import StopSignals
from adaclip_finetune.training.trainer import chosen_on_test

FAILURES = 5
"""So many failed cells in a row end the command."""

# What makes the methods comparable: the same data and the same number of updates of the same number of videos.
_DATA = names_with("data") | {"data_subset", "primary"}
_UPDATES = {"num_epochs", "batch_size", "gradient_accumulation_steps"}
# What a cell cannot have, and what its folder makes pointless.
_UNUSED = ("optuna_cfg", "do_inference", "auto_batch_size")
_SINGLE = {"no_output": False, "tensorboard_dir": None, "save_last": False, "save_similarity": None}

Budget = Literal["train_annot", "data_subset", "num_epochs", "batch_size", "gradient_accumulation_steps"]


class GridSettings(Settings):
    """The config file of `adaclip compare`."""

    recipe: dict[str, Any] | PathText = setting(
        ..., "settings that all methods share", allowed="an object of settings, or the path of a config file"
    )
    methods: dict[str, dict[str, Any]] = setting(
        ...,
        'name of each method -> the settings in which it differs from the recipe; "after" names a method above it, '
        "from whose weights it goes on",
        min_length=1,
    )
    seeds: int = setting(5, "seeds of each method: 0, 1, …", ge=1, le=1000)
    search: dict[str, list[Any]] = setting(
        {}, "setting -> the values that are tried, with seed 0, for each method that does not set it", max_length=1
    )
    reference: str | None = setting(
        None, "method that the others are compared with; null: the first that finetunes all of CLIP"
    )
    vary: Annotated[tuple[Budget, ...], Field(strict=False)] = setting(
        (), "settings of data and budget in which the methods differ on purpose; the report names them"
    )
    output_dir: PathText = setting(..., "folder of the cells and of the report", unit="folder")
    keep_weights: bool = setting(False, "keep best.safetensors and adapter.safetensors of each cell")

    @field_validator("search")
    @classmethod
    def _has_values(cls, search: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in search.items():
            if not values or len({folder_name(name, one) for one in values}) < len(values):
                raise ValueError(f"{name} needs a list of different values")
        return search


class Grid:
    """All cells that a config file may need, and which of them are needed so far. Making it refuses what cannot work.

    `methods` are the names; `primary` is the figure that chooses epochs and values.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.settings = path, load(GridSettings, path, {})
        self.folder = Path(self.settings.output_dir)
        self.methods = list(self.settings.methods)
        self.setting: str = next(iter(self.settings.search), "")
        self.after = {name: given["after"] for name, given in self.settings.methods.items() if "after" in given}
        """Method -> the method from whose weights it goes on."""
        if odd := [name for name in self.methods if not re.fullmatch(r"\w[\w+. -]{0,99}", name)]:
            raise UserError(
                f"{path}: methods has {show(odd[0])}, but a name is also that of a folder: at most 100 letters, "
                "digits, spaces and any of _ + . -, of which the first is a letter, a digit or _"
            )
        if len({name.casefold() for name in self.methods}) < len(self.methods):
            raise UserError(f"{path}: methods has two names that differ in upper and lower case only; rename one")
        if (reference := self.settings.reference) not in (None, *self.methods):
            raise UserError(f"{path}: reference is {show(reference)}; it must be one of {', '.join(self.methods)}")
        self._check_order()
        self.cells = dict[str, Cell]()
        for cell in self._cells():
            self.cells[cell.label] = cell
        self.check()
        any_config = next(iter(self.cells.values())).config
        self.primary = any_config.primary_figure
        self.greater_is_better = any_config.figures[self.primary]

    def _check_order(self) -> None:
        """Raise UserError if a method goes on from one that is not above it, or that has several values."""
        for name, first in self.after.items():
            if first not in (above := self.methods[: self.methods.index(name)]):
                allowed = f"it must be one of the methods above it: {', '.join(above)}" if above else "none is above it"
                raise UserError(f"{self.path}: methods.{name}.after is {show(first)}; {allowed}")
            if len(self.values(first)) > 1:
                raise UserError(
                    f"{self.path}: methods.{name} goes on from {first}, of which several values of {self.setting} are "
                    f"tried; set methods.{first}.{self.setting}"
                )

    def _cells(self) -> Iterator[Cell]:
        recipe = self.settings.recipe
        below = recipe if isinstance(recipe, dict) else read_object(recipe)
        place = f"{self.path}: recipe" if isinstance(recipe, dict) else recipe
        validated(Config, merged(Config, below, {}), place)
        for method, searched in ((name, one) for name in self.methods for one in self.values(name)):
            given = {name: one for name, one in self.settings.methods[method].items() if name != "after"}
            value_of = {self.setting: searched} if self.setting else {}
            if "seed" in given.keys() | value_of.keys():
                raise UserError(f"{self.path}: methods.{method} cannot set seed, which the grid sets itself")
            where = f"{self.path}: methods.{method}" + (f" with search.{self.setting}" if self.setting else "")
            for seed in range(self.settings.seeds):
                data = merged(Config, below, given | value_of | {"seed": seed})
                config = validated(Config, data, where).model_copy(update=_SINGLE)
                if config.resume is not None:
                    raise UserError(f'{where} has resume; to go on from another method, give its name as "after"')
                label = ", ".join(
                    [method, *([f"{self.setting} {show(searched)}"] if self.setting else []), f"seed {seed}"]
                )
                parts = [folder_name(self.setting, searched)] if self.setting else []
                folder = self.folder.joinpath("cells", method, *parts, f"seed{seed}")
                start = None
                if method in self.after:
                    start = self.of(self.after[method], self.values(self.after[method])[0])[seed]
                    config = config.model_copy(update={"resume": str(start.weights)})
                yield Cell(method, searched, seed, label, folder, config, start)

    def check(self) -> None:
        """Raise UserError for methods that cannot be compared, and for cells that were trained with other settings."""
        first = next(iter(self.cells.values()))
        of_kind = {cell.start is None: cell for cell in reversed(self.cells.values())}  # the first of each kind
        for cell in self.cells.values():
            if used := [name for name in _UNUSED if getattr(cell.config, name)]:
                raise UserError(
                    f"{self.path}: methods.{cell.method} has {used[0]}; leave it out, since each cell is one training "
                    "with the same batch size"
                )
            for name in sorted((_DATA | _UPDATES) - {*self.settings.vary}):
                other = first if name in _DATA else of_kind[cell.start is None]
                if getattr(other.config, name) != getattr(cell.config, name):
                    raise UserError(
                        f"{self.path}: {name} is {show(getattr(other.config, name))} for {other.method}, but "
                        f"{show(getattr(cell.config, name))} for {cell.method}"
                        "; methods are compared with the same data and the same updates, so set it in the recipe only"
                        + (", or name it in vary if it is what you compare" if name in get_args(Budget) else "")
                    )
        config = first.config
        if "t2v.R@1" not in config.figures:
            raise UserError(
                f"{self.path}: task {config.task.method} has no R@1; methods are compared by task retrieval"
            )
        check_paths(config)
        if config.test_annot is None:
            raise UserError(f"{self.path}: recipe.test_annot is missing: the captions on which methods are compared")
        if chosen_on_test(config):
            raise UserError(
                f"{self.path}: val_annot and test_annot hold the same captions. Validation chooses the values and "
                "epochs, so take other captions"
            )
        for cell in self.cells.values():
            self._refuse_other_settings(cell)
            self._refuse_without_start(cell)

    def _refuse_other_settings(self, cell: Cell) -> None:
        if not cell.is_finished and not (cell.folder / "config.json").is_file():
            return
        here = cell.deciding()
        if cell.is_finished:
            there = cell.result()["settings"]
            # A setting that the version which trained it did not have has its default.
            known = {name: there[name] for name in there.keys() & Config.model_fields.keys()}
            there = there | deciding_values(load_config(None, known))
        else:
            there = here | deciding_values(load_config(cell.folder / "config.json")) | {"resume": here["resume"]}
        differ = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
        if differ:
            lines = [f"\n  {name} is {show(here.get(name))} here, but {show(there.get(name))} there" for name in differ]
            raise UserError(
                f"{self.path}: {cell.folder} was trained with other settings:{''.join(lines[:5])}\n"
                f"Take another output_dir, or delete {cell.folder} to train it again"
            )

    def _refuse_without_start(self, cell: Cell) -> None:
        """Raise UserError if the weights are gone from which a cell, not finished yet, goes on."""
        if (start := cell.start) is None or cell.is_finished:
            return
        if start.is_finished and not start.is_kept:
            raise UserError(
                f"{self.path}: {cell.method} goes on from {start.weights}, which was not kept; delete {start.folder} "
                "to train it again"
            )
        if not start.is_finished and cell.folder.exists():
            raise UserError(
                f"{self.path}: {cell.folder} was begun from weights that are gone; delete it to train it again"
            )

    def values(self, method: str) -> list[Any]:
        """Return the values of the searched setting that are tried for a method: one if the method sets it itself."""
        own = self.settings.methods[method]
        return [own[self.setting]] if self.setting in own else self.settings.search.get(self.setting, [None])

    def keeps_weights(self, cell: Cell) -> bool:
        """Return whether the weights of a cell are kept: where that is wanted, or another method goes on from them."""
        return self.settings.keep_weights or cell.method in self.after.values()

    @property
    def reference(self) -> str | None:
        """The method that the others are compared with."""
        configs = {cell.method: cell.config for cell in reversed(self.cells.values())}  # the first cell of each
        full = (name for name in self.methods if configs[name].peft.method == "full" and not configs[name].freeze_clip)
        return self.settings.reference or next(full, None)

    def of(self, method: str, searched: Any) -> list[Cell]:
        """Return the cells of a method with one value, by seed."""
        return [cell for cell in self.cells.values() if cell.method == method and cell.searched == searched]

    def searching(self, method: str) -> list[Cell]:
        """Return the cells of seed 0, one for each value."""
        return [self.of(method, searched)[0] for searched in self.values(method)]

    def validation(self, cell: Cell) -> float | None:
        """Return the primary figure of a finished cell on validation, None if the cell failed."""
        result = cell.result()
        return None if result["failed"] else value(result["validation"], self.primary)

    def chosen(self, method: str) -> Cell | None:
        """Return the cell of seed 0 that is best on validation, of equal ones the first; None if all of them failed.

        All cells of the search must be finished.
        """
        figures = {cell.label: self.validation(cell) for cell in self.searching(method)}
        sign = 1 if self.greater_is_better else -1
        found = [cell for cell in self.searching(method) if figures[cell.label] is not None]
        return max(found, key=lambda cell: sign * (figures[cell.label] or 0.0), default=None)

    def is_searched(self, method: str) -> bool:
        """Return whether all values of a method are finished."""
        return all(cell.is_finished for cell in self.searching(method))

    def needed(self) -> list[Cell]:
        """Return the cells that are known to be needed: each search, and the other seeds of each chosen value.

        A value that is alone is chosen unless it fails with seed 0.
        """
        cells = []
        for method in self.methods:
            tried = self.searching(method)
            alone = tried[0] if len(tried) == 1 else None
            best = self.chosen(method) if self.is_searched(method) else alone
            cells += [*tried, *(self.of(method, best.searched)[1:] if best else [])]
        return cells

    def left(self) -> list[Cell]:
        """Return the needed cells that are not finished, those in training included."""
        return [cell for cell in self.needed() if not cell.is_finished]

    def finished(self) -> list[Cell]:
        """Return the needed cells that are finished."""
        return [cell for cell in self.needed() if cell.is_finished]

    @property
    def size(self) -> int:
        """The number of cells of the whole grid; those of methods whose search failed altogether are not trained."""
        failed = [method for method in self.methods if self.is_searched(method) and not self.chosen(method)]
        searched = sum(len(self.values(method)) for method in self.methods)
        return searched + (len(self.methods) - len(failed)) * (self.settings.seeds - 1)

    def progress(self) -> str:
        """Return how many cells are finished, and how long the others take if all workers go on."""
        done = self.finished()
        seconds = statistics.mean(cell.result().get("seconds", 0.0) for cell in done)
        workers = 1 + sum(cell.lock_path.exists() for cell in self.left())
        left = seconds * (self.size - len(done)) / workers / 60
        about = f", about {max(left, 1):.0f} min left" if len(done) < self.size else ""
        return f"   [{len(done)} of {self.size}{about}]"


def run_grid(grid: Grid, report: Callable[[Grid], str]) -> bool:
    """Train the cells that are left and that no other worker trains, with a report after each one.

    `report` writes the tables and returns them as text, which is printed at the end. Return False if a method has no
    result, since all of its cells failed. Raise UserError, Interrupted.
    """
    if launched_processes() > 1:
        raise UserError(
            "compare: a cell is trained in one process. To use several, start the command several times without "
            "torchrun or accelerate launch (docs/comparing.md)"
        )
    say, failures = partial(print, flush=True), list[str]()
    say(f"{grid.path}: {len(grid.methods)} methods, {len(grid.finished())} of {grid.size} cells in {grid.folder}")
    with StopSignals(saving=False):
        try:
            if grid.left():
                in_process(open_models, {name: grid.searching(name)[0].config for name in grid.methods})
            while taken := take_cell(grid):
                cell, lock = taken
                try:
                    say(f"{cell.label}: {'resumed' if has_snapshot(cell.folder) else 'begun'}")
                    result = train_in_process(cell, grid.keeps_weights(cell))
                finally:
                    lock.release()
                if cell.start is None or not cell.start.result()["failed"]:  # otherwise it could not but fail
                    failures = [*failures, f"{cell.label}: {result['failed']}"] if result["failed"] else []
                say(f"{cell.label}: {told(grid, result)}{grid.progress()}")
                report(grid)
                if len(failures) == FAILURES:
                    raise UserError(f"{FAILURES} cells in a row failed:\n  " + "\n  ".join(failures))
        except KeyboardInterrupt:
            say("Interrupted. The same command goes on where it stopped.")
            raise
        say(f"\n{report(grid)}")
        if left := grid.left():
            say(f"left to other workers: {len(left)} cells. The last worker completes the report")
            say("\n".join(f"  {cell.label}: {cell.folder}" for cell in left))
    return all(not grid.is_searched(method) or grid.chosen(method) for method in grid.methods)


def take_cell(grid: Grid) -> tuple[Cell, Lock] | None:
    """Return the next cell that can be trained and its lock, which is taken; None if there is none.

    Others may be training those that are left, or those from which they go on.
    """
    for cell in grid.left():
        if cell.start is not None and not cell.start.is_finished:
            continue
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = cell.lock()
        try:
            lock.take()
        except UserError:
            continue
        if not cell.is_finished:  # another worker may have finished it before the lock was taken
            return cell, lock
        lock.release()
    return None


def told(grid: Grid, result: Mapping[str, Any]) -> str:
    """Return in a few words what became of a cell."""
    if result["failed"]:
        return f"FAILED: {result['failed'].splitlines()[0]}"
    figure, test = value(result["validation"], grid.primary), value(result["test"], "t2v.R@1")
    return f"{grid.primary} {figure:.1f} on validation, epoch {result['best_epoch']}; test T2V R@1 {test:.1f}"


def open_models(configs: Mapping[str, Config]) -> None:
    """Build the model of each method, without loading anything that is large, so that it is refused now if ever.

    Weights from which a method goes on are not there yet.
    """
    for method, config in configs.items():
        try:
            open_model(config.model_copy(update={"resume": None}), values="meta")
        except UserError as error:
            raise UserError(f"methods.{method}: {error}") from error


def folder_name(name: str, searched: Any) -> str:
    """Return the name of the folder for a value of a setting, such as `coef_lr=0.1`."""
    return re.sub(r"[^\w.=+-]", "_", f"{name}={searched if isinstance(searched, str) else json.dumps(searched)}")
