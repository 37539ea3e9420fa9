"""An index on disk and in memory: what is found, and what is refused."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from indexing import index_info, index_row, unit_rows, write_random_index
from safetensors import safe_open
from safetensors.numpy import save

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import IndexedFrame, VideoIndex
from adaclip_finetune.search.stored import FILE, EmbeddedMoments, write_index
from adaclip_finetune.search.transcripts import FoundLine


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_narrowed_search_finds_what_remains_of_the_whole_one(tmp_path: Path, dtype: str) -> None:
    """Of copies, the first for which the condition holds."""
    vectors = unit_rows(40).astype(dtype)
    vectors[20:30] = vectors[:10]  # copies
    rows = [index_row(number) | {"metadata": {"season": number % 3}} for number in range(40)]
    parts = [{"start": n / 2, "end": n / 2 + 1, "time": n / 2, "thumb": "a.jpg"} for n in range(3)]
    moments = [EmbeddedMoments(parts, unit_rows(3, seed=1 + number % 20).astype(dtype)) for number in range(40)]
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", index_info(moments={"by": "windows"}), vectors, rows, moments)
    index, queries = VideoIndex.load(tmp_path / "i"), unit_rows(9, seed=1)
    where = ["season = 1", "name != video4"]
    for find in (index.search, partial(index.search, score="moment"), index.search_moments):
        whole, narrowed = find(queries, 1000), find(queries, 1000, where=where)
        for hits, found in zip(whole, narrowed, strict=True):
            kept = [(hit, [one.id for one in (hit.video, *hit.copies) if holds(one)]) for hit in hits]
            assert [ids([hit]) + ids_of(hit.copies) for hit in found] == [names for _, names in kept if names]
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit, names in kept if names], abs=1e-6)
            assert [hit.moments for hit in found] == [hit.moments for hit, names in kept if names]
            assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert (
        index.count(where) == len(narrowed[0] and index.search(queries[:1], 99, where=where)[0]) < index.count() == 30
    )
    assert index.search(queries[:1], 3, slice(2, 4), where=where)[0] == index.search(queries[:1], 3, where=where)[0][2:]


def test_lines_that_were_found_are_fused_with_the_vectors(tmp_path: Path) -> None:
    """By reciprocal rank; of copies, the transcript of any counts; what does not hold is passed over."""
    vectors = unit_rows(30)
    vectors[29] = vectors[20]
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", index_info(), vectors, [index_row(number) for number in range(30)])
    index, query = VideoIndex.load(tmp_path / "i"), unit_rows(1, seed=1)
    plain = index.search(query, 100)[0]
    said = [plain[25].video.id, "video29", plain[3].video.id, "gone"]
    lines = {name: FoundLine(number, number + 1.0, name) for number, name in enumerate(said)}
    rows = {hit.video.id: hit.rank for hit in plain}
    texts = {"video20" if name == "video29" else name: rank for rank, name in enumerate(said, 1)}
    expected = sorted(rows, key=lambda name: -1 / (60 + rows[name]) - (1 / (60 + texts[name]) if name in texts else 0))
    (found,) = index.search(query, 100, lines=[lines])
    assert ids(found) == expected and [hit.rank for hit in found] == list(range(1, 30))
    shown = {hit.video.id: hit.line.text for hit in found if hit.line}
    assert shown == {said[0]: said[0], "video20": "video29", said[2]: said[2]}
    assert {hit.video.id: hit.score for hit in found} == {hit.video.id: hit.score for hit in plain}
    assert index.search(query, 7, slice(4, 7), lines=[lines])[0] == found[4:7]
    narrowed = index.search(query, 100, where=["name != video20", f"name != {said[0]}"], lines=[lines])[0]
    assert len(narrowed) == 28 and {hit.video.id for hit in narrowed if hit.line} == {"video29", said[2]}


def holds(video: Any) -> bool:
    return bool(video.metadata["season"] == 1 and video.id != "video4")


def ids_of(videos: Sequence[Any]) -> list[str]:
    return [video.id for video in videos]


def test_rows_are_parsed_when_they_are_found_and_only_once(tmp_path: Path) -> None:
    """Parsing is what a search spends its time on."""
    vectors, info = unit_rows(3), index_info(settings={"clip_weights": None, "peft.config.metric": "l2_norm"})
    (tmp_path / "i").mkdir()
    write_index(tmp_path / "i", info, vectors, [{"id": "not a row"}, {"id": "not a row"}, index_row(2)])
    index = VideoIndex.load(tmp_path / "i")
    assert index.info == info
    first, again = index.search(vectors[[2, 2]], 1)
    video = first[0].video
    assert video is again[0].video is index.search(vectors[2:], 1)[0][0].video is index.videos[2]
    assert (video.id, video.path, video.duration) == ("video2", Path("/videos/video2.mp4"), 70.0)
    assert video.frames == (IndexedFrame(3, 0.5, 0.25), IndexedFrame(400, 65.0, 0.75))
    assert (video.best_time, video.captions, video.thumb) == (65.0, ("a ä",), tmp_path / "i" / "thumbs" / "a.jpg")
    assert index.videos.keys()[2] == video.key


def test_an_index_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It lacks what makes opening quick, and everything else is the same."""
    vectors, rows = unit_rows(9), [index_row(number) for number in range(9)]
    vectors[8] = vectors[4]
    parts = [{"start": n / 2, "end": n / 2 + 1, "time": n / 2, "thumb": "a.jpg"} for n in range(3)]
    moments = [EmbeddedMoments(parts, unit_rows(3, seed=1 + number)) for number in range(9)]
    write_index(tmp_path, index_info(moments={"by": "windows"}), vectors, rows, moments)
    index = VideoIndex.load(tmp_path)
    later = ("firsts", "ends", "moment_ends")
    with safe_open(tmp_path / FILE, "np") as file:
        old = {name: file.get_tensor(name) for name in file.keys() if name not in later}  # noqa: SIM118
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / FILE).write_bytes(save(old, file.metadata()))
    older, query = VideoIndex.load(tmp_path / "old"), unit_rows(1, seed=5)
    assert len(old) == 5 and (older.distinct, len(older)) == (8, 9)
    for find in (index.search, index.search_moments):
        found, expected = getattr(older, find.__name__)(query, 99)[0], find(query, 99)[0]
        assert ids(found) == ids(expected) and [hit.score for hit in found] == [hit.score for hit in expected]


