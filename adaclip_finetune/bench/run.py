"""Run rows of the benchmark, and write and compare what they found."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from adaclip_finetune import __version__
from adaclip_finetune.bench.measure import Measured, Setup
from adaclip_finetune.bench.rows import ROWS
from adaclip_finetune.config import load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json
from adaclip_finetune.training.device import describe_device, make_accelerator

_SLOWER = 1.1  # a median that is worse by less is not reported
_HEAD = "| case | measured | ms | against | ms | times as fast | in a turn | aim |\n|---|---|---|---|---|---|---|---|"


def make_setup(device: str, precision: str | None, turns: int, quick: bool) -> Setup:
    """Return the setup for a device as the setting `device` names it. The default precision on CUDA is bf16.

    Raise UserError if the device is not available.
    """
    found = make_accelerator(load_config(None, {"device": device})).device
    return Setup(found, precision or ("bf16" if found.type == "cuda" else "fp32"), turns, quick)


def run_rows(names: Sequence[str], setup: Setup) -> dict[str, Any]:
    """Measure rows, print a table of each when it is done, and return everything as JSON can hold it."""
    found: dict[str, Any] = {"machine": machine(setup), "quick": setup.quick, "rows": {}}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()), flush=True)
    for name in names:
        print(f"\n## {name}: {ROWS[name].help}\n\n{_HEAD}", flush=True)
        cases = found["rows"][name] = []
        for measured in ROWS[name].function()(setup):
            print("\n".join(_lines(measured, setup.quick)), flush=True)
            aims = [asdict(aim) | {"times_as_fast": measured.ratios(aim)} for aim in measured.aims]
            cases.append(asdict(measured) | {"aims": aims})
    return found


def machine(setup: Setup) -> dict[str, str]:
    """Return a description of the machine and the software."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = named[0] if named else processor
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": f"{describe_device(setup.device)}, {setup.precision}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": f"adaclip-finetune {__version__}, torch {torch.__version__}",
    }


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each ratio of `new` that is below that in `old`, beyond the spread of both over their turns."""
    before, lines = _ratios(old), []
    for case, ratios in _ratios(new).items():
        then = before.get(case, [0.0])
        was, now = statistics.median(then), statistics.median(ratios)
        if max(ratios) < min(then) and was > _SLOWER * now:
            lines.append(f"{case}: {was:.2f} times as fast before, now {now:.2f}")
    return lines


def read_results(path: Path) -> dict[str, Any]:
    """Read what `adaclip bench --json` wrote. Raise UserError if it is something else."""
    found = parse_json(path.read_text(), str(path))
    if not isinstance(found, dict) or not {"rows", "machine"} <= set(found):
        raise UserError(f"--compare {path}: is not a file that `adaclip bench --json` wrote")
    return found


def _lines(measured: Measured, quick: bool) -> Iterator[str]:
    for aim in measured.aims:
        ratios = measured.ratios(aim)
        times = [f"{1000 * measured.median(name):.4g}" for name in (aim.ours, aim.reference)]
        reach = ""
        if aim.reach is not None and not quick:
            reach = f"{aim.reach:g}" if statistics.median(ratios) >= aim.reach else f"{aim.reach:g}, missed"
        cells = [measured.case, aim.ours, times[0], aim.reference, times[1], f"{statistics.median(ratios):.2f}"]
        yield f"| {' | '.join([*cells, f'{ratios[0]:.2f} – {ratios[-1]:.2f}', reach])} |"
    for name, value in measured.notes.items():
        yield f"| {measured.case} | {name} | {value:.3g} | | | | | |"


def _ratios(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the ratios in each turn, by row, case and what is compared."""
    return {
        f"{row}, {case['case']}, {aim['ours']} against {aim['reference']}": aim["times_as_fast"]
        for row, cases in found["rows"].items()
        for case in cases
        for aim in case["aims"]
    }
