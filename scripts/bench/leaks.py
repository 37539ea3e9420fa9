"""Probe whether colour histograms or average frames of `dataset_example/` reveal the captions.

    python scripts/bench/leaks.py

Ridge regression fitted on train predicts the words of a caption from features of its clip; test captions then retrieve
the clip whose predicted words are most similar (cosine). The same probe on the frames of the event alone shows that it
finds the answer where the features contain it. Then zero-shot retrieval by the tiny CLIP with frames chosen in several
ways. Prints Markdown for dataset_example/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from adaclip_finetune.data.video.folder import VideoFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain_tiny_clip as pretraining
import shapes_world as world

DATA = Path(__file__).resolve().parents[2] / "dataset_example"
LEVELS = 6  # of each of red, green and blue in a histogram
NEAR = 45  # how far a pixel's red, green and blue may be from a colour to count as that colour
THUMBNAIL = 16  # pixels a side of an average frame
PENALTIES = 10.0 ** np.arange(0, 6)
FRAMES = {  # from the first frame of a clip, the one after its last, and the same of its event
    "4 uniform frames, mean": lambda first, end, *event: np.linspace(first, end, 4, endpoint=False),
    "16 uniform frames, mean": lambda first, end, *event: np.linspace(first, end, 16, endpoint=False),
    "one frame of the event": lambda first, end, *event: np.array([sum(event) / 2]),
    "4 frames of the event, mean": lambda first, end, *event: np.linspace(*event, 4, endpoint=False),
}

Features = NDArray[np.float64]


def main() -> None:
    """Print a row for each kind of feature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    data = parser.parse_args().data
    kinds = {split: features(data, split) for split in ("train", "val", "test")}
    captions = {split: first_sentences(data, split) for split in kinds}
    queries = len(captions["test"])
    print("| what the probe sees | T2V R@1 | R@10 | MedR |\n|---|---|---|---|")
    print(f"| nothing (chance) | {100 / queries:.1f} | {1000 / queries:.1f} | {queries // 2} |")
    for kind in kinds["train"]:
        rank = probe({split: kinds[split][kind] for split in kinds}, captions)
        print(f"| {kind} | {100 * (rank == 1).mean():.1f} | {100 * (rank <= 10).mean():.1f} | {np.median(rank):.0f} |")
    print("\n| frames | R@1 | R@10 |\n|---|---|---|")
    for kind in FRAMES:
        rank = zero_shot(data, kind)
        print(f"| {kind} | {100 * (rank == 1).mean():.1f} | {100 * (rank <= 10).mean():.1f} |")


def zero_shot(data: Path, kind: str) -> NDArray[np.int64]:
    """Return ranks of the clips of the test captions by the mean of unit vectors of the frames that FRAMES names."""
    events = json.loads((data / "events.json").read_text())
    names, store = list(json.loads((data / "test.json").read_text())), VideoFolder(data / "videos", {})
    clip = open_clip.create_model(f"local-dir:{data / 'tiny_clip'}").eval()
    tokens = open_clip.SimpleTokenizer(context_length=clip.context_length)(first_sentences(data, "test"))
    whole = [0, events["frames"]]
    chosen = [FRAMES[kind](*whole, *events["videos"][name]["event"]).astype(int).tolist() for name in names]
    frames = np.concatenate([store.read(name, indices) for name, indices in zip(names, chosen, strict=True)])
    with torch.no_grad():
        image = F.normalize(clip.visual(pretraining.pixels(frames)), dim=-1).unflatten(0, (len(names), -1)).mean(dim=1)
        return _ranks(clip.encode_text(tokens).double().numpy(), image.double().numpy())


