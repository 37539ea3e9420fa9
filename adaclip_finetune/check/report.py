"""Findings: what a check found, as text for people and as JSON for programs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from adaclip_finetune.printable import printable

Severity = Literal["fails", "warning", "fine"]
VERDICTS: dict[Severity, str] = {
    "fails": "As things stand, a run would fail.",
    "warning": "A run would go through, but look at the warnings.",
    "fine": "Nothing stands against a run.",
}
"""The severities, the worst first, and the verdict if a severity is the worst one found."""

_EXAMPLES = 2
_LONGEST = 120  # characters of an example


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    `severity` is fails (the run would stop, or an evaluation refuse), warning (the run would go on) or fine. `check` is
    a word for programs, such as missing_videos. `split` is "train", "train, test" or, for what concerns no split,
    "run". `items` maps each video, caption or figure concerned to details. `advice` is the way out.
    """

    severity: Severity
    check: str
    split: str
    message: str
    items: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""


def plural(count: int, noun: str) -> str:
    """Return `1 video`, `2 videos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def worst(findings: Sequence[Finding]) -> Severity:
    """Return the severity of the worst finding."""
    return min((finding.severity for finding in findings), key=list(VERDICTS).index, default="fine")


def as_json(paths: Mapping[str, str], trains: Sequence[str], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return everything as one JSON object. `paths` maps a split to its file; `trains` names the training splits."""
    splits = {name: {"path": path, "trains": name in trains} for name, path in paths.items()}
    return {"verdict": worst(findings), "splits": splits, "findings": [vars(finding) for finding in findings]}


def as_text(paths: Mapping[str, str], trains: Sequence[str], findings: Sequence[Finding]) -> str:
    """Return a table, the worst findings first, each with one or two examples and the way out."""
    width = max(len(printable(name)) for name in ("run", *(finding.split for finding in findings)))
    lines = [
        f"{printable(name):{width}}  {printable(path)}  ({'training' if name in trains else 'evaluation'})"
        for name, path in paths.items()
    ]
    ordered = sorted(findings, key=lambda finding: list(VERDICTS).index(finding.severity))
    lines += ["", *(line for finding in ordered for line in _lines(finding, width)), ""]
    counts = [sum(finding.severity == severity for finding in findings) for severity in VERDICTS]
    told = f"{counts[0]} would fail, {plural(counts[1], 'warning')}, {counts[2]} fine"
    return "\n".join([*lines, f"{VERDICTS[worst(findings)]} ({told})"])


def _lines(finding: Finding, width: int) -> Iterator[str]:
    head, indent = f"{finding.severity:8} {printable(finding.split):{width}}  ", " " * (width + 11)
    for line in finding.message.split("\n"):
        yield _wrapped(line, head, indent)
        head = indent
    # The figures of a finding about cost are part of its message already.
    examples = [] if finding.split == "run" or finding.severity == "fine" else list(finding.items.items())
    for subject, detail in examples[:_EXAMPLES]:
        words = ", ".join(map(str, detail)) if isinstance(detail, list) else str(detail)
        yield indent + printable(f"· {subject}: {words}" if words else f"· {subject}")[:_LONGEST]
    if len(examples) > _EXAMPLES:
        yield f"{indent}· and {len(examples) - _EXAMPLES} more (--json lists all)"
    if finding.advice:
        yield _wrapped(finding.advice, f"{indent}→ ", f"{indent}  ")


def _wrapped(line: str, first: str, following: str) -> str:
    """Wrap a line, keeping paths and flags whole, so that they can be copied."""
    columns = max(80, min(140, shutil.get_terminal_size((110, 24)).columns))
    wrapper = textwrap.TextWrapper(columns, first, following, break_on_hyphens=False, break_long_words=False)
    return wrapper.fill(printable(line))
