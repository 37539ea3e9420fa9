"""The tower `proxy_tokens`: golden values of CLIP-ViP, and what every image tower gives with proxies."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip
from golden import load_golden
from tiny import VOCABULARY, build_pe_clip, build_timm_clip
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.towers import PerFrameSettings, ProxyTokensSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.pooling import MeanPooling
from adaclip_finetune.model.towers.base import FrameTower
from adaclip_finetune.model.towers.per_frame import PerFrame
from adaclip_finetune.model.towers.proxy_tokens import ProxyTokens, proxy_attention, temporal_rows
from adaclip_finetune.model.vit import vision_view
from adaclip_finetune.objectives.auxiliary_captions import both_texts, both_ways
from adaclip_finetune.objectives.contrastive import contrastive_loss

Golden = dict[str, Any]

# ---- the published system ----

VIP = "clipmodel.vision_model."
OUTSIDE_BLOCKS = {
    "clipmodel.logit_scale": "logit_scale",
    "clipmodel.visual_projection.weight": "visual.proj",
    f"{VIP}embeddings.class_embedding": "visual.class_embedding",
    f"{VIP}embeddings.patch_embedding.weight": "visual.conv1.weight",
    f"{VIP}embeddings.position_embedding.weight": "visual.positional_embedding",
    f"{VIP}pre_layrnorm.": "visual.ln_pre.",
    f"{VIP}post_layernorm.": "visual.ln_post.",
    f"{VIP}embeddings.added_cls": "tower.proxies",
    f"{VIP}embeddings.temporal_embedding": "tower.temporal_embedding",
    f"{VIP}encoder.layers.": "visual.transformer.resblocks.",
}
INSIDE_BLOCKS = {
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{part}_proj.": "attn.in_proj_" for part in "qkv"},
}


def place_of(published: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return the part of our tensors that has a published name, in its published shape."""
    name = published
    for old, new in {**OUTSIDE_BLOCKS, **INSIDE_BLOCKS}.items():
        name = name.replace(old, new)
    tensor = tensors[name]
    if ".in_proj_" in name:
        return tensor.chunk(3)["qkv".index(published.split("_proj")[0][-1])]
    if name == "tower.temporal_embedding":
        return tensor[None]
    return tensor.T if name == "visual.proj" else tensor


class Published(nn.Module):
    """A model of the published system in float64, from golden values."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        sizes = golden["vision"]
        vision = {
            "image_size": sizes["image"],
            "patch_size": sizes["patch"],
            "width": sizes["width"],
            "layers": sizes["layers"],
            "head_width": sizes["width"] // sizes["heads"],
            "mlp_ratio": sizes["mlp"] / sizes["width"],
        }
        text = {"vocab_size": 2, "width": 32, "heads": 1, "layers": 1}
        clip = open_clip.CLIP(golden["embed_dim"], vision, text, quick_gelu=golden["act"] == "quick_gelu")  # type: ignore[arg-type]
        self.tower: FrameTower
        if golden["proxy_tokens_in_all"] is None:
            self.tower = PerFrame(PerFrameSettings(), clip)
        else:
            settings = ProxyTokensSettings(
                num_proxies=golden["proxy_tokens_in_all"],
                temporal_size=golden["temporal_size"],
                temporal_embedding=bool(golden["use_temporal"]),
            )
            self.tower = ProxyTokens(settings, clip)
        self.visual, self.logit_scale = clip.visual, clip.logit_scale
        with torch.no_grad():
            for name, value in golden["sd"].items():
                if value.numel():  # with one proxy, the published parameter of the others has no rows
                    place_of(name, dict(self.named_parameters())).copy_(value)
        self.double()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, D) of videos."""
        tokens = self.tower(pixels.double(), torch.ones(pixels.shape[:2], dtype=torch.bool))
        return F.normalize(MeanPooling()(tokens)[0], dim=-1)


