"""Read JSON strictly: UTF-8, no key twice, no NaN or Infinity. Anything else is a UserError that says where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaclip_finetune.errors import UserError


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raise UserError, which names the file and the place, if that fails."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file (looked for in {Path.cwd()})") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a NUL in the name
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_json(decoded(content, path), str(path))


def decoded(content: bytes, source: object, encoding: str = "utf-8-sig") -> str:
    """Return the text of a file, without a byte order mark. Raise UserError, beginning with `source`, if it is none."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def parse_json(text: str, source: str) -> Any:
    """Return the value of a JSON text. Raise UserError, beginning with `source` (a file, a flag), if it fails."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice, ensure_ascii=False)} appears twice; remove one")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
