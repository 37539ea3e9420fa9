"""Training entries and evaluation queries of annotated videos.

The setting `concat_captions` decides how several sentences of a video are used. `concat` joins them by spaces into one
text. `indep-one` makes one training entry of a video, from which each epoch draws one sentence. `indep-all` makes a
training entry of each sentence. With the last two, each sentence is a query of an evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.sampling import generator


@dataclass(frozen=True)
class TrainEntry:
    """One row of the training set: a video, and the sentences and auxiliary captions of which each epoch takes one."""

    video_id: str
    sentences: tuple[str, ...]
    auxiliary: tuple[str, ...] = ()

    def sentence(self, seed: int, epoch: int, index: int) -> str:
        """Return the sentence of this epoch; `index` is the entry's place in the training set."""
        return _drawn("caption", self.sentences, seed, epoch, index)

    def auxiliary_caption(self, seed: int, epoch: int, index: int) -> str:
        """Return the auxiliary caption of this epoch, "" if the video has none."""
        return _drawn("auxiliary", self.auxiliary, seed, epoch, index) if self.auxiliary else ""


@dataclass(frozen=True)
class Queries:
    """The texts of an evaluation, the gallery of videos in which they are searched, and the video of each text."""

    texts: list[str]
    video_of_text: NDArray[np.int64]  # (T,), an index into video_ids
    video_ids: list[str]  # (V,), each video once

    def within(self, video_ids: Sequence[str]) -> Queries:
        """Return the queries of a smaller gallery: these videos in the order given, their texts in the old order."""
        place = {video_id: i for i, video_id in enumerate(video_ids)}
        kept = [
            (text, place[self.video_ids[video]])
            for text, video in zip(self.texts, self.video_of_text, strict=True)
            if self.video_ids[video] in place
        ]
        return Queries([text for text, _ in kept], np.array([video for _, video in kept], np.int64), list(video_ids))


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
    """Return every text of every video, and the gallery, in which each video occurs once."""
    texts: list[str] = []
    video_of_text: list[int] = []
    video_ids: list[str] = []
    for video in videos:
        of_video = _texts(video, concat_captions)
        texts += of_video
        video_of_text += [len(video_ids)] * len(of_video)
        video_ids.append(video.video_id)
    return Queries(texts, np.array(video_of_text, np.int64), video_ids)


def fingerprint(entries: Sequence[TrainEntry], **evaluated: Queries) -> dict[str, str]:
    """Return digests of the training set and of each evaluation, by which a resumed run recognises its data."""
    parts: dict[str, object] = {"training": [(entry.video_id, entry.sentences, entry.auxiliary) for entry in entries]}
    for name, queries in evaluated.items():
        parts[name] = (queries.texts, queries.video_of_text.tolist(), queries.video_ids)
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _drawn(stream: str, texts: tuple[str, ...], seed: int, epoch: int, index: int) -> str:
    return texts[generator(stream, seed, epoch, index).integers(len(texts))] if len(texts) > 1 else texts[0]


def _texts(video: VideoAnnotation, concat_captions: str) -> list[str]:
    return [" ".join(video.sentences)] if concat_captions == "concat" else list(video.sentences)
