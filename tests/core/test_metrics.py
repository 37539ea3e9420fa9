"""Ranks against nested Python loops, on small matrices full of ties, with any number of captions a video."""

import json
import math

import numpy as np
import pytest
import torch
from golden import load_golden
from scorers import clip_with, cosine_scorer, features

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation import metrics, similarity
from adaclip_finetune.evaluation.metrics import DirectionMetrics, retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer, Scorer


def slow_ranks(scores, owners, texts=None):
    """The definition, word for word: t2v ranks by caption, v2t ranks by video that has captions.

    With `texts`, captions with the same text do not count against each other.
    """
    texts = range(len(owners)) if texts is None else texts
    of_video = {v: {text for text, own in zip(texts, owners, strict=True) if own == v} for v in range(len(scores[0]))}
    t2v, v2t = [], {}
    for text, own, row in zip(texts, owners, scores, strict=True):
        others = [s for v, s in enumerate(row) if v != own and text not in of_video[v]]
        t2v.append(1 + sum(s > row[own] for s in others) + sum(s == row[own] for s in others))
    for caption, own in enumerate(owners):
        mine = scores[caption][own]
        others = [scores[c][own] for c, v in enumerate(owners) if v != own and texts[c] not in of_video[own]]
        rank = 1 + sum(s > mine for s in others) + sum(s == mine for s in others)
        v2t[own] = min(rank, v2t.get(own, rank))
    return t2v, [v2t[v] for v in sorted(v2t)]


@pytest.mark.parametrize("seed", range(40))
def test_ranks_are_those_of_the_definition(seed):
    random = np.random.default_rng(seed)
    captions, videos = random.integers(1, 10), random.integers(1, 7)
    row_of = random.choice([-1.0, 0.0, 0.25, 0.5, float("-inf")], (6, videos))  # the same text has the same scores
    numbers, owners = random.integers(6, size=captions), random.integers(videos, size=captions).tolist()
    scores, texts = row_of[numbers].tolist(), ["abcdef"[number] for number in numbers]
    metrics = retrieval_metrics(torch.tensor(scores).split(int(random.integers(1, 4))), owners, texts)
    assert (metrics.t2v.ranks.tolist(), metrics.v2t.ranks.tolist()) == slow_ranks(scores, owners)
    assert metrics.t2v.ranks.dtype == metrics.v2t.ranks.dtype == np.int64
    videos_of = {text: {own for other, own in zip(texts, owners, strict=True) if other == text} for text in texts}
    assert metrics.shared_captions == sum(len(videos_of[text]) > 1 for text in texts)
    assert (metrics.excused is None) == (metrics.shared_captions == 0)
    if excused := metrics.excused:
        assert (excused.t2v.ranks.tolist(), excused.v2t.ranks.tolist()) == slow_ranks(scores, owners, texts)


SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.7, 0.2]])


@pytest.mark.parametrize(
    ("scores", "owners", "t2v", "v2t"),
    [
        (SCORES, [0, 1, 2], [1, 3, 3], [1, 2, 3]),
        # Two captions of video 0: each is a query of its own, and neither counts against the other.
        (torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.85, 0.7]]), [0, 0, 1], [1, 1, 2], [1, 1]),
        # Captions belong to the videos that the map says, whatever their order.
        (torch.eye(3)[[2, 0, 1]], [2, 0, 1], [1, 1, 1], [1, 1, 1]),
        # All scores equal: the worst rank for all.
        (torch.zeros(6, 6), range(6), [6] * 6, [6] * 6),
        # Video 1 has no caption: it is a distractor, and not a query.
        (torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.1, 0.6]]), [0, 2], [2, 1], [1, 1]),
    ],
)
def test_worked_examples(scores, owners, t2v, v2t):
    metrics = retrieval_metrics([scores], owners)
    assert (metrics.t2v.ranks.tolist(), metrics.v2t.ranks.tolist()) == (t2v, v2t)


@pytest.mark.parametrize("direction", [0.0, 1.0])
def test_a_text_ties_with_itself_whatever_the_last_bits_of_its_scores(direction):
    """Processors differ in them, and so do places in a matrix."""
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.1, 0.9]])
    scores[1] = scores[1].nextafter(torch.tensor(direction))
    metrics = retrieval_metrics(scores.split(1), [0, 1, 2], ["a man", "a man", "a dog"])
    assert metrics.v2t.ranks.tolist() == [2, 2, 1]


