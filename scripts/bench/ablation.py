"""Ablation on `dataset_example/`: selection times learning, and probes of what can be learned, with paired bootstrap.

    python scripts/bench/ablation.py --work /tmp/ablation --seeds 5 --jobs 2

Each row is `train.py --config cfgs/demo.json` with the flags of `rows`, `--jobs` runs at a time with one thread each.
Runs whose similarity matrix is in the work folder already are not repeated. Prints Markdown for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from adaclip_finetune.config import load_config
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.folder import VideoFolder

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "dataset_example"
CONFIG = ROOT / "cfgs" / "demo.json"
RESAMPLES = 10_000
FULL = ("--peft.method", "full")
TUNED = (*FULL, "--coef_lr", "0.3")  # the best rate of `full` in cfgs/compare-demo.json
REFERENCE = "LoRA, K by Hard-Top-k"


@dataclass(frozen=True)
class Row:
    """A row of the table: the source of its frames, and the flags that differ from the demo."""

    name: str
    frames: str
    flags: tuple[str, ...] = ()

    def seeds(self, count: int) -> range:
        """Return the seeds of the row. Zero-shot has one, since it draws nothing."""
        return range(1 if "--do_inference" in self.flags else count)


def rows(top_k: int) -> list[Row]:
    """Return all rows: selection times learning, and probes with the event's own frames."""
    fixed, mean = ("--no_policy", "--num_frm", str(top_k)), ("--frame_agg", "none")
    heads = (*FULL, "--coef_lr", "1", "--freeze_layer_num", "4")  # all blocks of both towers are frozen
    return [
        Row("zero-shot, K uniform", "candidates", ("--do_inference",)),
        Row("zero-shot, K of the event", "oracle", ("--do_inference", *fixed)),
        Row("projections alone, K of the event", "oracle", (*heads, *fixed, *mean)),
        Row("LoRA, K of the event", "oracle", (*fixed, *mean)),
        Row("full, K of the event", "oracle", (*TUNED, *fixed, *mean)),
        Row("full, K of the event, 18 epochs", "oracle", (*TUNED, *fixed, *mean, "--num_epochs", "18")),
        Row("frozen CLIP, K uniform", "candidates", ("--freeze_clip", "--coef_lr", "1", *FULL, *fixed)),
        Row("frozen CLIP, K by Hard-Top-k", "candidates", ("--freeze_clip", "--coef_lr", "1", *FULL)),
        Row("LoRA, K uniform", "candidates", fixed),
        Row(REFERENCE, "candidates"),
        Row("full, K by Hard-Top-k", "candidates", TUNED),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for frames and results, outside the project")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    config = load_config(CONFIG)
    table = rows(config.top_k)
    (arguments.work / "results").mkdir(parents=True, exist_ok=True)
    extract(arguments.work, config.num_frm, config.top_k)
    jobs = [(row, seed) for row in table for seed in row.seeds(arguments.seeds)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(tqdm(pool.map(lambda job: run(arguments.work, *job), jobs), "runs", len(jobs)))
    ranks = {
        row.name: np.stack([read_ranks(path(arguments.work, row, seed)) for seed in row.seeds(arguments.seeds)])
        for row in table
    }
    matrix = path(arguments.work, table[0], 0)
    print(report(table, ranks, needs_order(matrix), videos(matrix), arguments.seeds))


def extract(work: Path, num_frm: int, top_k: int) -> None:
    """Write frames as PNG: num_frm uniform candidates per video, and top_k of them that show the event."""
    done = work / "frames.done"
    if done.exists():
        return
    store = VideoFolder(DATA / "videos", {})
    for name, event in tqdm(json.loads((DATA / "events.json").read_text())["videos"].items(), "frames"):
        indices = frame_indices(store.count(name), num_frm)
        first, end = event["event"]
        inside = np.flatnonzero((indices >= first) & (indices < end))
        chosen = {
            "candidates": np.arange(num_frm),
            "oracle": inside[np.linspace(0, len(inside), top_k, endpoint=False).astype(int)],
        }
        images = store.read(name, indices.tolist())
        for kind, places in chosen.items():
            folder = work / kind / name
            folder.mkdir(parents=True, exist_ok=True)
            for number, place in enumerate(places, start=1):
                Image.fromarray(images[place]).save(folder / f"{number:05d}.png")
    done.touch()


def path(work: Path, row: Row, seed: int) -> Path:
    return work / "results" / f"{row.name.replace(' ', '_').replace(',', '')}-{seed}.npy"


def run(work: Path, row: Row, seed: int) -> None:
    """Train and evaluate one row with one seed, unless that is done."""
    matrix = path(work, row, seed)
    if matrix.with_suffix(".json").exists():
        return
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(CONFIG), "--video_dir", "none"]
    command += ["--frames_dir", str(work / row.frames), "--img_tmpl", "{:05d}.png", "--num_workers", "0"]
    command += ["--output_dir", str(work / "runs" / matrix.stem), "--save_similarity", str(matrix), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *row.flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row.name}, seed {seed}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def read_ranks(matrix: Path) -> NDArray[np.int64]:
    """Return text-to-video ranks with ties counted against, computed independently of the package as a check."""
    similarity, ids = np.load(matrix), json.loads(matrix.with_suffix(".json").read_text())
    own = similarity[np.arange(len(similarity)), ids["video_of_query"]]
    return (similarity >= own[:, None]).sum(axis=1)


def needs_order(matrix: Path) -> NDArray[np.bool_]:
    """Return which queries depend on the order of frames."""
    ids, events = json.loads(matrix.with_suffix(".json").read_text()), json.loads((DATA / "events.json").read_text())
    return np.array([events["videos"][ids["videos"][video]]["needs_order"] for video in ids["video_of_query"]])


def videos(matrix: Path) -> list[NDArray[np.int64]]:
    """Return the queries of each video."""
    owners = np.array(json.loads(matrix.with_suffix(".json").read_text())["video_of_query"])
    return [np.flatnonzero(owners == video) for video in np.unique(owners)]


def report(
    table: list[Row],
    ranks: dict[str, NDArray[np.int64]],
    ordered: NDArray[np.bool_],
    videos: list[NDArray[np.int64]],
    seeds: int,
) -> str:
    """Print the table and the share of the gap to the oracle that Hard-Top-k closes."""
    hits = {name: (rank == 1).mean(axis=0) * 100 for name, rank in ranks.items()}  # per query, mean over seeds
    reference = hits[REFERENCE]
    lines = [
        "| row | R@1 | 95 % | R@5 | MedR | R@1, order not needed / needed | R@1 minus the demo's row, paired 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        rank, hit = ranks[row.name], hits[row.name]
        difference = "" if hit is reference else interval(lambda i, hit=hit: (hit[i] - reference[i]).mean(), videos)
        cells = [
            row.name,
            f"{hit.mean():.1f}",
            interval(lambda i, hit=hit: hit[i].mean(), videos),
            f"{100 * (rank <= 5).mean():.1f}",
            f"{np.median(rank):.0f}",
            f"{hit[~ordered].mean():.1f} / {hit[ordered].mean():.1f}",
            difference,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    uniform, oracle = hits["LoRA, K uniform"], hits["LoRA, K of the event"]

    def closed(i: NDArray[np.int64]) -> float:
        return float(100 * (reference[i] - uniform[i]).mean() / (oracle[i] - uniform[i]).mean())

    whole = np.arange(len(reference))
    lines += [
        "",
        f"{len(whole)} queries ({ordered.sum()} need order), {seeds} seed(s); intervals by bootstrap over videos, each "
        f"with all its captions, {RESAMPLES} resamples.",
        f"Hard-Top-k minus uniform: {(reference - uniform).mean():.1f} points "
        f"{interval(lambda i: (reference[i] - uniform[i]).mean(), videos)}. "
        f"It closes {closed(whole):.0f} % of the gap to the oracle {interval(closed, videos)}.",
        "R@1 by seed: " + "; ".join(f"{name}: {by_seed(rank)}" for name, rank in ranks.items()),
    ]
    return "\n".join(lines)


def by_seed(ranks: NDArray[np.int64]) -> str:
    return " ".join(f"{100 * (rank == 1).mean():.1f}" for rank in ranks)


def interval(statistic, videos: list[NDArray[np.int64]]) -> str:  # type: ignore[no-untyped-def]
    """Return the 95 % percentile bootstrap interval of a statistic of query indices, resampling videos with all their
    queries."""
    random = np.random.default_rng(0)
    draws = (random.integers(len(videos), size=len(videos)) for _ in range(RESAMPLES))
    values = [statistic(np.concatenate([videos[video] for video in draw])) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return f"[{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
