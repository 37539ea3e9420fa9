"""Row `hard_topk`: drawing K of N frames with gradients, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.model.hard_topk import hard_top_k

Draw = Callable[[Tensor, int, float, Tensor], tuple[Tensor, Tensor]]


def hard_topk(setup: Setup) -> Iterator[Measured]:
    """Compare `hard_top_k` with a plain loop on three sizes."""
    for rows, frames, k in [(2, 4, 2)] if setup.quick else [(16, 32, 16), (16, 64, 32), (512, 32, 16)]:
        random = torch.Generator().manual_seed(0)
        scores = torch.randn(rows, frames, generator=random).log_softmax(dim=1)
        noise = -torch.empty(rows, frames).exponential_(generator=random).log()
        upstream = torch.randn(rows, k, frames, generator=random)
        given = [tensor.to(setup.device) for tensor in (scores, noise, upstream)]
        exact = [tensor.double() for tensor in given]
        for what, own, plain in zip(
            ("frames", "gradients"),
            forward_and_backward(hard_top_k, *exact),
            forward_and_backward(loop, *exact),
            strict=True,
        ):
            check(f"the {what} drawn", own, plain, 1e-9)
        alternatives = {
            "plain loop": partial(forward_and_backward, loop, *given),
            "ours": partial(forward_and_backward, hard_top_k, *given),
        }
        seconds = in_turns(setup, alternatives, calls=1 if setup.quick else 10)
        aim = Aim("ours", "plain loop", 1.5 if setup.device.type == "cpu" else 5)
        yield Measured(f"{k} of {frames} frames, batch {rows}", seconds, [aim])


def forward_and_backward(
    draw: Draw, scores: Tensor, noise: Tensor, upstream: Tensor, *, temperature: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return the weights (B, K, N), and the gradient (B, N) of their product with `upstream` by the scores (B, N)."""
    scores = scores.detach().requires_grad_()
    weights, _ = draw(scores, upstream.shape[1], temperature, noise)
    (gradient,) = torch.autograd.grad((weights * upstream).sum(), scores)
    return weights.detach(), gradient


def loop(scores: Tensor, k: int, temperature: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw K of N as the formulas say it: one relaxed draw after another, whose index is looked up on the host."""
    keys = scores + noise
    relaxed = torch.zeros_like(keys)
    taken: list[set[int]] = [set() for _ in keys]
    weights, indices = [], []
    for _ in range(k):
        keys = keys + torch.log(torch.clamp(1 - relaxed, min=1e-40))
        relaxed = torch.softmax(keys / temperature, dim=1)
        index = []
        for row, order in zip(taken, relaxed.argsort(dim=1, descending=True).tolist(), strict=True):
            index.append(next(frame for frame in order if frame not in row))
            row.add(index[-1])
        column = torch.tensor(index, device=keys.device)[:, None]
        hard = torch.zeros_like(relaxed).scatter_(1, column, 1.0)
        weights.append(hard - relaxed.detach() + relaxed)
        indices.append(column)
    return torch.stack(weights, dim=1), torch.cat(indices, dim=1)
