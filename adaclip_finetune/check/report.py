"""A check in words for people, and as one JSON object for programs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from adaclip_finetune.check.finding import SEVERITIES, Finding, worst
from adaclip_finetune.check.source import Split
from adaclip_finetune.printable import printable

_EXAMPLES = 2
_LETTERS = 120  # of an example
_PLAIN = str.maketrans({"·": "-", "→": "->", "…": "...", "“": '"', "”": '"'})
_FIGURES = (
    "captions",
    "disk",
    "memory",
    "shared_memory",
    "gpu_memory",
    "time",
)  # whose items are numbers that the message tells
# Paths and flags are to be copied from the screen.
_WHOLE_WORDS: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}


def as_json(splits: Sequence[Split], findings: Sequence[Finding]) -> dict[str, Any]:
    """All of it, nothing cut."""
    return {
        "verdict": worst(findings),
        "splits": {split.name: {"path": split.path, "trains": split.trains} for split in splits},
        "findings": [asdict(finding) for finding in findings],
    }


def as_text(splits: Sequence[Split], findings: Sequence[Finding], encoding: str = "utf-8") -> str:
    """A table, the worst first, with an example or two of each finding and what to do about it; in letters that the
    encoding has."""
    columns = max(80, min(140, shutil.get_terminal_size((110, 24)).columns))
    width = max(len(printable(name)) for name in ("run", *(finding.split for finding in findings)))
    lines = [f"{printable(split.name):{width}}  {printable(split.path)}{_role(split)}" for split in splits] + [""]
    for severity in SEVERITIES:
        for finding in findings:
            if finding.severity == severity:
                lines += _lines(finding, width, columns)
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    verdict = {
        "fails": "As things stand a run would fail.",
        "warning": "A run would go through; look at the warnings.",
        "fine": "Nothing stands against a run.",
    }[worst(findings)]
    plural = "" if counts["warning"] == 1 else "s"
    told = f"{counts['fails']} would fail, {counts['warning']} warning{plural}, {counts['fine']} fine"
    return _spelled("\n".join([*lines, "", f"{verdict} ({told})"]), encoding)


def _spelled(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)


def _role(split: Split) -> str:
    return "  (to learn from)" if split.trains else "  (to evaluate)"


def _lines(finding: Finding, width: int, columns: int) -> Iterator[str]:
    head, indent = f"{finding.severity:8} {printable(finding.split):{width}}  ", " " * (width + 11)
    for number, line in enumerate(finding.message.split("\n")):
        yield textwrap.fill(
            printable(line),
            columns,
            initial_indent=indent if number else head,
            subsequent_indent=indent,
            **_WHOLE_WORDS,
        )
    if finding.severity != "fine":
        for subject, detail in list(finding.items.items())[:_EXAMPLES]:
            if finding.check not in _FIGURES:
                yield f"{indent}· {_short(subject, detail)}"
        if finding.check not in _FIGURES and len(finding.items) > _EXAMPLES:
            yield f"{indent}· and {len(finding.items) - _EXAMPLES} more (--json lists all)"
    if finding.advice:
        yield textwrap.fill(
            printable(finding.advice),
            columns,
            initial_indent=f"{indent}→ ",
            subsequent_indent=f"{indent}  ",
            **_WHOLE_WORDS,
        )


def _short(subject: str, detail: Any) -> str:
    text = printable(f"{subject}: {_told(detail)}" if detail else subject)
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _told(detail: Any) -> str:
    """Videos by name; a cut caption by its end."""
    if not isinstance(detail, list):
        return str(detail)
    parts = [f"“…{one['kept'][-30:]}” loses “{one['cut']}”" if isinstance(one, dict) else str(one) for one in detail]
    return ", ".join(parts)
