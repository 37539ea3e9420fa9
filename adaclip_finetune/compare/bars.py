"""Bars of a chart, counted from ranks, and drawn as SVG that stands inside a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.evaluation.metrics import IntArray

_RANKS = (1, 5, 10, 20, 50, 100, 1000)  # the last rank of each bar
_GROUPS = 5
_WIDTH, _LINE, _LEFT, _RIGHT = 380, 26, 92, 128


@dataclass(frozen=True)
class Bar:
    """`share` in percent, of `count` queries where it is a recall."""

    label: str
    share: float
    count: int


def rank_bars(ranks: IntArray) -> list[Bar]:
    """How many queries have their right answer at rank 1, at 2 to 5, … up to the worst rank."""
    bars, first, worst = [], 1, int(ranks.max())
    for last in (*_RANKS, worst):
        if first <= worst and first <= last:
            count = int(((ranks >= first) & (ranks <= last)).sum())
            bars.append(Bar(_range(first, min(last, worst)), 100 * count / len(ranks), count))
            first = last + 1
    return bars


def recall_bars(values: NDArray[np.float64], ranks: IntArray, unit: str) -> list[Bar]:
    """R@1 of the queries in at most five groups of about the same size, by value; equal values stay together."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _GROUPS + 1)[1:-1], method="lower"))
    group, bars = np.searchsorted(edges, values, side="left"), []
    for number in np.unique(group):
        here = group == number
        low, high = values[here].min(), values[here].max()
        bars.append(Bar(f"{_range(low, high)} {unit}", 100 * float((ranks[here] <= 1).mean()), int(here.sum())))
    return bars


def draw_bars(bars: Sequence[Bar], said: str, of_count: str) -> str:
    """An SVG of horizontal bars, from 0 to 100 %; `said` is what it shows, for those who do not see it."""
    room, lines = _WIDTH - _LEFT - _RIGHT, []
    for number, bar in enumerate(bars):
        top = number * _LINE
        width = max(1.0, room * bar.share / 100) if bar.count and bar.share else 0.0
        lines.append(
            f'<text x="{_LEFT - 8}" y="{top + 17}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect class="track" x="{_LEFT}" y="{top + 4}" width="{room}" height="18" rx="3"/>'
            f'<rect class="bar" x="{_LEFT}" y="{top + 4}" width="{width:.1f}" height="18" rx="3"/>'
            f'<text x="{_LEFT + room + 8}" y="{top + 17}">{bar.share:.1f} %'
            f'<tspan class="quiet" dx="6">{escape(of_count)}{bar.count:,}</tspan></text>'
        )
    height = max(1, len(bars)) * _LINE
    label = escape(said, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(lines)}</svg>'


def _range(low: float, high: float) -> str:
    first, last = _number(low), _number(high)
    return first if first == last else f"{first}–{last}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
