"""Make `dataset_example/`: short clips in which something happens for a quarter of the time, and captions that tell it.

Every clip is four shots of two coloured shapes each. One shot, the event, is lit in the middle and is what the caption
tells; the three others are filler. `dataset_example/README.md` says why it is built this way and how well it works.

    python scripts/make_dataset_example.py --out dataset_example --seed 0
The same seed gives the same captions everywhere, and the same frames with the same version of numpy. Which bytes they
become is the encoder's choice; `encode` says what keeps that choice the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import shapes_clips
import shapes_world as world
from numpy.typing import NDArray
from shapes_world import Layout, Scene
from tqdm import tqdm

FRAMES = 48
EVENT_FRAMES = 12
FILLERS = 3
SHORTEST_FILLER = 8
FRAMES_A_SECOND = 12
SPLITS = {"train": 600, "val": 150, "test": 250}
ORDERED_SHARE = 0.28  # of the clips of a split; they come in pairs of which each is the other played backwards
SENTENCES = {  # how many clips have one, two, three … sentences
    "train": (0.0, 0.0, 0.2, 0.3, 0.5),
    "val": (0.7, 0.22, 0.08),
    "test": (0.7, 0.22, 0.08),
}


@dataclass
class Clip:
    """One video before it is drawn: its event, when it starts, and the three filler scenes with the length of each."""

    name: str
    event: Scene
    layout: Layout
    sentences: list[str]
    reversed_of: str | None = None
    fillers: tuple[Scene, ...] = ()
    filler_frames: tuple[int, ...] = ()
    slot: int = 0

    @property
    def event_start(self) -> int:
        """The first frame of the event."""
        return sum(self.filler_frames[: self.slot])


def main() -> None:
    """Write videos, annotations and events of all splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dataset_example"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--order",
        type=int,
        default=0,
        metavar="PAIRS",
        help="also make the splits `order` and `order_val`: so many pairs each of clips that are each other backwards, "
        "with captions as in `test`",
    )
    args = parser.parse_args()

    splits = plan(args.seed, args.order)
    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(tqdm([c for clips in splits.values() for c in clips], desc="clips", unit="clip")):
        encode(args.out / "videos" / f"{clip.name}.mp4", draw(clip, np.random.default_rng([args.seed, 1, number])))
    for split, clips in splits.items():
        write_json(args.out / f"{split}.json", {clip.name: annotation(clip) for clip in clips})
    write_json(args.out / "dataset.json", format_example(splits["val"]))
    write_json(args.out / "events.json", events(splits), seed=args.seed, frames=FRAMES, frames_a_second=FRAMES_A_SECOND)


def plan(seed: int, order_pairs: int = 0) -> dict[str, list[Clip]]:
    """All clips but their pixels. No two share a sentence; no two of a split, save reversed pairs, the same things.

    With `order_pairs` two last splits, `order` and `order_val`, have as many pairs and no other clips; the other splits
    stay as they are.
    """
    rng = np.random.default_rng([seed, 0])
    told: set[Scene] = set()
    splits: dict[str, list[Clip]] = {}
    number = 0
    further = {"order": 2 * order_pairs, "order_val": 2 * order_pairs} if order_pairs else {}
    for split, count in (SPLITS | further).items():
        pairs, amounts = (order_pairs, SENTENCES["test"]) if split in further else (None, SENTENCES[split])
        clips = [
            replace(clip, name=f"clip{number + i:04d}")
            for i, clip in enumerate(_events(count, pairs, amounts, told, rng))
        ]
        _name_partners(clips)
        _add_fillers(clips, rng)
        splits[split] = clips
        number += count
    return splits


