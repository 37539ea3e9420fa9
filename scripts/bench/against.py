"""Compare this checkout with another one in alternating runs: start-up, training step, evaluation.

    git worktree add /tmp/before COMMIT
    python scripts/bench/against.py /tmp/before --pairs 5

Both run the demo for two epochs with the same Python. The table shows medians over the pairs, and median and range of
the ratio within a pair; above 1, this checkout is slower.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for number in range(args.pairs):
        checkouts = [args.other.resolve(), HERE]
        measured = {}
        for checkout in checkouts if number % 2 == 0 else checkouts[::-1]:
            measured[checkout] = measure(checkout)
            print(checkout.name, {name: round(value, 4) for name, value in measured[checkout].items()}, flush=True)
        for name, value in measured[HERE].items():
            found.setdefault(name, []).append((measured[checkouts[0]][name], value))
    print(f"\n| {args.pairs} pairs | before | now | ratio | in a pair |\n|---|---|---|---|---|")
    for name, pairs in found.items():
        ratios = sorted(now / before for before, now in pairs)
        before, now = (statistics.median(values) for values in zip(*pairs, strict=True))
        spread = f"{ratios[0]:.2f} – {ratios[-1]:.2f}"
        print(f"| {name} | {before:.3f} | {now:.3f} | {statistics.median(ratios):.2f} | {spread} |")


def measure(checkout: Path) -> dict[str, float]:
    """Return CPU seconds of `adaclip --help`, and wall seconds of a training step and a validation of the demo."""
    code = "import sys; from adaclip_finetune.cli import main; sys.exit(main(sys.argv[1:]))"
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        _run(checkout, "-c", code, "--help")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime) / 5
    with tempfile.TemporaryDirectory() as output:
        begun = time.monotonic()
        _run(checkout, "train.py", "--config", "cfgs/demo.json", "--num_epochs", "2", "--output_dir", output)
        whole = time.monotonic() - begun
        (events,) = Path(output).glob("*/*/metrics.jsonl")
        lines = [json.loads(line) for line in events.read_text().splitlines()]
    # In the first epoch the reading processes start.
    steps = [line["seconds"] for line in lines if line["event"] == "train" and line["epoch"] == 2]
    evaluations = [line["eval_seconds"] for line in lines if line["event"] == "validation"]
    return {
        "`adaclip --help`, s of CPU": cpu,
        "training step, s": statistics.median(b - a for a, b in itertools.pairwise(steps)),
        "validation (150 clips), s": statistics.median(evaluations),
        "the run, s": whole,
    }


def _run(checkout: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *words], cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
