"""The saved similarity matrix: whole or not written, and never in place of another file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scorers import cosine_scorer

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.similarity_file import write_similarity_file
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport, save_similarity

QUERIES = Queries(["a dog", "ein Hünd", "a cat"], np.array([1, 1, 0]), ["cat.mp4", "dog.mp4"])
MATRIX = torch.tensor([[0.1, 0.9], [0.5, 0.25], [-3.0, 1.0]])


def test_a_matrix_and_its_ids_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s.npy"
    write_similarity_file(path, MATRIX.split(2), QUERIES)
    ids = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert ids == {"queries": QUERIES.texts, "videos": QUERIES.video_ids, "video_of_query": [1, 1, 0]}

    def blocks() -> Any:
        yield MATRIX[:1]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_similarity_file(path, blocks(), QUERIES)
    assert np.load(path).dtype == np.float32 and np.array_equal(np.load(path), MATRIX.numpy())
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
    assert np.array_equal(np.load(tmp_path / "s.npy"), np.eye(3, 2))
    with pytest.raises(UserError, match=r"save_similarity: .*s\.npy/deeper\.npy cannot be written"):
        save_similarity(tmp_path / "s.npy" / "deeper.npy", result)
