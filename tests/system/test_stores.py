"""Indexes that are pushed: a folder, a file of Milvus Lite and a server find what the index itself finds."""

import importlib.util
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from indexing import index_info, index_row, unit_rows
from serving import axis, running, until, write_divided_index

from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import Hit, VideoIndex
from adaclip_finetune.search.search_model import load_retriever
from adaclip_finetune.search.stored import EmbeddedMoments, read_index, write_index
from adaclip_finetune.search.stores.places import open_index, open_store, push

MILVUS = all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite"))
needs_milvus = pytest.mark.skipif(not MILVUS, reason="pymilvus and milvus-lite are not installed")
NAMES = ["a b.mp4", "x/Ä_1%.mp4", 'x/q".mp4', "x/back\\slash.mp4", "y/x/UPPER.MP4", "y/new\nline.mp4", "y/[z].mp4"]
VIDEOS, WIDTH = 40, 32

Place = Callable[[str], str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server of Milvus Lite in a process of its own, and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("milvus")
    words = ["-m", "milvus_lite", "server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    until(answers)
    yield f"milvus://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture(params=["folder", pytest.param("file", marks=needs_milvus), pytest.param("server", marks=needs_milvus)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Return what names a place of each kind that nothing was pushed to."""
    if request.param == "server":
        address = request.getfixturevalue("server")
        return lambda name: f"{address}/{tmp_path.name}_{name}"
    start, end = ("milvus://", ".db") if request.param == "file" else ("", "")
    return lambda name: f"{start}{tmp_path / name}{end}"


def write(folder: Path, numbers: Sequence[int] = range(VIDEOS), windows: int = 6, **info: Any) -> VideoIndex:
    """Write an index of videos whose vectors and moments depend on their number alone. The videos 30 to 34 are copies
    of 10 to 14, and the fifth part of the videos has no moments."""
    rows, vectors, moments = [], [], []
    for number in numbers:
        own = number - 20 if 30 <= number < 35 else number
        count = 0 if own % 5 == 4 else own % windows + 1
        name = NAMES[number] if number < len(NAMES) else f"z/{number:02}.mp4"
        known: dict[str, Any] = {"season": number % 3, "tags": ["dog", f"T{number}"], "views": f"{number * 10}.0"}
        row = index_row(number) | {
            "id": name,
            "path": f"/videos/{name}",
            "mtime_ns": (1_700_000_000 + 86_400 * number) * 10**9,
        }
        rows.append(
            row | {"duration": number / 2 if number % 4 else None} | ({"metadata": known} if number % 2 else {})
        )
        vectors.append(unit_rows(1, WIDTH, own)[0])
        parts = [
            {"start": 2.0 * n, "end": 2.0 * n + 4, "time": 2.0 * n + 1, "thumb": f"{own}-{n}.jpg"} for n in range(count)
        ]
        moments.append(EmbeddedMoments(parts, unit_rows(count, WIDTH, 1000 + own)))
    folder.mkdir(exist_ok=True)
    about = index_info(moments={"by": "windows", "window": 4.0, "stride": 2.0}, **info)
    write_index(folder, about, np.array(vectors).reshape(len(rows), WIDTH), rows, moments)
    return VideoIndex.load(folder)


def told(found: list[list[Hit]]) -> Any:
    """Return what hits say, without scores and the folder of the pictures."""
    return [
        [(hit.rank, *map(_told, (hit.video, *hit.copies)), *map(_told, hit.moments)) for hit in hits] for hits in found
    ]


def _told(one: Any) -> dict[str, Any]:
    return {**vars(one), "thumb": one.thumb.name, "score": None}


def scores(found: list[list[Hit]]) -> list[float]:
    return [score for hits in found for hit in hits for score in (hit.score, *(one.score for one in hit.moments))]


CONDITIONS = [
    *(
        (f"name {sign} {pattern}",)
        for sign in ("=", "!=")
        for pattern in ("*.mp4", "x/ä_1%.mp4", '*q"*', "*\\*", "?/[z]*")
    ),
    *(("name = *new?line*",), ("folder = X",), ("folder != x",), ("name = nothing",)),
    *((f"duration {sign} 4.5",) for sign in ("=", "!=", "<", "<=", ">", ">=")),
    *((f"date {sign} 2023-11-{day}",) for sign in ("=", "!=", "<", "<=", ">", ">=") for day in (20, "20T22:13")),
    *((f"season {sign} 1.0",) for sign in ("=", "!=", "<", ">=")),
    *(
        ("tags = DOG",),
        ("tags != t7",),
        ("tags = t1*",),
        ("tags > t2",),
        ("views = 70",),
        ("views = 7*",),
        ("views > 100",),
    ),
    ("season = 1", "duration > 3 and folder = z"),
]


def test_what_was_pushed_is_found_as_in_the_index(tmp_path: Path, place: Place) -> None:
    index, queries = write(tmp_path / "i"), unit_rows(3, WIDTH, 7)
    assert push(tmp_path / "i", open_store(place("p"))) == (VIDEOS, 0, 0)
    pushed = open_index(place("p"))
    assert (len(pushed), pushed.distinct, pushed.width, pushed.info) == (VIDEOS, 35, WIDTH, index.info)
    for k, ranks in ((10, slice(None)), (100, slice(20, 30)), (1, slice(5, 9))):
        for score in (None, "whole", "moment"):
            found, right = (one.search(queries, k, ranks, score) for one in (pushed, index))
            assert told(found) == told(right) and scores(found) == pytest.approx(scores(right), abs=1e-6)
        found, right = (one.search_moments(queries, k, ranks) for one in (pushed, index))
        assert told(found) == told(right) and scores(found) == pytest.approx(scores(right), abs=1e-6)
    videos, vectors = pushed.nearest(queries[0], 5)
    assert [video.id for video in videos] == [hit.video.id for hit in index.search(queries[:1], 5)[0]]
    np.testing.assert_allclose(vectors @ queries[0], index.nearest(queries[0], 5)[1] @ queries[0], atol=1e-6)
    with pytest.raises(UserError, match=r"width 32"):
        pushed.search(unit_rows(1, 8), 1)
    if not pushed.fuses:
        with pytest.raises(UserError, match="folder of the index"):
            pushed.search(queries, 1, lines=[{}] * 3)


def test_conditions_mean_what_they_mean_in_the_index(tmp_path: Path, place: Place) -> None:
    index, queries = write(tmp_path / "i"), unit_rows(1, WIDTH, 7)
    push(tmp_path / "i", open_store(place("p")))
    pushed = open_index(place("p"))
    narrow = 0
    for where in CONDITIONS:
        assert pushed.count(where) == index.count(where), where
        assert told(pushed.search(queries, 12, where=where)) == told(index.search(queries, 12, where=where)), where
        narrow += 0 < index.count(where) < 35
    assert narrow > len(CONDITIONS) / 2
    where = ("season = 1", "views > 50")
    assert told(pushed.search_moments(queries, 9, where=where)) == told(index.search_moments(queries, 9, where=where))
    assert told(pushed.search(queries, 40, score="moment", where=where)) == told(
        index.search(queries, 40, score="moment", where=where)
    )
    for wrong in ("nowhere = 3", "duration"):
        with pytest.raises(UserError, match="where"):
            pushed.search(queries, 1, where=[wrong])


def test_a_push_stores_what_changed_and_deletes_what_is_gone(tmp_path: Path, place: Place) -> None:
    write(tmp_path / "i")
    push(tmp_path / "i", open_store(place("p")))
    assert push(tmp_path / "i", open_store(place("p"))) == (0, VIDEOS, 0)
    numbers = [number for number in range(5, 50) if number not in (10, 33)]
    index = write(tmp_path / "i", numbers, windows=3)  # fewer moments in many videos
    stored, kept, deleted = push(tmp_path / "i", open_store(place("p")))
    assert (stored + kept, deleted) == (43, 7) and kept > 10
    pushed, queries = open_index(place("p")), unit_rows(2, WIDTH, 8)
    assert (len(pushed), pushed.count()) == (43, index.count())
    assert told(pushed.search(queries, 100)) == told(index.search(queries, 100))
    assert told(pushed.search_moments(queries, 100)) == told(index.search_moments(queries, 100))
    info, vectors = index.info, read_index(tmp_path / "i").vectors
    write_index(
        tmp_path / "i",
        replace(info, moments=None),
        vectors,
        [video.row for video in read_index(tmp_path / "i").videos()],
    )
    push(tmp_path / "i", open_store(place("p")))
    assert open_index(place("p")).moments is None
    assert not any(hit.moments for hit in open_index(place("p")).search(queries, 5)[0])


def test_vectors_of_another_model_are_refused(tmp_path: Path, place: Place) -> None:
    write(tmp_path / "i", range(3))
    push(tmp_path / "i", open_store(place("p")))
    write(tmp_path / "other", range(3), fingerprint="e" * 64)
    with pytest.raises(UserError, match="another model"):
        push(tmp_path / "other", open_store(place("p")))
    assert open_index(place("p")).info.fingerprint == "f" * 64


DIE = """
import os, signal, sys
from pathlib import Path
from adaclip_finetune.search.stores import places

places._AT_ONCE = 8
store = places.open_store(sys.argv[2])
upsert, blocks = store.upsert, []

def write_videos(name, rows, write=getattr(store, "_write", None)):
    if name == store._videos:
        os.kill(os.getpid(), signal.SIGKILL)
    write(name, rows)

def dying(videos):
    blocks.append(videos)
    if len(blocks) == 3:
        if not hasattr(store, "_write"):
            os.kill(os.getpid(), signal.SIGKILL)
        store._write = write_videos
    upsert(videos)

store.upsert = dying
places.push(Path(sys.argv[1]), store)
"""


def test_a_push_that_is_killed_goes_on(tmp_path: Path, place: Place) -> None:
    """In Milvus it is killed between the moments of its third block and the videos."""
    index, queries = write(tmp_path / "i"), unit_rows(2, WIDTH, 8)
    died = subprocess.run([sys.executable, "-c", DIE, tmp_path / "i", place("p")], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with pytest.raises(UserError, match=r"adaclip index"):
        open_index(place("p"))
    pushed = push(tmp_path / "i", open_store(place("p")))
    assert pushed == ((24, 16, 0) if "milvus" in place("p") else (VIDEOS, 0, 0))
    for where in ((), ("season = 1",)):
        assert told(open_index(place("p")).search(queries, 50, where=where)) == told(
            index.search(queries, 50, where=where)
        )
    assert told(open_index(place("p")).search_moments(queries, 50)) == told(index.search_moments(queries, 50))


def test_the_commands(run: Path, tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """`index push` copies, and `search` prints the same there."""
    model = load_retriever(run)
    info = index_info(fingerprint=model.fingerprint, run=str(run))
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", info, unit_rows(9, model.width), [index_row(number) for number in range(9)])
    assert main(["index", "push", str(tmp_path / "i"), place("p")]) == 0
    assert "9 stored, 0 unchanged, 0 deleted" in capsys.readouterr().out
    said = []
    for where in (str(tmp_path / "i"), place("p")):
        assert (
            main(["search", where, "a red thing", "-k", "4", "--where", "name = *[1-7]", "--where", "duration > 1"])
            == 0
        )
        assert main(["search", where, "a red thing", "-k", "4", "--json"]) == 0
        assert main(["search", where, "--image", str(_picture(tmp_path)), "--explain"]) == 0
        said.append(capsys.readouterr().out)
        assert main(["search", where, "a red thing", "--by", "moment"]) == 2
        assert "has no moments" in capsys.readouterr().err
    assert said[0] == said[1] and "video" in said[0]


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    return folder / "red.png"


def test_the_page(tmp_path: Path, place: Place) -> None:
    """It shows the same videos with their pictures and files."""
    index = write_divided_index(tmp_path)
    push(index.folder, open_store(place("p")))
    answers = []
    for searched in (index, open_index(place("p"))):
        with running(searched) as served:
            paths = ["/api/search?q=1", "/api/search?q=6&by=moment", "/api/search?q=2&where=name%20=%20*2*&k=1"]
            found = [served.ask(path).json for path in paths]
            one = found[1]["found"][0]
            files = [one["video"], one["poster"], one["frames"][0]["picture"], one["moments"][0]["poster"]]
            replies = [served.ask(path) for path in files]
            assert [reply.status for reply in replies] == [200] * 4
            missing = (
                served.ask(files[3].replace("moments/1", "moments/99")),
                served.ask(f"/api/videos/{'0' * 20}/file"),
            )
            assert [reply.status for reply in missing] == [404, 404]
            answers.append((found, [reply.body for reply in replies], served.ask("/api/status").json["videos"]))
    assert answers[0] == answers[1]
    assert answers[0][0][0]["found"][0]["id"] == "video1.mp4" and (axis(1) == 1).sum() == 1


@needs_milvus
def test_a_graph(tmp_path: Path, server: str) -> None:
    """--hnsw makes one, later as well; it stays."""
    index, queries = write(tmp_path / "i"), unit_rows(2, WIDTH, 8)
    place = f"{server}/graph"
    for hnsw, kind in ((False, "FLAT"), (True, "HNSW"), (False, "HNSW")):
        push(tmp_path / "i", open_store(place, hnsw))
        store: Any = open_store(place)
        assert store._client.describe_index("graph", "vector")["index_type"] == kind
        found = open_index(place).search(queries, 10)
        # So few vectors are all seen.
        assert told(found) == told(index.search(queries, 10))


@needs_milvus
def test_what_milvus_cannot_keep_and_what_is_not_ours(tmp_path: Path, server: str) -> None:
    write_long = index_row(0) | {"captions": ["long " * 20_000]}
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", index_info(), unit_rows(1), [write_long])
    with pytest.raises(UserError, match=r"video0: .* 65,535"):
        push(tmp_path / "i", open_store(f"{server}/long"))
    store: Any = open_store(f"{server}/none")
    with pytest.raises(UserError, match="no index was pushed"):
        open_index(f"{server}/none")
    store._client.create_collection("theirs", dimension=4)
    with pytest.raises(UserError, match="did not make this collection"):
        open_store(f"{server}/theirs")


@needs_milvus
def test_a_file_that_another_process_has_open(tmp_path: Path) -> None:
    place = f"milvus://{tmp_path}/x.db"
    open_store(place)
    search = f"import sys; from adaclip_finetune.cli import main; sys.exit(main(['search', '{place}', 'a red thing']))"
    other = subprocess.run([sys.executable, "-c", search], capture_output=True, text=True)
    assert other.returncode == 2 and "another process has it open" in other.stderr
    assert len(other.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("milvus://127.0.0.1:1", "COLLECTION"),
        ("milvus://127.0.0.1/not-a-name", "COLLECTION"),
        ("milvus:///no/such/folder/x.db", "/no/such/folder/x.db"),
        pytest.param("milvus://127.0.0.1:1/name", "127.0.0.1:1", marks=needs_milvus),
    ],
)
def test_places_that_are_refused(place: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", place, "a red thing"]) == 2
    assert reason in capsys.readouterr().err


def test_pymilvus_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"adaclip-finetune\[milvus\]"):
        open_store(f"milvus://{tmp_path}/x.db")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for place, hnsw, reason in ((tmp_path / "mine", False, "not an index"), (tmp_path / "new", True, "--hnsw")):
        with pytest.raises(UserError, match=reason):
            open_store(str(place), hnsw)
