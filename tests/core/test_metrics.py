"""Ranks against nested Python loops, on small matrices full of ties, with any number of captions a video."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import clip_with, cosine_scorer, features

from adaclip_finetune.evaluation import similarity
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalFigures
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer, Scorer


def slow_ranks(scores, owners):
    """The definition word for word: t2v ranks by caption, v2t ranks by video that has captions."""
    t2v = []
    for own, row in zip(owners, scores, strict=True):
        greater = sum(1 for v, s in enumerate(row) if v != own and s > row[own])
        equal = sum(1 for v, s in enumerate(row) if v != own and s == row[own])
        t2v.append(1 + greater + equal)
    v2t = {}
    for caption, own in enumerate(owners):
        mine = scores[caption][own]
        others = [scores[c][own] for c in range(len(owners)) if owners[c] != own]
        rank = 1 + sum(s > mine for s in others) + sum(s == mine for s in others)
        v2t[own] = min(rank, v2t.get(own, rank))
    return t2v, [v2t[v] for v in sorted(v2t)]


@st.composite
def tied_problems(draw):
    captions, videos = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, float("-inf")])
    scores = draw(st.lists(st.lists(values, min_size=videos, max_size=videos), min_size=captions, max_size=captions))
    owners = draw(st.lists(st.integers(0, videos - 1), min_size=captions, max_size=captions))
    return scores, owners, draw(st.integers(1, captions))


@settings(max_examples=300, deadline=None)
@given(tied_problems())
def test_ranks_are_those_of_the_definition(problem):
    scores, owners, block = problem
    metrics = retrieval_metrics(torch.tensor(scores).split(block), owners)
    t2v, v2t = slow_ranks(scores, owners)
    assert metrics.t2v.ranks.tolist() == t2v
    assert metrics.v2t.ranks.tolist() == v2t
    assert metrics.v2t.queries.tolist() == sorted(set(owners))
    assert metrics.t2v.ranks.dtype == np.int64


@pytest.mark.parametrize("block", [1, 7, 200])
def test_a_larger_matrix_in_blocks_of_any_size(block):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(200, 60, generator=generator) * 2).round() / 2
    owners = torch.randint(0, 60, (200,), generator=generator)
    metrics = retrieval_metrics(scores.split(block), owners)
    t2v, v2t = slow_ranks(scores.tolist(), owners.tolist())
    assert metrics.t2v.ranks.tolist() == t2v
    assert metrics.v2t.ranks.tolist() == v2t
    assert metrics.t2v.recall(5) == pytest.approx(100 * sum(r <= 5 for r in t2v) / len(t2v))
    assert metrics.v2t.median_rank == sorted(v2t)[len(v2t) // 2] if len(v2t) % 2 else True
    assert metrics.t2v.mean_rank == pytest.approx(sum(t2v) / len(t2v))


def test_hand_worked_example():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.7, 0.2]])
    metrics = retrieval_metrics([scores], [0, 1, 2])
    assert metrics.t2v.ranks.tolist() == [1, 3, 3]
    assert metrics.v2t.ranks.tolist() == [1, 2, 3]
    assert metrics.as_dict()["t2v"] == {
        "R@1": pytest.approx(100 / 3),
        "R@5": 100.0,
        "R@10": 100.0,
        "R@50": 100.0,
        "MedR": 3.0,
        "MeanR": pytest.approx(7 / 3),
        "queries": 3,
    }
    json.dumps(metrics.as_dict())


def test_fault_multi_caption_evaluation_wrong():
    """Two captions of video 0: each is ranked on its own (t2v), and neither counts against the other (v2t)."""
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.85, 0.7]])
    metrics = retrieval_metrics([scores], [0, 0, 1])
    assert metrics.t2v.ranks.tolist() == [1, 1, 2]
    assert metrics.v2t.ranks.tolist() == [1, 1]  # caption 0 is first; caption 1 (0.8) would be behind caption 2 (0.85)
    only_the_second = retrieval_metrics([scores[1:]], [0, 1])
    assert only_the_second.v2t.ranks.tolist() == [2, 1]


def test_fault_captions_are_matched_by_the_map_and_not_by_their_order():
    scores = torch.eye(3)[[2, 0, 1]]
    assert retrieval_metrics([scores], [2, 0, 1]).t2v.recall(1) == 100
    assert retrieval_metrics([scores], [0, 1, 2]).t2v.recall(1) == 0


def test_fault_constant_matrix_scores_zero():
    metrics = retrieval_metrics([torch.zeros(6, 6)], range(6))
    assert metrics.t2v.recall(1) == metrics.v2t.recall(1) == 0
    assert metrics.t2v.ranks.tolist() == metrics.v2t.ranks.tolist() == [6] * 6


def test_videos_without_captions_are_distractors_only():
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.1, 0.6]])
    metrics = retrieval_metrics([scores], [0, 2])
    assert metrics.t2v.ranks.tolist() == [2, 1]
    assert metrics.v2t.queries.tolist() == [0, 2]
    assert metrics.v2t.ranks.tolist() == [1, 1]


def test_nan_is_an_error_that_names_the_row():
    scores = torch.zeros(5, 3)
    scores[3, 1] = math.nan
    with pytest.raises(ValueError, match="row 3 is NaN"):
        retrieval_metrics(scores.split(2), [0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("blocks", "owners", "message"),
    [
        ([torch.zeros(2, 3)], [0, 1, 2], "2 rows for 3 captions"),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], [0, 1, 2], "more rows than the 3"),
        ([torch.zeros(2, 3), torch.zeros(1, 4)], [0, 1, 2], "4 columns"),
        ([torch.zeros(2, 3)], [0, 3], "outside the 3 columns"),
        ([torch.zeros(2, 3)], [0, -1], "outside the 3 columns"),
        (torch.zeros(2, 3), [0, 1], "list of one block"),
        ([], [], "no captions"),
    ],
)
def test_what_does_not_fit_is_refused(blocks, owners, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(blocks, owners)


def test_a_generator_is_refused():
    with pytest.raises(TypeError, match="twice"):
        retrieval_metrics((block for block in [torch.zeros(1, 1)]), [0])


def test_only_one_block_is_held_at_a_time():
    alive = 0

    class Block(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    class Blocks:
        most = 0

        def __iter__(self):
            nonlocal alive
            for _ in range(10):
                alive += 1
                Blocks.most = max(Blocks.most, alive)
                yield torch.randn(3, 4).as_subclass(Block)

    with torch._C.DisableTorchFunctionSubclass():
        retrieval_metrics(Blocks(), [i % 4 for i in range(30)])
    assert Blocks.most <= 2  # the one that is being made, and the one before


def test_similarity_blocks_equal_the_whole_matrix():
    generator = torch.Generator().manual_seed(1)
    text, video = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator)
    expected = 100 * torch.nn.functional.cosine_similarity(text[:, None].double(), video[None].double(), dim=-1)
    scorer = cosine_scorer(math.log(100))
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 3)
    assert len(blocks) == 3
    for _ in range(2):  # afresh each time
        whole = torch.cat(list(blocks))
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole.double(), expected, atol=1e-4, rtol=0)
    scorer = CosineScorer(clip_with(math.log(100), -3))
    in_double = torch.cat(list(similarity_blocks(text.double(), scorer.keep(features(video.double())), scorer, 3)))
    torch.testing.assert_close(in_double, expected - 3, atol=1e-10, rtol=0)
    scorer = cosine_scorer()
    half = torch.cat(list(similarity_blocks(text.bfloat16(), scorer.keep(features(video.bfloat16())), scorer, 3)))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected / 100, atol=0.02, rtol=0)


def test_similarity_blocks_are_those_of_the_moment_they_were_made():
    text, video, scorer = torch.randn(7, 5), torch.randn(4, 5), CosineScorer(clip := clip_with(1, -3))
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 3)
    before = list(blocks)
    with torch.no_grad():
        clip.logit_scale.fill_(2)
        clip.logit_bias.fill_(4)
    assert all(torch.equal(one, other) for one, other in zip(blocks, before, strict=True))


def test_similarity_of_videos_that_depend_on_the_query(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    text, frames = torch.randn(7, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    scorer = QueryScorer(clip_with(0).float(), 0.5)
    cosines = torch.nn.functional.cosine_similarity(text[:, None, None], frames[None], dim=-1)
    videos = torch.einsum("tvk,vkd->tvd", (cosines / 0.5).softmax(-1), frames)
    expected = torch.nn.functional.cosine_similarity(text[:, None], videos, dim=-1)
    torch.testing.assert_close(torch.cat(list(similarity_blocks(text, frames, scorer, 2))), expected)
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 100)  # two rows of four videos; answers for two videos at a time
    blocks = list(similarity_blocks(text, frames, scorer, 2))
    assert [block.shape for block in blocks] == [(2, 4), (2, 4), (2, 4), (1, 4)]
    torch.testing.assert_close(torch.cat(blocks), expected)


def test_blocks_are_bounded_in_bytes_whatever_val_batch_size(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    text, video = torch.randn(40, 5, generator=generator), torch.randn(10, 5, generator=generator)
    scorer = cosine_scorer()
    whole = torch.cat(list(similarity_blocks(text, video, scorer, 500)))
    for allowed, rows in ((5 * 10 * 4, 5), (1, 1)):
        monkeypatch.setattr(similarity, "BLOCK_BYTES", allowed)
        blocks = similarity_blocks(text, video, scorer, 500)
        assert {len(block) for block in blocks} == {rows} and len(blocks) == 40 // rows
        torch.testing.assert_close(torch.cat(list(blocks)), whole)


def test_figures_survive_json_exactly():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.7, 0.2]])
    figures = RetrievalFigures(retrieval_metrics([scores], [0, 2, 2]), videos_evaluated=3, videos_listed=5)
    again = Retrieval.figures_from_state(json.loads(json.dumps(figures.as_state())))
    assert again.as_dict() == figures.as_dict()
    assert again.as_dict()["v2t"]["videos_evaluated"] == 3 and again.as_dict()["t2v"]["videos_listed"] == 5
    for direction in ("t2v", "v2t"):
        one, other = getattr(figures.metrics, direction), getattr(again.metrics, direction)
        for name in ("queries", "ranks"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()
            assert getattr(other, name).dtype == np.int64


def test_similarity_is_float32_under_autocast_and_without_gradients():
    text, video, scorer = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5), cosine_scorer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = scorer.keep(features(video))
        blocks = list(similarity_blocks(text, kept, scorer, 2))
    assert kept.dtype == torch.float32
    assert all(block.dtype == torch.float32 and not block.requires_grad for block in blocks)
    expected = torch.nn.functional.cosine_similarity(text[:, None], video[None], dim=-1).detach()
    torch.testing.assert_close(torch.cat(blocks), expected)


@pytest.fixture
def tf32():
    """As `--tf32` switches it on."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield matmul
    matmul.allow_tf32 = before


@pytest.mark.parametrize("can_be_indexed", [False, True])
def test_similarity_is_no_tf32_where_the_towers_are(tf32, can_be_indexed):
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


def test_similarity_needs_rows():
    with pytest.raises(ValueError, match="at least one row"):
        similarity_blocks(torch.zeros(1, 2), torch.zeros(1, 2), cosine_scorer(), 0)
