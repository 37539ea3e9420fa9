"""How often runs tell a clip from itself played backwards, on the split `order` of the example data.

    python scripts/bench/reversed_pairs.py output/order-data RUN…

For each run: R@1; how often one of the two clips of a pair is found first, which needs no order; and how often a
caption's own clip has the higher score of the two, which is 50 % for a model that does not know order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from adaclip_finetune.cli import main as adaclip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that make_dataset_example.py wrote with --order")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    arguments = parser.parse_args()
    events = json.loads((arguments.data / "events.json").read_text())["videos"]
    found = [measure(arguments.data, run, events) for run in arguments.runs]
    print(f"{'R@1':>6}{'pair':>6}{'right':>7}")
    for run, figures in zip([*arguments.runs, "mean"], [*found, np.mean(found, axis=0)], strict=True):
        print("".join(f"{100 * figure:6.1f}" for figure in figures), run)


def measure(data: Path, run: Path, events: dict[str, dict[str, str]]) -> list[float]:
    with TemporaryDirectory() as folder:
        path, annotation = Path(folder) / "similarity.npy", str(data / "order.json")
        words = ["train", "--config", str(run / "config.json"), "--do_inference", "--no_output"]
        words += ["--resume", str(run / "best.safetensors"), "--test_annot", annotation, "--embedding_cache", "none"]
        if adaclip([*words, "--video_dir", str(data / "videos"), "--save_similarity", str(path)]):
            raise SystemExit(f"{run} could not be evaluated")
        similarity, ids = np.load(path), json.loads(path.with_suffix(".json").read_text())
    videos, own = ids["videos"], np.array(ids["video_of_query"])
    backwards = np.array([videos.index(events[name]["reversed_of"]) for name in videos])[own]
    rows = np.arange(len(own))
    mine, other = similarity[rows, own], similarity[rows, backwards]
    rest = similarity.copy()
    rest[rows, own] = rest[rows, backwards] = -np.inf
    best = rest.max(axis=1)
    return [
        float(np.mean(mine > np.maximum(best, other))),
        float(np.mean(np.maximum(mine, other) > best)),
        float(np.mean(mine > other)),
    ]


if __name__ == "__main__":
    main()
