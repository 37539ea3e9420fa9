"""Write the test clips of `dataset_example/` as annotations of classes, to measure classification and its adaptation.

    python scripts/bench/example_classes.py --out /tmp/classes
    adaclip evaluate RUN --annot /tmp/classes/colours.json --task.method classification

`colours.json` has the 28 pairs of colours that the things of the event have. `kinds.json` has what happens in it, in 17
kinds: an event and its reverse are one, since a mean of frames does not know their order. Verbs name the kinds, and
`templates.txt` puts them between 48 pairs of things: "a large red circle {} a small blue square".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import shapes_world as world  # noqa: E402
from shapes_clips import OTHER_WORDS  # noqa: E402

TEMPLATES = 48
KINDS = {
    "bumps": "bumps into",
    "jumps": "jumps over",
    "circles": "circles around",
    "hides": "hides behind",
    "spins": "spins beside",
    "bounces": "bounces up and down beside",
    "rides": "rides on",
    "splits": "splits in two beside",
    "turns": "alternates with",
    "between": "is in the middle of two",
    "blinks": "blinks beside",
    "left": "moves past",
    "grows": "changes its size beside",
    "appears": "appears and disappears beside",
    "meets": "comes to and goes from",
    "becomes": "turns into",
    "before": "hops before",
}
COLOURS = {OTHER_WORDS[colour]: colour for colour in world.COLOURS} | {colour: colour for colour in world.COLOURS}


def main() -> None:
    """Write the two annotations and the templates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    events = json.loads((ROOT / "dataset_example/events.json").read_text(encoding="utf-8"))["videos"]
    clips = json.loads((ROOT / "dataset_example/test.json").read_text(encoding="utf-8"))
    kinds = {name: KINDS.get(action := events[name]["action"]) or KINDS[world.REVERSED[action]] for name in clips}
    colours = {}
    for name, clip in clips.items():
        words = re.findall(r"\w+", clip["sentences"][0])
        colours[name] = " and ".join(sorted(COLOURS[word] for word in words if word in COLOURS))
    for file, classes in {"kinds": kinds, "colours": colours}.items():
        content = {name: {"sentences": [label]} for name, label in classes.items()}
        (folder / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    random = np.random.default_rng(0)
    scenes = [world.random_scene(random) for _ in range(TEMPLATES)]
    lines = [f"{scene.actor.words()} {{}} {scene.other.words()}\n" for scene in scenes]
    (folder / "templates.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
