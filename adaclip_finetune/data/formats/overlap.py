"""Do splits share source videos or captions? Asked of hashes, so that it fits into memory for ten million entries."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.formats.clip import Clip

NUM_EXAMPLES = 3


class Contents:
    """What stands in one written split: a number for each source video and each caption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups, self.captions = array("q"), array("q")

    def add(self, clip: Clip, sentences: list[str]) -> None:
        """Note a clip with the sentences that it was written with."""
        self.groups.append(hash(clip.group or clip.video))
        self.captions.extend(hash(sentence.casefold()) for sentence in sentences)


def shared_between(contents: Mapping[str, Contents]) -> Iterator[str]:
    """A line of warning for each two splits that share source videos, and for each that share captions."""
    for one, other in itertools.combinations(contents, 2):
        for kind in ("groups", "captions"):
            common = _common(getattr(contents[one], kind), getattr(contents[other], kind))
            if len(common):
                smaller = min(contents[one], contents[other], key=lambda content: len(content.groups))
                what = "source videos" if kind == "groups" else "captions"
                examples = ", ".join(map(repr, _examples(smaller.path, kind, set(common.tolist()))))
                yield f"warning: {one} and {other} share {len(common):,} {what}, such as {examples}"


def _common(one: array[int], other: array[int]) -> NDArray[np.int64]:
    """The numbers that stand in both; sorts them in place, where they are."""
    small, large = sorted((np.frombuffer(a, np.int64) if a else np.zeros(0, np.int64) for a in (one, other)), key=len)
    if not len(small):
        return small
    small.sort()
    large.sort()
    places = np.searchsorted(large, small).clip(max=len(large) - 1)
    return np.unique(small[large[places] == small])


def _examples(path: Path, kind: str, common: set[int]) -> list[str]:
    """The first few groups or captions behind the numbers, from the written file, which has a video a line."""
    found: dict[str, None] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if len(found) < NUM_EXAMPLES and line.startswith('"'):
                entries: dict[str, Any] = json.loads("{" + line.rstrip(",\n") + "}")
                for video, entry in entries.items():
                    texts = entry["sentences"] if kind == "captions" else [entry.get("group", video)]
                    found.update(dict.fromkeys(text for text in texts if hash(_key(text, kind)) in common))
    return list(found)[:NUM_EXAMPLES]


def _key(text: str, kind: str) -> str:
    return text.casefold() if kind == "captions" else text