def test_what_is_opened_is_read_when_it_is_needed(tmp_path: Path) -> None:
    """An index larger than memory can be opened: it keeps its file, even when it is replaced, and copies nothing."""
    vectors = write_random_index(tmp_path / "i")
    index, other = VideoIndex.load(tmp_path / "i"), unit_rows(50, seed=2)
    kept = index._vectors
    assert not kept.flags.owndata and (kept == vectors).all()
    write_index(tmp_path / "i", index_info(), other, [index_row(number) for number in range(50)])
    assert (kept == vectors).all() and (VideoIndex.load(tmp_path / "i")._vectors == other).all()


def test_an_index_that_is_replaced_while_it_is_opened_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of one file over the bytes of another would give wrong vectors."""
    write_random_index(tmp_path / "i")
    new, opened = unit_rows(60, seed=3), list[Path]()

    def replace_it(path: Path, framework: str) -> Any:
        if not opened:
            write_index(tmp_path / "i", index_info(), new, [index_row(number) for number in range(60)])
        opened.append(path)
        return safe_open(path, framework)

    monkeypatch.setattr("adaclip_finetune.search.stored.safetensors.safe_open", replace_it)
    assert (VideoIndex.load(tmp_path / "i")._vectors == new).all() and len(opened) == 2


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


def test_folders_that_are_not_an_index(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "unfinished" / "parts").mkdir(parents=True)
    for name, reason in {"nothing": "no such folder", "folder": "not an index", "unfinished": "continues"}.items():
        with pytest.raises(UserError, match=reason):
            VideoIndex.load(tmp_path / name)


def test_a_damaged_index_and_one_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "i" / FILE
    write_random_index(path.parent)
    content = path.read_bytes()
    for other in (b"", content[:-1], content.replace(b"adaclip-index/3", b"adaclip-index/2"), save({"a": np.zeros(1)})):
        path.write_bytes(other)
        with pytest.raises(UserError, match="index the videos again"):
            VideoIndex.load(path.parent)


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    (tmp_path / "i" / f".{FILE}.part").mkdir()  # in the way
    with pytest.raises(OSError, match="part"):
        write_random_index(tmp_path / "i", 1)
    assert len(VideoIndex.load(tmp_path / "i")) == 50
