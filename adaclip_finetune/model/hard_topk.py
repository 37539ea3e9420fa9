"""Differentiable Hard-Top-k: choose K of N frames, with gradients for the scores that chose them.

Training draws without replacement by Gumbel noise and relaxes each draw to a softmax (Xie and Ermon 2019,
"Reparameterizable subset sampling via continuous relaxations"); the straight-through estimator (Bengio et al. 2013)
makes each row a one-hot forward and the relaxed draw backward. AdaCLIP (Hu et al. 2023) uses it for frames. Evaluation
takes the K highest scores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adaclip_finetune.errors import NotFinite

_MIN_PROBABILITY = 1e-8
_MIN_REMAINDER = 1e-40


class Selection(NamedTuple):
    """The selected frames: `weights` (B, K, N) with one-hot rows, `indices` (B, K) in the order of selection, and the
    `logits` (B, N) of all frames."""

    weights: Tensor
    indices: Tensor
    logits: Tensor


def select_frames(logits: Tensor, k: int, temperature: float | None = None, noise: Tensor | None = None) -> Selection:
    """Choose `k` of N frames by their `logits` (B, N).

    With a `temperature` (training) it is `hard_top_k` of log max(softmax(logits), 1e-8); without one (evaluation) the
    `k` highest logits, descending, and no gradient. `noise` (B, N) replaces the Gumbel(0, 1) draw. Works in float32
    (float64 for float64 logits) whatever the autocast state, and never waits for the device.

    Raises ValueError for k outside 1…N, and NotFinite for NaN logits on the CPU. On an accelerator that check would
    stall every step, so NaN logits turn the weights into NaN there, which the loss and the metrics refuse.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(
            f"cannot choose k={k} frames by logits of shape {tuple(logits.shape)}: need (B, N) and 1 <= k <= N"
        )
    if logits.device.type == "cpu" and bool(logits.isnan().any()):
        raise NotFinite("the scores of the frame selector are NaN: the weights are damaged, or training diverged")
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if temperature is None:
            return _highest(logits, k)
        scores = logits.softmax(dim=1).clamp(min=_MIN_PROBABILITY).log()
        if noise is None:
            noise = -torch.empty_like(scores).exponential_().log()
        weights, indices = hard_top_k(scores, k, temperature, noise)
        return Selection(weights, indices, logits)


def hard_top_k(scores: Tensor, k: int, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `k` of N without replacement by `scores` + `noise` (B, N). Return weights (B, K, N) and indices (B, K), both
    in the order drawn.

    Row i of the weights is onehot(jᵢ) − stopgrad(aᵢ) + aᵢ, where aᵢ is the i-th relaxed draw at `temperature` and jᵢ
    its highest entry among those not drawn yet.
    """
    weights, indices = _HardTopK.apply(scores, k, temperature, noise)
    return weights, indices


class _HardTopK(Function):
    """`hard_top_k` with a backward pass of its own, since autograd's would take a dozen small operations per draw."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        keys, rest, draw = scores + noise, torch.ones_like(scores), torch.empty_like(scores)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        draws, indices = [], []
        for _ in range(k):
            keys = keys + rest.clamp(min=_MIN_REMAINDER).log()
            draw = (keys / temperature).softmax(dim=1)
            rest = 1 - draw
            index = draw.masked_fill(taken, -1).argmax(dim=1, keepdim=True)
            taken.scatter_(1, index, True)
            draws.append(draw)
            indices.append(index)
        relaxed, chosen = torch.stack(draws, dim=1), torch.cat(indices, dim=1)
        one_hot = torch.zeros_like(relaxed).scatter_(2, chosen[..., None], 1)
        ctx.save_for_backward(relaxed)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(chosen)
        return one_hot - relaxed + relaxed, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (relaxed,) = ctx.saved_tensors
        rest = 1 - relaxed
        rest = rest.masked_fill(rest < _MIN_REMAINDER, torch.inf)  # where the minimum stood in, nothing flows back
        of_keys = torch.zeros_like(relaxed[:, 0])
        for draw, own, left in zip(*(part.unbind(dim=1)[::-1] for part in (relaxed, gradient, rest)), strict=True):
            of_draw = torch.addcdiv(own, of_keys, left, value=-1)
            of_softmax = torch._softmax_backward_data(of_draw, draw, 1, draw.dtype)
            of_keys = of_keys + of_softmax / ctx.temperature
        return of_keys, None, None, of_keys


def selection_temperature(epoch: int, init_tau: float, min_tau: float, exp_decay_factor: float) -> float:
    """Return the temperature of an epoch (from 0): max(init_tau · exp(−exp_decay_factor · epoch), min_tau)."""
    return max(init_tau * math.exp(-exp_decay_factor * epoch), min_tau)


def annealed_k(epoch: int, num_frm: int, top_k: int, warmup_epochs: int) -> int:
    """Return K of a training epoch, which falls from num_frm − 1 at epoch 0 to top_k at `warmup_epochs`."""
    if epoch >= warmup_epochs:
        return top_k
    start = num_frm - 1
    return max(start + (top_k - start) * epoch // warmup_epochs, top_k)


def _highest(logits: Tensor, k: int) -> Selection:
    # A stable sort, so that equal logits choose the same frames on every device.
    indices = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    not_a_number = (logits.detach() * 0).sum(dim=1)[:, None, None]
    return Selection(F.one_hot(indices, logits.shape[1]).to(logits.dtype) + not_a_number, indices, logits)
