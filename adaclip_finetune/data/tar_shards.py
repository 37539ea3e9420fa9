"""Videos and captions in tar files, read in place, in the layout of WebDataset: members of one key are one sample.

    shard-000.tar: 0001.mp4, 0001.txt, 0002.webm, 0002.json {"caption": "…" or ["…"], or "sentences": ["…"]}, …

A key is a name up to the first dot of its last part. The webdataset package streams shards one after the other and
shuffles within a buffer. An index of where each member begins costs one walk over the headers, which later runs
remember, and gives what streaming cannot: one permutation over all shards, shares of processes and workers like those
of any other data, and runs that resume at any batch.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.annotations import VideoAnnotation, parse_video, shown
from adaclip_finetune.data.frame_store import FrameError, place_and_stamp
from adaclip_finetune.data.lazy_sequence import LazySequence
from adaclip_finetune.data.names import canonical, split_extension
from adaclip_finetune.data.video.decoding import Member
from adaclip_finetune.data.video.folder import DecodedStore
from adaclip_finetune.data.video.index import cache_folder, index_video, pack_index
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import decoded, parse_json

FORMAT = 1  # to be raised whenever the index of the same shards would be another
# A sample: a digest of its key, its shard, the place and size of its video (size -1: none), and where the header of its
# caption begins (-1: none).
SAMPLE = np.dtype([("key", "<u8"), ("shard", "<i4"), ("video", "<i8"), ("size", "<i8"), ("caption", "<i8")])
_CAPTIONS = ("txt", "json")  # the first one that a sample has: JSON beside a text often holds other facts
_KEPT = 4096  # videos whose frame index is kept


class TarShards(DecodedStore[Member]):
    """A frame store for the videos in `folder/*.tar`, whose names are their keys."""

    def __init__(self, folder: Path) -> None:
        """Index the shards. Raises UserError for one that is no plain tar file, and for a key that occurs twice."""
        super().__init__()
        self.folder, self.shards = folder, sorted(folder.glob("*.tar"))
        facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.shards]
        cache = _cache_file(folder)
        samples = _load(cache, facts)
        if samples is None:
            samples = np.concatenate([np.zeros(0, SAMPLE), *map(_index, range(len(self.shards)), self.shards)])
            _save(cache, facts, samples)
        self.samples: NDArray[Any] = samples
        self._order = np.argsort(samples["key"])
        self._keys = samples["key"][self._order]
        if (twice := np.flatnonzero(self._keys[1:] == self._keys[:-1])).size:
            one, other = (self.shards[samples["shard"][self._order[twice[0] + step]]] for step in (0, 1))
            raise UserError(f"{folder}: {one.name} and {other.name} hold samples of one key; keys must differ")

    def stamp(self, video_id: str) -> str:
        member = self.locate(video_id)
        return f"{place_and_stamp(video_id, member.path)} {member}"

    def locate(self, video_id: str) -> Member:
        """Return where the video is, named by its key, with or without an extension. Raises FrameError."""
        for name in (video_id, split_extension(video_id)[0]):
            place = int(np.searchsorted(self._keys, key := _digest_of_key(name)))
            if place < len(self._keys) and self._keys[place] == key:
                sample = self.samples[self._order[place]]
                if sample["size"] >= 0:
                    return Member(self.shards[sample["shard"]], int(sample["video"]), int(sample["size"]))
        raise FrameError(video_id, self.folder, "no shard holds a video of this key", "missing")

    def _packed_index(self, source: Member) -> bytes:
        if len(self._indices) >= _KEPT:
            self._indices.clear()
        return pack_index(index_video(source))


class ShardCaptions(LazySequence[VideoAnnotation]):
    """The samples of tar shards that have a caption, in the order of the shards, each read when it is asked for.

    Only the first `at_most` count if that is above 0. Asking for one that is wrong raises UserError.
    """

    def __init__(self, shards: TarShards, at_most: int = 0) -> None:
        """Raise UserError if no sample has a caption, or the first caption is wrong."""
        self.path, self._shards = shards.folder, shards.shards
        samples = shards.samples[shards.samples["caption"] >= 0][: at_most or None]
        self._places = np.stack([samples["shard"].astype(np.int64), samples["caption"]], axis=1)  # (captions, 2)
        if not len(self):
            raise UserError(f"{self.path}: no tar shard in this folder holds a caption (KEY.txt or KEY.json)")
        self[0]

    @property
    def digest(self) -> str:
        """A digest of the names of the shards and the places of the captions."""
        names = json.dumps([path.name for path in self._shards])
        return hashlib.sha256(names.encode() + self._places.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def _row(self, index: int) -> VideoAnnotation:
        shard, place = self._places[index].tolist()
        path = self._shards[shard]
        try:
            with tarfile.open(path, "r:") as tar:
                assert tar.fileobj is not None
                tar.fileobj.seek(place)
                member = tarfile.TarInfo.fromtarfile(tar)
                tar.fileobj.seek(member.offset_data)
                content = tar.fileobj.read(member.size)
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be read at byte {place}: {error}") from error
        where = f"{path}: {member.name}"
        text = decoded(content, where)
        key, extension = _split(member.name)
        return parse_video(where, key, {"sentences": [text] if extension == "txt" else _sentences(where, text)})


def _sentences(where: str, text: str) -> Any:
    """Return what a JSON member gives as captions."""
    facts = parse_json(text, where)
    if not isinstance(facts, dict) or not (facts.keys() & {"caption", "sentences"}):
        raise UserError(f'{where}: expected an object with "caption" or "sentences", got {shown(facts)}')
    found = facts["sentences"] if "sentences" in facts else facts["caption"]
    return [found] if isinstance(found, str) else found


def _index(number: int, path: Path) -> NDArray[Any]:
    """Return the samples of a shard, in the order in which they begin. Raises UserError."""
    found: dict[str, dict[str, tuple[int, int]]] = {}  # key → "video" or the kind of caption → place, size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep them all
                key, extension = _split(member.name)
                if not member.isfile():
                    continue
                if extension in _CAPTIONS:
                    kind, place = extension, member.offset
                elif split_extension(member.name)[1] is not None:
                    kind, place = "video", member.offset_data
                else:
                    continue
                if kind in found.setdefault(key, {}):
                    raise UserError(f"{path}: holds two members {kind} of the key {key!r}; keys must differ")
                found[key][kind] = place, member.size
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as a plain tar file: {error}") from error
    samples = np.zeros(len(found), SAMPLE)
    for row, (key, parts) in enumerate(found.items()):
        caption = next((parts[kind][0] for kind in _CAPTIONS if kind in parts), -1)
        samples[row] = (_digest_of_key(key), number, *parts.get("video", (0, -1)), caption)
    return samples


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member into its key and its extension, in lower case."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _digest_of_key(key: str) -> np.uint64:
    digest = hashlib.blake2b(canonical(key).encode(errors="surrogateescape"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def holds_shards(folder: Path) -> bool:
    """Return whether a folder holds tar files, and neither folders nor files that are called like videos."""
    entries: list[Path] = []
    with suppress(OSError):  # whoever looks for a video will tell
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(entry.suffix == ".tar" for entry in entries) and not any(
        entry.is_dir() or split_extension(entry.name)[1] is not None for entry in entries
    )


# ---- the index, kept in the user's cache folder between runs; where it cannot be, shards are indexed again ----


def _cache_file(folder: Path) -> Path | None:
    with suppress(RuntimeError):
        name = hashlib.sha256(f"{FORMAT} {folder.resolve()}".encode(errors="surrogateescape")).hexdigest()[:32]
        return cache_folder() / "shards" / f"{name}.npz"
    return None


def _load(path: Path | None, facts: list[Any]) -> NDArray[Any] | None:
    """Return the samples that were saved with the same facts, None if there are none."""
    if path is not None:
        with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as saved:
            if json.loads(str(saved["facts"])) == facts:
                samples: NDArray[Any] = saved["samples"]
                return samples
    return None


def _save(path: Path | None, facts: list[Any], samples: NDArray[Any]) -> None:
    if path is not None:
        content = io.BytesIO()
        np.savez(content, facts=np.array(json.dumps(facts)), samples=samples)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, content.getvalue(), shared=True)
