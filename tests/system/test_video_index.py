"""An index on disk and in memory: what is found, what is refused, what a kill leaves."""

import json
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import rewriting
import torch
from indexing import about, row, unit_rows, write_random_index
from rewriting import rewrite

from adaclip_finetune.errors import UserError
from adaclip_finetune.search import nearest, stored
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.json_lines import JsonLines
from adaclip_finetune.search.recall import recall_at, recall_of
from adaclip_finetune.search.stamp import stamp_of


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_flat_finds_what_the_product_says(tmp_path: Path, dtype: str) -> None:
    vectors = write_random_index(tmp_path / "i", dtype=dtype)
    queries = 7 * unit_rows(4, seed=1)  # of any length
    products = queries / 7 @ vectors.astype(dtype).astype(np.float32).T
    hits = VideoIndex.load(tmp_path / "i").search(torch.from_numpy(queries), 5)
    for found, product in zip(hits, products, strict=True):
        order = np.argsort(-product)[:5]
        assert [hit.video.id for hit in found] == [f"video{place}" for place in order]
        assert [hit.rank for hit in found] == [1, 2, 3, 4, 5]
        assert [hit.score for hit in found] == pytest.approx(product[order].tolist(), abs=1e-6)


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    video = VideoIndex.load(tmp_path / "i").videos[7]
    assert (video.id, video.path, video.duration) == ("video7", Path("/videos/video7.mp4"), 70.0)
    assert (video.frames, video.times, video.weights) == ((3, 400), (0.5, 65.0), (0.25, 0.75))
    assert (video.best_time, video.captions, video.thumb) == (65.0, ("a ä",), tmp_path / "i" / "thumbs" / "a.jpg")


def test_more_asked_than_there_is(tmp_path: Path) -> None:
    write_random_index(tmp_path / "few", count=3)
    write_random_index(tmp_path / "none", count=0)
    assert len(VideoIndex.load(tmp_path / "few").search(unit_rows(1), 10)[0]) == 3
    assert VideoIndex.load(tmp_path / "none").search(unit_rows(2), 10) == [[], []]


def test_what_a_graph_does_not_reach_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_index(tmp_path / "i")
    index = VideoIndex.load(tmp_path / "i")
    found = np.array([[0.9, 0.5, -1e38]], np.float32), np.array([[4, 2, -1]])
    monkeypatch.setattr(nearest.Nearest, "search", lambda *_: found)
    assert [(hit.video.id, hit.rank) for hit in index.search(unit_rows(1), 3)[0]] == [("video4", 1), ("video2", 2)]


