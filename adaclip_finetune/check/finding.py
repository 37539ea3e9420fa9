"""What a check comes to: findings, each with what a run would make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["fails", "warning", "fine"]

SEVERITIES: tuple[Severity, ...] = ("fails", "warning", "fine")
"""The worst first. fails: the run would stop, or an evaluation refuse; warning: it would go on, and say so at most."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `items` are all that it concerns (a video, a caption, …) and what of each."""

    severity: Severity
    check: str  # a word for programs, such as missing_videos
    split: str  # "train", "train, test", or "run" where it concerns no split
    message: str
    items: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""


def plural(count: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_bytes(count: int) -> str:
    """`1.5 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def worst(findings: Iterable[Finding]) -> Severity:
    """The severity of the whole."""
    return min((finding.severity for finding in findings), key=SEVERITIES.index, default="fine")
