"""Time and memory until the first batch of a JSON Lines annotation of millions of videos is known.

    python scripts/bench/large_corpus.py --rows 10000000 --folder /tmp

The file (about 100 bytes a row) is written first and deleted at the end. A process of its own then finds its lines and
reads the captions of the first batch and of the last one. Its peak memory includes Python, torch and all imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(), help="folder of the temporary file")
    parser.add_argument("--annotation", type=Path, help="measure this file in this process, and write none")
    a = parser.parse_args()
    if a.annotation:
        measure(a.annotation, a.batch_size)
        return
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        path = Path(folder, "corpus.jsonl")
        with path.open("w") as lines:
            for row in range(a.rows):
                name, caption = f"{row // 1000:05d}/{row:08d}", f"a person does thing number {row} near the water"
                lines.write(f'{{"video": "{name}", "sentences": ["{caption}"]}}\n')
        print(f"{a.rows:,} rows, {path.stat().st_size / 2**20:,.0f} MiB", flush=True)
        command = [sys.executable, __file__, "--annotation", str(path), "--batch_size", str(a.batch_size)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for step, (seconds, mebibytes) in found.items():
        print(f"{step:12s} {seconds:6.2f} s   peak memory so far {mebibytes:,.0f} MiB")


def measure(annotation: Path, batch_size: int) -> None:
    """Print the seconds and the peak memory in MiB after each step, as JSON."""
    found, last = {}, time.perf_counter()

    from adaclip_finetune.config import load_config
    from adaclip_finetune.data.splits import train_split
    from adaclip_finetune.training import trainer  # noqa: F401  # what a run imports

    def note(step: str) -> None:
        nonlocal last
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        found[step], last = (time.perf_counter() - last, peak), time.perf_counter()

    note("imports")
    split = train_split(load_config(None, {"video_dir": str(annotation.parent)}), str(annotation))
    note("open")
    number = split.plan.num_batches(batch_size)
    for step, start in {"first batch": 0, "last batch": number - 1}.items():
        batch = next(split.plan.epoch(0, batch_size, start))
        assert all(split.entries[row].video_id for row in batch)
        note(step)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
