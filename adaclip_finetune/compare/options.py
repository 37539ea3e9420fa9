"""What `adaclip evaluate` and `adaclip predict` have in common on the command line: settings that no figure of a
checkpoint hangs on may be given as flags, all others are the checkpoint's own. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import create_model

from adaclip_finetune.commands.flags import Parser, add_flags
from adaclip_finetune.config import Config
from adaclip_finetune.config.base import Settings
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.durable import beside, write_durably
from adaclip_finetune.errors import UserError

# A checkpoint is evaluated as it is: no search, no batch to fit, nothing written.
AS_IT_IS: Mapping[str, Any] = MappingProxyType(
    {
        "do_inference": True,
        "no_output": True,
        "save_similarity": None,
        "optuna_cfg": None,
        "do_training_af_optuna": False,
        "policy_weights": "random",  # the checkpoint brings the weights of the policy's CNN
    }
)

# What the checkpoint learned from and was chosen on is no choice of whoever evaluates it, and --annot says on what.
_ANNOTATIONS = frozenset({"train_annot", "val_annot", "test_annot"})


def overridable() -> frozenset[str]:
    """Return the names of the settings that may be given in place of the checkpoint's own: of the data, where its CLIP
    lies, and the machine's."""
    names = names_with("data", "machine") | names_with("model", paths=True)
    return names - _ANNOTATIONS - AS_IT_IS.keys()


def add_overrides(parser: Parser) -> None:
    """Flags for `overridable`, declared as in `adaclip train`, but for their defaults: those are the checkpoint's."""
    names = overridable()
    fields = {name: (field.annotation, field) for name, field in Config.model_fields.items() if name in names}
    group = create_model(
        "Overrides",
        __base__=Settings,
        __doc__="In place of the checkpoint's own settings (the defaults are those of `adaclip train`)",
        **fields,  # type: ignore[call-overload]
    )
    add_flags(parser, type("GivenOverrides", (group,), {}))


def check_file(flag: str, path: Path) -> None:
    """UserError unless it is there and can be read."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder, and a file is needed")
    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file (looked for in {Path.cwd()})")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: you may not read it")


def check_targets(
    targets: Mapping[str, Path | None], inputs: Iterable[str | Path | None], checkpoints: Iterable[str | Path]
) -> None:
    """UserError, before hours of work, where a target (flag → file) cannot be written, or would replace an input or
    another target, or something in the run folder of a checkpoint."""
    runs = [_run_folder(Path(given)) for given in checkpoints]
    taken = {Path(path).resolve(): "is read by the same command" for path in [*inputs, *runs] if path is not None}
    for flag, path in targets.items():
        if path is None:
            continue
        _check_target(flag, path)
        if run := next((run for run in runs if run in path.resolve().parents), None):
            raise UserError(f"{flag} {path}: would write into the run folder {run}; give a place outside of it")
        if (reason := taken.get(path.resolve())) is not None:
            raise UserError(f"{flag} {path}: {reason}, and would be overwritten; give another name")
        taken[path.resolve()] = f"is what {flag} writes, too"


def _run_folder(checkpoint: Path) -> Path:
    """That of a checkpoint, or the checkpoint's file where it lies alone."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return (folder if (folder / "config.json").is_file() else checkpoint).resolve()


def _check_target(flag: str, path: Path) -> None:
    folder = path.resolve().parent
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path}: is no plain file")
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: there is no such folder to write into")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: you may not write into {folder}")
    try:
        beside(path.resolve()).lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, say
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def write_file(flag: str, path: Path, content: str | bytes) -> None:
    """What was at `path`, or where it links to, is replaced, or left whole. Text is UTF-8; half a surrogate pair, such
    as in names that are no text, is written as its escape, which in JSON is what it means. Raises UserError."""
    try:
        whole = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        write_durably(path.resolve(), whole)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error
