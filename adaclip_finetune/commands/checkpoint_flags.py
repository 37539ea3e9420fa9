"""What `adaclip evaluate` and `adaclip predict` share: flags over a checkpoint's settings, and checks of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import create_model

from adaclip_finetune.commands.flags import Parser, add_flags
from adaclip_finetune.compare.options import overridable
from adaclip_finetune.config import Config
from adaclip_finetune.config.base import Settings
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError


def add_checkpoint_flags(parser: Parser) -> None:
    """Add --config, and a flag for each setting that may replace that of the checkpoint."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings for a weights file that holds none")
    names = overridable()
    fields = {name: (field.annotation, field) for name, field in Config.model_fields.items() if name in names}
    group = create_model(
        "Overrides",
        __base__=Settings,
        __doc__="Replacing settings of the checkpoint (the defaults are those of `adaclip train`)",
        **fields,  # type: ignore[call-overload]
    )
    add_flags(parser, type("GivenOverrides", (group,), {}))


def check_inputs(inputs: Mapping[str, Iterable[Path | str | None]]) -> None:
    """Raise UserError for a file (flag → files) that is given twice or cannot be read."""
    for flag, paths in inputs.items():
        seen: set[Path] = set()
        for path in [Path(path) for path in paths if path]:
            if path.resolve() in seen:
                raise UserError(f"{flag} {path} is given twice")
            seen.add(path.resolve())
            if not path.is_file():
                reason = "is a folder, not a file" if path.is_dir() else f"no such file (looked for in {Path.cwd()})"
                raise UserError(f"{flag} {path}: {reason}")


def check_outputs(outputs: Mapping[str, Path | None], suffixes: Mapping[str, str], inputs: Iterable[object]) -> None:
    """Raise UserError, before hours of work, for an output (flag → file) that cannot or must not be written.

    That is one with another suffix than its flag has in `suffixes` (separated by spaces), one without a folder to
    write into, one inside a run folder, and one that would replace an input or another output.
    """
    taken = {Path(str(path)).resolve(): "is read by the same command" for path in inputs if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        place = path.resolve()
        if path.suffix not in suffixes[flag].split():
            raise UserError(f"{flag} {path}: must end in {suffixes[flag].replace(' ', ' or ')}")
        if not place.parent.is_dir() or not os.access(place.parent, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: {place.parent} is not a folder that you can write into")
        marks = ("best.safetensors", "config.json")
        if run := next((above for above in place.parents if all((above / mark).is_file() for mark in marks)), None):
            raise UserError(f"{flag} {path}: {run} is a run folder, which stays as it is; choose another place")
        if reason := taken.get(place):
            raise UserError(f"{flag} {path}: this file {reason}; choose another name")
        taken[place] = f"is also written by {flag}"


def write_output(flag: str, path: Path, content: str | bytes) -> None:
    """Replace the file at `path`, or where it links to, as a whole. Raises UserError.

    Text is written as UTF-8. Half a surrogate pair, as in file names that are not UTF-8, is written as its escape.
    """
    try:
        whole = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        write_durably(path.resolve(), whole)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error
