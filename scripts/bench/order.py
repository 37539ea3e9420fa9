"""Whether the order of frames is learned on the example data: the tower `change`, and batches of similar captions.

    python scripts/make_dataset_example.py --out output/order-data --order 250
    OMP_NUM_THREADS=1 python scripts/bench/order.py output/order-data

First all of CLIP learns, in random batches, from the mean of frames, which knows no order. Then the image tower is
locked, and the text tower learns on in three ways, with five seeds each: with the tower `change` or the mean, with half
of each epoch in pairs of similar captions (`similar_captions` 2, `similar_share` 0.5) or, the mean alone, in random
batches. To be quick, a clip is four frames of its event. Tested on the split `order`, 250 pairs of clips that are each
other backwards, and on the captions of the split `test` that need no order. Prints Markdown for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.towers import ChangeSettings
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.batches import BatchPlan, Neighbours
from adaclip_finetune.data.preprocess import normalise, to_square
from adaclip_finetune.data.queries import Queries, evaluation_queries, train_entries
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.model.text import ClipTextTower
from adaclip_finetune.model.towers.change import Change
from adaclip_finetune.objectives.contrastive import contrastive_loss
from adaclip_finetune.training.measure import neighbours
from adaclip_finetune.training.session import open_model

ROOT = Path(__file__).resolve().parents[2]
RESAMPLES = 10_000
WARM_UP = 0.1


class Found(NamedTuple):
    """Whether a run ranks each query's video first on a split, and before the same event played backwards."""

    first: NDArray[np.bool_]  # (T,)
    before_reversed: NDArray[np.bool_]  # (queries that need order,)


