"""What `adaclip evaluate` and `adaclip predict` have in common on the command line: settings that no figure of a
checkpoint hangs on may be given as flags, all others are the checkpoint's own. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import create_model

from adaclip_finetune.config import Config
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.settings.base import Settings
from adaclip_finetune.settings.flags import Parser, add_flags

OVERRIDABLE = (
    "frames_dir",
    "video_dir",
    "img_tmpl",
    "clip_weights",
    "concat_captions",
    "skip_missing",
    "device",
    "xpu",
    "precision",
    "val_batch_size",
    "num_workers",
    "debug",
)


def add_overrides(parser: Parser) -> None:
    """Flags for `OVERRIDABLE`, declared as in `adaclip train`, but for their defaults: those are the checkpoint's."""
    fields = {name: (field.annotation, field) for name, field in Config.model_fields.items() if name in OVERRIDABLE}
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


def check_targets(targets: Mapping[str, Path | None], inputs: Iterable[str | Path | None]) -> None:
    """UserError, before hours of work, where a target (flag → file) cannot be written, or would replace an input or
    another target."""
    taken = {Path(path).resolve(): "is read by the same command" for path in inputs if path is not None}
    for flag, path in targets.items():
        if path is None:
            continue
        _check_target(flag, path)
        if (reason := taken.get(path.resolve())) is not None:
            raise UserError(f"{flag} {path}: {reason}, and would be overwritten; give another name")
        taken[path.resolve()] = f"is what {flag} writes, too"


def _check_target(flag: str, path: Path) -> None:
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder")
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: there is no such folder to write into")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: you may not write into {folder}")


def write_file(flag: str, path: Path, content: str | bytes) -> None:
    """What was at `path` before is replaced, or left whole. Text is UTF-8; half a surrogate pair, such as in names that
    are no text, is written as its escape, which in JSON is what it means. Raises UserError."""
    try:
        write_durably(path, content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error
