"""Training entries and evaluation queries of annotated videos.

The setting `concat_captions` decides how several sentences of a video are used. `concat` joins them by spaces into one
text. `indep-one` makes one training entry of a video, from which each epoch draws one sentence. `indep-all` makes a
training entry of each sentence. With the last two, each sentence is a query of an evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.sampling import generator

UNTAGGED = "(no tag)"
"""What queries without a tag are called among tagged ones; no tag has parentheses."""


@dataclass(frozen=True)
class TrainEntry:
    """One row of the training set: a video, and the sentences and auxiliary captions of which each epoch takes one.

    The sentences of a row that is not `labelled` do not belong to its video.
    """

    video_id: str
    sentences: tuple[str, ...]
    auxiliary: tuple[str, ...] = ()
    labelled: bool = True

    def sentence(self, seed: int, epoch: int, index: int) -> str:
        """Return the sentence of this epoch; `index` is the entry's place in the training set."""
        return drawn("caption", self.sentences, seed, epoch, index)

    def auxiliary_caption(self, seed: int, epoch: int, index: int) -> str:
        """Return the auxiliary caption of this epoch, "" if the video has none."""
        return drawn("auxiliary", self.auxiliary, seed, epoch, index) if self.auxiliary else ""


@dataclass(frozen=True)
class Queries:
    """The texts of an evaluation, the gallery of videos in which they are searched, and the video of each text.

    `tags` has the names of the kinds of each text; it is empty if the annotation has none.
    """

    texts: list[str]
    video_of_text: NDArray[np.int64]  # (T,), an index into video_ids
    video_ids: list[str]  # (V,), each video once
    tags: list[tuple[str, ...]] = field(default_factory=list)  # (T,) or (0,)

    def within(self, video_ids: Sequence[str]) -> Queries:
        """Return the queries of a smaller gallery: these videos in the order given, their texts in the old order."""
        place = {video_id: i for i, video_id in enumerate(video_ids)}
        kept = [number for number, video in enumerate(self.video_of_text) if self.video_ids[video] in place]
        videos = np.array([place[self.video_ids[self.video_of_text[number]]] for number in kept], np.int64)
        tags = [self.tags[number] for number in kept] if self.tags else []
        return Queries([self.texts[number] for number in kept], videos, list(video_ids), tags)

    def by_tag(self) -> dict[str, NDArray[np.bool_]]:
        """Return which texts (T,) have each tag, by name, and at last which have none; {} if no text has a tag."""
        names = sorted({tag for tags in self.tags for tag in tags})
        masks = {name: np.array([name in tags for tags in self.tags]) for name in names}
        if names and not all(self.tags):
            masks[UNTAGGED] = np.array([not tags for tags in self.tags])
        return masks


def train_entries(videos: Iterable[VideoAnnotation], concat_captions: str) -> list[TrainEntry]:
    """Return the training set, in the order of the annotation."""
    if concat_captions == "indep-one":
        return [TrainEntry(video.video_id, video.sentences, video.auxiliary) for video in videos]
    return [
        TrainEntry(video.video_id, (text,), video.auxiliary)
        for video in videos
        for text in _texts(video, concat_captions)
    ]


def evaluation_queries(videos: Iterable[VideoAnnotation], concat_captions: str) -> Queries:
    """Return every text of every video, and the gallery, in which each video occurs once.

    Joined sentences have the tags of all of them.
    """
    texts: list[str] = []
    tags: list[tuple[str, ...]] = []
    video_of_text: list[int] = []
    video_ids: list[str] = []
    for video in videos:
        of_video, of_sentences = _texts(video, concat_captions), video.tags or ((),) * len(video.sentences)
        texts += of_video
        tags += [tuple(chain(*of_sentences))] if concat_captions == "concat" else of_sentences
        video_of_text += [len(video_ids)] * len(of_video)
        video_ids.append(video.video_id)
    return Queries(texts, np.array(video_of_text, np.int64), video_ids, tags if any(tags) else [])


def digest_of_entries(entries: Iterable[TrainEntry]) -> str:
    """Return a digest of training entries, by which a resumed run recognises its data."""
    return digest_of([(entry.video_id, entry.sentences, entry.auxiliary) for entry in entries])


def digest_of_queries(queries: Queries) -> str:
    """Return a digest of an evaluation, by which a resumed run recognises its data."""
    return digest_of((queries.texts, queries.video_of_text.tolist(), queries.video_ids))


def digest_of(value: object) -> str:
    """Return the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def drawn(stream: str, texts: Sequence[str], seed: int, epoch: int, index: int) -> str:
    """Return the text of this epoch for the entry at `index`; streams draw independently of each other."""
    if len(texts) == 1:
        return texts[0]
    place = int(generator(stream, seed, epoch, index).integers(len(texts)))
    return texts[place]


def _texts(video: VideoAnnotation, concat_captions: str) -> list[str]:
    return [" ".join(video.sentences)] if concat_captions == "concat" else list(video.sentences)
