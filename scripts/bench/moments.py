"""Where in a video is what a caption says? Windows and shots of the example data, held against its events.

    python train.py --config cfgs/demo.json --output_dir /tmp/demo
    python scripts/bench/moments.py /tmp/demo/dataset_example/RUN
    python scripts/bench/moments.py /tmp/demo/dataset_example/RUN --split val
    python scripts/bench/moments.py dataset_example/tiny_clip

The first table: for each caption, the best moment of its video is compared with the event that the caption describes
(dataset_example/events.json): mean intersection over union in percent, and R@1 at 0.5 and 0.7, the share of captions
for which it is at least that. `whole video` is the span from start to end, `best frame` one second around the frame
with the greatest weight, which is the same for every query. Of windows and shots, `best` is the one with the highest
cosine, `moment` what `adaclip search` shows, and `oracle` the one that fits best, whatever the model says.

The second table: T2V R@1 if videos are ranked by the vector of the whole video (what `adaclip search` does with a
finetuned model), by their best window or shot (with a CLIP), or by the log-sum-exp of their cosines times 10, 20 or 50.
Beside it, what the index costs: seconds of a single process with the model in memory, and the bytes of all its files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from adaclip_finetune import VideoIndex, load_retriever
from adaclip_finetune.search.build import index_videos
from adaclip_finetune.search.collection import collect_annotation
from adaclip_finetune.search.moments import MomentSettings
from adaclip_finetune.search.search_model import SearchModel
from adaclip_finetune.search.stored import read_index

EXAMPLE = Path(__file__).parents[2] / "dataset_example"
LENGTH = 4.0  # seconds, of all clips
SCALES = (10, 20, 50)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """The captions of a split: their vectors (Q, D), the numbers of their videos (Q,), and their events (Q, 2)."""

    vectors: NDArray[np.float32]
    video: NDArray[np.int64]
    events: Floats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    a = parser.parse_args()
    torch.set_num_threads(1)
    model = load_retriever(a.run, device="cpu", num_workers=0)
    config = model.config.model_copy(update={"video_dir": str(EXAMPLE / "videos"), "frames_dir": None})
    collection = collect_annotation(EXAMPLE / f"{a.split}.json", config)
    asked = ask(model, a.split)
    ways: dict[str, MomentSettings | None] = {"no moments": None}
    for window in (2.0, 1.0, 0.5):
        ways[f"windows of {window:g} s"] = MomentSettings("windows", window, window / 2)
    ways["shots"] = MomentSettings("shots")
    located = {"whole video": iou(np.tile([0, LENGTH], (len(asked.video), 1)), asked.events)}
    ranked = []
    for name, settings in ways.items():
        with TemporaryDirectory() as folder:
            place, started = Path(folder) / "my.index", time.perf_counter()
            report = index_videos(model, collection, place, moments=settings)
            seconds = time.perf_counter() - started
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            index, moments = VideoIndex.load(place), [video.moments for video in read_index(place).videos()]
        if settings is None:
            times = np.array([index.videos[row].best_time for row in asked.video], np.float64)
            around = np.stack([times - 0.5, times + 0.5], axis=1).clip(0, LENGTH)
            located["best frame, 1 s around it"] = iou(around, asked.events)
        else:
            located |= {f"{name}, {what}": found for what, found in locate(index, moments, asked).items()}
        ranks = rank(read_vectors(index), moments if settings else [], asked)
        ranked.append((name, report.moments, ranks, size, seconds))
    print(f"{a.split}: {len(asked.video)} captions, {len(collection.videos)} clips\n")
    print("| | mIoU | R@1, IoU 0.5 | R@1, IoU 0.7 |\n|---|---|---|---|")
    for name, found in located.items():
        print(f"| {name} | {100 * found.mean():.1f} | {share(found >= 0.5)} | {share(found >= 0.7)} |")
    scales = " | ".join(f"log-sum-exp, {scale}" for scale in SCALES)
    print(f"\n| T2V R@1 by | moments | whole video | best moment | {scales} | MB | seconds |\n|{'---|' * 9}")
    for name, count, ranks, size, seconds in ranked:
        cells = [*ranks, *[""] * (2 + len(SCALES) - len(ranks))]
        print(f"| {name} | {count or ''} | {' | '.join(cells)} | {size / 1e6:.1f} | {seconds:.0f} |")


def ask(model: SearchModel, split: str) -> Asked:
    """Encode the captions of a split."""
    listed = json.loads((EXAMPLE / f"{split}.json").read_text())
    told = json.loads((EXAMPLE / "events.json").read_text())
    captions = [(number, text) for number, entry in enumerate(listed.values()) for text in entry["sentences"]]
    events = np.array([told["videos"][name]["event"] for name in listed]) / told["frames_a_second"]
    video = np.array([number for number, _ in captions])
    return Asked(model.encode_text([text for _, text in captions]).numpy(), video, events[video])


def read_vectors(index: VideoIndex) -> NDArray[np.float32]:
    """Return the vectors of the videos of an index, in the order of its rows."""
    assert index.distinct == len(index), "copies would have to be told apart"
    vectors: NDArray[np.float32] = index._nearest.reconstruct_n(0, len(index))
    return vectors


def locate(index: VideoIndex, moments: Sequence, asked: Asked) -> dict[str, Floats]:
    """Return the intersection over union of each caption's event with what is found in its video."""
    best, shown, oracle = [], [], []
    for vector, video, event in zip(asked.vectors, asked.video, asked.events, strict=True):
        spans = np.array([(row["start"], row["end"]) for row in moments[video].rows])
        best.append(spans[(moments[video].vectors @ vector).argmax()])
        assert index.moments is not None
        moment = index.moments.of_video(int(video), vector)[0]
        shown.append((moment.start, moment.end))
        oracle.append(spans[iou(spans, event[None]).argmax()])
    return {
        name: iou(np.array(found), asked.events)
        for name, found in {"best": best, "moment": shown, "oracle": oracle}.items()
    }


def rank(vectors: NDArray[np.float32], moments: Sequence, asked: Asked) -> list[str]:
    """Return R@1 by the vectors of whole videos and, if there are moments, by what their cosines are reduced to."""
    scores = [asked.vectors @ vectors.T]
    if moments:
        cosines = [asked.vectors @ of_one.vectors.T for of_one in moments]  # of each video (Q, M)
        scores.append(np.stack([one.max(axis=1) for one in cosines], axis=1))
        for scale in SCALES:
            scores.append(np.stack([np.logaddexp.reduce(scale * one, axis=1) for one in cosines], axis=1))
    return [share((one >= one[np.arange(len(one)), asked.video][:, None]).sum(axis=1) == 1) for one in scores]


def iou(spans: Floats, events: Floats) -> Floats:
    """Return the intersection over union of spans (N, 2) with events (N, 2) or (1, 2)."""
    both = np.minimum(spans[:, 1], events[:, 1]) - np.maximum(spans[:, 0], events[:, 0])
    either = np.maximum(spans[:, 1], events[:, 1]) - np.minimum(spans[:, 0], events[:, 0])
    found: Floats = both.clip(0) / either
    return found


def share(holds: NDArray[np.bool_]) -> str:
    return f"{100 * holds.mean():.1f}"


if __name__ == "__main__":
    main()
