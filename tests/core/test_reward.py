"""What a reward ranks without any gradient, against the same computed from whole matrices."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.reward import Rewarded
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.model.scoring import CosineScorer

OWNERS = np.arange(17) % 6
QUERIES = Queries([f"text {n}" for n in range(17)], OWNERS, [f"v{n}" for n in range(6)])


def blocks(seed: int, width: int) -> SimilarityBlocks:
    random = torch.Generator().manual_seed(seed)
    clip = nn.Module()
    clip.logit_scale = nn.Parameter(torch.tensor(3.0))
    text, videos = torch.randn(17, width, generator=random), torch.randn(6, width, generator=random)
    return SimilarityBlocks(text, F.normalize(videos, dim=-1), 5, CosineScorer(clip).fixed())


OWN, OTHERS = blocks(0, 4), [blocks(1, 4), blocks(2, 8)]


def rewarded(candidates: int = 3, caption_candidates: int = 4) -> Rewarded:
    return Rewarded(OWN, OTHERS, (1.0, 3.0), candidates, caption_candidates)


def whole() -> tuple[Tensor, Tensor]:
    own, first, second = (each.cosines().double() for each in (OWN, *OTHERS))
    return own, (first + 3 * second) / 4


def ranks_of(by_video: Tensor, by_text: Tensor) -> tuple[list[int], list[int]]:
    t2v, v2t = (retrieval_metrics([scores], OWNERS) for scores in (by_video, by_text))
    return t2v.t2v.ranks.tolist(), v2t.v2t.ranks.tolist()


def test_the_reward_alone() -> None:
    found, (_, reward) = rewarded().alone(QUERIES), whole()
    assert (found.t2v.ranks.tolist(), found.v2t.ranks.tolist()) == ranks_of(reward, reward)


def test_only_the_first_candidates_are_reranked() -> None:
    own, reward = whole()

    def moved_up(dim: int, count: int) -> Tensor:
        best = torch.zeros_like(own, dtype=torch.bool).scatter(dim, own.topk(count, dim=dim).indices, True)
        return torch.where(best, reward + 10, own)

    found = rewarded().reranked(QUERIES)
    assert (found.t2v.ranks.tolist(), found.v2t.ranks.tolist()) == ranks_of(moved_up(1, 3), moved_up(0, 4))
    everything, alone = rewarded(6, 17).reranked(QUERIES), rewarded().alone(QUERIES)
    assert everything.as_dict() == alone.as_dict() != found.as_dict()


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_ensemble_is_the_mean_of_standardised_scores(rows: int) -> None:
    own, reward = whole()

    def standardised(dim: int) -> Tensor:
        return sum((each - each.mean(dim, True)) / each.std(dim, correction=0, keepdim=True) for each in (own, reward))

    many = Rewarded(SimilarityBlocks(OWN.text, OWN.videos, rows, OWN.scorer), OTHERS, (1.0, 3.0), 3, 4)
    found = many.ensemble(QUERIES)
    assert (found.t2v.ranks.tolist(), found.v2t.ranks.tolist()) == ranks_of(standardised(1), standardised(0))