def draw(clip: Clip, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The frames of `clip` (FRAMES, height, width, 3)."""
    shots = [
        shapes_clips.Shot(scene, world.random_layout(scene, rng), frames, lit=False)
        for scene, frames in zip(clip.fillers, clip.filler_frames, strict=True)
    ]
    shots.insert(clip.slot, shapes_clips.Shot(clip.event, clip.layout, EVENT_FRAMES, lit=True))
    return shapes_clips.film(shots, rng)


def encode(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write `frames` as H.264 in mp4, in a way that depends neither on the run nor on the processor.

    One thread writes, without time stamps and without x264's routines for particular processors, since these do not
    agree to the bit: with those for AVX-512, its macroblock tree even changed from run to run. Another version of x264
    may still choose other bytes.
    """
    options = {"crf": "26", "preset": "slow", "x264-params": "threads=1:asm=0"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_A_SECOND), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def annotation(clip: Clip) -> dict[str, object]:
    """The entry of `clip` in an annotation file. All its sentences have the tag "order" if they need that of frames."""
    tags = {"tags": [["order"]] * len(clip.sentences)} if clip.event.needs_order else {}
    return {"sentences": clip.sentences, "duration": FRAMES / FRAMES_A_SECOND, **tags}


def format_example(clips: list[Clip]) -> dict[str, dict[str, object]]:
    """A few entries with all the keys that describe a whole video."""
    one = next(c for c in clips if len(c.sentences) == 1)
    two = next(c for c in clips if len(c.sentences) == 2 and c.event.needs_order)
    several = next(c for c in clips if len(c.sentences) == 3)
    start = two.event_start / FRAMES_A_SECOND
    span = [start, start + EVENT_FRAMES / FRAMES_A_SECOND]
    return {
        one.name: {"sentences": one.sentences},
        two.name: {**annotation(two), "extension": "mp4", "timestamps": [span] * 2},
        several.name: annotation(several),
    }


def events(splits: Mapping[str, list[Clip]]) -> dict[str, object]:
    """What an annotation does not say: where the event is (first frame, one after the last), and tags."""
    return {
        clip.name: {
            "split": split,
            "event": [clip.event_start, clip.event_start + EVENT_FRAMES],
            "action": clip.event.action,
            "needs_order": clip.event.needs_order,
            "reversed_of": clip.reversed_of,
        }
        for split, clips in splits.items()
        for clip in clips
    }


def write_json(path: Path, entries: Mapping[str, object], **head: object) -> None:
    """One line an entry, so that a change shows as one; below "videos" where there is a `head`."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
    before, after = (json.dumps(head)[:-1] + ', "videos": {', "}}") if head else ("{", "}")
    path.write_text(f"{before}\n{lines}\n{after}\n", encoding="utf-8")


def _events(
    count: int, pairs: int | None, amounts: tuple[float, ...], told: set[Scene], rng: np.random.Generator
) -> list[Clip]:
    """Events of one split, the colour pairs equally often, `ORDERED_SHARE` of them (or so many) in pairs; shuffled."""
    pairs_of_clips = round(count * ORDERED_SHARE / 2) if pairs is None else pairs
    ordered = [True] * pairs_of_clips + [False] * (count - 2 * pairs_of_clips)
    colour_pairs: list[tuple[str, str]] = []
    seen: set[frozenset[tuple[str, str]]] = set()
    clips: list[Clip] = []
    for needs_order in rng.permutation(ordered):
        if not colour_pairs:
            colour_pairs = [
                tuple(rng.permutation(pair)) for pair in rng.permutation(list(combinations(world.COLOURS, 2)))
            ]
        colours = colour_pairs.pop()
        while True:
            scene = world.random_scene(rng, world.ORDERED_ACTIONS if needs_order else world.PLAIN_ACTIONS, colours)
            looks = frozenset((thing.colour, thing.shape) for thing in (scene.actor, scene.other))
            both = [scene, scene.backwards()] if needs_order else [scene]
            if looks not in seen and not told.intersection(both):
                break
        seen.add(looks)
        layout = world.random_layout(scene, rng)
        for one in both:
            told.add(one)
            amount = 1 + int(rng.choice(len(amounts), p=amounts))
            clips.append(Clip("", one, layout, shapes_clips.sentences(one, rng, amount)))
    return [clips[i] for i in rng.permutation(len(clips))]


def _name_partners(clips: list[Clip]) -> None:
    by_event = {clip.event: clip.name for clip in clips}
    for clip in clips:
        if clip.event.needs_order:
            clip.reversed_of = by_event[clip.event.backwards()]


def _add_fillers(clips: list[Clip], rng: np.random.Generator) -> None:
    """Give each clip three scenes of the kind that events are: same shapes, colours, sizes, actions, equally often.

    They are drawn without a look at the event. (Were every colour in every clip, as a first version had it, the mean of
    uniform frames would tell nothing at all, and zero-shot retrieval would be at chance.)
    """
    for clip in clips:
        clip.fillers = tuple(_filler(rng) for _ in range(FILLERS))
        spare = rng.multinomial(FRAMES - EVENT_FRAMES - FILLERS * SHORTEST_FILLER, [1 / FILLERS] * FILLERS)
        clip.filler_frames = tuple(int(n) + SHORTEST_FILLER for n in spare)
        clip.slot = int(rng.integers(FILLERS + 1))


def _filler(rng: np.random.Generator) -> Scene:
    ordered = rng.random() < ORDERED_SHARE
    return world.random_scene(rng, world.ORDERED_ACTIONS if ordered else world.PLAIN_ACTIONS)


if __name__ == "__main__":
    main()
