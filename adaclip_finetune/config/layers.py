"""Merge defaults, a JSON file and flags, and report every invalid setting at once.

Each problem names the origin of the value (a file or "command line"), the setting, the value and what is accepted.
"""

from __future__ import annotations

import copy
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from adaclip_finetune.config.base import Contradictions, Settings
from adaclip_finetune.config.schema import Schema, schema_of, show
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

S = TypeVar("S", bound=Settings)
COMMAND_LINE = "command line"
log = logging.getLogger(__name__)


def load(settings: type[S], path: str | Path | None, overrides: Mapping[str, Any]) -> S:
    """Return the settings of a JSON file with overrides merged over it. Raises UserError that lists every problem.

    Overrides have dotted names (`peft.config.retain_ratio`). A section (`peft`) can be overridden by an object, or by
    the path of a file that contains this section alone.
    """
    layers = Layers(schema_of(settings), path)
    layers.lay_all(overrides)
    try:
        return settings.model_validate(layers.data)
    except ValidationError as error:
        raise UserError(together(_explain(error, layers))) from error


def together(problems: Sequence[str]) -> str:
    """Join problems into one message; several become a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} settings are invalid:\n" + "\n".join(f"  - {line}" for line in problems)


class Layers:
    """Merged values, with the origin of each."""

    def __init__(self, schema: Schema, path: str | Path | None):
        self.schema = schema
        self.data: dict[str, Any] = {}
        self._origins: dict[tuple[str | int, ...], str] = {}
        if path is not None:
            self.data = {name: as_section(value) for name, value in read_object(path).items()}
            self._origins = {(name,): str(path) for name in self.data}

    def lay_all(self, overrides: Mapping[str, Any]) -> None:
        """Apply overrides: sections first, then the choice of a method, then nested settings."""
        for name in sorted(overrides, key=lambda name: (name.count("."), not self._chooses(name.split(".")))):
            self._lay(name, copy.deepcopy(overrides[name]))

    def origin(self, steps: Sequence[str | int]) -> str:
        """Return where a value came from: a file, "command line" or "default"."""
        starts = (tuple(steps[:end]) for end in range(len(steps), 0, -1))
        return next((self._origins[start] for start in starts if start in self._origins), "default")

    def _lay(self, name: str, value: Any) -> None:
        steps = name.split(".")
        nodes = self.schema.locate(steps)[1]
        if not nodes:
            steps = [name]  # an unknown setting: kept under its full name, which validation refuses
        elif len(steps) == 1 and isinstance(value, str) and self.schema.is_section(nodes[0]):
            self.data[name], self._origins[name,] = as_section(read_section(value, name)), value
            return
        if len(steps) == 1:
            value = as_section(value)
        if self._chooses(steps):
            self._set_aside(steps, value)
        part = self.data
        for step in steps[:-1]:
            if part.get(step) is None:
                part[step] = {}
            part = part[step]
            if not isinstance(part, dict):
                return  # the file has a value where a section belongs, which validation refuses
        part[steps[-1]] = value
        self._origins[tuple(steps)] = COMMAND_LINE

    def _chooses(self, steps: Sequence[str]) -> bool:
        """Return whether the name chooses among alternatives, as `peft.method` does."""
        parents = self.schema.locate(steps[:-1])[1] if len(steps) > 1 else []
        return any(self.schema.tag(parent) == steps[-1] for parent in parents)

    def _set_aside(self, steps: Sequence[str], value: Any) -> None:
        """Drop the settings of a method that is replaced: the new one starts from its own defaults."""
        section, tag = steps[0], steps[-1]
        below = self.data.get(section)
        if not isinstance(below, dict) or below.get(tag, value) == value:
            return
        left = below.get("config")
        if isinstance(left, dict):
            del below["config"]
        if isinstance(left, dict) and left:
            log.warning(
                "%s %s replaces %s of %s, whose settings are ignored (%s); %s starts from its own defaults",
                ".".join(steps), value, below[tag], self.origin([section]), ", ".join(left), value,
            )  # fmt: skip


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that contains an object; its `$schema` is left out. Raises UserError."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: contains {show(data)}, but must contain a JSON object of settings: {{...}}")
    return {name: value for name, value in data.items() if name != "$schema"}


def as_section(value: Any) -> Any:
    """Return the section that a list of methods stands for: `[{"method": …}, …]` means that they are joined."""
    is_list = isinstance(value, list) and value and all(isinstance(part, dict) and "method" in part for part in value)
    return {"method": "joined", "config": {"methods": value}} if is_list else value


def read_section(path: str, name: str) -> Any:
    """Read a file that contains one section: `{"peft": {...}}`, or only the inner object. Raises UserError."""
    data = read_object(path)
    if name not in data:
        return data
    if len(data) > 1:
        others = ", ".join(sorted(_quoted(other) for other in data if other != name))
        raise UserError(f"{path} overrides the `{name}` section; remove the other keys: {others}")
    return data[name]


def _explain(error: ValidationError, layers: Layers) -> list[str]:
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        lines += _explain_one(problem, layers)
    return list(dict.fromkeys(lines))


def _explain_one(problem: Any, layers: Layers) -> Iterator[str]:
    schema, kind, value = layers.schema, problem["type"], problem["input"]
    steps, nodes = schema.locate(problem["loc"])
    raised = problem.get("ctx", {}).get("error")
    if isinstance(raised, Contradictions):
        for message, names in raised.problems:
            origins = [f"{name}: {layers.origin(name.split('.'))}" for name in names]
            yield f"{message} ({', '.join(origins)})"
        return
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = schema.tag(nodes[0]) or ""
        steps, nodes = (*steps, tag), schema.children(nodes[0])[tag]
        kind, value = ("missing", None) if kind == "union_tag_not_found" else (kind, value[tag])
    where = layers.origin(steps)
    start = dotted(steps) if where == "default" else f"{where}: {dotted(steps)}"
    allowed = schema.words(*nodes) or problem["msg"]
    if kind == "extra_forbidden":
        yield f"{where}: unknown setting {dotted(steps)}{_instead(problem['loc'], steps, schema)}"
    elif kind == "missing":
        yield f"{start} is missing; it must be {allowed}"
    elif raised is not None and not any("allowed" in node for node in nodes):
        yield f"{start} is {show(value)}: {raised}"
    else:
        yield f"{start} is {show(value)}, but must be {allowed}"


def _instead(loc: Sequence[str | int], steps: Sequence[str | int], schema: Schema) -> str:
    """Suggest what to write instead of an unknown name."""
    *above, name = [step for part in steps for step in str(part).split(".")]
    belongs = [path for path in schema.paths() if path.endswith(f".{name}") and path != dotted(steps)]
    if belongs:
        return f"; did you mean {belongs[0]}?"
    tags = [step for step in loc if step not in steps]
    parents = schema.locate(loc[:-1] if len(steps) > 1 else above)[1]
    siblings = [sibling for parent in parents for sibling in schema.children(parent)]
    of = f" of {tags[-1]}" if tags else ""
    if not siblings:
        return f"{of}; no setting is accepted there"
    known = f" (known: {', '.join(siblings)})" if len(siblings) < 9 else ""
    return f"{of}; did you mean {nearest(name, siblings)}?{known}"


def dotted(steps: Sequence[str | int]) -> str:
    """Return a location as text, such as `betas[1]` or `peft.config.retain_ratio`; unusual names are quoted."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{_quoted(step)}" for step in steps)
    return text.removeprefix(".") or "the config"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most similar to the given one."""
    return (difflib.get_close_matches(name, list(known), n=1, cutoff=0.0) or [""])[0]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.$-]+", name) else show(name)
