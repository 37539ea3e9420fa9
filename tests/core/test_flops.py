"""Counted GFLOPs: the published figure of ViT-B/32, small parts computed by hand, and what each setting adds."""

from typing import Any

import open_clip
import pytest
import torch
from tiny import build_retriever
from torch import Tensor, nn

from adaclip_finetune.config import PerFrameSettings, load_config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.flops import Gflops, count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.towers.base import FrameTower
from adaclip_finetune.model.towers.per_frame import PerFrame
from adaclip_finetune.weights.clip_weights import load_clip

N, K = 6, 2
WIDTH, EMBEDDING, PATCH, LAYERS, TOKENS = 48, 40, 16, 3, 10  # 3 x 3 patches and the class token
SMALL = {"num_frm": N, "top_k": K, "hidden_dim": 64, "mlp_hidden_dim": 32, "rescale_size": 8}
SPEC = ImageSpec(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def small(device: str = "meta", **settings: Any) -> VideoRetriever:
    vision = {"image_size": 48, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": 16}
    with torch.device(device):
        clip = open_clip.CLIP(EMBEDDING, vision, {"vocab_size": 100, "width": 64, "heads": 1, "layers": 1})
        return build_retriever(clip, SPEC, **SMALL | settings)


def counted(**settings: Any) -> Gflops:
    return count_gflops(small(**settings), N)


def block(tokens: int, width: int) -> float:
    """Return the multiply-adds with weights of a CLIP block: q, k, v and out (4 w²), two layers of the MLP (8 w²)."""
    return tokens * 12 * width**2


def attention(tokens: int, width: int) -> float:
    """Return the multiply-adds of queries with keys and of attention weights with values."""
    return 2 * tokens**2 * width


FRAME = 9 * 3 * PATCH**2 * WIDTH + LAYERS * block(TOKENS, WIDTH) + WIDTH * EMBEDDING
FRAME_ATTENTION = LAYERS * attention(TOKENS, WIDTH)


def giga(value: float) -> Any:
    return pytest.approx(value / 1e9, rel=1e-12)


def test_a_small_tower_by_hand() -> None:
    assert torch.backends.mha.get_fastpath_enabled(), "what would hide operations is on"
    found = counted(use_policy=False)
    assert found.clip_frame == giga(FRAME)
    assert found.video == giga(N * FRAME)
    assert found.video_attention == giga(N * FRAME_ATTENTION)
    assert found.policy_frame == found.temporal_encoder == found.scorer == found.header_and_aggregator == 0


def test_vit_b_32_has_the_published_figure() -> None:
    config = load_config(None, {"clip_backbone": "ViT-B/32", "policy_backbone": "frozen_clip"})
    with torch.device("meta"):
        found = count_gflops(VideoRetriever(config, load_clip(config, with_weights=False)), 16)
    assert f"{found.clip_frame:.2f}" == "4.36"
    by_hand = 49 * 3 * 32**2 * 768 + 12 * block(50, 768) + 768 * 512
    assert found.clip_frame == giga(by_hand)
    assert found.policy_frame == found.clip_frame
    assert f"{12 * attention(50, 768) / 1e9:.2f}" == "0.05"  # as the module says


@pytest.mark.parametrize(
    ("part", "settings", "by_hand"),
    [
        ("temporal_encoder", {}, N * 64 * 64 + block(N, 64)),
        ("temporal_encoder", {"rnn": "lstm"}, N * 4 * 64 * (64 + 64)),
        ("temporal_encoder", {"rnn": "bilstm"}, 2 * N * 4 * 64 * (64 + 64)),
        ("temporal_encoder", {"use_rnn": False}, 0),
        ("scorer", {}, N * (64 * 32 + 32)),
        ("scorer", {"mlp_type": "fc"}, N * 64),
        ("header_and_aggregator", {"frame_agg": "mlp"}, K * (4 * EMBEDDING**2 + EMBEDDING)),
        ("header_and_aggregator", {"frame_agg": "transformer"}, block(K, EMBEDDING) + K * EMBEDDING),
        ("header_and_aggregator", {"sim_header": "seqTransf"}, 4 * block(K, EMBEDDING)),
        ("header_and_aggregator", {"frame_agg": "qscore"}, 0),
    ],
)
def test_parts_by_hand(part: str, settings: dict[str, Any], by_hand: float) -> None:
    assert counted(**settings).as_dict()[part] == giga(by_hand)


def test_a_video_costs_n_frames_of_the_policy_and_k_of_clip() -> None:
    raw = counted()
    assert raw.policy_frame == 0
    assert raw.video == pytest.approx(K * raw.clip_frame + raw.temporal_encoder + raw.scorer)
    cnn = counted(policy_backbone="mobilenet_v3_large")
    rest = cnn.temporal_encoder + cnn.scorer
    assert cnn.video == pytest.approx(K * cnn.clip_frame + N * cnn.policy_frame + rest)
    assert cnn.policy_frame == pytest.approx(0.22, abs=0.005)  # torchvision's figure for this network
    frozen = counted(policy_backbone="frozen_clip")
    rest = frozen.temporal_encoder + frozen.scorer
    assert frozen.video == pytest.approx((K + N) * frozen.clip_frame + rest)
    assert frozen.policy_frame == frozen.clip_frame


def test_the_policy_clip_encodes_all_frames_once() -> None:
    found = counted(policy_backbone="clip")
    assert found.policy_frame == 0
    assert found.video == pytest.approx(N * found.clip_frame + found.temporal_encoder + found.scorer)
    assert found.video_attention == giga(N * FRAME_ATTENTION + attention(N, 64))


class TwoTokens(FrameTower):
    """Makes two tokens a video, each of half the frames."""

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return PerFrame.encode(self.clip, pixels).mean(dim=1, keepdim=True).expand(-1, 2, -1)

    def frame_shares(self, frames: int) -> Tensor:
        return torch.full((2, frames), 1 / frames)


def test_a_mixing_tower_is_counted_in_addition_to_the_clip_policy() -> None:
    for policy, frames in (("raw", 3), ("clip", N + 3)):
        model = small(policy_backbone=policy, top_k=3, frame_agg="mlp")
        model.tower = TwoTokens(PerFrameSettings(), model.clip)
        found = count_gflops(model, N)
        rest = found.temporal_encoder + found.scorer + found.header_and_aggregator
        assert found.video == pytest.approx(frames * found.clip_frame + rest)
        assert found.header_and_aggregator == giga(2 * (4 * EMBEDDING**2 + EMBEDDING)), "of two tokens"


def test_counting_changes_nothing() -> None:
    model = small("cpu", frame_agg="mlp", policy_backbone="mobilenet_v3_large").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    count_gflops(model, N)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_frozen_half_precision_and_learning_models_count_alike() -> None:
    model = small(frame_agg="mlp")
    expected = count_gflops(model, N)
    assert count_gflops(model.requires_grad_(False), N) == expected
    assert count_gflops(model.bfloat16().eval(), N) == expected
    assert set(expected.as_dict()) >= {"clip_frame", "policy_frame", "temporal_encoder", "scorer", "video"}
