"""Pooling compared with its formulas in numpy; padding, temperature and reused scores."""

from typing import Any

import numpy as np
import pytest
import torch
from scorers import clip_with, features
from tiny import build_retriever, random_videos
from torch import Tensor

from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.model.pooling import (
    MlpScore,
    WordPooling,
)
from adaclip_finetune.model.scoring import CosineScorer, QueryScorer

B, K, D, Q = 3, 4, 64, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module in float64, with weights large enough that every part matters."""
    module = module.double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.2 * random(*parameter.shape, seed=seed))
    return module


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


def numpy_mlp_score(scorer: torch.nn.Module, items: np.ndarray) -> np.ndarray:
    """Compute the MLP (…, D) → (…): D → 2D → D → 1, with a quick-GELU after the first two maps."""
    w1, b1, w2, b2, w3, b3 = (parameter.detach().numpy() for parameter in scorer.parameters())
    assert [w.shape for w in (w1, w2, w3)] == [(2 * D, D), (D, 2 * D), (1, D)]
    return (quick_gelu(quick_gelu(items @ w1.T + b1) @ w2.T + b2) @ w3.T + b3)[..., 0]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_mlp_score(temperature: float) -> None:
    pooling = randomised(MlpScore(D, temperature))
    frames = random(B, K, D)
    expected = softmax(numpy_mlp_score(pooling.scorer, frames.numpy()) / temperature, 1)
    assert expected.max() > 1.2 / K
    vector, weights = pooling(frames)
    np.testing.assert_allclose(weights.detach(), expected, atol=1e-10)
    np.testing.assert_allclose(vector.detach(), np.einsum("bk,bkd->bd", expected, frames.numpy()), atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_query_score(temperature: float) -> None:
    scorer = QueryScorer(clip_with(0.5, -2), temperature)
    assert not scorer.indexable
    frames, queries = random(B, K, D), random(Q, D, seed=1)
    kept = scorer.keep(features(frames))
    videos = scorer.videos_for(torch.from_numpy(unit(queries.numpy())), kept)
    logits = scorer(TextFeatures(queries), kept)
    assert videos.shape == (Q, B, D) and logits.shape == (Q, B)
    for q in range(Q):
        for b in range(B):
            cosines = unit(frames[b].numpy()) @ unit(queries[q].numpy())
            expected = softmax(cosines / temperature, 0) @ frames[b].numpy()
            np.testing.assert_allclose(videos[q, b], expected, atol=1e-12)
            logit = np.exp(0.5) * unit(expected) @ unit(queries[q].numpy()) - 2
            assert logits[q, b].item() == pytest.approx(logit, abs=1e-12)


def test_cosine_scorer() -> None:
    videos, queries = random(B, D), random(Q, D, seed=1)
    cosines = unit(queries.numpy()) @ unit(videos.numpy()).T
    for bias in (None, -10.0):
        scorer = CosineScorer(clip_with(2, bias))
        kept = scorer.keep(features(random(B, K, D), videos))
        np.testing.assert_allclose(kept, unit(videos.numpy()), atol=1e-12)
        logits = scorer(TextFeatures(queries), kept).detach()
        np.testing.assert_allclose(logits, np.exp(2) * cosines + (bias or 0), atol=1e-10)


@pytest.mark.parametrize("scorer_class", [CosineScorer, lambda clip: QueryScorer(clip, 0.3)])
def test_a_fixed_scorer_does_not_follow_what_clip_learns(scorer_class: Any) -> None:
    clip = clip_with(2, -10)
    scorer = scorer_class(clip)
    text, kept = TextFeatures(random(Q, D, seed=1)), scorer.keep(features(random(B, K, D), random(B, D)))
    fixed, before = scorer.fixed(), scorer(text, kept).detach()
    assert not fixed(text, kept).requires_grad
    with torch.no_grad():
        clip.logit_scale.add_(1)
        clip.logit_bias.add_(1)
    assert torch.equal(fixed(text, kept), before) and torch.equal(fixed.fixed()(text, kept), before)
    assert not torch.allclose(scorer(text, kept), before)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_words_after_the_end_cannot_change_the_sentence(kind: str, temperature: float) -> None:
    aggregator = randomised(WordPooling(kind, D, temperature))
    words, is_word = random(B, 6, D), torch.arange(6) < torch.tensor([[6], [3], [1]])
    sentences = aggregator(words, is_word)
    noise = torch.where(is_word[..., None], 0, 1e3 * random(B, 6, D, seed=3))
    torch.testing.assert_close(aggregator(words + noise, is_word), sentences, atol=1e-12, rtol=1e-12)
    # Each row by itself, cut at its end, gives the same.
    for row, length in enumerate((6, 3, 1)):
        alone = aggregator(words[row : row + 1, :length], is_word[row : row + 1, :length])
        torch.testing.assert_close(alone[0], sentences[row], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sentences[2], words[2, 0])


@pytest.mark.parametrize("settings", [{}, {"frame_agg": "mlp"}, {"word_agg": "mlp"}, {"sim_header": "transformer"}])
@torch.no_grad()
def test_reuse_scores(settings: dict[str, Any]) -> None:
    """Selected frames are weighted by softmax(scores / frame_agg_temp), before the header."""
    temperature = 0.001
    plain, reusing = (
        build_retriever(frame_agg_temp=temperature, top_k=3, reuse_scores=reuse, **settings).double().eval()
        for reuse in (False, True)
    )
    reusing.load_state_dict(plain.state_dict())
    header, plain.header = plain.header, None
    video, bare = reusing.encode_video(random_videos()), plain.encode_video(random_videos())
    assert video.selection is not None and bare.selection is not None and video.vector is not None
    scores = bare.selection.logits.gather(1, bare.selection.indices).numpy()
    weights = softmax(scores / temperature, 1)
    assert weights.std() > 0.02
    frames = bare.tokens.numpy() * weights[..., None]
    expected = torch.from_numpy(frames)
    if header is not None:
        expected = header(expected)
    torch.testing.assert_close(video.tokens, expected, atol=1e-10, rtol=1e-10)
    if settings.get("word_agg"):
        np.testing.assert_allclose(video.vector, unit(frames).mean(1), atol=1e-10)
    elif settings.get("frame_agg"):
        torch.testing.assert_close(video.vector, reusing.aggregator(expected)[0])
    else:
        torch.testing.assert_close(video.vector, expected.sum(dim=1))
