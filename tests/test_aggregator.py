"""Aggregators against numpy, by their formulas; padding, temperature, and weights that were used before."""

from typing import Any

import numpy as np
import pytest
import torch
from adaclip_finetune.model.aggregator import (
    FrameAggregator,
    MeanAggregator,
    MlpAggregator,
    QueryScoreAggregator,
    SumAggregator,
    TransformerAggregator,
    WordAggregator,
)
from conftest import build_tiny_clip
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever

B, K, D, Q = 3, 4, 64, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with weights large enough for every part to show."""
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
    """(…, D) → (…): D → 2D → D → 1 with a quick-GELU after the first two."""
    w1, b1, w2, b2, w3, b3 = (parameter.detach().numpy() for parameter in scorer.parameters())
    assert [w.shape for w in (w1, w2, w3)] == [(2 * D, D), (D, 2 * D), (1, D)]
    return (quick_gelu(quick_gelu(items @ w1.T + b1) @ w2.T + b2) @ w3.T + b3)[..., 0]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_mean_of_normalised_frames() -> None:
    frames = random(B, K, D)
    np.testing.assert_allclose(MeanAggregator()(frames), unit(frames.numpy()).mean(1), atol=1e-12)


def test_sum() -> None:
    frames = random(B, K, D)
    np.testing.assert_allclose(SumAggregator()(frames), frames.numpy().sum(1), atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_mlp_score(temperature: float) -> None:
    aggregator = randomised(MlpAggregator(D, temperature))
    frames = random(B, K, D)
    weights = softmax(numpy_mlp_score(aggregator.scorer, frames.numpy()) / temperature, 1)
    assert weights.max() > 1.2 / K
    expected = np.einsum("bk,bkd->bd", weights, frames.numpy())
    np.testing.assert_allclose(aggregator(frames).detach(), expected, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_query_score(temperature: float) -> None:
    aggregator = QueryScoreAggregator(temperature)
    assert aggregator.query_dependent
    frames, queries = random(B, K, D), random(Q, D, seed=1)
    videos = aggregator(frames, queries)
    assert videos.shape == (Q, B, D)
    for q in range(Q):
        for b in range(B):
            cosines = unit(frames[b].numpy()) @ unit(queries[q].numpy())
            expected = softmax(cosines / temperature, 0) @ frames[b].numpy()
            np.testing.assert_allclose(videos[q, b], expected, atol=1e-12)


def test_transformer_weighs_the_frames_as_they_came() -> None:
    aggregator = randomised(TransformerAggregator(D, 0.7))
    frames = random(B, K, D)
    scores = aggregator.scorer(aggregator.transformer(frames)).detach().numpy()[..., 0]
    expected = np.einsum("bk,bkd->bd", softmax(scores / 0.7, 1), frames.numpy())
    np.testing.assert_allclose(aggregator(frames).detach(), expected, atol=1e-12)


AGGREGATORS = {
    "mean": MeanAggregator(),
    "sum": SumAggregator(),
    "mlp": randomised(MlpAggregator(D, 1.0)),
    "transformer": randomised(TransformerAggregator(D, 1.0)),
    "qscore": QueryScoreAggregator(1.0),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_do_not_see_the_order_of_frames(name: str) -> None:
    aggregator, frames, queries = AGGREGATORS[name], random(B, K, D), random(Q, D, seed=1)
    assert isinstance(aggregator, FrameAggregator)
    torch.testing.assert_close(aggregator(frames, queries), aggregator(frames[:, [2, 0, 3, 1]], queries))


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_temperature_from_one_frame_to_the_mean(kind: str) -> None:
    build = {"mlp": MlpAggregator, "transformer": TransformerAggregator}[kind]
    frames = random(B, K, D)
    cold, hot = randomised(build(D, 1e-6)), randomised(build(D, 1e6))
    torch.testing.assert_close(hot(frames), frames.mean(dim=1), atol=1e-4, rtol=0)
    distance = (cold(frames)[:, None] - frames).norm(dim=-1).min(dim=1).values
    assert distance.max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_words_after_the_end_cannot_change_the_sentence(kind: str, temperature: float) -> None:
    aggregator = randomised(WordAggregator(kind, D, temperature))
    words, is_word = random(B, 6, D), torch.arange(6) < torch.tensor([[6], [3], [1]])
    sentences = aggregator(words, is_word)
    noise = torch.where(is_word[..., None], 0, 1e3 * random(B, 6, D, seed=3))
    torch.testing.assert_close(aggregator(words + noise, is_word), sentences, atol=1e-12, rtol=1e-12)
    # Each row alone, cut at its end, is the same.
    for row, length in enumerate((6, 3, 1)):
        alone = aggregator(words[row : row + 1, :length], is_word[row : row + 1, :length])
        torch.testing.assert_close(alone[0], sentences[row], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sentences[2], words[2, 0])


def test_mlp_score_over_words() -> None:
    aggregator = randomised(WordAggregator("mlp", D, 0.5))
    words, is_word = random(B, 6, D), torch.arange(6) < torch.tensor([[6], [3], [1]])
    scores = np.where(is_word, numpy_mlp_score(aggregator.scorer, words.numpy()) / 0.5, -np.inf)
    expected = np.einsum("bl,bld->bd", softmax(scores, 1), words.numpy())
    np.testing.assert_allclose(aggregator(words, is_word).detach(), expected, atol=1e-10)


def test_layer_norms_of_the_word_transformer() -> None:
    norms = [m for m in WordAggregator("transformer", D, 1.0).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-12, 1e-12]


def retriever(**settings: Any) -> VideoRetriever:
    small = {"num_frm": 6, "top_k": 3, "policy_backbone": "raw", "rescale_size": 4, "hidden_dim": 64}
    config = load_config(None, {**small, **settings})
    spec = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    torch.manual_seed(0)
    loaded = LoadedClip(build_tiny_clip(), spec, None, None, 77, "test")  # type: ignore[arg-type]
    return VideoRetriever(config, loaded).double().eval()


def batch() -> VideoBatch:
    generator = torch.Generator().manual_seed(5)
    frames = torch.randint(0, 256, (B, 6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    thumbnails = torch.randint(0, 256, (B, 6, 1, 4, 4), dtype=torch.uint8, generator=generator)
    mask = torch.ones(B, 6, dtype=torch.bool)
    return VideoBatch(frames, mask, thumbnails, torch.arange(6).expand(B, 6), list("abc"))


@pytest.mark.parametrize("settings", [{}, {"frame_agg": "mlp"}, {"word_agg": "mlp"}, {"sim_header": "transformer"}])
@torch.no_grad()
def test_reuse_scores(settings: dict[str, Any]) -> None:
    """Chosen frames are weighted by the softmax of their scores / frame_agg_temp, before the header."""
    temperature = 0.01
    plain = retriever(frame_agg_temp=temperature, **settings)
    reusing = retriever(frame_agg_temp=temperature, reuse_scores=True, **settings)
    reusing.load_state_dict(plain.state_dict())
    header, plain.header = plain.header, None
    video, bare = reusing.encode_video(batch()), plain.encode_video(batch())
    assert video.selection is not None and bare.selection is not None and video.video is not None
    scores = bare.selection.logits.gather(1, bare.selection.indices).numpy()
    weights = softmax(scores / temperature, 1)
    assert weights.std() > 0.02
    frames = bare.frames.numpy() * weights[..., None]
    expected = torch.from_numpy(frames)
    if header is not None:
        expected = header(expected)
    torch.testing.assert_close(video.frames, expected, atol=1e-10, rtol=1e-10)
    if settings.get("word_agg"):
        np.testing.assert_allclose(video.video, unit(frames).mean(1), atol=1e-10)
    elif settings.get("frame_agg"):
        torch.testing.assert_close(video.video, reusing.aggregator(expected))
    else:
        torch.testing.assert_close(video.video, expected.sum(dim=1))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, MeanAggregator),
        ({"reuse_scores": True}, SumAggregator),
        ({"reuse_scores": True, "frame_agg": "mlp"}, MlpAggregator),
        ({"frame_agg": "transformer"}, TransformerAggregator),
        ({"frame_agg": "qscore"}, QueryScoreAggregator),
        ({"use_policy": False}, MeanAggregator),
    ],
)
def test_names(settings: dict[str, Any], kind: type) -> None:
    assert isinstance(retriever(**settings).aggregator, kind)
