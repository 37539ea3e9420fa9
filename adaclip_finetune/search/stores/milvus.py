"""`MilvusStore`: the vectors of an index in Milvus (Wang et al. 2021), a cluster or a file, through pymilvus.

Three collections hold an index: NAME a row for each video, NAME_moments one for each of its windows, and NAME_about what
`IndexInfo` says. The key of a row is derived from the id of its video, so that it never changes. Each row also has what
conditions ask for, and the row of the index as JSON, from which hits are made. A video's own row is written after those
of its windows and has a digest of them all; a push that was interrupted goes on with the videos whose digest is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import (
    MOMENTS_A_VIDEO,
    EmbeddedVideo,
    FoundMoment,
    Hit,
    IndexedVideo,
    IndexInfo,
    Windows,
    found_moments,
    indexed_video,
    key_of,
    unit_queries,
)
from adaclip_finetune.search.stores.base import digest_of

TOKEN = "MILVUS_TOKEN"
"""The environment variable that holds `user:password` or the API key, if the server asks for one."""

_FORM = re.compile(r"milvus(?P<tls>\+https)?://(?P<host>[^/?#]+)/(?P<name>[A-Za-z_]\w{0,199})", re.ASCII)
_FILE = re.compile(r"milvus://(?P<path>/.+\.db)")
_NAME_IN_FILE = "videos"
_LONGEST = 65_535  # bytes of a text field, and
_MOST = 16_384  # rows that one search finds: limits of Milvus
_ROWS_AT_ONCE = 1_000
_GRAPH = {"M": 32, "efConstruction": 128}
_LEAST_CANDIDATES = 128  # of a search in the graph


class Moments(NamedTuple):
    """The number of windows or shots."""

    count: int

    def __len__(self) -> int:
        return self.count


class MilvusStore:
    """Videos of an index in a Milvus collection, searched as `VideoIndex` searches its folder.

    The collection is compared vector by vector, or with `hnsw`, approximately. Videos with the same vector are one hit;
    the first of them is that whose id comes first.
    """

    def __init__(self, place: str, hnsw: bool = False) -> None:
        """Connect to `milvus://HOST:PORT/COLLECTION`, `milvus+https://…` or `milvus:///FILE.db`. Raise UserError."""
        self.place, self._hnsw = place, hnsw
        uri, self.name = _address(place)
        pymilvus = _pymilvus()
        self._types = pymilvus.DataType
        with self._explained():
            self._client = pymilvus.MilvusClient(uri, token=os.environ.get(TOKEN, ""), timeout=30)
        self._videos, self._windows, self._about = self.name, f"{self.name}_moments", f"{self.name}_about"
        self._load_about()

    def _load_about(self) -> None:
        self.facts: dict[str, Any] = {}
        with self._explained():
            if self._client.has_collection(self._about):
                self._client.load_collection(self._about)
                for row in self._client.get(self._about, "about", output_fields=["facts"], consistency_level="Strong"):
                    self.facts = json.loads(row["facts"])
            elif self._client.has_collection(self._videos):
                raise UserError(f"{self.place}: is a collection that `adaclip index push` did not make")
        self.info = IndexInfo(**self.facts.get("info", asdict(IndexInfo("", "", {}, ""))))
        self.width, self.distinct = self.facts.get("width", 0), self.facts.get("distinct", 0)
        self._thumbs = Path(self.facts.get("thumbs", ""))

    def open(self) -> None:
        """Make it ready to be searched. Raise UserError if nothing was pushed, or not everything."""
        if not self.facts.get("finished"):
            what = "was not filled to the end; the same command continues" if self.facts else "holds no index"
            raise UserError(f"{self.place}: {what}: `adaclip index push NAME.index {self.place}`")
        with self._explained():
            for name in (self._videos, self._windows):
                self._client.load_collection(name)

    # ---- filling ----

    @property
    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model of the vectors; None if nothing has been stored yet."""
        return self.info.fingerprint or None

    def begin(self, info: IndexInfo, width: int, thumbs: Path) -> None:
        text, number, vector = self._types.VARCHAR, self._types.INT64, self._types.FLOAT_VECTOR
        of_video = {"owner": text, "grp": text, "video": text, "folder": text, "mtime_ns": number, "row": text}
        with self._explained():
            self._make(self._about, {"facts": text}, 2)
            self._make(self._videos, {**of_video, "served": text, "digest": text}, width)
            self._make(self._windows, {**of_video, "number": number}, width)
            self._remake_graph(vector)
        self.facts |= {"info": asdict(info), "width": width, "thumbs": str(thumbs)}
        self._write_about()

    def digests(self) -> dict[str, str]:
        return {row["video"]: row["digest"] for row in self._rows(self._videos, "", "video", "digest")}

    def upsert(self, videos: Sequence[EmbeddedVideo]) -> None:
        rows, windows = [], []
        counts: dict[int, list[str]] = {}
        for video in videos:
            row, owner = video.row, _owner(video.row["id"])
            line, vector = json.dumps(row), video.vector.astype(np.float32)
            path = Path(row["path"])
            own = {"owner": owner, "grp": _digest(vector.tobytes()), "video": row["id"], "mtime_ns": row["mtime_ns"]}
            own |= {"folder": f"{path.parent.as_posix()}/", "duration": row["duration"]}
            served = {"served": key_of(line.encode()), "digest": digest_of(video)}
            rows.append({"pk": owner, "vector": vector.tolist(), "row": line, **own, **served})
            moments = video.moments.rows if video.moments else []
            counts.setdefault(len(moments), []).append(owner)
            for at, moment in enumerate(moments):
                assert video.moments is not None
                values = video.moments.vectors[at].astype(np.float32).tolist()
                about = {"pk": f"{owner}/{at}", "number": at, "row": json.dumps(moment)}
                windows.append({**about, "vector": values, **own})
        for one in rows:
            if (size := len(one["row"].encode())) > _LONGEST:
                raise UserError(f"{one['video']}: its row takes {size:,} bytes, and Milvus keeps at most {_LONGEST:,}")
        with self._explained():
            self._write(self._windows, windows)
            for count, owners in counts.items():
                self._client.delete(self._windows, filter=f"{_among('owner', owners)} and number >= {count}")
            self._write(self._videos, rows)

    def delete(self, ids: Collection[str]) -> None:
        owners = [_owner(name) for name in ids]
        with self._explained():
            for start in range(0, len(owners), _ROWS_AT_ONCE):
                for collection in (self._windows, self._videos):
                    self._client.delete(collection, filter=_among("owner", owners[start : start + _ROWS_AT_ONCE]))

    def finish(self) -> None:
        groups = {row["grp"] for row in self._rows(self._videos, "", "grp")}
        self.facts |= {"finished": True, "distinct": len(groups), "moments": self._count(self._windows)}
        self._write_about()
        self._load_about()
        self.open()

    def _write_about(self) -> None:
        with self._explained():
            facts = json.dumps(self.facts)
            self._client.upsert(self._about, [{"pk": "about", "vector": [1.0, 0.0], "facts": facts}])

    def _write(self, collection: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            self._client.upsert(collection, list(rows[start : start + _ROWS_AT_ONCE]))

    def _make(self, name: str, fields: Mapping[str, Any], width: int) -> None:
        """Make a collection if there is none."""
        if self._client.has_collection(name):
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("pk", self._types.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("vector", self._types.FLOAT_VECTOR, dim=width)
        for field, kind in fields.items():
            schema.add_field(field, kind, **({"max_length": _LONGEST} if kind == self._types.VARCHAR else {}))
        if name != self._about:
            schema.add_field("duration", self._types.DOUBLE, nullable=True)
        self._client.create_collection(name, schema=schema, index_params=self._index_of(fields))

    def _index_of(self, fields: Iterable[str]) -> Any:
        wanted = self._client.prepare_index_params()
        kind: dict[str, Any] = {"index_type": "HNSW", "params": _GRAPH} if self._hnsw else {"index_type": "FLAT"}
        wanted.add_index("vector", metric_type="IP", **kind)
        for field in {"owner", "grp", "served"}.intersection(fields):
            wanted.add_index(field, index_type="INVERTED")
        return wanted