class Clips:
    """The clips of all splits: token ids of captions, of a small vocabulary, and the event's frames.

    `frames` holds vectors (4, D) of each clip's frames by its name, once `encode` has computed them.
    """

    def __init__(self, data: Path) -> None:
        config = load_config(
            ROOT / "cfgs" / "demo.json", {"similar_captions": 2, "use_policy": False, "peft": {"method": "full"}}
        )
        session = open_model(config)
        self.data = data
        self.events = json.loads((data / "events.json").read_text())["videos"]
        self.entries = train_entries(load_annotations(data / "train.json"), "indep-one")
        self.neighbours = neighbours(session, self.entries)
        self.queries = {name: self._queries(name) for name in ("val", "test", "order")}
        self.view, self.frames = session.loaded.image, dict[str, Tensor]()
        self.pixels = self._pixels()
        texts = {text for entry in self.entries for text in entry.sentences}
        texts |= {text for queries in self.queries.values() for text in queries.texts}
        ids = session.loaded.tokenize(sorted(texts), config.max_txt_len)
        ids = ids[:, : (ids != 0).sum(dim=1).max()]
        # Of the vocabulary, only what occurs: the optimizer's steps over all of it would take most of the time.
        used, small = torch.unique(ids, return_inverse=True)
        self.ids = dict(zip(sorted(texts), small, strict=True))
        self.clip = session.loaded.module.float()
        words = self.clip.get_parameter("token_embedding.weight").detach()[used].clone()
        self.clip.token_embedding = nn.Embedding.from_pretrained(words, freeze=False)

    def _queries(self, split: str) -> Queries:
        return evaluation_queries(load_annotations(self.data / f"{split}.json"), "indep-one")

    def needs_order(self, split: str) -> NDArray[np.bool_]:
        """Return which captions of a split need the order of frames: (T,)."""
        queries = self.queries[split]
        return np.array([self.events[queries.video_ids[video]]["needs_order"] for video in queries.video_of_text])

    def _pixels(self) -> dict[str, Tensor]:
        store, found = VideoFolder(self.data / "videos", {}), {}
        for name, event in self.events.items():
            candidates = frame_indices(store.count(name), 16)
            inside = candidates[(candidates >= event["event"][0]) & (candidates < event["event"][1])]
            chosen = inside[np.linspace(0, len(inside), 4, endpoint=False).astype(int)]
            found[name] = torch.from_numpy(to_square(store.read(name, chosen.tolist()), self.view, None))
        return found

    def vectors(self, names: list[str]) -> Tensor:
        """Return the unit vectors (B, 4, D) that CLIP makes of the frames of clips."""
        pixels = torch.cat([self.pixels[name] for name in names])
        vectors = encode_images(self.clip, normalise(pixels, self.view.mean, self.view.std))
        return F.normalize(vectors, dim=-1).unflatten(0, (len(names), 4))

    @torch.no_grad()
    def encode(self) -> None:
        """Compute `frames` with the image tower as it is."""
        self.frames = {name: self.vectors([name])[0] for name in self.pixels}

    def videos(self, names: list[str]) -> Tensor:
        """Return the vectors (B, 4, D) of the frames of clips."""
        return torch.stack([self.frames[name] for name in names])

    def texts(self, captions: list[str]) -> Tensor:
        """Return the token ids (B, L) of captions."""
        return torch.stack([self.ids[caption] for caption in captions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that make_dataset_example.py wrote with --order")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    clips = Clips(arguments.data)
    before = finetune(clips)
    show("before", 0, before)
    start = {name: tensor.clone() for name, tensor in clips.clip.state_dict().items()}
    found: dict[str, list[dict[str, Found]]] = {}
    similar = replace(clips.neighbours, share=0.5)
    rows = {
        "`change`, half similar": (True, similar),
        "mean, half similar": (False, similar),
        "mean, random": (False, None),
    }
    for name, (knows, pairs) in rows.items():
        for seed in range(arguments.seeds):
            clips.clip.load_state_dict(start)
            found.setdefault(name, []).append(finetune_text(clips, knows, pairs, seed))
            show(name, seed, found[name][-1])
    print(report(clips, found | {"before": [before] * arguments.seeds}))


def show(name: str, seed: int, run: dict[str, Found]) -> None:
    print(name, seed, *(f"{split} {100 * one.first.mean():.1f}" for split, one in run.items()), flush=True)


def finetune(clips: Clips) -> dict[str, Found]:
    """Train all of CLIP in random batches with the mean of the frames, and compute the vectors of all frames."""
    optimizer = torch.optim.AdamW(clips.clip.parameters(), lr=5e-4, weight_decay=0.05)
    plan = BatchPlan((len(clips.entries),), 0)
    found = learn(clips, optimizer, plan, 32, 6, lambda names: clips.vectors(names).mean(dim=1))
    clips.encode()
    return found


def finetune_text(clips: Clips, knows: bool, pairs: Neighbours | None, seed: int) -> dict[str, Found]:
    """Train the text tower and, if the video `knows` the order, the map of its change."""
    tower, real = Change(ChangeSettings(), clips.clip), torch.ones(1, 4, dtype=torch.bool)
    text = [weight for name, weight in clips.clip.named_parameters() if not name.startswith("visual.")]
    groups = [{"params": text, "lr": 1e-3}, *([{"params": [tower.maps], "lr": 3e-3}] if knows else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    plan = BatchPlan((len(clips.entries),), seed, neighbours=pairs)
    return learn(clips, optimizer, plan, 16, 20, lambda names: tower.combine(clips.videos(names), real)[:, 0])


def learn(
    clips: Clips,
    optimizer: torch.optim.Optimizer,
    plan: BatchPlan,
    batch_size: int,
    epochs: int,
    vectors_of: Callable[[list[str]], Tensor],
) -> dict[str, Found]:
    """Train on the contrastive loss of captions and the vectors (B, D) of clips, and evaluate the last epoch."""
    text, steps = ClipTextTower(clips.clip), epochs * plan.num_batches(batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )

    def similarity(captions: list[str], names: list[str]) -> Tensor:
        sentences = F.normalize(text(clips.texts(captions)).sentence, dim=-1)
        return sentences @ F.normalize(vectors_of(names), dim=-1).T

    for epoch in range(epochs):
        for batch in plan.epoch(epoch, batch_size):
            rows = [clips.entries[row] for row in batch]
            captions = [one.sentence(plan.seed, epoch, row) for one, row in zip(rows, batch, strict=True)]
            cosines = similarity(captions, [one.video_id for one in rows])
            optimizer.zero_grad()
            contrastive_loss(clips.clip.get_parameter("logit_scale").exp() * cosines).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return {
            name: evaluate(clips, queries, similarity(queries.texts, queries.video_ids).numpy())
            for name, queries in clips.queries.items()
        }


def evaluate(clips: Clips, queries: Queries, similarity: NDArray[np.float32]) -> Found:
    own = similarity[np.arange(len(similarity)), queries.video_of_text]
    place = {name: number for number, name in enumerate(queries.video_ids)}
    partners = [clips.events[queries.video_ids[video]]["reversed_of"] for video in queries.video_of_text]
    before = [own[text] > similarity[text, place[name]] for text, name in enumerate(partners) if name]
    return Found((similarity >= own[:, None]).sum(axis=1) == 1, np.array(before))


def report(clips: Clips, found: dict[str, list[dict[str, Found]]]) -> str:
    """Return the table, with bootstrap intervals over videos with all their captions and over seeds."""
    owners = clips.queries["order"].video_of_text
    groups = [np.flatnonzero(owners == video) for video in np.unique(owners)]
    first, right = (
        {name: np.stack([getattr(run["order"], what) for run in runs]).astype(float) for name, runs in found.items()}
        for what in ("first", "before_reversed")
    )
    reference, plain = next(iter(found)), ~clips.needs_order("test")
    columns = "row", "R@1", "first row minus", "right one of a pair (validation)", "first row minus"
    lines = [f"| {' | '.join(columns)} | R@1, order not needed |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        minus = ["" if name == reference else interval(one[reference] - one[name], groups) for one in (first, right)]
        validation, other = (
            100 * np.mean([getattr(run[split], what)[chosen] for run in runs])
            for split, what, chosen in (("val", "before_reversed", slice(None)), ("test", "first", plain))
        )
        pairs = f"{100 * right[name].mean():.1f} ({validation:.1f})"
        lines.append(f"| {name} | {100 * first[name].mean():.1f} | {minus[0]} | {pairs} | {minus[1]} | {other:.1f} |")
    return "\n".join(lines)


def interval(differences: NDArray[np.float64], groups: list[NDArray[np.int64]]) -> str:
    """Return the mean of differences (seeds, queries) in points, and its 95 % percentile bootstrap interval."""
    random, values = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([groups[group] for group in random.integers(len(groups), size=len(groups))])
        values.append(differences[random.integers(len(differences), size=len(differences))][:, chosen].mean())
    low, high = np.percentile(values, [2.5, 97.5]) * 100
    return f"{100 * differences.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
