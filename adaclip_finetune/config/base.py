"""What every settings class has in common, and how one setting is declared.

A setting stands once: name, type, default, range, unit and a line of help. The flags, `--help`, the JSON Schema and
the error messages are all made from that declaration.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# A JSON list becomes a tuple, so that a frozen config is frozen all the way down; what is in it stays strict.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]

Problem = tuple[str, tuple[str, ...]]
"""A combination that cannot be: the message, and the dotted names of the settings that take part in it."""


Role = Literal["data", "view", "model", "method", "optimisation", "run", "machine"]
"""What a setting decides:

- data: which videos and captions, where they lie, and what is asked of them;
- view: how a video or a text becomes what the model sees;
- model: the function that the model computes, and the weights that it begins with;
- method: which parameters learn;
- optimisation: how they are trained, and which epoch is kept;
- run: what one run is called, does and writes;
- machine: where and how fast it is computed. Some of these change the last bits of a figure; they are the ones that
  say `on_resume="same"`.
"""

OnResume = Literal["free", "same", "ignored"]
"""A setting that is given to an interrupted run may be another one, must be the run's own, or has no effect."""


class Settings(BaseModel):
    """Frozen; a string is not a number, true is not a number, NaN is not a number, unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Contradictions(ValueError):
    """Settings that are right one by one and wrong together."""

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
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str | None = None,
    min_length: int | None = None,
) -> Any:
    """Declare one setting: its default, one line of help, unit and range. `...` as default: it must be given.

    Every setting of `Config` has a role, which counts for all that is in a section; `roles.py` makes lists of names
    from it. `on_resume` is needed only where the role does not tell. A unit of files or folders makes the setting a
    path. `allowed` says in words what a pattern asks for.
    """
    facts = {"role": role, "on_resume": on_resume, "unit": unit, "allowed": allowed}
    extra = {key: value for key, value in facts.items() if value}
    return Field(
        default,
        description=help,
        json_schema_extra=dict(extra) or None,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
        pattern=pattern,
        min_length=min_length,
        validate_default=True,
    )
