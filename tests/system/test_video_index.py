"""An index on disk and in memory: what is found, what is refused, and what an interrupted writer leaves."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from indexing import index_info, index_row, unit_rows, write_random_index

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.collection import stamp_of
from adaclip_finetune.search.index import IndexedFrame, VideoIndex
from adaclip_finetune.search.nearest import FaissIndex, measure_recall
from adaclip_finetune.search.storage import finish_move, read_index, version_of, write_index

FILES = ("vectors.safetensors", "videos.jsonl", "index.json")


def ids(hits: list[Any]) -> list[str]:
    return [hit.video.id for hit in hits]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_flat_search_finds_what_the_product_says(tmp_path: Path, dtype: str) -> None:
    vectors = write_random_index(tmp_path / "i", dtype=dtype)
    queries = 7 * unit_rows(4, seed=1)  # queries may have any length
    products = queries / 7 @ vectors.astype(dtype).astype(np.float32).T
    index = VideoIndex.load(tmp_path / "i")
    for found, product in zip(index.search(torch.from_numpy(queries), 5), products, strict=True):
        order = np.argsort(-product)[:5]
        assert ids(found) == [f"video{row}" for row in order]
        assert [hit.rank for hit in found] == [1, 2, 3, 4, 5]
        assert [hit.score for hit in found] == pytest.approx(product[order].tolist(), abs=1e-6)
    (page,) = index.search(queries[:1], 5, slice(2, 4))
    assert page == index.search(queries[:1], 5)[0][2:4] and [hit.rank for hit in page] == [3, 4]
    assert len(index.search(queries[:1], 60)[0]) == 50


def test_rows_are_parsed_when_they_are_found_and_only_once(tmp_path: Path) -> None:
    """Parsing is what a search spends its time on."""
    vectors = unit_rows(3)
    info = replace(index_info(), settings={"clip_weights": None, "peft.config.metric": "l2_norm", "num_frm": 2})
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", info, vectors, [index_row(0), {"id": "not a whole row"}, index_row(2)])
    index = VideoIndex.load(tmp_path / "i")
    assert index.info == info
    first, again = index.search(vectors[[2, 2]], 1)
    video = first[0].video
    assert video is again[0].video is index.search(vectors[2:], 1)[0][0].video is index.videos[-1]
    assert (video.id, video.path, video.duration) == ("video2", Path("/videos/video2.mp4"), 70.0)
    assert video.frames == (IndexedFrame(3, 0.5, 0.25), IndexedFrame(400, 65.0, 0.75))
    assert (video.best_time, video.captions, video.thumb) == (65.0, ("a ä",), tmp_path / "i" / "thumbs" / "a.jpg")
    assert index.videos.keys()[2] == video.key
    with pytest.raises(UserError, match=r"videos\.jsonl, line 2"):
        index.search(vectors[1:2], 1)


def test_queries_that_are_refused(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    index = VideoIndex.load(tmp_path / "i")
    cases: list[tuple[np.ndarray, int, str]] = [
        (unit_rows(1, 31), 1, r"width 32.*\(1, 31\)"),
        (np.zeros((1, 32)), 1, "diverged"),
        (np.full((1, 32), np.nan), 1, "diverged"),
        (unit_rows(1), 0, "k 0"),
    ]
    for vectors, k, fact in cases:
        with pytest.raises(UserError, match=fact):
            index.search(vectors, k)


def test_a_graph_is_read_back_and_rebuilt_if_it_is_damaged(tmp_path: Path) -> None:
    """FAISS never sees bytes that `adaclip index` did not write."""
    folder = tmp_path / "i"
    vectors = write_random_index(folder, count=200, kind="hnsw")
    own = [f"video{number}" for number in range(20)]
    path = folder / "faiss.index"
    content = path.read_bytes()
    assert read_index(folder).graph == content
    for damaged in (content[:-9] + b"!" + content[-8:], b""):
        path.write_bytes(damaged)
        assert read_index(folder).graph is None
        assert [ids(hits)[0] for hits in VideoIndex.load(folder).search(vectors[:20], 1)] == own
    write_index(folder, index_info(), vectors, [index_row(number) for number in range(200)])
    assert not path.exists()


def test_an_unconnected_graph_leaves_out_what_it_does_not_reach(tmp_path: Path) -> None:
    class Unconnected(FaissIndex):
        def search(self, queries: Any, k: int) -> Any:
            return np.array([[0.9, 0.5, -1e38]], np.float32), np.array([[4, 2, -1]])

    vectors = write_random_index(tmp_path / "i")
    index = VideoIndex(tmp_path / "i", read_index(tmp_path / "i"), Unconnected.build(vectors, "flat"))
    assert [(hit.video.id, hit.rank) for hit in index.search(unit_rows(1), 3)[0]] == [("video4", 1), ("video2", 2)]


def test_folders_that_are_not_an_index(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / ".adaclip-index").touch()
    for name, reason in {"nothing": "no such folder", "folder": "not an index", "unfinished": "continues"}.items():
        with pytest.raises(UserError, match=reason):
            VideoIndex.load(tmp_path / name)


def test_altered_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    write_random_index(folder)
    info, lines, vectors = ((folder / name).read_bytes() for name in ("index.json", *FILES[1::-1]))
    cases: list[tuple[str, bytes | None, str]] = [
        ("index.json", b"{", r"index\.json"),
        ("index.json", info.replace(b"adaclip-index/2", b"adaclip-index/3"), "adaclip-index/3"),
        ("index.json", info.replace(b'"flat"', b'"ivf"'), "ivf"),
        ("index.json", info.replace(b'"recall": null', b'"recall": {"share": "x"}'), "damaged"),
        ("videos.jsonl", lines.replace(b"video7.mp4", b"passwd"), r"videos\.jsonl was altered"),
        ("videos.jsonl", None, r"videos\.jsonl"),
        ("vectors.safetensors", vectors[:-100], "safetensors"),
        ("vectors.safetensors", vectors[:-1] + b"!", r"vectors\.safetensors was altered"),
    ]
    for name, content, fact in cases:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=fact):
            VideoIndex.load(folder)
        (folder / name).write_bytes(whole)


def test_a_change_of_folder_or_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "video0.mp4"
    path.write_text("a")
    stamp = stamp_of(path)
    rows = [index_row(0) | {"path": str(path), "size": stamp.size, "mtime_ns": stamp.mtime_ns}]
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", index_info(), unit_rows(1), rows)
    index = VideoIndex.load(tmp_path / "i")
    assert (version_of(tmp_path / "i"), stamp_of(path)) == (index.version, index.videos[0].stamp)
    path.write_text("ab")
    assert stamp_of(path) != index.videos[0].stamp
    write_index(tmp_path / "i", index_info(), unit_rows(1), rows)  # the same content again
    assert version_of(tmp_path / "i") != index.version
    shutil.rmtree(tmp_path / "i")
    assert version_of(tmp_path / "i") == ""


@pytest.mark.parametrize("moved", range(4))
def test_a_writer_killed_while_files_move(tmp_path: Path, moved: int) -> None:
    """However many files are in place already, all that is read is the new index."""
    folder, after = tmp_path / "i", tmp_path / "after"
    write_random_index(folder)
    write_random_index(after, count=3, seed=5)
    (folder / "next").mkdir()
    for number, name in enumerate(FILES):
        shutil.copy(after / name, folder / name if number < moved else folder / "next" / name)
    hits = VideoIndex.load(folder).search(unit_rows(3, seed=5), 1)
    assert [ids(found) for found in hits] == [["video0"], ["video1"], ["video2"]]
    finish_move(folder)
    assert not (folder / "next").exists() and len(VideoIndex.load(folder)) == 3


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    (tmp_path / "i" / "next").write_text("in the way")
    with pytest.raises(UserError, match="untouched"):
        write_index(tmp_path / "i", index_info(), unit_rows(1), [index_row(1)])
    assert len(VideoIndex.load(tmp_path / "i")) == 50


def test_a_reader_never_sees_a_mixture_while_the_index_is_rewritten(tmp_path: Path) -> None:
    def rewrite() -> None:
        while not done.is_set():
            for count in (5, 4):
                write_random_index(tmp_path / "i", count, seed=count)

    done, writer = threading.Event(), threading.Thread(target=rewrite)
    write_random_index(tmp_path / "i", 4, seed=4)
    writer.start()
    try:
        seen = set()
        while len(seen) < 10:  # versions
            index = VideoIndex.load(tmp_path / "i")
            seen.add(index.version)
            hits = index.search(unit_rows(len(index), seed=len(index)), 1)
            assert [ids(found) for found in hits] == [[f"video{number}"] for number in range(len(index))]
    finally:
        done.set()
        writer.join()


def encode(rows: np.ndarray) -> Callable[[list[str]], torch.Tensor]:
    """Return a text encoder that maps "3" to the third row."""
    return lambda texts: torch.from_numpy(rows[[int(text) for text in texts]])


def test_recall_against_counting_by_hand() -> None:
    exact, queries = unit_rows(60), unit_rows(30, seed=2)
    coarse, captions = np.round(exact * 4) / 4, [f"{number}" for number in range(30)]
    truth = np.argsort(-(queries @ exact.T), axis=1)[:, :10]
    found = np.argsort(-(queries @ coarse.T), axis=1)[:, :10]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert 0.3 < by_hand < 0.95
    for vectors, share in ((coarse, by_hand), (exact, 1)):
        measured = measure_recall(FaissIndex.build(vectors, "flat"), exact, captions, encode(queries))
        assert measured == (pytest.approx(share), "30 captions")
    assert measure_recall(FaissIndex.build(exact[:11], "flat"), exact[:11], captions, encode(queries)) is None


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_recall_leaves_out_the_query_itself_and_counts_ties(kind: str) -> None:
    exact = np.repeat(unit_rows(12), 3, axis=0)[::-1]  # each row three times
    index = FaissIndex.build(exact, kind)
    assert measure_recall(index, exact, [], encode(exact)) == (1, "36 of its own vectors")