def test_captions_of_two_videos_give_both_figures():
    """A perfect model of three videos, two with the same caption but for case and spaces."""
    texts, owners = ["a man  plays", "A man plays", "a dog"], [0, 1, 2]
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.1, 0.9]])
    metrics = retrieval_metrics([scores], owners, texts)
    third = pytest.approx(100 / 3)
    assert (metrics.t2v.recall(1), metrics.v2t.recall(1), metrics.shared_captions) == (third, third, 2)
    assert set(metrics.as_dict()["t2v"]) == {"R@1", "R@5", "R@10", "R@50", "MedR", "MeanR", "queries"}
    assert (metrics.as_dict()["t2v"]["MedR"], metrics.as_dict()["t2v"]["MeanR"]) == (2, pytest.approx(5 / 3))
    assert metrics.excused is not None
    assert (metrics.excused.t2v.recall(1), metrics.excused.v2t.recall(1)) == (100, 100)
    assert metrics.as_dict()["shared_captions"]["captions"] == 2
    report = RetrievalReport(metrics, Queries(texts, np.array(owners), ["x", "y", "z"]), None, None, 4, 0.0)
    counts, shared = report.gallery().splitlines()
    assert "3 captions, 3 videos, 1 of 4 MISSING" in counts
    assert "2 captions" in shared and "T2V 100.0, V2T 100.0" in shared


def test_figures_survive_json_exactly():
    metrics = retrieval_metrics([SCORES], [0, 2, 1], ["a", "a", "b"])
    queries = Queries(["a", "a", "b"], np.array([0, 2, 1]), ["x", "y", "z"], [("order",), (), ("order", "b")])
    figures = RetrievalReport(metrics, queries, None, None, 5, 0.0).figures
    again = Retrieval.figures_from_state(json.loads(json.dumps(figures.as_state())))
    assert again.as_dict() == figures.as_dict() and "excused" in again.as_dict()["shared_captions"]
    assert again.as_dict()["v2t"]["videos_evaluated"] == 3 and again.as_dict()["t2v"]["videos_listed"] == 5
    tags = {"order": metrics.t2v.ranks[[0, 2]], "b": metrics.t2v.ranks[[2]], "(no tag)": metrics.t2v.ranks[[1]]}
    assert again.as_dict()["tags"] == {tag: DirectionMetrics(ranks).as_dict() for tag, ranks in tags.items()}
    old = {name: part for name, part in figures.as_state().items() if name != "by_tag"}
    assert "tags" not in Retrieval.figures_from_state(old).as_dict()
    for direction in ("t2v", "v2t"):
        one, other = getattr(figures.metrics, direction), getattr(again.metrics, direction)
        assert one.ranks.tolist() == other.ranks.tolist() and other.ranks.dtype == np.int64


def nan_in_row(row):
    scores = torch.zeros(5, 3)
    scores[row, 1] = math.nan
    return scores.split(2)


@pytest.mark.parametrize(
    ("blocks", "owners", "message"),
    [
        (nan_in_row(3), [0, 1, 2, 0, 1], "row 3 is NaN"),
        ([torch.zeros(2, 3)], [0, 1, 2], "2 rows for 3 captions"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], [0, 1, 2], "more rows than the 3"),
        ((block for block in [torch.zeros(1, 1)]), [0], "0 rows for 1 captions"),
        ([], [], "no captions"),
    ],
)
def test_wrong_matrices_are_refused(blocks, owners, message, monkeypatch):
    monkeypatch.setattr(metrics, "_KEPT", 0)  # what is kept is not asked for a second time
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(blocks, owners)


def test_blocks_of_a_small_matrix_are_computed_once(monkeypatch):
    """And those of a larger one a second time, with the same ranks."""

    class Blocks:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(matrix.split(3))

    matrix, owners, found = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1, 2, 2, 3, 4], []
    for kept, passes in ((8 * 5 * 4, 1), (8 * 5 * 4 - 1, 2)):
        monkeypatch.setattr(metrics, "_KEPT", kept)
        found.append(retrieval_metrics(blocks := Blocks(), owners).as_state())
        assert blocks.passes == passes
    assert found[0] == found[1]


