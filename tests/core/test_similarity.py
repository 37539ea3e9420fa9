"""The saved similarity matrix: written and read back bit for bit, within little memory, and refused if it is wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scorers import cosine_scorer

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation import similarity
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.similarity_file import similarity_file, write_similarity_file
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, save_similarity

QUERIES = Queries(["a dog", "ein Hünd", "a cat"], np.array([1, 1, 0]), ["cat.mp4", "dog.mp4"])
MATRIX = torch.tensor([[0.1, 0.9], [0.5, 0.25], [-3.0, 1.0]])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "s.npy"
    write_similarity_file(path, MATRIX.split(2), QUERIES)
    return path


@pytest.mark.parametrize(("block_bytes", "count"), [(1, 3), (16, 2), (2**20, 1)])
def test_a_matrix_is_read_as_it_was_written(
    path: Path, block_bytes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", block_bytes)
    file = similarity_file(path)
    assert (file.queries.texts, file.queries.video_ids) == (QUERIES.texts, QUERIES.video_ids)
    for _ in range(2):  # it starts afresh each time
        blocks = list(file)
        assert len(blocks) == count and torch.equal(torch.cat(blocks), MATRIX)
    assert retrieval_metrics(file, file.queries.video_of_text).t2v.ranks.tolist() == [1, 2, 2]
    assert np.array_equal(np.load(path), MATRIX.numpy())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["s.json", "s.npy"]


@pytest.mark.parametrize(("dtype", "read"), [("<f2", "f4"), (">f4", "f4"), ("<f8", "f8"), (">f8", "f8")])
def test_other_programs_may_write_other_floats(path: Path, dtype: str, read: str) -> None:
    np.save(path, MATRIX.double().numpy().astype(dtype))
    (block,) = similarity_file(path)
    assert block.numpy().dtype == np.dtype(read)
    assert np.array_equal(block.numpy(), MATRIX.double().numpy().astype(dtype).astype(read))


def saved(matrix: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, matrix, allow_pickle=True)


def ids(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> object:
        content = json.loads(path.with_suffix(".json").read_text())
        return path.with_suffix(".json").write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "s.npy: cannot be read"),
        (lambda path: path.write_bytes(b""), "s.npy: not a complete .npy file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "s.npy: not a complete .npy file"),
        (saved(np.array([[{}]])), "s.npy: not a complete .npy file"),
        (saved(np.zeros(6)), "s.npy: has the shape (6,)"),
        (saved(np.zeros((3, 2), int)), "s.npy: has the dtype int64"),
        (saved(np.asfortranarray(np.zeros((3, 2)))), "s.npy: is stored column by column"),
        (saved(np.zeros((2, 3))), "s.json lists 3 queries and 2 videos"),
        (saved(np.array([[0, 0], [0, np.nan], [0, 0]], np.float32)), "(query 'ein Hünd', video 'dog.mp4') is nan"),
        (lambda path: path.with_suffix(".json").unlink(), "s.json: "),
        (lambda path: path.with_suffix(".json").write_text("[]"), "s.json: must hold the lists queries"),
        (ids(videos=None), "s.json: must hold the lists queries"),
        (ids(queries=["a", 7, "b"]), "queries.1"),
        (ids(queries=[], video_of_query=[]), "queries: List should have at least 1"),
        (ids(videos=["a", "a"]), "s.json: videos lists 'a' twice"),
        (ids(video_of_query=[0, 1]), "s.json: video_of_query has 2 entries for 3 queries"),
        (ids(video_of_query=[0, 1, 2]), "s.json: video_of_query holds 2"),
        (ids(video_of_query=[0, 1, True]), "video_of_query.2"),
    ],
)
def test_a_wrong_matrix_or_wrong_ids_are_named(spoil: Callable[[Path], object], message: str, path: Path) -> None:
    spoil(path)
    with pytest.raises(UserError) as refused:
        list(similarity_file(path))
    assert message in str(refused.value)


def test_a_failed_write_leaves_the_old_matrix(path: Path) -> None:
    def blocks() -> Any:
        yield MATRIX[:1]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_similarity_file(path, blocks(), QUERIES)
    assert np.array_equal(np.load(path), MATRIX.numpy())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["s.json", "s.npy"]


def test_an_annotation_with_the_name_of_the_ids_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('{"dog": {"sentences": ["a dog"]}}')
    with pytest.raises(UserError, match=r"save_similarity: .*test\.json"):
        write_similarity_file(tmp_path / "test.npy", [MATRIX], QUERIES)
    assert (tmp_path / "test.json").read_text() == '{"dog": {"sentences": ["a dog"]}}'
    assert [entry.name for entry in tmp_path.iterdir()] == ["test.json"]


def test_only_the_main_process_saves(tmp_path: Path) -> None:
    blocks = similarity_blocks(torch.eye(3)[:, :2], torch.eye(2), cosine_scorer(), 2)
    result = RetrievalReport(retrieval_metrics(blocks, QUERIES.video_of_text), QUERIES, blocks, None, 2, 0.0)
    save_similarity(tmp_path / "elsewhere.npy", replace(result, similarity=None))
    assert list(tmp_path.iterdir()) == []
    save_similarity(tmp_path / "s.npy", result)
    assert torch.equal(torch.cat(list(similarity_file(tmp_path / "s.npy"))), torch.eye(3)[:, :2])
    with pytest.raises(UserError, match=r"save_similarity: .*s\.npy/deeper\.npy cannot be written"):
        save_similarity(tmp_path / "s.npy" / "deeper.npy", result)
