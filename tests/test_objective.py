"""The contrastive loss against numpy, and what must not count as wrong."""

import numpy as np
import pytest
import torch
from adaclip_finetune.training.objective import contrastive_loss


def numpy_loss(similarity, groups):
    def one_way(s):
        total = 0.0
        for i, row in enumerate(s):
            negatives = [row[j] for j in range(len(row)) if j == i or groups[j] != groups[i]]
            total += np.log(np.exp(negatives).sum()) - row[i]
        return total / len(s)

    return (one_way(similarity) + one_way(similarity.T)) / 2


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [3, 0, 3, 1, 3], [7, 7, 7, 7, 7]])
def test_against_numpy(groups):
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    loss = contrastive_loss(similarity, torch.tensor(groups))
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(numpy_loss(similarity.numpy(), groups), rel=1e-12, abs=1e-12)


def test_distinct_groups_are_the_same_as_none():
    similarity = torch.randn(4, 4)
    assert torch.equal(contrastive_loss(similarity), contrastive_loss(similarity, torch.arange(4)))


def test_another_caption_of_the_same_video_is_not_a_negative():
    similarity = torch.randn(4, 4, requires_grad=True)
    loss = contrastive_loss(similarity, torch.tensor([0, 1, 0, 2]))
    loss.backward()
    assert similarity.grad[0, 2] == similarity.grad[2, 0] == 0
    assert (similarity.grad != 0).sum() == 14
    pushed = similarity.detach().clone()
    pushed[0, 2] = pushed[2, 0] = 1000
    assert contrastive_loss(pushed, torch.tensor([0, 1, 0, 2])) == loss.detach()


def test_a_batch_of_one_and_of_one_video_have_zero_loss_and_gradients():
    for size in (1, 3):
        similarity = torch.randn(size, size, requires_grad=True)
        loss = contrastive_loss(similarity, torch.zeros(size, dtype=torch.int64))
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert similarity.grad.isfinite().all()


def test_half_precision_is_computed_in_float32_even_under_autocast():
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).bfloat16() * 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(similarity)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(numpy_loss(similarity.double().numpy(), range(6)), rel=1e-6)


def test_nan_stays_visible():
    similarity = torch.zeros(3, 3)
    similarity[0, 1] = float("nan")
    assert contrastive_loss(similarity).isnan()


def test_only_square_matrices():
    with pytest.raises(ValueError, match="square"):
        contrastive_loss(torch.zeros(2, 3))