def features(data: Path, split: str, every: int = 1) -> dict[str, Features]:
    """Return kind → one row per clip of `split`, in the order of its annotation, from every `every`-th frame."""
    events = json.loads((data / "events.json").read_text())["videos"]
    names = list(json.loads((data / f"{split}.json").read_text()))
    store = VideoFolder(data / "videos", {})
    rows: dict[str, list[Features]] = {}
    for name in names:
        indices = np.arange(0, store.count(name), every)
        frames = store.read(name, indices.tolist())
        first, end = events[name]["event"]
        event = frames[(indices >= first) & (indices < end)]
        for kind, row in {
            "how much of each of the 8 colours, whole clip": palette(frames),
            "how much of each of the 8 colours, event alone": palette(event),
            f"histogram of {LEVELS**3} shades, whole clip": histogram(frames),
            f"histogram of {LEVELS**3} shades, event alone": histogram(event),
            "average frame, whole clip": average(frames),
            "average frame, event alone": average(event),
        }.items():
            rows.setdefault(kind, []).append(row)
    return {kind: np.stack(values) for kind, values in rows.items()}


def first_sentences(data: Path, split: str) -> list[str]:
    """Return one caption per clip."""
    return [entry["sentences"][0] for entry in json.loads((data / f"{split}.json").read_text()).values()]


def palette(frames: NDArray[np.uint8]) -> Features:
    """Return square roots of the fraction of pixels (n, H, W, 3) close to each of the world's colours."""
    colours = np.array(list(world.COLOURS.values()), np.float32)
    pixels = frames.reshape(-1, 3).astype(np.float32)
    squares = ((pixels**2).sum(axis=1, keepdims=True) - 2 * pixels @ colours.T + (colours**2).sum(axis=1)).T
    nearest = np.where(squares.min(axis=0) < NEAR**2, squares.argmin(axis=0), len(colours))
    return np.sqrt(np.bincount(nearest, minlength=len(colours) + 1)[:-1] / len(pixels))


def histogram(frames: NDArray[np.uint8]) -> Features:
    """Return square roots of the frequency of each of LEVELS³ shades over all frames (n, H, W, 3)."""
    levels = frames.reshape(-1, 3).astype(int) * LEVELS // 256
    counts = np.bincount(levels @ (LEVELS**2, LEVELS, 1), minlength=LEVELS**3)
    return np.sqrt(counts / len(levels))


def average(frames: NDArray[np.uint8]) -> Features:
    """Return the mean of the frames (n, H, W, 3), as a flattened thumbnail."""
    mean = frames.mean(axis=0)
    block = mean.shape[0] // THUMBNAIL
    return mean.reshape(THUMBNAIL, block, THUMBNAIL, block, 3).mean(axis=(1, 3)).ravel() / 255


def probe(rows: dict[str, Features], captions: dict[str, list[str]]) -> NDArray[np.int64]:
    """Return ranks of the clips of the test captions, ties counted against; val selects the penalty (mean log rank)."""
    words = sorted({word for sentence in captions["train"] for word in sentence.split()})
    bags = {split: _bags(captions[split], words) for split in captions}
    mean, scale = rows["train"].mean(axis=0), rows["train"].std(axis=0) + 1e-6
    x = {split: (row - mean) / scale for split, row in rows.items()}
    centre = bags["train"].mean(axis=0)

    def ranked(split: str, penalty: float) -> NDArray[np.int64]:
        gram = x["train"] @ x["train"].T
        dual = np.linalg.solve(gram + penalty * np.eye(len(gram)), bags["train"] - centre)
        return _ranks(bags[split] - centre, x[split] @ x["train"].T @ dual)

    best = min(PENALTIES, key=lambda penalty: np.log(ranked("val", penalty)).mean())
    return ranked("test", best)


def _bags(sentences: list[str], words: list[str]) -> Features:
    return np.array([[word in sentence.split() for word in words] for sentence in sentences], float)


def _ranks(queries: Features, clips: Features) -> NDArray[np.int64]:
    similarity = queries @ (clips / (np.linalg.norm(clips, axis=1, keepdims=True) + 1e-12)).T
    return (similarity >= np.diag(similarity)[:, None]).sum(axis=1)


if __name__ == "__main__":
    main()
