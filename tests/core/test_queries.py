"""Training entries and evaluation queries of the three ways to treat several sentences a video."""

import numpy as np
import pytest

from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.queries import TrainEntry, evaluation_queries, train_entries

VIDEOS = [VideoAnnotation("a", ("one", "two")), VideoAnnotation("b", ("three",)), VideoAnnotation("c", ("x", "y", "z"))]


def test_concat_is_one_query_a_video() -> None:
    assert [entry.sentences for entry in train_entries(VIDEOS, "concat")] == [("one two",), ("three",), ("x y z",)]
    queries = evaluation_queries(VIDEOS, "concat")
    assert queries.texts == ["one two", "three", "x y z"]
    assert queries.video_of_text.tolist() == [0, 1, 2] and queries.video_ids == ["a", "b", "c"]


def test_indep_all_is_one_entry_a_sentence() -> None:
    entries = train_entries(VIDEOS, "indep-all")
    assert [(entry.video_id, *entry.sentences) for entry in entries] == [
        ("a", "one"), ("a", "two"), ("b", "three"), ("c", "x"), ("c", "y"), ("c", "z"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["indep-one", "indep-all"])
def test_fault_multi_caption_evaluation_asks_every_sentence_and_lists_each_video_once(mode: str) -> None:
    queries = evaluation_queries(VIDEOS, mode)
    assert queries.texts == ["one", "two", "three", "x", "y", "z"]
    assert queries.video_ids == ["a", "b", "c"]
    assert queries.video_of_text.tolist() == [0, 0, 1, 2, 2, 2] and queries.video_of_text.dtype == np.int64


def test_indep_one_draws_a_sentence_each_epoch() -> None:
    entry = train_entries(VIDEOS, "indep-one")[2]
    assert entry == TrainEntry("c", ("x", "y", "z"))
    drawn = [entry.sentence(seed=0, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn == [entry.sentence(seed=0, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn != [entry.sentence(seed=1, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn != [entry.sentence(seed=0, epoch=epoch, index=3) for epoch in range(300)]
    assert all(60 < drawn.count(sentence) < 140 for sentence in "xyz")


def test_within_keeps_the_map_right() -> None:
    queries = evaluation_queries(VIDEOS, "indep-all").within(["c", "a"])
    assert queries.video_ids == ["c", "a"]
    assert queries.texts == ["one", "two", "x", "y", "z"]
    assert queries.video_of_text.tolist() == [1, 1, 0, 0, 0]
    assert evaluation_queries(VIDEOS, "concat").within([]).video_of_text.shape == (0,)
