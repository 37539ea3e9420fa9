"""What a query learns from the CLIPs of `adaptation: clip_reward`: their reward (RLCF, Zhao et al. 2024), or their
logits (distillation, the baselines of that paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from adaclip_finetune.model.features import at_least_float32

Baseline = Literal["query", "all", "none"]
_STD_EPSILON = _MEAN_EPSILON = 1e-5


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """Return the mean of tensors of the same shape with these weights; without any, their plain mean."""
    shares = torch.tensor(weights or [1.0] * len(values), device=values[0].device, dtype=values[0].dtype)
    mean: Tensor = torch.tensordot(shares / shares.sum(), torch.stack(list(values)), dims=1)
    return mean


def clip_scores(cosines: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """Return the CLIPScores max(2.5 · cosine, 0) of several models, added with `weights`; without any, their mean."""
    shares = weights or [1 / len(cosines)] * len(cosines)
    scores = torch.stack([weight * (2.5 * each).clamp(min=0) for weight, each in zip(shares, cosines, strict=True)])
    return scores.sum(dim=0)


def centred(scores: Tensor, baseline: Baseline = "query", divide_by_std: bool = False) -> Tensor:
    """Return the scores (q, K) minus the mean of their row or of all, and divided by that standard deviation if asked.

    With `baseline` none they are returned as they are.
    """
    if baseline == "none":
        return scores
    of = scores if baseline == "query" else scores.reshape(1, -1)
    rewards = scores - of.mean(dim=1, keepdim=True)
    return rewards / (of.std(dim=1, keepdim=True) + _STD_EPSILON) if divide_by_std else rewards


def policy_gradient_loss(
    logits: Tensor, scores: Tensor, candidates: int, baseline: Baseline = "query", divide_by_std: bool = False
) -> Tensor:
    """Return the mean of reward · −log softmax(logits) over the best candidates of each query, by their logits.

    `logits` and `scores` are (q, N), and the softmax is over all N. The rewards are the centred `scores` of the best
    candidates, constants. Where the baseline is that of each query, the rewards of a row have the sum 0, so that the
    gradient of all other logits is 0. The loss is float32 even under autocast, and float64 for float64 logits.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits)
        best = logits.detach().topk(min(candidates, logits.shape[1]), dim=1).indices
        rewards = centred(scores.gather(1, best), baseline, divide_by_std)
        return -(rewards * logits.log_softmax(dim=1).gather(1, best)).mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the mean of softmax(logits) over the queries (q, N)."""
    with torch.autocast(logits.device.type, enabled=False):
        entropy: Tensor = torch.special.entr(at_least_float32(logits).softmax(dim=1).mean(dim=0)).sum()
        return entropy


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cross-entropy of softmax(logits) and softmax(teacher), both (q, N) (Hinton et al. 2015)."""
    with torch.autocast(logits.device.type, enabled=False):
        return -(teacher.softmax(dim=1) * at_least_float32(logits).log_softmax(dim=1)).sum(dim=1).mean()


def adaptive_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over rows of m² · the divergence of softmax(2 · logits / m) from softmax(2 · teacher / m').

    m and m' are the means of a row (q, N) of logits and of the teacher, constants (ATKD). As published, a negative
    mean turns the order of a row around; the logits of CLIP have positive means.
    """
    with torch.autocast(logits.device.type, enabled=False):
        own, other = at_least_float32(logits), at_least_float32(teacher)
        mean, of_teacher = (rows.detach().mean(dim=1, keepdim=True) for rows in (own, other))
        target = (2 * other / (of_teacher + _MEAN_EPSILON)).log_softmax(dim=1)
        given = (2 * own / (mean + _MEAN_EPSILON)).log_softmax(dim=1)
        divergence = (target.exp() * (target - given)).sum(dim=1)
        return (mean[:, 0] ** 2 * divergence).mean()


def decoupled_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence for the teacher's best item against all others, and half of that among the others, (q, N).

    This is decoupled distillation (DKD, Zhao et al. 2022) with α = 1 and β = 0.5.
    """
    with torch.autocast(logits.device.type, enabled=False):
        best = teacher.argmax(dim=1, keepdim=True)
        (one, rest), (target, others) = (_decoupled(at_least_float32(rows), best) for rows in (logits, teacher))
        return _divergence(target, one) + 0.5 * _divergence(others, rest)


def _decoupled(logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities of the best item and of all others (q, 2), and those among the others (q, N − 1)."""
    kept = torch.ones_like(logits, dtype=torch.bool).scatter(1, best, False)
    rest = logits[kept].reshape(len(logits), -1)
    pair = torch.cat([logits.gather(1, best), rest.logsumexp(dim=1, keepdim=True)], dim=1)
    return pair.log_softmax(dim=1), rest.log_softmax(dim=1)


def _divergence(target: Tensor, given: Tensor) -> Tensor:
    """Return the mean over rows of the Kullback-Leibler divergence of log probabilities `given` from `target`."""
    return (target.exp() * (target - given)).sum(dim=1).mean()


DISTILLATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distillation": distillation,
    "adaptive_distillation": adaptive_distillation,
    "decoupled_distillation": decoupled_distillation,
}
