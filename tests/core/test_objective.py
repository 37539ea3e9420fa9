"""The losses compared with numpy and plain loops, and pairs that must not count as negatives."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip
from golden import load_golden
from tiny import VOCABULARY, build_retriever, random_tokens, random_videos
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.objectives import build_objective
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.objectives.contrastive import all_but_hardest, contrastive_loss, cross_entropy
from adaclip_finetune.objectives.sigmoid import sigmoid_loss
from adaclip_finetune.weights.loaded import LOGIT_BIAS


def same(numbers, others=None):
    """Return which of `numbers` equal which of `others`, by default of themselves."""
    return torch.tensor(list(numbers))[:, None] == torch.tensor(list(others or numbers))[None, :]


def numpy_loss(similarity, groups):
    def one_way(s):
        total = 0.0
        for i, row in enumerate(s):
            negatives = [row[j] for j in range(len(row)) if j == i or groups[j] != groups[i]]
            total += np.log(np.exp(negatives).sum()) - row[i]
        return total / len(s)

    return (one_way(similarity) + one_way(similarity.T)) / 2


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [3, 0, 3, 1, 3], [7, 7, 7, 7, 7]])
def test_contrastive_loss_equals_its_formula(groups):
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    loss = contrastive_loss(similarity, same(groups))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(numpy_loss(similarity.numpy(), groups), rel=1e-12, abs=1e-12)


def test_a_batch_of_one_and_of_one_video_have_zero_loss_and_gradients():
    for size in (1, 3):
        similarity = torch.randn(size, size, requires_grad=True)
        loss = contrastive_loss(similarity, same([0] * size))
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert similarity.grad.isfinite().all()


@pytest.mark.parametrize("name", ["1", "2", "4"])
def test_contrastive_losses_are_those_of_the_published_clip_vip(name):
    """Which adds the directions. Its hard negatives are the largest logits of each row."""
    golden = load_golden("op_clip_vip_losses")[name]
    text, video = (torch.tensor(golden[kind], dtype=torch.float64) for kind in ("text", "video"))
    cosines, nothing = text @ video.T, torch.zeros(len(text), len(text), dtype=torch.bool)
    logits = math.exp(golden["logit_scale"]) * cosines
    right = torch.arange(len(text))
    hard = [way.masked_fill(torch.eye(len(text)) > 0, -math.inf).topk(2).indices for way in (cosines, cosines.T)]
    left_out = [torch.ones_like(nothing).scatter(1, indices, False) for indices in hard]
    found = {
        "NCELearnableTempLoss": 2 * contrastive_loss(logits),
        "NCELearnableTempDSLLoss": 2 * contrastive_loss(logits, dual_softmax=True),
        "NCEContrastiveLoss_temp0.05": 2 * contrastive_loss(cosines / 0.05),
        "HardNegLoss_k2": cross_entropy(cosines, right, left_out[0]) + cross_entropy(cosines.T, right, left_out[1]),
    }
    assert {kind: loss.item() for kind, loss in found.items()} == pytest.approx(golden["loss"], rel=1e-9)


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [3, 0, 3, 1, 3], [7, 7, 7, 7, 7]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_spread_over_what_is_contrasted(groups, smoothing):
    """Each row equals torch's loss of the entries that are not left out."""
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    left_out = same(groups)
    expected = torch.zeros(())
    for way in (logits, logits.T):
        for number, row in enumerate(way):
            kept = torch.cat([row[number : number + 1], row[~left_out[number]]])
            own = F.cross_entropy(kept[None], torch.zeros(1, dtype=torch.long), label_smoothing=smoothing)
            expected = expected + own / 10
    loss = contrastive_loss(logits, left_out, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    own, other = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(own, other)


def test_the_dual_softmax_knows_no_pairs_that_are_left_out():
    logits, left_out = torch.randn(3, 3, dtype=torch.float64, requires_grad=True), same([0, 1, 0])
    loss = contrastive_loss(logits, left_out, dual_softmax=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and not gradient[[0, 2], [2, 0]].any() and gradient[[0, 1], [1, 0]].all()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_hard_negatives_have_the_most_similar_captions(count):
    text = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alike = same([0, 1, 0, 2, 3, 4])
    left_out = all_but_hardest(text, alike, count)
    for i, own in enumerate(text):
        others = [j for j in range(6) if not alike[i, j]]
        others.sort(key=lambda j: -F.cosine_similarity(own, text[j], dim=0).item())
        assert [j for j in range(6) if not left_out[i, j]] == sorted(others[:count])


def test_settings_of_the_contrastive_objective_reach_its_loss():
    batch = make_batch(["a", "b", "a", "c"])
    group = Group([batch.pairs()])
    found = set()
    for chosen in ({}, {"dual_softmax": True}, {"label_smoothing": 0.2}, {"hard_negatives": 1}):
        retriever, objective = build(objective={"method": "contrastive", "config": chosen})
        rows = objective.embed(batch)
        logits, left_out = retriever.similarity(*retriever(batch)), group.same(torch.device("cpu"))
        if "hard_negatives" in chosen:
            left_out = all_but_hardest(rows["text"], left_out, 1)
        others = {name: value for name, value in chosen.items() if name != "hard_negatives"}
        loss = objective.loss(rows, group)["contrastive"]
        torch.testing.assert_close(loss, contrastive_loss(logits, left_out, **others))
        found.add(loss.item())
    assert len(found) == 4


def slow_sigmoid_loss(logits, offset, text_videos, videos):
    """Return the sum over pairs of -log of the probability of the right answer, 1 / (1 + exp(-x))."""
    total = 0.0
    for i, text_video in enumerate(text_videos):
        for j, video in enumerate(videos):
            if j == i + offset:
                total -= math.log(1 / (1 + math.exp(-logits[i][j])))
            elif video != text_video:
                total -= math.log(1 - 1 / (1 + math.exp(-logits[i][j])))
    return total


# A batch of five pairs, of which this process may have some rows, and be at some columns.
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [3, 0, 3, 1, 3], [7, 7, 7, 7, 7]])
@pytest.mark.parametrize(("rows", "columns"), [((0, 5), (0, 5)), ((0, 2), (2, 5)), ((2, 5), (0, 2)), ((1, 4), (0, 5))])
def test_sigmoid_loss_is_the_sum_over_pairs(numbers, rows, columns):
    rows, columns = range(*rows), range(*columns)
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    part, offset = logits[rows.start : rows.stop, columns.start : columns.stop], rows.start - columns.start
    text_videos, videos = [numbers[i] for i in rows], [numbers[j] for j in columns]
    loss = sigmoid_loss(part, offset, same(text_videos, videos))
    assert loss.dtype == torch.float64
    expected = slow_sigmoid_loss(part.tolist(), offset, text_videos, videos)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_sigmoid_loss_is_finite_for_large_logits():
    logits = torch.tensor([[-1000.0, 1000.0], [-1000.0, 1000.0]], requires_grad=True)
    loss = sigmoid_loss(logits, 0, same(range(2)))
    loss.backward()
    assert loss.item() == 2000
    assert logits.grad.tolist() == [[-1, 1], [0, 0]]


