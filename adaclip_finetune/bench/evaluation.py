"""Row `evaluation`: ranks in both directions from the embeddings of texts and videos."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.model.scoring import CosineScorer

_WIDTH = 512


def evaluation(setup: Setup) -> Iterator[Measured]:
    """Compare the ranks of as many texts as videos with sorting the whole matrix twice, by rows and by columns."""
    count = 100 if setup.quick else 10_000
    random = torch.Generator().manual_seed(0)
    videos = torch.randn(count, _WIDTH, generator=random)
    text = torch.randn(count, _WIDTH, generator=random).mul_(6).add_(videos).to(setup.device)
    videos = F.normalize(videos, dim=-1).to(setup.device)
    clip, owners = nn.Module(), torch.arange(count)
    clip.logit_scale = nn.Parameter(torch.zeros((), device=setup.device))
    scorer = CosineScorer(clip)

    def ours() -> Tensor:
        found = retrieval_metrics(similarity_blocks(text, videos, scorer, block=count), owners)
        return torch.stack([torch.from_numpy(found.t2v.ranks), torch.from_numpy(found.v2t.ranks)])

    def plain() -> Tensor:
        similarity = F.normalize(text, dim=-1) @ videos.T
        return torch.stack([sorted_twice(similarity), sorted_twice(similarity.T.contiguous())])

    check("the ranks", ours().double(), plain().cpu().double(), 2 / count)  # rounding may exchange neighbours
    seconds = in_turns(setup, {"sorting twice": plain, "ours": ours})
    yield Measured(f"{count:,} texts and videos", seconds, [Aim("ours", "sorting twice", 10)])


def sorted_twice(similarity: Tensor) -> Tensor:
    """Return the rank (n,), from 1, of the diagonal in each row of a matrix (n, n)."""
    places = similarity.argsort(dim=1, descending=True).argsort(dim=1)
    return places.diagonal() + 1
