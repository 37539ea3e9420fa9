"""The saved similarity matrix: written and read back bit for bit, within little memory, refused where it is wrong."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scorers import clip_with, cosine_scorer, features
from torch import Tensor

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation import similarity
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.similarity_file import similarity_file, write_similarity_file
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, save_similarity
from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.model.scoring import Scorer

QUERIES = Queries(["a dog", "ein Hünd", "a cat"], np.array([1, 1, 0]), ["cat.mp4", "dog.mp4"])
MATRIX = torch.tensor([[0.1, 0.9], [0.5, 0.25], [-3.0, 1.0]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "s.npy"
    write_similarity_file(path, MATRIX.split(2), QUERIES)
    return path


@pytest.mark.parametrize("block_bytes", [1, 16, 2**20])
def test_what_was_written_is_read(path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", block_bytes)
    file = similarity_file(path)
    assert (file.queries.texts, file.queries.video_ids) == (QUERIES.texts, QUERIES.video_ids)
    for _ in range(2):  # afresh each time
        blocks = list(file)
        assert len(blocks) == {1: 3, 16: 2, 2**20: 1}[block_bytes]
        assert torch.equal(torch.cat(blocks), MATRIX)
    metrics = retrieval_metrics(file, file.queries.video_of_text)
    assert metrics.t2v.ranks.tolist() == [1, 2, 2]
    assert np.array_equal(np.load(path), MATRIX.numpy())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["s.json", "s.npy"]


@pytest.mark.parametrize(("dtype", "read"), [("<f2", "f4"), (">f4", "f4"), ("<f8", "f8"), (">f8", "f8")])
def test_other_programs_may_write_other_floats(path: Path, dtype: str, read: str) -> None:
    np.save(path, MATRIX.double().numpy().astype(dtype))
    (block,) = similarity_file(path)
    assert block.numpy().dtype == np.dtype(read)
    assert np.array_equal(block.numpy(), MATRIX.double().numpy().astype(dtype).astype(read))


def saved(matrix: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, matrix, **options)


def ids(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**content, **changes}))

    return change


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, r"s\.npy: there is no such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), r"s\.npy: cannot be read \(Is a directory\)"),
    "empty": (lambda path: path.write_bytes(b""), r"s\.npy: is no \.npy file of numbers"),
    "no npy": (
        lambda path: path.write_text("0.1 0.2\n" * 9),
        r"s\.npy: is no \.npy file of numbers.*magic",
    ),
    "cut": (
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        r"s\.npy: is no \.npy file of numbers",
    ),
    "objects": (
        saved(np.array([[{}]]), allow_pickle=True),
        r"s\.npy: is no \.npy file of numbers.*object",
    ),
    "vector": (saved(np.zeros(6)), r"s\.npy: has the shape \(6,\); a similarity is \(queries, videos\)"),
    "integers": (saved(np.zeros((3, 2), int)), r"s\.npy: has the dtype int64; a similarity is one of float16"),
    "columns": (saved(np.asfortranarray(np.zeros((3, 2)))), r"s\.npy: lies column by column"),
    "transposed": (saved(np.zeros((2, 3))), r"s\.npy: has the shape \(2, 3\), but s\.json .* 3 queries and 2 videos"),
    "no ids": (lambda path: path.with_suffix(".json").unlink(), r"s\.json: there is no such file"),
    "no object": (lambda path: path.with_suffix(".json").write_text("[]"), r"s\.json: is to hold the lists queries"),
    "a list missing": (ids(videos=None), r"s\.json: is to hold the lists queries, videos, video_of_query"),
    "no text": (ids(queries=["a", 7, "b"]), r"s\.json: queries holds 7, which is no text"),
    "no queries": (ids(queries=[], video_of_query=[]), r"s\.json: lists no queries"),
    "too few owners": (ids(video_of_query=[0, 1]), r"s\.json: video_of_query has 2 entries for 3 queries"),
    "wrong owner": (ids(video_of_query=[0, 1, 2]), r"s\.json: video_of_query holds 2, .*\(0 to 1\)"),
    "no number": (ids(video_of_query=[0, 1, True]), r"s\.json: video_of_query holds True"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str, path: Path) -> None:
    spoil, message = WRONG[wrong]
    spoil(path)
    with pytest.raises(UserError, match=message):
        similarity_file(path)


def test_nan_is_named_with_its_query_and_video(path: Path) -> None:
    np.save(path, np.array([[0, 0], [0, np.nan], [0, 0]], np.float32))
    with pytest.raises(UserError, match=r"s\.npy: row 1, column 1 \(query 'ein Hünd', video 'dog\.mp4'\) is nan"):
        list(similarity_file(path))


def test_a_file_that_shrinks_meanwhile_is_noticed(path: Path) -> None:
    file = similarity_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"s\.npy: ends in the middle of row 2"):
        list(file)


def test_a_failed_write_leaves_what_was_there(path: Path) -> None:
    def blocks() -> Any:
        yield MATRIX[:1]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_similarity_file(path, blocks(), QUERIES)
    assert np.array_equal(np.load(path), MATRIX.numpy())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["s.json", "s.npy"]


def test_an_annotation_of_the_matrixs_name_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('{"dog": {"sentences": ["a dog"]}}')
    with pytest.raises(UserError, match=r"save_similarity: .*test\.json, where .* holds something else"):
        write_similarity_file(tmp_path / "test.npy", [MATRIX], QUERIES)
    assert (tmp_path / "test.json").read_text() == '{"dog": {"sentences": ["a dog"]}}'
    assert [entry.name for entry in tmp_path.iterdir()] == ["test.json"]


def test_only_the_main_process_saves_and_says_where_it_cannot(tmp_path: Path) -> None:
    text, video = torch.eye(3)[:, :2], torch.eye(2)
    blocks = similarity_blocks(text, video, cosine_scorer(), 2)
    result = RetrievalReport(retrieval_metrics(blocks, QUERIES.video_of_text), QUERIES, blocks, None, 2, 0.0)
    save_similarity(tmp_path / "elsewhere.npy", replace(result, similarity=None))
    assert list(tmp_path.iterdir()) == []
    save_similarity(tmp_path / "s.npy", result)
    assert torch.equal(torch.cat(list(similarity_file(tmp_path / "s.npy"))), torch.eye(3)[:, :2])
    with pytest.raises(UserError, match=r"save_similarity: .*s\.npy/deeper\.npy cannot be written"):
        save_similarity(tmp_path / "s.npy" / "deeper.npy", result)


def peak_growth(action: Callable[[], Any]) -> float:
    """By how much `action` raises the most resident memory of this process, in MiB."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = field("VmRSS")
    action()
    return (field("VmHWM") - before) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_gallery_is_ranked_and_saved_within_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 4 * 2**20)
    count, path = 8500, tmp_path / "s.npy"
    whole, little = 275, 110  # MiB: the matrix; blocks, what is made of them, and what the allocator holds back
    text, video = torch.randn(2, count, 16, generator=torch.Generator().manual_seed(0))
    owners = np.arange(count)
    scorer = cosine_scorer(4.6)
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 500)
    names = [str(number) for number in range(count)]
    ranks: list[list[int]] = []

    def rank(matrix: Any) -> None:
        metrics = retrieval_metrics(matrix, owners)
        ranks.append(metrics.t2v.ranks.tolist() + metrics.v2t.ranks.tolist())

    assert peak_growth(lambda: rank([torch.cat(list(blocks))])) > whole, "it would be seen"
    assert peak_growth(lambda: rank(blocks)) < little
    assert peak_growth(lambda: write_similarity_file(path, blocks, Queries(names, owners, names))) < little
    assert peak_growth(lambda: rank(similarity_file(path))) < little
    assert ranks[0] == ranks[1] == ranks[2]


def test_gathered_answers_of_a_query_dependent_gallery_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 4 * 8 * 16 * 3)
    sizes: list[int] = []

    class Measuring(Scorer):
        indexable = False

        def keep(self, videos: VideoFeatures) -> Tensor:
            return videos.tokens

        def cosines(self, text: Tensor, kept: Tensor) -> Tensor:
            sizes.append(len(text) * len(kept) * kept.shape[-1] * 4)
            return text @ kept.mean(dim=1).T

    text, frames = torch.randn(2, 30, 16)[0], torch.randn(20, 3, 16)
    blocks = list(similarity_blocks(text, frames, Measuring(clip_with(0)), 8))
    assert torch.cat(blocks).shape == (30, 20)
    assert max(sizes) <= similarity.BLOCK_BYTES
