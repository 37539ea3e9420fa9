"""Shards: each of several processes, perhaps on several machines, embeds its share of the videos into an index of its
own, a part; `merge.py` joins the parts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import CollectionVideo, VideoCollection


@dataclass(frozen=True)
class Shard:
    """One of `of` shares of the videos of a collection; `number` counts from 1.

    A video stays in its shard when others are added or dropped. Files of one size are in the same shard, and copies of
    a file therefore, too: that they are copies is found where they are embedded.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that `--shard` names: `2/4`, or `auto` for the process of torchrun. Raise UserError."""
        if text == "auto":
            try:
                return cls(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]))
            except (KeyError, ValueError):
                way_out = "start the command with torchrun, or say which shard, such as --shard 1/4"
                raise UserError(f"--shard auto: RANK and WORLD_SIZE are not set; {way_out}") from None
        numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
            raise UserError(f"--shard {text}: write NUMBER/OF with NUMBER from 1 to OF, such as 1/4, or auto")
        return cls(int(numbers[1]), int(numbers[2]))

    def part(self, index: Path) -> Path:
        """Return the folder of the part, beside the folder of the whole index."""
        return index.with_name(f"{index.name}-{self.number}-of-{self.of}")

    def share(self, collection: VideoCollection) -> VideoCollection:
        """Return the videos of a collection that belong to this shard."""
        by_size = isinstance(collection.store, VideoFolder)
        videos = [video for video in collection.videos if self._owns(str(video.stamp.size) if by_size else video.id)]
        broken = {name: reason for name, reason in collection.broken.items() if self._owns(name)}
        ids = {video.id for video in videos}
        transcripts = {name: files for name, files in collection.transcripts.items() if name in ids}
        return replace(collection, videos=videos, broken=broken, transcripts=transcripts)

    def facts(self, collection: VideoCollection) -> dict[str, Any]:
        """Return what a part says of itself: its shard, and a digest of all videos of the collection."""
        return asdict(self) | {"videos": _digest(collection.videos)}

    def _owns(self, key: str) -> bool:
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % self.of == self.number - 1


def _digest(videos: Iterable[CollectionVideo]) -> str:
    digest = hashlib.sha256()
    for video in videos:
        digest.update(repr((video.id, str(video.path), video.stamp, video.captions, video.duration)).encode())
    return digest.hexdigest()
