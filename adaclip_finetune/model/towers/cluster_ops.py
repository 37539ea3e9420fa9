"""Clustering of tokens by k-medoids and by spectral clustering, as in CenterCLIP (Zhao et al. 2022).

Each row of a batch (R, N, C) is a set of N tokens, of which those where `valid` (R, N) is False do not take part. A row
is clustered as if it were alone. All ties are decided by the lowest index. Distances are computed from differences, not
from a matrix product, so that d(i, j) and d(j, i) are equal to the bit and the same tokens give the same medoids.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6
_CHOSEN, _INVALID = -1.0, -2.0  # in place of a distance, which is not negative


class MedoidRule(NamedTuple):
    """How k-medoids measures distances and when it stops.

    `p` is the exponent of the Minkowski distance, which `euclidean` stands for. A row stops when its medoids together
    moved less than `threshold`, or after `iterations` updates.
    """

    distance: Literal["euclidean", "cosine"] = "euclidean"
    p: float = 2.0
    threshold: float = 1e-6
    iterations: int = 100


def distances(x: Tensor, rule: MedoidRule) -> Tensor:
    """Return the distances of all pairs of tokens: (R, N, C) → (R, N, N)."""
    if rule.distance == "cosine":
        unit = normalised(x)
        half = unit.square().sum(dim=-1) / 2
        # 1 − u·v, written with ‖u − v‖². From a token to itself it is not quite 0, since `normalised` adds 1e-6: of two
        # tokens, the longer one is the medoid.
        return 1 - (half[:, :, None] + half[:, None, :]) + _direct(unit, 2.0).square() / 2
    return _direct(x, rule.p)


def farthest_first(between: Tensor, first: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Return `count` tokens of each row, (R, count), as KKZ chooses them (Katsavounidis et al. 1994).

    After `first` (R), each is the token farthest from its nearest chosen one, by the distances `between` (R, N, N). If
    all tokens are chosen, the one with the lowest index is repeated.
    """
    rows, chosen = torch.arange(len(between), device=between.device), [first]
    nearest = torch.full_like(between[:, 0], torch.inf)
    if valid is not None:
        nearest = nearest.masked_fill(~valid, _INVALID)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, between[rows, chosen[-1]]).scatter(1, chosen[-1][:, None], _CHOSEN)
        chosen.append(nearest.argmax(dim=1))
    return torch.stack(chosen, dim=1)


def kmedoids(
    x: Tensor, count: int, rule: MedoidRule | None = None, valid: Tensor | None = None, pre_norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the indices of the medoids, (R, count) in ascending order, and the cluster of each token, (R, N).

    The first medoid of the start is the token of the largest norm; `farthest_first` chooses the others. With more
    medoids than tokens, the index 0 is repeated. `pre_norm` clusters the tokens `normalised`: these still have norms in
    the same order, but so near to 1 that rounding would decide.
    """
    rule, norms = rule or MedoidRule(), x.norm(dim=-1)
    if pre_norm:
        x = normalised(x)
    if valid is None:
        valid = torch.ones_like(norms, dtype=torch.bool)
    between = distances(x, rule)
    medoids = farthest_first(between, norms.masked_fill(~valid, _INVALID).argmax(dim=1), count, valid)
    moving = torch.ones_like(medoids[:, :1], dtype=torch.bool)
    slots = torch.arange(count, device=x.device)[:, None]
    for _ in range(rule.iterations):
        clusters = torch.where(valid, _nearest(between, medoids), -1)
        # The sum of the distances from each token to those of its own cluster: the medoid has the smallest one.
        sums = torch.where(clusters[:, :, None] == clusters[:, None, :], between, 0).sum(dim=2)
        within = torch.where(clusters[:, None, :] == slots, sums[:, None, :], torch.inf)
        new = torch.where(moving, within.argmin(dim=2), medoids)
        moved = (_take(x, new) - _take(x, medoids)).norm(dim=-1).sum(dim=1, keepdim=True)
        medoids, moving = new, moving & (moved >= rule.threshold)
        if not moving.any():
            break
    medoids = medoids.sort(dim=1).values
    return medoids, _nearest(between, medoids)


def normalised(x: Tensor) -> Tensor:
    """Return the tokens divided by their norms + 1e-6."""
    unit: Tensor = x / (x.norm(dim=-1, keepdim=True) + _EPS)
    return unit


def affinity(
    x: Tensor, sigma: float, neighbours: Tensor | None = None, valid: Tensor | None = None, near: Tensor | None = None
) -> Tensor:
    """Return exp(−d² / 2σ²) of all pairs of tokens: (R, N, C) → (R, N, N).

    With `neighbours` (R), pairs are kept where one token is among that many most similar tokens of the other, itself
    included, and all others are 0. So are pairs of an invalid token, and pairs where `near` (R, N, N) is False.
    """
    weights = torch.exp(-_direct(x, 2.0).square() / (2 * sigma**2))
    if valid is not None:
        weights = weights * (valid[:, :, None] & valid[:, None, :])
    if neighbours is not None:
        place = (neighbours.clamp(max=x.shape[1]) - 1)[:, None, None].expand(-1, x.shape[1], 1)
        kept = weights >= weights.sort(dim=2, descending=True).values.gather(2, place)
        weights = weights * (kept | kept.mT)
    return weights if near is None else weights * near


def spectral_embedding(weights: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Return the rows (R, N, count) of the eigenvectors of the `count` smallest eigenvalues, for `pre_norm`.

    The eigenvectors are those of the symmetric normalised Laplacian of the graph with `weights` (R, N, N).
    """
    degrees = weights.sum(dim=2)
    scale = degrees.clamp(min=torch.finfo(weights.dtype).tiny).rsqrt()
    laplacian = (torch.diag_embed(degrees) - weights) * scale[:, :, None] * scale[:, None, :]
    if valid is not None:  # the eigenvalues of the others are at most 2
        laplacian = laplacian + torch.diag_embed(3.0 * ~valid)
    # NaN would be an error here; it is better noticed in the loss.
    vectors: Tensor = torch.linalg.eigh(laplacian.nan_to_num()).eigenvectors
    return vectors[:, :, :count]


def token_weights(clusters: Tensor, count: int, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix (R, count, N) that gives the mean of each cluster's valid tokens."""
    members = (F.one_hot(clusters, count).mT * valid[:, None, :]).to(dtype)
    return members / members.sum(dim=2, keepdim=True).clamp(min=1)


def _direct(x: Tensor, p: float) -> Tensor:
    return torch.cdist(x, x, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens (R, K, C) at `indices` (R, K)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def _nearest(between: Tensor, medoids: Tensor) -> Tensor:
    """Return which of the medoids (R, K) is nearest to each token: (R, N). A medoid is nearest to itself."""
    return _take(between, medoids).scatter(2, medoids[..., None], _CHOSEN).argmin(dim=1)