def test_half_precision_is_computed_in_float32_even_under_autocast():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).bfloat16() * 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contrastive, sigmoid = contrastive_loss(logits), sigmoid_loss(logits, 0, same(range(6)))
    assert contrastive.dtype == sigmoid.dtype == torch.float32
    assert contrastive.item() == pytest.approx(numpy_loss(logits.double().numpy(), range(6)), rel=1e-6)
    assert sigmoid.item() == pytest.approx(slow_sigmoid_loss(logits.double().tolist(), 0, range(6), range(6)), rel=1e-5)


def build(logit_bias=None, **settings):
    """Return a small retriever in float64, and its objective."""
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    if logit_bias is not None:
        clip.logit_bias = nn.Parameter(torch.tensor(logit_bias))
    retriever = build_retriever(clip, use_policy=False, **settings)
    return retriever.double(), build_objective(load_config(None, settings), retriever)


def make_batch(video_ids, captions=None):
    count = len(video_ids)
    videos = dataclasses.replace(random_videos(count, view=None), video_ids=video_ids)
    return TrainBatch(
        videos, captions or [f"caption {n}" for n in range(count)], random_tokens(count), torch.zeros(count, 6)
    )


@pytest.mark.parametrize("frame_agg", [None, "qscore"])
@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_objectives_are_the_losses_of_the_similarity(name, frame_agg):
    captions = ["a dog", "a cat", "a bird", "A  dog"]  # the last video is another one with the caption of the first
    batch = make_batch(["a", "b", "a", "c"], captions)
    alike = same([0, 1, 0, 2]) | same([0, 1, 2, 0])
    retriever, objective = build(objective={"method": name}, frame_agg=frame_agg)
    terms = objective(batch, Group([batch.pairs()]))
    assert list(terms) == [name] and terms[name].dtype == torch.float64
    logits = retriever.similarity(*retriever(batch))
    expected = contrastive_loss(logits, alike) if name == "contrastive" else sigmoid_loss(logits, 0, alike) / 4
    torch.testing.assert_close(terms[name], expected)


def test_the_objective_without_a_setting_is_what_the_clip_was_trained_with():
    for logit_bias, name in ((None, "contrastive"), (-12.0, "sigmoid")):
        _, objective = build(logit_bias)
        batch = make_batch(["a", "b"])
        assert list(objective(batch, Group([batch.pairs()]))) == [name]


def test_sigmoid_uses_the_bias_of_the_tower_or_a_new_one_that_learns():
    for given, expected in ((-12.0, -12.0), (None, LOGIT_BIAS)):
        retriever, objective = build(given, objective={"method": "sigmoid"})
        assert retriever.clip.logit_bias.item() == retriever.scorer.logit_bias().item() == expected
        retriever.requires_grad_(False)
        objective.choose()
        learns = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
        assert learns == ([] if given else ["retriever.clip.logit_bias"])
        assert objective.own_state() == {}