def test_queries_that_cannot_be_answered(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    index = VideoIndex.load(tmp_path / "i")
    with pytest.raises(UserError, match=r"width 32, a query the shape \(1, 31\)"):
        index.search(unit_rows(1, 31), 1)
    for bad in (0, float("nan")):
        with pytest.raises(UserError, match="diverged"):
            index.search(np.full((1, 32), bad), 1)
    for k in (0, -1):
        with pytest.raises(UserError, match=f"k {k}: a whole number from 1 up is needed"):
            index.search(unit_rows(1), k)
    index.check_model("f" * 64)
    with pytest.raises(UserError, match=r"another model \(/run, fingerprint ffffffffffff; this one has 000000000000\)"):
        index.check_model("0" * 64)


def test_a_graph_is_kept_and_made_anew_for_other_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "i"
    vectors = write_random_index(folder, count=200, kind="hnsw")
    digest = stored.read_index(folder).digest
    nearest.keep(folder, nearest.build(vectors, "hnsw"), "hnsw", digest)
    built = []
    original = nearest.build
    monkeypatch.setattr(nearest, "build", lambda *given: built.append(1) or original(*given))

    def answers() -> list[str]:
        index = VideoIndex.load(folder)
        return [hit.video.id for found in index.search(vectors[:20], 1) for hit in found]

    own = [f"video{number}" for number in range(20)]
    assert (answers(), len(built)) == (own, 0)
    content = (folder / "faiss.index").read_bytes()
    (folder / "faiss.index").write_bytes(content[:-9] + b"!" + content[-8:])  # FAISS never sees it
    assert (answers(), len(built)) == (own, 1)
    (folder / "faiss.index").unlink()
    assert (answers(), len(built)) == (own, 2)
    (folder / "faiss.index").write_bytes(content)
    assert (answers(), len(built)) == (own, 2)
    stored.write_index(folder, about("hnsw"), vectors[::-1], [row(number) for number in range(200)])
    assert answers() == [f"video{199 - number}" for number in range(20)]
    assert len(built) == 3


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    with pytest.raises(UserError, match="there is no such folder"):
        VideoIndex.load(folder)
    folder.mkdir()
    (tmp_path / "file").touch()
    for path in (folder, tmp_path / "file"):
        with pytest.raises(UserError, match=r"is no index \(it holds no index\.json\)"):
            VideoIndex.load(path)
    (folder / ".adaclip-index").touch()
    with pytest.raises(UserError, match="no finished index"):
        VideoIndex.load(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not JSON: .*: remove the index, and make it anew"):
        VideoIndex.load(folder)


def test_something_in_the_place_of_what_a_writer_moves(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    (tmp_path / "i" / "next").write_text("")
    assert len(VideoIndex.load(tmp_path / "i")) == 50
    with pytest.raises(UserError, match="what was there before is untouched"):
        stored.write_index(tmp_path / "i", about(), unit_rows(1), [row(1)])
    assert len(VideoIndex.load(tmp_path / "i")) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "adaclip-index/3"}, "has the format 'adaclip-index/3'; this version of adaclip reads"),
        ({"kind": "ivf"}, "kind 'ivf'"),
        ({"run": 3}, "run is missing or of another type"),
        ({"settings": None}, "settings is missing"),
        ({"settings": {"clip_weights": 3}}, r"index\.json: .*settings\.clip_weights: .* a valid string.*: remove the"),
        ({"settings": {"nonsense": 1, "num_frm": "x"}}, r"index\.json: .*settings\.num_frm.*settings\.nonsense"),
        ({"dtype": "float16"}, "not float16"),
        ({"recall": {"share": "x"}}, "not as adaclip writes it"),
        ({"recall": {"share": "x", "by": "", "asked": "", "videos": 1}}, "not as adaclip writes it"),
        ({"sha256": {}}, "not as adaclip writes it"),
        (
            {"sha256": {"vectors": "", "videos": ""}},
            "something has altered vectors.safetensors and videos.jsonl",
        ),
    ],
)
def test_facts_that_cannot_be(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = tmp_path / "i"
    write_random_index(folder)
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        VideoIndex.load(folder)


def test_settings_that_only_a_run_makes_whole(tmp_path: Path) -> None:
    settings = {"num_frm": 2, "top_k": 5, "peft": "ibs.json", "peft.config.metric": "l2_norm", "clip_weights": None}
    (tmp_path / "i").mkdir()
    stored.write_index(tmp_path / "i", about(settings=settings), unit_rows(1), [row(0)])
    assert VideoIndex.load(tmp_path / "i").about.settings == settings


def test_altered_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    write_random_index(folder)
    lines = (folder / "videos.jsonl").read_bytes()
    (folder / "videos.jsonl").write_bytes(lines.replace(b"video7.mp4", b"passwd"))
    with pytest.raises(UserError, match=r"something has altered videos\.jsonl: remove the index"):
        VideoIndex.load(folder)
    (folder / "videos.jsonl").unlink()
    with pytest.raises(UserError, match=r"videos\.jsonl: is missing: remove the index, and make it anew"):
        VideoIndex.load(folder)
    (folder / "videos.jsonl").write_bytes(lines)
    VideoIndex.load(folder)
    content = (folder / "vectors.safetensors").read_bytes()
    (folder / "vectors.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        VideoIndex.load(folder)


def test_rows_are_as_many_as_vectors(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    stored.write_index(folder, about(), unit_rows(3), [row(0), row(1)])
    with pytest.raises(UserError, match=r"has 3 rows, videos\.jsonl 2"):
        VideoIndex.load(folder)


def test_a_row_of_another_form_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    stored.write_index(folder, about(), unit_rows(2), [row(0), {"id": "b"}])
    videos = VideoIndex.load(folder).videos
    assert videos[0].id == "video0"
    with pytest.raises(UserError, match=r"videos\.jsonl, line 2: not as adaclip writes it"):
        list(videos)
    for wrong in ({"best": 2}, {"best": -1}, {"frames": [{}]}, {"path": 3}, {"size": "x"}, {"mtime_ns": 1e999}):
        stored.write_index(folder, about(), unit_rows(1), [row(0) | wrong])
        with pytest.raises(UserError, match="line 1: not as adaclip writes it"):
            VideoIndex.load(folder).search(unit_rows(1), 1)


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    write_random_index(tmp_path / "i")
    videos = VideoIndex.load(tmp_path / "i").videos
    names = [f"video{number}" for number in range(50)]
    assert [video.id for video in videos] == names and len(videos) == 50
    assert [video.id for video in videos[-3:]] == names[-3:] and videos[-1].id == names[-1]
    with pytest.raises(IndexError):
        videos[50]


def test_only_rows_that_are_found_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred thousand, parsing takes seconds and a gigabyte."""
    write_random_index(tmp_path / "i")
    parsed, original = list[int](), JsonLines.__getitem__
    monkeypatch.setattr(JsonLines, "__getitem__", lambda self, place: parsed.append(place) or original(self, place))
    index = VideoIndex.load(tmp_path / "i")
    assert (len(index), parsed) == (50, [])
    hits = index.search(unit_rows(1), 3)[0]
    assert [f"video{place}" for place in parsed] == [hit.video.id for hit in hits]


def test_a_reader_can_tell_what_changed(tmp_path: Path) -> None:
    """The folder since it was loaded, and a file since it was indexed."""
    path = tmp_path / "video0.mp4"
    path.write_text("a")
    stamp = stamp_of(path)
    rows = [row(0) | {"path": str(path), "size": stamp.size, "mtime_ns": stamp.mtime_ns}]
    (tmp_path / "i").mkdir()
    stored.write_index(tmp_path / "i", about(), unit_rows(1), rows)
    index = VideoIndex.load(tmp_path / "i")
    assert stored.version_of(tmp_path / "i") == index.version
    assert index.videos[0].stamp == stamp_of(path)
    path.write_text("ab")
    assert index.videos[0].stamp != stamp_of(path)
    stored.write_index(tmp_path / "i", about(), unit_rows(1), rows)  # the same, to the letter
    assert stored.version_of(tmp_path / "i") != index.version
    index = VideoIndex.load(tmp_path / "i")
    assert stored.version_of(tmp_path / "i") == index.version
    shutil.rmtree(tmp_path / "i")
    assert stored.version_of(tmp_path / "i") != index.version


@pytest.mark.parametrize("moved", range(4))
def test_a_writer_killed_while_files_move(tmp_path: Path, moved: int) -> None:
    """With any number of files in their places already, all that is read is the new ones."""
    folder, after = tmp_path / "i", tmp_path / "after"
    write_random_index(folder)
    after.mkdir()
    stored.write_index(after, about(), unit_rows(3, seed=5), [row(number) for number in range(3)])
    names = ("vectors.safetensors", "videos.jsonl", "index.json")
    (folder / "next").mkdir()
    for number, name in enumerate(names):
        shutil.copy(after / name, folder / name if number < moved else folder / "next" / name)
    hits = VideoIndex.load(folder).search(unit_rows(3, seed=5), 1)
    assert [hit.video.id for (hit,) in hits] == ["video0", "video1", "video2"]
    stored.finish_move(folder)
    assert not (folder / "next").exists()
    assert len(VideoIndex.load(folder)) == 3


def test_a_writer_killed_before_that_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "i"
    write_random_index(folder)
    original = stored.write_durably

    def full(path: Path, content: bytes) -> None:
        if path.name == "videos.jsonl":
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(stored, "write_durably", full)
    with pytest.raises(UserError, match=r"No space left on device.*what was there before is untouched"):
        stored.write_index(folder, about(), unit_rows(3), [row(number) for number in range(3)])
    assert len(VideoIndex.load(folder)) == 50
    monkeypatch.undo()
    stored.write_index(folder, about(), unit_rows(3), [row(number) for number in range(3)])
    assert len(VideoIndex.load(folder)) == 3


def seen(folder: Path) -> int:
    """How many rows the index has, all of which must be of one writing."""
    index = VideoIndex.load(folder)
    hits = index.search(unit_rows(len(index), seed=len(index)), 1)
    assert [hit.video.id for (hit,) in hits] == [f"video{1000 * len(index) + n}" for n in range(len(index))]
    return len(index)


@pytest.mark.parametrize("strikes_at", range(4))
def test_an_index_that_is_rewritten_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strikes_at: int
) -> None:
    """Before any of its files is opened."""
    rewrite(tmp_path / "i", 4)
    original, opened = stored._from, list[str]()

    def interrupted(folder: Path, name: str, read: Any) -> Any:
        opened.append(name)
        if len(opened) == strikes_at:
            rewrite(tmp_path / "i", 5)
        return original(folder, name, read)

    monkeypatch.setattr(stored, "_from", interrupted)
    assert seen(tmp_path / "i") == (5 if strikes_at else 4)
    assert len(opened) == (7 if strikes_at > 1 else 3)  # the second time, after a look at what has changed


def test_an_index_that_never_rests_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count(4)
    rewrite(tmp_path / "i", next(counts))
    original = stored._read_vectors

    def interrupted(folder: Path, dtype: str) -> Any:
        rewrite(folder, next(counts))
        return original(folder, dtype)

    monkeypatch.setattr(stored, "_read_vectors", interrupted)
    with pytest.raises(UserError, match="is being rewritten without a pause"):
        VideoIndex.load(tmp_path / "i")


def test_a_writer_in_a_loop_is_never_seen(tmp_path: Path) -> None:
    rewrite(tmp_path / "i", 4)
    index = VideoIndex.load(tmp_path / "i")
    with subprocess.Popen([sys.executable, rewriting.__file__, str(tmp_path / "i")]) as writer:
        try:
            while stored.version_of(index.folder) == index.version:
                assert writer.poll() is None
            assert {seen(tmp_path / "i") for _ in range(400)} == {4, 5}
        finally:
            writer.kill()


def test_recall_against_counting_by_hand() -> None:
    exact, queries = unit_rows(60), unit_rows(30, seed=2)
    coarse = np.round(exact * 4) / 4  # far from what it was
    truth = np.argsort(-(queries @ exact.T), axis=1)[:, :10]
    found = np.argsort(-(queries @ coarse.T), axis=1)[:, :10]
    by_hand = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert 0.3 < by_hand < 0.95
    assert recall_at(10, nearest.build(coarse, "flat"), exact, queries) == pytest.approx(by_hand)
    assert recall_at(10, nearest.build(exact, "flat"), exact, queries) == 1


def test_recall_leaves_a_row_itself_out_and_lets_ties_count() -> None:
    exact = np.repeat(unit_rows(12), 3, axis=0)  # each row three times: which of the equals comes is no matter
    own = np.arange(36)
    assert recall_at(10, nearest.build(exact[::-1], "flat"), exact[::-1], exact[::-1], own) == 1
    share, asked = recall_of(nearest.build(exact, "hnsw"), exact, [], lambda _: torch.empty(0))
    assert (share, asked) == (1, "36 of its own vectors")
    captions = [f"{number}" for number in range(5)]
    share, asked = recall_of(
        nearest.build(exact, "flat"), exact, captions, lambda texts: torch.from_numpy(exact[[int(t) for t in texts]])
    )
    assert (share, asked) == (1, "5 captions")
    assert recall_of(nearest.build(exact[:11], "flat"), exact[:11], captions, lambda _: torch.empty(0)) == (None, "")


def test_faiss_and_torch_compute_in_one_process_with_threads() -> None:
    """Each brings an OpenMP of its own."""
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        torch.set_num_threads(2)
        faiss.omp_set_num_threads(2)
        rows = torch.from_numpy(unit_rows(3000, 64))
        for _ in range(3):
            scores, _ = nearest.build(rows.numpy(), "flat").search(rows[:50].numpy(), 4)
            torch.testing.assert_close(torch.from_numpy(scores), (rows[:50] @ rows.T).topk(4).values)
    finally:
        torch.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])
