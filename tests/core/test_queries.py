"""Training entries and evaluation queries of the three ways to use several sentences of a video."""

from dataclasses import replace

import numpy as np
import pytest

from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.queries import TrainEntry, digest_of_entries, evaluation_queries, train_entries

VIDEOS = [VideoAnnotation("a", ("one", "two")), VideoAnnotation("b", ("three",)), VideoAnnotation("c", ("x", "y", "z"))]
SENTENCES = ["one", "two", "three", "x", "y", "z"]


@pytest.mark.parametrize(
    ("mode", "entries", "texts", "videos"),
    [
        ("concat", [("one two",), ("three",), ("x y z",)], ["one two", "three", "x y z"], [0, 1, 2]),
        ("indep-one", [("one", "two"), ("three",), ("x", "y", "z")], SENTENCES, [0, 0, 1, 2, 2, 2]),
        ("indep-all", [(text,) for text in SENTENCES], SENTENCES, [0, 0, 1, 2, 2, 2]),
    ],
)
def test_training_entries_and_queries(
    mode: str, entries: list[tuple[str, ...]], texts: list[str], videos: list[int]
) -> None:
    """An evaluation asks every text and repeats no video."""
    of_entries = "aabccc" if mode == "indep-all" else "abc"
    assert train_entries(VIDEOS, mode) == [TrainEntry(*entry) for entry in zip(of_entries, entries, strict=True)]
    queries = evaluation_queries(VIDEOS, mode)
    assert queries.texts == texts and queries.video_ids == ["a", "b", "c"]
    assert queries.video_of_text.tolist() == videos and queries.video_of_text.dtype == np.int64


def test_indep_one_draws_a_sentence_each_epoch() -> None:
    entry = train_entries(VIDEOS, "indep-one")[2]
    drawn = [entry.sentence(seed=0, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn == [entry.sentence(seed=0, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn != [entry.sentence(seed=1, epoch=epoch, index=2) for epoch in range(300)]
    assert drawn != [entry.sentence(seed=0, epoch=epoch, index=3) for epoch in range(300)]
    assert all(60 < drawn.count(sentence) < 140 for sentence in "xyz")


def test_auxiliary_captions_are_drawn_independently_of_sentences() -> None:
    video = VideoAnnotation("a", ("x", "y"), auxiliary=("1", "2"))
    for mode, rows in (("concat", 1), ("indep-one", 1), ("indep-all", 2)):
        assert [entry.auxiliary for entry in train_entries([video], mode)] == [("1", "2")] * rows
    (entry,) = train_entries([video], "indep-one")
    drawn = [(entry.sentence(0, epoch, 0), entry.auxiliary_caption(0, epoch, 0)) for epoch in range(400)]
    assert all(60 < drawn.count((text, auxiliary)) < 140 for text in "xy" for auxiliary in "12")
    assert TrainEntry("b", ("x",)).auxiliary_caption(0, 0, 0) == ""


def test_a_run_recognises_its_auxiliary_captions() -> None:
    digests = [digest_of_entries([TrainEntry("a", ("x",), auxiliary)]) for auxiliary in ((), ("1",), ("2",))]
    assert len(set(digests)) == 3


def test_a_smaller_gallery_keeps_its_texts() -> None:
    queries = evaluation_queries(VIDEOS, "indep-all").within(["c", "a"])
    assert queries.video_ids == ["c", "a"]
    assert queries.texts == ["one", "two", "x", "y", "z"]
    assert queries.video_of_text.tolist() == [1, 1, 0, 0, 0]
    assert evaluation_queries(VIDEOS, "concat").within([]).video_of_text.shape == (0,)


@pytest.mark.parametrize(
    ("mode", "masks"),
    [
        ("indep-all", {"order": "010000", "sound": "011000", "(no tag)": "100111"}),
        ("concat", {"order": "100", "sound": "110", "(no tag)": "001"}),
    ],
)
def test_tags_select_queries(mode: str, masks: dict[str, str]) -> None:
    """Joined sentences have the tags of all of them."""
    tags = [((), ("sound", "order")), (("sound",),), None]
    queries = evaluation_queries([replace(video, tags=one) for video, one in zip(VIDEOS, tags, strict=True)], mode)
    found = {tag: "".join(str(int(has)) for has in mask) for tag, mask in queries.by_tag().items()}
    assert found == masks and list(found) == list(masks)
    smaller = queries.within(["c", "b"]).by_tag()  # "order" has no query left
    assert list(smaller) == ["sound", "(no tag)"] and smaller["sound"].tolist() == [True] + [False] * (
        len(smaller["sound"]) - 1
    )
    assert evaluation_queries(VIDEOS, mode).by_tag() == {}
