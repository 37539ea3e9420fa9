"""Training entries that are made when they are needed, those of several parts as one sequence, and their videos.

Two parts can have different videos of one name. In a mixture a video of a part with its own folder is therefore called
`folder//name`, which is no name of any other video, since names hold no empty part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.frame_store import FrameError, Frames, FrameStore, Scan
from adaclip_finetune.data.json_lines import JsonLines
from adaclip_finetune.data.lazy_sequence import LazySequence
from adaclip_finetune.data.names import split_extension
from adaclip_finetune.data.queries import TrainEntry, train_entries
from adaclip_finetune.data.tar_shards import ShardCaptions
from adaclip_finetune.data.video.decoding import Stopped, never
from adaclip_finetune.errors import UserError


class LazyEntries(LazySequence[TrainEntry]):
    """The training entries of videos that are read one by one. Asking for one that is wrong raises FrameError."""

    def __init__(self, videos: JsonLines | ShardCaptions, concat_captions: str) -> None:
        """`concat_captions` must not be `indep-all`, which makes several entries of a video."""
        self.videos, self.concat_captions = videos, concat_captions

    def __len__(self) -> int:
        return len(self.videos)

    def _row(self, index: int) -> TrainEntry:
        try:
            video = self.videos[index]
        except UserError as error:
            path = self.videos.path
            raise FrameError(f"row {index + 1} of {path.name}", path, str(error).removeprefix(f"{path}: ")) from None
        (entry,) = train_entries([video], self.concat_captions)
        if video.extension and split_extension(video.video_id)[1] is None:
            entry = replace(entry, video_id=f"{video.video_id}.{video.extension}")
        return entry


class MixedEntries(LazySequence[TrainEntry]):
    """The entries of all parts of a mixture, part after part; `places` and `labelled` as the parts say."""

    def __init__(self, parts: Sequence[Sequence[TrainEntry]], places: Sequence[str], labelled: Sequence[bool]) -> None:
        self.parts, self.places, self.labelled = parts, places, labelled
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, index: int) -> TrainEntry:
        part = bisect_right(self._ends, index)
        entry = self.parts[part][index - self._ends[part] + len(self.parts[part])]
        return replace(entry, video_id=name_in(self.places[part], entry.video_id), labelled=self.labelled[part])


class MixedStore:
    """A frame store for the videos of a mixture: the stores by their folder, "" for that of the run."""

    def __init__(self, stores: Mapping[str, FrameStore]) -> None:
        self.stores = stores

    def count(self, video_id: str) -> int:
        with self._found(video_id) as (store, name):
            return store.count(name)

    def times(self, video_id: str) -> NDArray[np.float64] | None:
        with self._found(video_id) as (store, name):
            return store.times(name)

    def stamp(self, video_id: str) -> str:
        with self._found(video_id) as (store, name):
            return store.stamp(name)

    def read(self, video_id: str, indices: Sequence[int]) -> Frames:
        with self._found(video_id) as (store, name):
            return store.read(name, indices)

    def scan(self, video_id: str, stopped: Stopped = never) -> Scan:
        with self._found(video_id) as (store, name):
            yield from store.scan(name, stopped)

    @contextmanager
    def _found(self, video_id: str) -> Iterator[tuple[FrameStore, str]]:
        """Give the store of a video and its name there; a FrameError of the body gets the name in the mixture."""
        place, _, name = video_id.rpartition("//")
        try:
            yield self.stores[place], name
        except FrameError as error:
            raise FrameError(video_id, error.path, error.reason, error.kind) from None


def name_in(place: str, video_id: str) -> str:
    """Return what a video of a part is called in a mixture; `place` is the folder of the part, "" that of the run."""
    return f"{place}//{video_id}" if place else video_id
