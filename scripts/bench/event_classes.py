"""Write the clips of `dataset_example/` as annotations of classes: what happens in the event, in 17 kinds.

    python scripts/bench/event_classes.py --out /tmp/events
    adaclip evaluate RUN --annot /tmp/events/test.json --task.method classification \
        --task.config.templates /tmp/events/templates.txt --max_txt_len 32

An event and its reverse are one class, since a mean of frames does not know their order. A class is named by a verb,
and the templates put it between 48 pairs of things: "a large red circle {} a small blue square".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import shapes_world as world  # noqa: E402

TEMPLATES = 48
NAMES = {
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


def main() -> None:
    """Write val.json, test.json and templates.txt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    videos = json.loads((ROOT / "dataset_example/events.json").read_text(encoding="utf-8"))["videos"]
    for split in ("val", "test"):
        actions = {name: video["action"] for name, video in videos.items() if video["split"] == split}
        classes = {name: NAMES.get(action) or NAMES[world.REVERSED[action]] for name, action in actions.items()}
        content = {name: {"sentences": [label]} for name, label in classes.items()}
        (folder / f"{split}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    random = np.random.default_rng(0)
    scenes = [world.random_scene(random) for _ in range(TEMPLATES)]
    lines = [f"{scene.actor.words()} {{}} {scene.other.words()}\n" for scene in scenes]
    (folder / "templates.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
