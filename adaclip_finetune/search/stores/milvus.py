"""`MilvusStore`: the vectors of an index in Milvus (Wang et al. 2021), a cluster or a file, through pymilvus.

Three collections hold an index: NAME a row for each video, NAME_moments one for each window, and NAME_about what
`IndexInfo` says. The primary key of a row is derived from the id of its video, so it never changes. A row holds the row
of the index as JSON, from which hits are made, and what conditions ask for. That of a video is written after those of
its windows, with a digest of them all: a push that was interrupted goes on with the videos whose digest is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import (
    MOMENTS_A_VIDEO,
    THUMBS,
    Hit,
    IndexedVideo,
    indexed_video,
    key_of,
    unit_queries,
)
from adaclip_finetune.search.indexed_moments import FoundMoment, Windows, found_moments
from adaclip_finetune.search.stored import EmbeddedVideo, IndexInfo
from adaclip_finetune.search.stores.base import digest_of
from adaclip_finetune.search.transcripts import FoundLine
from adaclip_finetune.search.where import Condition, columns, conditions, rows_where

TOKEN = "MILVUS_TOKEN"
"""The environment variable with the API key, or USER:PASSWORD, if the server asks for one."""

_SERVER = re.compile(r"milvus(?P<tls>\+https)?://(?P<host>[^/?#@]+)/(?P<name>[A-Za-z_]\w{0,199})", re.ASCII)
_FILE = re.compile(r"milvus://(?P<path>/.+\.db)")
_NAME_IN_FILE = "videos"
_LONGEST, _MOST = 65_535, 16_384  # bytes of a text, and rows that one search finds: limits of Milvus
_ROWS_AT_ONCE = 500
_WINDOWS_A_VIDEO = 8  # among those that a query finds first, as a guess
_GRAPH = {"M": 32, "efConstruction": 128}
_LEAST_CANDIDATES = 128  # of a search in the graph
# By default, a server of gRPC closes connections that are kept alive more often than every five minutes.
_CONNECTION = {"grpc.keepalive_time_ms": 600_000}
_NOT_OPENED = "Open local milvus failed"
_NARROWED = 8  # conditions whose number of videos is remembered


class _Stored(NamedTuple):
    """A video as it is stored: the digest of its id, and its row."""

    owner: str
    video: IndexedVideo


class MilvusStore:
    """The videos of an index in Milvus, searched as `VideoIndex` searches them in their folder.

    A query is compared with every vector or, with `hnsw`, only with those that a graph leads to (Malkov and Yashunin
    2018). Videos with the same vector are one hit, and the first of them is the one whose id comes first.
    """

    fuses = False

    def __init__(self, place: str, hnsw: bool = False, make: bool = False) -> None:
        """Connect to `milvus://HOST:PORT/COLLECTION`, `milvus+https://…`, or `milvus:///FILE.db`, which must exist
        unless `make` is given. Raise UserError."""
        self.place, self._hnsw = place, hnsw
        uri, self.name = _address(place)
        if uri.startswith("/") and not (Path(uri).parent.is_dir() if make else Path(uri).exists()):
            raise UserError(f"{place}: there is no {Path(uri).parent if make else uri}")
        try:
            import pymilvus
        except ImportError as error:
            raise UserError(f"{place}: needs pymilvus: pip install 'adaclip-finetune[milvus]'") from error
        for logger in ("pymilvus", "milvus_lite"):  # they would log what is raised, with a traceback
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        self._pymilvus = pymilvus
        self._videos, self._windows, self._about = self.name, f"{self.name}_moments", f"{self.name}_about"
        with self._explained():
            token = os.environ.get(TOKEN, "")
            self._client = pymilvus.MilvusClient(uri, token=token, timeout=30, grpc_options=_CONNECTION)
            self._read_about()
        self._counted = lru_cache(_NARROWED)(self._count_where)

    def open(self) -> None:
        """Make it ready to be searched. Raise UserError if an index was not pushed, or not to the end."""
        if not self._facts.get("finished"):
            what = "a push was interrupted; the same command continues" if self._facts else "no index was pushed"
            raise UserError(f"{self.place}: {what}: `adaclip index push NAME.index {self.place}`")
        with self._explained():
            for name in (self._videos, self._windows):
                self._client.load_collection(name)

    def _read_about(self) -> None:
        self._facts: dict[str, Any] = {}
        if self._client.has_collection(self._about):
            self._client.load_collection(self._about)
            for row in self._client.get(self._about, "about", ["facts"], consistency_level="Strong"):
                self._facts = json.loads(row["facts"])
        elif self._client.has_collection(self._videos):
            raise UserError(f"{self.place}: `adaclip index push` did not make this collection; give another name")
        facts = {"info": {"fingerprint": "", "run": "", "settings": {}, "source": ""}, **self._facts}
        self.info, self.width = IndexInfo(**facts["info"]), int(facts.get("width", 0))
        self.distinct, self.folder = int(facts.get("distinct", 0)), Path(facts.get("folder", ""))
        self.moments = range(facts.get("moments", 0)) if self.info.moments else None

    def __len__(self) -> int:
        return int(self._facts.get("videos", 0))

    # ---- filling ----

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model of the vectors; None if nothing has been stored yet."""
        return self.info.fingerprint or None

    def begin(self, info: IndexInfo, width: int, folder: Path) -> None:
        kind = self._pymilvus.DataType
        text, number = kind.VARCHAR, kind.INT64
        own = dict.fromkeys(("owner", "grp", "video", "name", "folder", "date", "row"), text)
        with self._explained():
            self._make(self._about, {"facts": text}, 2)
            # Written first, so that a push of another model at the same time is refused.
            self._facts |= {"info": asdict(info), "width": width, "folder": str(folder)}
            self._write_about()
            self._make(self._videos, {**own, "key": text, "digest": text}, width)
            self._make(self._windows, {**own, "number": number}, width)
            self._read_about()

    def digests(self) -> dict[str, str]:
        return {row["video"]: row["digest"] for row in self._rows(self._videos, "", "video", "digest")}

    def upsert(self, videos: Sequence[EmbeddedVideo]) -> None:
        rows, windows = [], []
        owners: dict[int, list[str]] = defaultdict(list)  # by number of windows
        for video in videos:
            own = _own_fields(video)
            parts = video.moments.rows if video.moments else []
            owners[len(parts)].append(own["owner"])
            line = json.dumps(video.row)
            known = {"row": line, "key": key_of(line.encode()), "digest": digest_of(video)}
            rows.append({"pk": own["owner"], "vector": _floats(video.vector), **own, **known})
            for number, part in enumerate(parts):
                assert video.moments is not None
                about = {"pk": f"{own['owner']}/{number}", "number": number, "row": json.dumps(part)}
                windows.append({"vector": _floats(video.moments.vectors[number]), **own, **about})
            if (size := len(line.encode())) > _LONGEST:
                raise UserError(f"{video.row['id']}: its row takes {size:,} bytes; Milvus keeps at most {_LONGEST:,}")
        with self._explained():
            self._write(self._windows, windows)
            for count, same in owners.items():  # windows beyond are those of an earlier push
                self._client.delete(self._windows, filter=f"{_among('owner', same)} and number >= {count}")
            self._write(self._videos, rows)

    def delete(self, ids: Collection[str]) -> None:
        owners = [_owner(name) for name in ids]
        with self._explained():
            for start in range(0, len(owners), _ROWS_AT_ONCE):
                for name in (self._windows, self._videos):
                    self._client.delete(name, filter=_among("owner", owners[start : start + _ROWS_AT_ONCE]))

    def finish(self) -> None:
        rows = list(self._rows(self._videos, "", "grp", "metadata"))
        fields = {field for row in rows for field in row["metadata"] or ()}
        with self._explained():
            for name in (self._videos, self._windows):
                self._client.flush(name)  # what is not on disk has no index yet
            (found,) = self._client.query(self._windows, "", ["count(*)"], consistency_level="Strong")
            self._facts |= {"finished": True, "videos": len(rows), "moments": int(found["count(*)"])}
            self._facts |= {"distinct": len({row["grp"] for row in rows}), "fields": sorted(fields)}
            self._write_about()
            self._read_about()
        self._counted.cache_clear()

    def _write_about(self) -> None:
        facts = json.dumps(self._facts)
        self._client.upsert(self._about, [{"pk": "about", "vector": [1.0, 0.0], "facts": facts}])

    def _write(self, collection: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            self._client.upsert(collection, list(rows[start : start + _ROWS_AT_ONCE]))

    def _make(self, name: str, fields: Mapping[str, Any], width: int) -> None:
        """Make a collection if there is none. If there is one, change its index if a graph is wanted."""
        kind: dict[str, Any] = {"index_type": "HNSW", "params": _GRAPH} if self._hnsw else {"index_type": "FLAT"}
        indexes = self._client.prepare_index_params()
        indexes.add_index("vector", metric_type="IP", **kind)
        if self._client.has_collection(name):
            if self._hnsw and self._client.describe_index(name, "vector")["index_type"] != "HNSW":
                self._client.release_collection(name)
                self._client.drop_index(name, "vector")
                self._client.create_index(name, indexes)
            self._client.load_collection(name)
            return
        kinds = self._pymilvus.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("pk", kinds.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=width)
        for field, type_ in fields.items():
            schema.add_field(field, type_, **({"max_length": _LONGEST} if type_ == kinds.VARCHAR else {}))
        if name != self._about:
            schema.add_field("duration", kinds.DOUBLE, nullable=True)
            schema.add_field("metadata", kinds.JSON, nullable=True)
        for field in sorted({"owner", "grp", "key"} & fields.keys()):
            indexes.add_index(field, index_type="INVERTED")
        self._client.create_collection(name, schema=schema, index_params=indexes)

    # ---- searching ----

    def search(
        self,
        vectors: Any,
        k: int,
        ranks: slice = slice(None),
        score: Literal["whole", "moment"] | None = None,
        where: Sequence[str] = (),
        lines: Sequence[Mapping[str, FoundLine]] | None = None,
    ) -> list[list[Hit]]:
        """Return the k best videos for each query, as `VideoIndex.search` does, but without `lines`, which need the
        ranks of all videos. Raise UserError."""
        if lines is not None:
            raise UserError(f"{self.place}: does not fuse rankings: search the folder of the index")
        queries, stated = unit_queries(vectors, k, self.width, self.place), self._conditions(where)
        by_moment = self.ranked_by(score) == "moment"
        if by_moment:
            self.need_moments()
        found = []
        for query in queries:
            best = self._best_of_moments(query, k, stated) if by_moment else self._nearest(query, k, stated)
            chosen = list(enumerate(best.items(), 1))[ranks]
            videos = self._videos_of([group for _, (group, _) in chosen], stated)
            moments = self._moments_of([videos[group][0] for group in videos], query)
            hits = []
            for rank, (group, cosine) in chosen:
                if group not in videos:  # deleted in the meantime
                    continue
                first, *copies = videos[group]
                own = tuple(moments.get(first.owner, ())[:MOMENTS_A_VIDEO])
                hits.append(Hit(first.video, cosine, rank, tuple(copy.video for copy in copies), own))
            found.append(hits)
        return found

    def search_moments(
        self, vectors: Any, k: int, ranks: slice = slice(None), where: Sequence[str] = ()
    ) -> list[list[Hit]]:
        """Return the k best moments of all videos for each query, best first. Raise UserError."""
        self.need_moments()
        stated, found = self._conditions(where), []
        for query in unit_queries(vectors, k, self.width, self.place):
            # The best moment of a video scores what its best window scores, so that k videos have the k best moments.
            best = islice(self._ranked(self._windows, query, k, stated), k)
            videos = self._videos_of([group for group, _ in best], stated)
            moments = self._moments_of([same[0] for same in videos.values()], query)
            firsts = {same[0].owner: same for same in videos.values()}
            every = [(moment, firsts[owner]) for owner, own in moments.items() for moment in own]
            every.sort(key=lambda one: -one[0].score)
            hits = [
                Hit(first.video, moment.score, rank, tuple(copy.video for copy in copies), (moment,))
                for rank, (moment, (first, *copies)) in list(enumerate(every[:k], 1))[ranks]
            ]
            found.append(hits)
        return found

    def ranked_by(self, score: Literal["whole", "moment"] | None = None) -> Literal["whole", "moment"]:
        """Return what ranks videos if `search` is given this `score`."""
        return score or ("moment" if self.info.untrained and self.moments is not None else "whole")

    def count(self, where: Sequence[str] = ()) -> int:
        """Return the number of different videos for which these conditions hold. Raise UserError."""
        return self._counted(tuple(where)) if where else self.distinct

    def need_moments(self) -> range:
        """Return the numbers of the moments of the index. Raise UserError if it has none."""
        if self.moments is None:
            way_out = "`adaclip index … --moments` makes an index with moments, and `adaclip index push` stores them"
            raise UserError(f"{self.place}: has no moments; {way_out}")
        return self.moments

    def nearest(self, vector: NDArray[np.float32], k: int) -> tuple[list[IndexedVideo], NDArray[np.float32]]:
        """Return the k nearest videos to a unit vector (D,), best first and copies as one, and their vectors (k, D)."""
        best = self._nearest(vector, k, [])
        videos = self._videos_of(best, [])
        firsts = [videos[group][0] for group in best if group in videos]
        expression = _among("owner", [first.owner for first in firsts])
        rows = {row["owner"]: row["vector"] for row in self._rows(self._videos, expression, "owner", "vector")}
        return [first.video for first in firsts], np.array([rows[first.owner] for first in firsts], np.float32)

    def find(self, key: str) -> IndexedVideo | None:
        """Return the video of a key, or None."""
        rows = list(self._rows(self._videos, _among("key", [key]), "row"))
        return indexed_video(rows[0]["row"].encode(), self.folder / THUMBS) if rows else None

    def moment_picture(self, key: str, number: int) -> Path | None:
        """Return the JPEG of the best frame of a window of the video of a key, or None if it has no such window."""
        for video in self._rows(self._videos, _among("key", [key]), "owner"):
            for row in self._rows(self._windows, f"{_among('owner', [video['owner']])} and number == {number}", "row"):
                return self.folder / THUMBS / Path(json.loads(row["row"])["thumb"]).name
        return None

    def _nearest(self, query: NDArray[np.float32], k: int, stated: Sequence[Condition]) -> dict[str, float]:
        """Return the k groups of videos whose vector is nearest to a query, with their scores, best first."""
        return dict(islice(self._ranked(self._videos, query, k, stated), k))

    def _best_of_moments(self, query: NDArray[np.float32], k: int, stated: Sequence[Condition]) -> dict[str, float]:
        """Return k groups of videos by their best windows, and after them those that were not divided."""
        best = dict(islice(self._ranked(self._windows, query, k, stated), k))
        if len(best) < k:
            best |= islice(self._ranked(self._videos, query, k, stated, best), k - len(best))
        return best

    def _ranked(
        self,
        collection: str,
        query: NDArray[np.float32],
        wanted: int,
        stated: Sequence[Condition],
        known: Collection[str] = (),
    ) -> Iterator[tuple[str, float]]:
        """Yield groups of videos with the same vector, and the score of their best row, best first, without `known`.

        Milvus finds a limited number of rows, of which several may be of one group. So those that were found are left
        out of the next search, until there are no more.
        """
        found = set(known)
        limit = min(wanted * (_WINDOWS_A_VIDEO if collection == self._windows else 1), _MOST)
        narrowed = _expression(stated)
        while True:
            others = _both(narrowed, f"not ({_among('grp', sorted(found))})" if found else "")
            asked = {"filter": others, "limit": limit, "output_fields": ["grp"]}
            candidates = {"params": {"ef": max(limit, _LEAST_CANDIDATES)}}
            with self._explained():
                (rows,) = self._client.search(
                    collection, [query.tolist()], anns_field="vector", search_params=candidates, **asked
                )
            fresh: dict[str, float] = {}
            for row in rows:
                fresh.setdefault(row["entity"]["grp"], float(row["distance"]))
            holding = self._videos_of(fresh, stated) if stated else fresh
            yield from ((group, score) for group, score in fresh.items() if group in holding)
            found |= fresh.keys()
            if len(rows) < limit:
                return

    def _videos_of(self, groups: Collection[str], stated: Sequence[Condition]) -> dict[str, list[_Stored]]:
        """Return the videos of each group of which the conditions hold, by id; groups of which none is are left out."""
        return self._holding(_both(_expression(stated), _among("grp", groups)), stated) if groups else {}

    def _holding(self, expression: str, stated: Sequence[Condition]) -> dict[str, list[_Stored]]:
        rows = sorted(
            self._rows(self._videos, expression, "owner", "grp", "video", "row"), key=lambda row: row["video"]
        )
        lines = [row["row"].encode() for row in rows]
        table = columns(lines)
        table |= {field: [None] * len(rows) for field in self._facts.get("fields", ()) if field not in table}
        videos: dict[str, list[_Stored]] = {}
        for row, line, holds in zip(rows, lines, rows_where(table, stated), strict=True):
            if holds:
                videos.setdefault(row["grp"], []).append(
                    _Stored(row["owner"], indexed_video(line, self.folder / THUMBS))
                )
        return videos

    def _count_where(self, where: tuple[str, ...]) -> int:
        stated = self._conditions(where)
        return len(self._holding(_expression(stated), stated))

    def _conditions(self, where: Sequence[str]) -> list[Condition]:
        """Return the conditions. Raise UserError for one of a field that no video has."""
        stated = conditions(where)
        rows_where({**columns([]), **{field: [] for field in self._facts.get("fields", ())}}, stated)
        return stated

    def _moments_of(self, videos: Sequence[_Stored], query: NDArray[np.float32]) -> dict[str, list[FoundMoment]]:
        """Return the moments of videos for a query, best first, by owner."""
        if self.moments is None or not videos:
            return {}
        rows: dict[str, list[dict[str, Any]]] = {video.owner: [] for video in videos}
        for row in self._rows(self._windows, _among("owner", rows), "owner", "number", "row", "vector"):
            rows[row["owner"]].append(row)
        found = {}
        for owner, own in rows.items():
            own.sort(key=lambda row: int(row["number"]))
            if own:
                scores = np.array([row["vector"] for row in own], np.float32) @ query
                windows = Windows.of([json.loads(row["row"]) for row in own])
                found[owner] = list(found_moments(windows, scores, self.folder / THUMBS).values())
        return found

    def _rows(self, collection: str, expression: str, *fields: str) -> Iterator[dict[str, Any]]:
        """Yield all rows of a collection of which an expression holds."""
        with self._explained():
            asked = {"filter": expression, "output_fields": list(fields), "consistency_level": "Strong"}
            rows = self._client.query_iterator(collection, batch_size=_ROWS_AT_ONCE, **asked)
            try:
                while block := rows.next():
                    yield from block
            finally:
                rows.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of Milvus into UserError."""
        try:
            yield
        except self._pymilvus.MilvusException as error:
            busy = "; another process has it open, or it is damaged" if error.message == _NOT_OPENED else ""
            raise UserError(f"{self.place}: {error.message}{busy}") from error


def _address(place: str) -> tuple[str, str]:
    """Return the URI for pymilvus and the name of the collection. Raise UserError."""
    if found := _FILE.fullmatch(place):
        return found["path"], _NAME_IN_FILE
    if found := _SERVER.fullmatch(place):
        host = found["host"] if re.search(r":\d+$", found["host"]) else f"{found['host']}:19530"
        return f"http{'s' if found['tls'] else ''}://{host}", found["name"]
    raise UserError(
        f"{place}: expected milvus://HOST:PORT/COLLECTION or milvus+https://HOST:PORT/COLLECTION, with a name of "
        "letters, digits and _, or milvus:///PATH/TO/FILE.db"
    )


def _own_fields(video: EmbeddedVideo) -> dict[str, Any]:
    """Return what the row of a video and those of its windows have in common."""
    row = video.row
    table = columns([json.dumps(row).encode()])
    texts = {name: str(table[name][0]).lower() for name in ("name", "folder", "date")}
    metadata = {name: _searched(value) for name, value in row.get("metadata", {}).items()}
    group = hashlib.sha256(video.vector.astype(np.float32).tobytes()).hexdigest()[:32]
    own: dict[str, Any] = {"owner": _owner(row["id"]), "grp": group, "video": row["id"], **texts}
    return own | {"duration": row["duration"], "metadata": metadata or None}


def _owner(video_id: str) -> str:
    return hashlib.sha256(video_id.encode()).hexdigest()[:32]


def _floats(vector: NDArray[Any]) -> list[float]:
    floats: list[float] = vector.astype(np.float32).tolist()
    return floats


def _searched(value: Any) -> str:
    """Return what conditions on a value of metadata look at, as one text."""
    entries = value if isinstance(value, list) else [value]
    texts = [text for entry in entries for text in (str(entry).lower(), _as_number(entry)) if text is not None]
    return "\n".join(texts)


def _as_number(value: Any) -> str | None:
    """Return a number, or a text that is one, in the one way in which it is stored; None for something else."""
    try:
        return repr(float(value))
    except ValueError:
        return None


# ---- conditions in the language of Milvus ----
#
# What they let through is tested again by `where.py`, which alone says what a condition means. So they may let too much
# through, but never too little.


def _expression(stated: Sequence[Condition]) -> str:
    return _both(*(_of_condition(condition) for condition in stated))


def _of_condition(condition: Condition) -> str:
    field, sign, value = condition.field, condition.sign, condition.value
    if field == "duration":
        return f"duration {'==' if sign == '=' else sign} {float(value)}"
    if field == "date":
        ends = {"=": f'date like "{_pattern(value)}%"', "<": f'date < "{value.lower()}"'}
        ends |= {"<=": f'date < "{value.lower()}~"'} | dict.fromkeys((">", ">="), f'date >= "{value.lower()}"')
        return ends.get(sign, "")
    if field in ("name", "folder"):
        text = _pattern(value) if field == "name" else f"%/{_pattern(value)}/%"
        return f'{field} like "{text}"' if sign == "=" else ""
    texts = {_pattern(value), _as_number(value) or _pattern(value)} if sign == "=" else {""}
    return " or ".join(f'metadata["{field}"] like "%{text}%"' for text in sorted(texts))


def _pattern(pattern: str) -> str:
    """Return a pattern of * and ? for `like`; characters that mean something there, or have no one lower case, are
    replaced by wildcards."""
    plain = ("%" if char in "*?" or not char.isascii() else char.lower() for char in pattern)
    return "".join(char if char.isalnum() or char in "% .-/:" else "_" for char in plain)


def _among(field: str, values: Collection[str]) -> str:
    return f"{field} in {json.dumps(list(values))}"


def _both(*expressions: str) -> str:
    return " and ".join(f"({one})" for one in expressions if one)