def assert_published(golden: Golden) -> None:
    """Compare vectors, and all gradients of the image tower that the golden values hold."""
    model, expected = Published(golden), golden["out"]
    video = model(golden["in"]["video"])
    vectors = [(video, expected["vis_features"])]
    scale, text = model.logit_scale.exp(), expected.get("text_features")
    if "image" in golden["in"]:
        vectors.append((model(golden["in"]["image"]), expected["img_features"]))
        caption, own = expected["cap_features"], torch.eye(len(video), dtype=torch.bool)
        by_text, by_caption = scale * text @ video.T, scale * caption @ video.T
        loss = both_texts(by_text, by_caption, torch.arange(len(video)), own, own)
        loss = loss + both_ways(scale * caption @ vectors[1][0].T, own)
    elif golden.get("grad"):
        loss = 2 * contrastive_loss(scale * text @ video.T)
    for own, other in vectors:
        assert (own - other).norm() <= 1e-7 * other.norm()
    if golden.get("grad"):
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, gradient in golden.get("grad", {}).items():
        if gradient.numel() and "text" not in name:
            error = (place_of(name, gradients) - gradient).norm()
            assert error <= 1e-6 * gradient.norm(), f"{name}: {error / gradient.norm()}"


@pytest.mark.parametrize("name", ["1", "2", "3", "4", "5_meanpool"])
def test_vectors_and_gradients_are_those_of_the_published_system(name: str) -> None:
    """`5_meanpool` is the published baseline, our tower per_frame with the mean of frames."""
    assert_published(load_golden(f"proxy_tokens_{name}"))


@pytest.mark.parametrize("name", ["dev_1", "dev_2", "dev_3", "dev_4", "dev_5_meanpool"])
def test_all_golden_values_agree_where_they_are_at_hand(shared: Path, name: str) -> None:
    """The complete set, of which tests/golden keeps a part."""
    path = shared / "reference" / "clip_vip" / "golden" / f"{name}.pt"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    golden: Golden = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    for place, tensor in torch.load(path, weights_only=True).items():
        kind, _, key = place.partition("/")
        image_tower = "vision_model" in key or "visual_projection" in key or "logit_scale" in key
        if kind in ("in", "out") or (kind in ("sd", "grad") and image_tower and "position_ids" not in key):
            golden.setdefault(kind, {})[key] = tensor
    assert len(golden["grad"]) >= 10
    assert_published(golden)


# ---- every image tower ----


CLIPS: dict[str, Callable[[], nn.Module]] = {
    "class token": lambda: build_tiny_clip(vocabulary=VOCABULARY),
    "no class token": build_timm_clip,
    "rotary": build_pe_clip,
}


@functools.cache
def pretrained(kind: str) -> nn.Module:
    """Return a CLIP in float64 in which no parameter is zero, so that each would be missed."""
    clip = CLIPS[kind]().double()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in clip.get_submodule("visual").parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return clip


