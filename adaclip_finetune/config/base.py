"""The base class of all settings, and how one setting is declared.

Each setting is declared once, with its name, type, default, range, unit and one line of help. Flags, `--help`, the
JSON Schema and error messages are generated from the declaration.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# JSON lists become tuples, so that a frozen config is immutable all the way down.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]

PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]

Problem = tuple[str, tuple[str, ...]]
"""An impossible combination of settings: the message, and the dotted names of the settings involved."""

Role = Literal["data", "view", "model", "method", "optimisation", "run", "machine"]
"""What a setting decides:

- data: which videos and captions are used, and where they are
- view: how a video or a text is turned into model input
- model: the function that the model computes, and its initial weights
- method: which parameters are trained
- optimisation: how they are trained, and which epoch is kept
- run: what a run is called, does and writes
- machine: where and how fast it is computed. Those that change rounding are marked `on_resume="same"`.
"""

OnResume = Literal["free", "same", "ignored"]
"""When a run is resumed, a given setting may differ from the run's own, must be the same, or has no effect."""

LARGEST = {
    **dict.fromkeys(("block", "blocks", "groups"), 1000),
    "processes": 1024,
    **dict.fromkeys(("tokens", "frames", "pixels"), 4096),
    "channels": 65536,
    **dict.fromkeys(("epochs", "batches", "items", "trials"), 10**6),
    **dict.fromkeys(("videos", "steps"), 10**9),
}
"""Upper bound of every whole number with this unit, far above what any real run needs. Larger values would only fail
later: in torch, with an overflow, or by exhausting memory."""


class Settings(BaseModel):
    """A frozen group of settings, read strictly: "1" and true are not numbers, NaN and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Contradictions(ValueError):
    """Settings that are valid one by one but not together."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(message for message, _ in self.problems))


def setting(
    default: Any,
    help: str,
    *,
    role: Role | None = None,
    on_resume: OnResume | None = None,
    unit: str | None = None,
    allowed: str | None = None,
    **limits: Any,
) -> Any:
    """Declare one setting: its default (`...` if required), one line of help, its unit and its limits.

    Every setting of `Config` has a role, its own or that of its group, which also applies to everything in a section.
    `on_resume` is only needed where the role does not imply it. The units "file" and "folder" make the setting a path;
    those in `LARGEST` bound it. `allowed` describes in words what a pattern accepts. `limits` are those of pydantic's
    `Field`: ge, gt, le, lt, pattern, min_length.
    """
    facts = {"role": role, "on_resume": on_resume, "unit": unit, "allowed": allowed}
    extra: dict[str, Any] = {key: value for key, value in facts.items() if value}
    if unit in LARGEST:
        limits = {"le": LARGEST[unit], **limits}
    return Field(default, description=help, json_schema_extra=extra or None, validate_default=True, **limits)
