"""What argparse cannot know of `adaclip evaluate`: which flags go together, and whether files are there."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from adaclip_finetune.compare.options import check_file, check_targets
from adaclip_finetune.errors import UserError

RERANKINGS = ("dual_softmax", "qb_norm")
_MOST_SHARES = 101
_SUFFIXES = {"markdown": ".md", "json": ".json", "errors": ".html"}


def check(arguments: Namespace, overrides: dict[str, Any]) -> None:
    """Raise UserError for flags that do not go together, and for files that are not there."""
    _check_mode(arguments, overrides)
    read_shares(arguments.alpha)
    _check_reranking(arguments)
    several = any(len(given or []) > 1 for given in (arguments.checkpoints, arguments.annot, arguments.similarity))
    if arguments.errors and several:
        raise UserError("--errors is of one checkpoint on one annotation, or of one matrix: give one of each")
    for name in ("annot", "similarity"):
        paths = getattr(arguments, name) or []
        places = [Path(path).resolve() for path in paths]
        if repeated := [path for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
            raise UserError(f"--{name} {repeated[-1]} is given twice")
        for path in paths:
            check_file(f"--{name}", Path(path))
    for name in ("config", "bank", "val_annot", "ids", "zero_shot"):
        if path := getattr(arguments, name):
            check_file(_flag(name), Path(path))
    inputs = [*(arguments.annot or []), *(arguments.similarity or []), *_beside(arguments)]
    inputs += [getattr(arguments, name) for name in ("config", "bank", "val_annot", "ids", "zero_shot")]
    checkpoints = [*(arguments.checkpoints or []), *(arguments.interpolate or [])]
    check_targets({_flag(name): getattr(arguments, name) for name in _SUFFIXES}, inputs, checkpoints)
    for name, suffix in _SUFFIXES.items():
        if (path := getattr(arguments, name)) is not None and path.suffix != suffix:
            raise UserError(f"{_flag(name)} {path}: must end in {suffix}")


def read_shares(text: str) -> list[float]:
    """`0:1:0.1` as numbers, the ends included. Raises UserError."""
    wrong = UserError(f"--alpha {text}: must be FROM:TO:STEP between 0 and 1, such as 0:1:0.1")
    try:
        start, end, step = map(float, text.split(":"))
    except ValueError:
        raise wrong from None
    if not (0 <= start <= end <= 1 and step > 0):
        raise wrong
    if (end - start) / step + 1e-9 >= _MOST_SHARES:
        raise UserError(f"--alpha {text}: is more than {_MOST_SHARES} shares, each of which is an evaluation")
    return [round(start + number * step, 10) for number in range(int((end - start) / step + 1e-9) + 1)]


def _check_mode(arguments: Namespace, overrides: dict[str, Any]) -> None:
    """What is evaluated: checkpoints, a mix, or matrices."""
    modes = {
        "RUN_OR_CHECKPOINT": bool(arguments.checkpoints),
        "--interpolate": bool(arguments.interpolate),
        "--similarity": bool(arguments.similarity),
    }
    chosen = [name for name, there in modes.items() if there]
    if len(chosen) != 1:
        what = f"{' and '.join(chosen)} exclude each other: give one" if chosen else "give a run folder or weights file"
        raise UserError(f"{what} (adaclip evaluate --help)")
    if arguments.similarity:
        _refuse(arguments, "--similarity", annot="the captions are those of its ids", config="there is no model")
        if overrides:
            raise UserError(f"--{next(iter(overrides))} belongs to a model, and --similarity evaluates without one")
    elif not arguments.annot:
        raise UserError("--annot FILE is needed: the captions to evaluate")
    for name in ("ids", "zero_shot"):
        if getattr(arguments, name) and not arguments.similarity:
            raise UserError(f"{_flag(name)} belongs to --similarity")
    if arguments.interpolate:
        alone = "give the run without --interpolate"
        _refuse(arguments, "--interpolate", rerank=alone, errors=alone)
        if not arguments.val_annot:
            raise UserError("--interpolate needs --val-annot FILE: the captions that choose alpha")


def _check_reranking(arguments: Namespace) -> None:
    repeated = [name for name in RERANKINGS if arguments.rerank.count(name) > 1]
    if repeated:
        raise UserError(f"--rerank {repeated[0]} is given twice")
    if arguments.temperature is not None and not 0 < arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature:g}: must be a number above 0")
    for name in ("temperature", "bank"):
        if getattr(arguments, name) is not None and not arguments.rerank:
            raise UserError(f"--{name} belongs to --rerank")
    if ("qb_norm" in arguments.rerank) != (arguments.bank is not None):
        raise UserError("--rerank qb_norm and --bank TRAIN.json belong together: the captions are its bank of queries")
    if arguments.val_annot and not arguments.rerank and not arguments.interpolate:
        raise UserError("--val-annot chooses a temperature (--rerank) or alpha (--interpolate), and neither is given")
    if arguments.val_annot and arguments.temperature is not None:
        raise UserError("--val-annot would choose the temperature, and --temperature gives it: leave one out")


def _beside(arguments: Namespace) -> list[Path]:
    """The ids of matrices."""
    matrices = [*(arguments.similarity or []), arguments.zero_shot]
    matrices += [arguments.bank, arguments.val_annot] if arguments.similarity else []
    return [Path(path).with_suffix(".json") for path in matrices if path is not None]


def _refuse(arguments: Namespace, beside: str, **reasons: str) -> None:
    for name, reason in reasons.items():
        if getattr(arguments, name):
            raise UserError(f"{_flag(name)} does not go with {beside}, leave it out: {reason}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
