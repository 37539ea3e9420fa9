"""Merge defaults, a JSON file and flags, and report every invalid setting at once.

Each problem names the flag or the file that gave the setting, the setting, its value and what is accepted.
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
from adaclip_finetune.config.schema import Described, described, show
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

S = TypeVar("S", bound=Settings)
log = logging.getLogger(__name__)


def load(settings: type[S], path: str | Path | None, overrides: Mapping[str, Any]) -> S:
    """Return the settings of a JSON file with overrides merged over it. Raises UserError that lists every problem.

    Overrides have dotted names (`peft.config.retain_ratio`). A section (`peft`) can be overridden by an object, or by
    the path of a file that contains this section alone.
    """
    data = merged(settings, {} if path is None else read_object(path), overrides)
    return validated(settings, data, path, overrides)


def validated(settings: type[S], data: Mapping[str, Any], source: object, flags: Iterable[str] = ()) -> S:
    """Return nested data as settings. Raises UserError that lists every problem, and names `source` (a file) or a flag.

    `flags` are the dotted names of the settings that flags gave.
    """
    try:
        return settings.model_validate(data)
    except ValidationError as error:
        explainer = _Explainer(described(settings), data, source, flags)
        problems = [line for problem in error.errors(include_url=False) for line in explainer.explain(problem)]
        raise UserError(together(list(dict.fromkeys(problems)))) from error


def merged(settings: type[Settings], data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested data with overrides (dotted name → value) merged over it, not validated yet. Raises UserError."""
    known, nested = described(settings), {name: as_section(value) for name, value in copy.deepcopy(dict(data)).items()}
    # Sections first, then the choice of a method, then nested settings.
    for name in sorted(overrides, key=lambda name: (name.count("."), not name.endswith(".method"))):
        value = copy.deepcopy(overrides[name])
        if isinstance(value, str) and "." not in name and name in known and known[name].kinds == {"object"}:
            value = read_section(value, name)
        if "." not in name:
            value = as_section(value)
        # An unknown setting keeps its full name, which validation refuses.
        _override(nested, name.split(".") if name in known else [name], value)
    return nested


def together(problems: Sequence[str]) -> str:
    """Join problems into one message; several become a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} settings are invalid:\n" + "\n".join(f"  - {line}" for line in problems)


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
    if name in data and len(data) > 1:
        others = ", ".join(sorted(_quoted(other) for other in data if other != name))
        raise UserError(f"{path} overrides the `{name}` section; remove the other keys: {others}")
    return data.get(name, data)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most similar to the given one."""
    return (difflib.get_close_matches(name, list(known), n=1, cutoff=0.0) or [""])[0]


def _override(data: dict[str, Any], steps: Sequence[str], value: Any) -> None:
    """Put a value at its place in nested data. Another method starts from its own defaults, with a warning."""
    *above, last = steps
    section: Any = data
    for step in above:
        if section.get(step) is None:
            section[step] = {}
        section = section[step]
        if not isinstance(section, dict):
            return  # the file has a value where a section belongs, which validation refuses
    if last == "method" and section.get("method", value) != value and (left := section.pop("config", None)):
        names = ", ".join(left) if isinstance(left, dict) else show(left)
        log.warning("%s %s replaces %s; its settings are ignored: %s", ".".join(steps), value, section[last], names)
    section[last] = value


class _Explainer:
    """Turn the errors of pydantic into messages."""

    def __init__(self, known: Mapping[str, Described], data: Mapping[str, Any], path: object, flags: Iterable[str]):
        self.known, self.data, self.path, self.flags = known, data, path, list(flags)

    def explain(self, problem: Any) -> Iterator[str]:
        """Yield the messages of one error."""
        kind, value, raised = problem["type"], problem["input"], problem.get("ctx", {}).get("error")
        if isinstance(raised, Contradictions):
            for message, names in raised.problems:
                yield f"{message} ({', '.join(map(self._source, names))})"
            return
        steps = list(problem["loc"])
        chooses = self.known.get(f"{steps[0]}.method") if len(steps) > 1 else None
        # pydantic puts the chosen method after the name of its section.
        method = steps.pop(1) if chooses is not None and len(chooses.types) > 1 else None
        if chooses is None and len(steps) > 1 and steps[0] in self.known and len(self.known[steps[0]].types) > 1:
            steps.pop(1)  # which of several types of value was tried
        if kind in ("union_tag_not_found", "union_tag_invalid"):
            steps.append("method")
            kind, value = ("missing", None) if kind == "union_tag_not_found" else (kind, value["method"])
        name = ".".join(step for step in steps if isinstance(step, str))
        place, one = dotted(steps), self.known.get(name)
        origin = self._origin(name)
        start = f"{origin}: {place}" if origin not in ("", f"--{place}") else origin or place
        allowed = one.words if one else problem["msg"].removeprefix("Input should be ")
        if one and isinstance(steps[-1], int):  # an item of a list
            allowed = allowed.partition("each ")[2] or allowed
        if kind == "extra_forbidden":
            yield f"{origin}: unknown setting {place}{f' of {method}' if method else ''}; {self._instead(name, method)}"
        elif kind == "missing":
            yield f"{start} is missing" + (f"; it must be {allowed}" if one else "")
        elif raised is not None and not (one and "allowed" in one.facts):
            yield f"{start} is {show(value)}: {raised}"
        else:
            at_least_one = ", and not empty" if kind == "too_short" else ""
            yield f"{start} is {show(value)}, but must be {allowed}{at_least_one}"

    def _origin(self, name: str) -> str:
        """Return the flag that gave a setting, or else the file; "" for a default."""
        if given := [flag for flag in self.flags if f"{name}.".startswith(f"{flag}.")]:
            return f"--{max(given, key=len)}"
        return str(self.path) if self.path is not None and name.split(".")[0] in self.data else ""

    def _source(self, name: str) -> str:
        """Return a setting and where it was given: `--top_k`, `top_k in my.json`, `top_k by default`."""
        origin = self._origin(name)
        return origin if origin == f"--{name}" else f"{name} {f'in {origin}' if origin else 'by default'}"

    def _instead(self, name: str, method: str | None) -> str:
        """Suggest what to write instead of an unknown name."""
        if name in self.known:
            owners = ", ".join(self.known[name].methods)
            return f"it is a setting of {owners}" if method else "in a file, a dot is a nested object"
        fitting = [path for path, one in self.known.items() if not (method and one.methods) or method in one.methods]
        above, _, last = name.rpartition(".")
        below = [path for path in fitting if path.endswith(f".{last}")]
        beside = [path for path in fitting if path.rpartition(".")[0] == above]
        return f"did you mean {nearest(name, below or beside)}?" if below or beside else "no setting is accepted there"


def dotted(steps: Sequence[str | int]) -> str:
    """Return a location as text, such as `betas[1]` or `peft.config.retain_ratio`; unusual names are quoted."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{_quoted(step)}" for step in steps)
    return text.removeprefix(".") or "the config"


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.$-]+", name) else show(name)