@pytest.fixture(params=CLIPS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield request.param


def build(kind: str, **settings: Any) -> ProxyTokens:
    """Return a tower in float64 whose temporal embedding is not zero."""
    tower = ProxyTokens(ProxyTokensSettings(**settings), copy.deepcopy(pretrained(kind))).double()
    if tower.temporal_embedding is not None:
        nn.init.normal_(tower.temporal_embedding)
    return tower


def frames(count: int, videos: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(videos, count, 3, 32, 32, dtype=torch.float64, generator=generator)


def everything(pixels: Tensor) -> Tensor:
    return torch.ones(pixels.shape[:2], dtype=torch.bool)


def assert_close(own: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_with_one_proxy_and_one_frame_it_is_clip(kind: str) -> None:
    tower, pixels = build(kind, num_proxies=1, temporal_embedding=False), frames(1)
    assert not list(tower.parameters())
    assert_close(tower(pixels, everything(pixels)), PerFrame.encode(tower.clip, pixels))


def test_the_class_token_of_a_view_is_what_it_places(kind: str) -> None:
    view = vision_view(pretrained(kind))
    own, placed = view.class_token(), view.place(frames(1)[:, 0])
    assert (own is None) == (view.prefix == 0)
    if own is not None:
        assert_close(own[0] + own[1], placed[0, 0])


@pytest.mark.parametrize("shared_tokens", [0, 1, 4])
def test_attention_in_two_parts_equals_a_mask(shared_tokens: int) -> None:
    per_frame, count = 5, 3
    length = shared_tokens + per_frame * count
    q, k, v = torch.randn(3, 2, 4, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frame_of = torch.cat([torch.full((shared_tokens,), -1), torch.arange(count).repeat_interleave(per_frame)])
    real = torch.tensor([[True, True, True], [True, False, True]])
    seen = torch.cat([torch.ones(2, shared_tokens, dtype=torch.bool), real.repeat_interleave(per_frame, 1)], dim=1)
    is_proxy = frame_of == -1
    allowed = is_proxy | (frame_of[:, None] == frame_of) | (is_proxy[:, None] & seen[:, None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    assert_close(proxy_attention(q, k, v, shared_tokens, real), expected)


@pytest.mark.parametrize(("size", "count"), [(4, 4), (4, 6), (12, 1), (12, 7), (1, 3)])
def test_temporal_rows_are_interpolated_as_torch_does(size: int, count: int) -> None:
    embedding = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(embedding.T[None], count, mode="linear")[0].T
    assert_close(temporal_rows(embedding, torch.ones(1, count, dtype=torch.bool))[0], expected)
    real = torch.tensor([[*[True] * count, False, False], [False, *[True] * count, False]])
    rows = temporal_rows(embedding, real)
    assert_close(rows[0, :count], expected)
    assert_close(rows[1, 1:-1], expected)


def test_a_video_without_real_frames_has_a_finite_vector(kind: str) -> None:
    tower, pixels = build(kind), torch.zeros(1, 3, 3, 32, 32, dtype=torch.float64)
    out = tower(pixels, ~everything(pixels))
    assert out.isfinite().all()
    assert_close(out, tower(pixels, everything(pixels)))


def test_only_the_temporal_embedding_tells_the_order_of_frames(kind: str) -> None:
    pixels = frames(4)
    for temporal in (False, True):
        tower = build(kind, temporal_embedding=temporal)
        out, back = (tower(x, everything(x)) for x in (pixels, pixels.flip(1)))
        assert torch.allclose(out, back, rtol=1e-9, atol=1e-9) == (not temporal)


def test_frames_meet_in_the_proxies(kind: str) -> None:
    """Only proxies carry what is in one frame to the patches of another."""
    for count, meets in ((1, kind != "no class token"), (3, True)):
        tower = build(kind, num_proxies=count, temporal_embedding=False)
        if tower.proxies is not None:
            tower.proxies.data.mul_(3)
        outputs = []
        with patch.object(ProxyTokens, "leave", lambda _self, tokens, _state: tokens):
            for last in (0.0, 1.0):
                pixels = frames(3)
                pixels[:, 2] += last
                outputs.append(tower(pixels, everything(pixels)))
        shared_tokens = outputs[0].shape[1] - 3 * tower.view.grid[0] * tower.view.grid[1]
        first_frame = slice(shared_tokens, shared_tokens + tower.view.grid[0] * tower.view.grid[1])
        assert (not torch.equal(outputs[0][:, first_frame], outputs[1][:, first_frame])) == meets


@pytest.mark.parametrize("proxy_init", ["published", "clip"])
def test_new_proxies_start_as_the_setting_says(kind: str, proxy_init: str) -> None:
    tower = build(kind, num_proxies=9, proxy_init=proxy_init)
    assert tower.proxies is not None and tower.proxies.shape == (8, 64)
    own = tower.view.class_token()
    if proxy_init == "published":
        assert 0.8 < tower.proxies.std() < 1.2
    elif own is None:
        assert 0.1 < tower.proxies.std() < 0.15
    else:
        distance = (tower.proxies - own[0]).norm(dim=1) / own[0].norm()
        assert ((distance > 0.05) & (distance < 0.2)).all()


def test_it_runs_in_bfloat16(kind: str) -> None:
    tower, pixels = build(kind).float(), frames(3).float()
    tower.clip.float()
    expected = tower(pixels, everything(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        out = tower(pixels, everything(pixels))
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


def test_its_settings_are_checked() -> None:
    for wrong in ({"num_proxies": 0}, {"temporal_size": 0}, {"proxy_init": "zeros"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            load_config(None, {"tower": {"method": "proxy_tokens", "config": wrong}})