def test_similarity_blocks_equal_the_whole_matrix():
    generator = torch.Generator().manual_seed(1)
    text, video = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator)
    expected = 100 * torch.nn.functional.cosine_similarity(text[:, None].double(), video[None].double(), dim=-1)
    scorer = cosine_scorer(math.log(100))
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 3)
    assert len(blocks) == 3
    for _ in range(2):  # it starts afresh each time
        whole = torch.cat(list(blocks))
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole.double(), expected, atol=1e-4, rtol=0)
    scorer = CosineScorer(clip_with(math.log(100), -3))
    in_double = torch.cat(list(similarity_blocks(text.double(), scorer.keep(features(video.double())), scorer, 3)))
    torch.testing.assert_close(in_double, expected - 3, atol=1e-10, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = cosine_scorer().keep(features(video))
        blocks = list(similarity_blocks(text.requires_grad_(), kept, cosine_scorer(), 3))
    assert all(block.dtype == torch.float32 and not block.requires_grad for block in blocks)
    torch.testing.assert_close(100 * torch.cat(blocks).double(), expected, atol=1e-4, rtol=0)


def test_similarity_blocks_do_not_change_while_the_model_learns():
    text, video, scorer = torch.randn(7, 5), torch.randn(4, 5), CosineScorer(clip := clip_with(1, -3))
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 3)
    before = list(blocks)
    with torch.no_grad():
        clip.logit_scale.fill_(2)
        clip.logit_bias.fill_(4)
    assert all(torch.equal(one, other) for one, other in zip(blocks, before, strict=True))


def test_similarity_of_videos_that_depend_on_the_query(monkeypatch):
    at_once = []

    class Watching(QueryScorer):
        def cosines(self, text, kept):
            at_once.append(len(kept))
            return super().cosines(text, kept)

    generator = torch.Generator().manual_seed(2)
    text, frames = torch.randn(7, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    scorer = Watching(clip_with(0).float(), 0.5)
    cosines = torch.nn.functional.cosine_similarity(text[:, None, None], frames[None], dim=-1)
    videos = torch.einsum("tvk,vkd->tvd", (cosines / 0.5).softmax(-1), frames)
    expected = torch.nn.functional.cosine_similarity(text[:, None], videos, dim=-1)
    torch.testing.assert_close(torch.cat(list(similarity_blocks(text, frames, scorer, 2))), expected)
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 100)  # two rows of four videos; answers for two videos at a time
    blocks = list(similarity_blocks(text, frames, scorer, 2))
    assert [block.shape for block in blocks] == [(2, 4), (2, 4), (2, 4), (1, 4)]
    assert at_once == [4] * 4 + [2] * 8
    torch.testing.assert_close(torch.cat(blocks), expected)


@pytest.mark.parametrize(("allowed", "rows"), [(5 * 10 * 4, 5), (1, 1)])
def test_blocks_are_limited_in_bytes_whatever_val_batch_size(allowed, rows, monkeypatch):
    text, video, scorer = torch.randn(40, 5), torch.randn(10, 5), cosine_scorer()
    whole = torch.cat(list(similarity_blocks(text, video, scorer, 500)))
    monkeypatch.setattr(similarity, "BLOCK_BYTES", allowed)
    blocks = similarity_blocks(text, video, scorer, 500)
    assert {len(block) for block in blocks} == {rows} and len(blocks) == 40 // rows
    torch.testing.assert_close(torch.cat(list(blocks)), whole)


@pytest.fixture
def tf32():
    """Switch TF32 on, as `--tf32` does."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield matmul
    matmul.allow_tf32 = before


@pytest.mark.parametrize("can_be_indexed", [False, True])
def test_similarity_does_not_use_tf32_when_the_towers_do(tf32, can_be_indexed):
    seen = []

    class Watching(Scorer):
        indexable = can_be_indexed

        def keep(self, videos):
            return videos.tokens

        def cosines(self, text, kept):
            seen.append(tf32.allow_tf32)
            return text @ kept.mean(dim=1).T

    for _ in similarity_blocks(torch.randn(4, 3), torch.randn(5, 2, 3), Watching(clip_with(0)), 2):
        seen.append(tf32.allow_tf32)
    assert seen == [False, True] * 2


@pytest.mark.parametrize("case", range(2))
def test_golden_recalls_of_rlcf(case):
    golden = load_golden("reward_recall")[case]
    owners = golden["image_of_text"]
    found = {
        "img": retrieval_metrics([golden["scores_t2i"]], owners).t2v,
        "txt": retrieval_metrics([golden["scores_i2t"].T.contiguous()], owners).v2t,
    }
    for name, direction in found.items():
        for k in (1, 5, 10):
            assert direction.recall(k) == pytest.approx(golden[f"{name}_r{k}"], abs=1e-4)
