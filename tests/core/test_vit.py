"""Opened transformers of open_clip and timm: their pieces compute the same as the whole."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import CustomResidualAttentionBlock
from tiny import on_meta
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import MT5Config

from adaclip_finetune.errors import UserError
from adaclip_finetune.model.vit import ROLES, Linear, OpenBlock, TowerName, tower_blocks, vision_view

# A configuration of open_clip, and what to change in its vision_cfg and in timm's trunk, to be fast: all models have
# two blocks a tower and narrow text towers. All else, the width of a head included, is as published.
Model = tuple[str, dict[str, Any], dict[str, Any]]
NARROW = {"embed_dim": 128, "num_heads": 2}
CUSTOM = dict.fromkeys(("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True)
MODELS: dict[str, Model] = {
    "ViT-B-32": ("ViT-B-32", {"width": 128}, {}),
    "ViT-H-14-worldwide": ("ViT-H-14-worldwide", {"width": 160, "image_size": 56}, {}),
    "MobileCLIP2-B": ("MobileCLIP2-B", {"image_size": 64}, {"img_size": 64}),
    "PE-Core-B-16": ("PE-Core-B-16", {"image_size": 64}, NARROW | {"img_size": 64}),
    "ViT-SO400M-14-SigLIP2": (
        "ViT-SO400M-14-SigLIP2",
        {"image_size": 56},
        {"embed_dim": 144, "num_heads": 2, "img_size": 56},
    ),
    "EVA02-B-16": ("EVA02-B-16", {"image_size": 64}, NARROW | {"img_size": 64}),
    "average pooling": ("ViT-L-14-CLIPA", {"width": 128, "image_size": 56}, {}),
    "layer scale": ("ViT-M-16-alt", {"width": 128, "image_size": 64}, {}),
    "custom blocks": ("ViT-B-32", {"width": 128, **CUSTOM}, {}),
    "CoCa": ("coca_ViT-B-32", {"width": 128}, {}),
    "no class token": ("PE-Core-bigG-14-448", {"image_size": 56}, NARROW | {"img_size": 56}),
    "biases of q and v apart": ("EVA01-g-14", {"image_size": 56}, NARROW | {"img_size": 56}),
    "post-norm": ("EVA02-E-14", {"image_size": 56}, NARROW | {"img_size": 56}),
    "gated MLP": ("ViTamin-S", {"image_size": 64}, {"img_size": 64}),
}


def build(config: str, vision: dict[str, Any], trunk: dict[str, Any], seed: int = 0) -> nn.Module:
    """Return the model of that name with two blocks a tower and 100 words, with random weights, biases and scales."""
    settings = open_clip.get_model_config(config)
    assert settings is not None
    if "timm_model_name" not in settings["vision_cfg"]:
        vision = {"layers": 2, **vision}
    settings["vision_cfg"] |= vision
    settings["text_cfg"] |= {"vocab_size": 100, "layers": 2, "width": 128, "heads": 2}
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    if "multimodal_cfg" in settings:
        settings["multimodal_cfg"] |= {"vocab_size": 100, "layers": 1, "width": 128, "heads": 2}
        kind = CoCa
    create = timm.create_model
    with (
        torch.random.fork_rng(),
        patch("timm.create_model", lambda name, **options: create(name, **{"depth": 2, **trunk, **options})),
    ):
        torch.manual_seed(seed)
        clip: nn.Module = kind(**settings)
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return clip.eval()


@pytest.fixture(scope="module", params=MODELS)
def clip(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    yield build(*MODELS[request.param])


def pixels(clip: Any, count: int = 2) -> Tensor:
    size = clip.visual.image_size[0]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def words(clip: Any) -> Tensor:
    """Return three sentences with an end token (the highest id, and the id 2 of other tokenizers) and padding."""
    length = getattr(clip, "text", clip).context_length
    ids = torch.randint(3, 99, (3, length), generator=torch.Generator().manual_seed(2))
    for row, end in zip(ids, (5, 9, length - 2), strict=True):
        row[end], row[end + 1], row[end + 2 :] = 99, 2, 0
    return ids


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def features(clip: Any) -> tuple[Tensor, Tensor]:
    return first(clip.visual(pixels(clip))), first(clip.encode_text(words(clip)))


def assert_close(own: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert own.shape == other.shape
    assert (own - other).norm() <= tolerance * other.norm()


def parameters_of(linears: list[dict[Any, list[Linear]]]) -> dict[tuple[nn.Module, str], list[Linear]]:
    """Return the maps, grouped by the parameter that they are rows of."""
    parameters: dict[tuple[nn.Module, str], list[Linear]] = {}
    for block in linears:
        for role in ROLES:
            for linear in block[role]:
                parameters.setdefault((linear.module, linear.weight), []).append(linear)
    return parameters


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clone()


class LowRank(nn.Module):
    def __init__(self, weight: Tensor, linear: Linear) -> None:
        super().__init__()
        self.rows = slice(linear.start, linear.stop)
        self.down = nn.Parameter(0.02 * torch.randn(2, weight.shape[1]))
        self.up = nn.Parameter(0.02 * torch.randn(linear.stop - linear.start, 2))

    def forward(self, weight: Tensor) -> Tensor:
        update = torch.zeros_like(weight)
        update[self.rows] = (self.up @ self.down).to(weight.dtype)
        return weight + update


@torch.no_grad()
def test_the_pieces_of_an_image_tower_compute_its_output(clip: Any) -> None:
    view, images = vision_view(clip), pixels(clip)
    tokens = view.norm(view.place(images))
    assert tokens.shape == (2, view.prefix + view.grid[0] * view.grid[1], view.width)
    for block in view.blocks:
        tokens = block(tokens)
    assert_close(view.pool(tokens), first(clip.visual(images)))


@torch.no_grad()
def test_the_pieces_of_a_block_compute_its_output(clip: Any) -> None:
    view = vision_view(clip)
    tokens = torch.randn_like(view.place(pixels(clip)))
    patches = torch.arange(view.grid[0] * view.grid[1])
    standing = torch.cat([torch.full((view.prefix,), -1), patches])
    mask = torch.rand(len(tokens), 1, *[tokens.shape[1]] * 2) < 0.5
    mask |= torch.eye(tokens.shape[1], dtype=torch.bool)
    for block in view.blocks:
        assert_close(in_pieces(block, tokens), block(tokens))
        for own in (mask, mask[0, 0], torch.randn(tokens.shape[1], tokens.shape[1])):
            assert_close(in_pieces(block, tokens, own), block(tokens, own))
        assert_close(block(tokens, positions=standing), block(tokens))
        order = torch.randperm(len(standing))
        assert_close(block(tokens[:, order], positions=standing[order]), block(tokens)[:, order])
        assert_close(block(tokens[:, order], positions=standing[order].expand(2, -1)), block(tokens)[:, order])
        assert block(tokens[:, :3], positions=standing[:3]).shape == tokens[:, :3].shape


def in_pieces(block: OpenBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = block.qkv(x)
    assert q.shape[:3] == (x.shape[0], block.heads, x.shape[1])
    x = x + block.attention_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return x + block.mlp(x)


@torch.no_grad()
def test_each_linear_map_has_the_role_that_it_is_listed_under(clip: Any) -> None:
    """Noise in the rows of a map changes the output of that map, and nothing else."""
    block = vision_view(clip).blocks[1]
    x = torch.randn_like(vision_view(clip).place(pixels(clip, 1)))

    def made() -> dict[str, Tensor]:
        q, k, v = block.qkv(x)
        return {"q": q, "k": k, "v": v, "out": block.attention_out(v), "mlp": block.mlp(x)}

    values = block.qkv(x)[2]
    before = made()
    for role, linears in block.linears().items():
        for linear in linears:
            weight = linear.module.get_parameter(linear.weight)
            kept = weight.clone()
            weight[linear.start : linear.stop] += torch.randn_like(linear.rows())
            after = made() | {"out": block.attention_out(values)}
            weight.copy_(kept)
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            assert changed == {"mlp" if role in ("fc", "proj") else role}


def test_the_maps_cover_all_matrices_of_the_blocks(clip: Any) -> None:
    named = {id(parameter): name for name, parameter in clip.named_parameters()}
    for linears, blocks in (
        (linears_of(clip, "image"), [block.module for block in vision_view(clip).blocks]),
        (linears_of(clip, "text"), list(getattr(clip, "text", clip).transformer.resblocks)),
    ):
        assert len(linears) == len(blocks) == 2
        covered = parameters_of(linears)
        for (module, name), own in covered.items():
            weight = module.get_parameter(name)
            assert [row for linear in own for row in range(linear.start, linear.stop)] == list(range(len(weight)))
            assert id(weight) in named
            for linear in own:
                assert linear.bias is None or len(linear.module.get_parameter(linear.bias)) == len(weight)
        matrices = {id(weight) for block in blocks for weight in block.parameters() if weight.dim() == 2}
        assert {id(module.get_parameter(name)) for module, name in covered} == matrices


def test_weights_can_be_parametrized(clip: nn.Module) -> None:
    clip = deepcopy(clip)

    def outputs() -> list[Tensor]:
        own = [*features(clip)]
        with torch.no_grad():
            own += features(clip)
            with torch.autocast("cpu", torch.bfloat16):
                own += features(clip)
        return own

    before = outputs()
    for module, name in parameters_of(linears_of(clip, "image") + linears_of(clip, "text")):
        parametrize.register_parametrization(module, name, Same())
    assert len(linears_of(clip, "image")) == 2, "parametrization changes their classes"
    # Not bit for bit: without gradients, PyTorch multiplies by a parameter in another order than by its copy.
    for own, other in zip(outputs(), before, strict=True):
        assert_close(own, other, 1e-5 if own.dtype == torch.float32 else 1e-2)


def test_gradients_reach_low_rank_updates_with_and_without_checkpointing(clip: Any) -> None:
    clip = deepcopy(clip)
    updates = add_low_rank(clip)
    parameters = [parameter for update in updates for parameter in update.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        image, text = features(clip)
        loss = (image * torch.linspace(-1, 1, image.shape[1])).sum() + (text**2).sum()
        return torch.autograd.grad(loss, parameters)

    plain = gradients()
    assert all(gradient.norm() > 0 for gradient in plain)
    clip.set_grad_checkpointing(True)
    if any(isinstance(module, CustomResidualAttentionBlock) for module in clip.modules()):
        with pytest.raises(TypeError):  # open_clip cannot checkpoint its custom blocks
            gradients()
        return
    for own, other in zip(gradients(), plain, strict=True):
        assert_close(own, other)


def linears_of(clip: nn.Module, tower: TowerName) -> list[dict[Any, list[Linear]]]:
    return [block.linears() for block in tower_blocks(clip, tower)]


def add_low_rank(clip: nn.Module) -> list[LowRank]:
    clip.requires_grad_(False)
    updates = []
    for (module, name), linears in parameters_of(linears_of(clip, "image") + linears_of(clip, "text")).items():
        for linear in linears:
            updates.append(LowRank(getattr(module, name), linear))
            parametrize.register_parametrization(module, name, updates[-1])
    return updates


@pytest.mark.parametrize(
    ("config", "tower"),
    [
        ("RN50", "ModifiedResNet"),
        ("MobileCLIP2-S0", "FastVit"),
        ("convnext_base", "ConvNeXt"),
        ("swin_base_patch4_window7_224", "SwinTransformer"),
        ("vit_relpos_medium_patch16_cls_224", "VisionTransformerRelPos"),
    ],
)
def test_image_towers_other_than_vits_are_refused(config: str, tower: str) -> None:
    clip = on_meta(config)
    with pytest.raises(UserError, match=rf"image tower \({tower}\)"):
        vision_view(clip)
    with pytest.raises(UserError, match=rf"image tower \({tower}\)"):
        tower_blocks(clip, "image")
    assert len(tower_blocks(clip, "text")) == 12


def test_text_towers_of_hugging_face_that_are_no_bert_are_refused() -> None:
    clip = nn.Module()
    config = MT5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=9)
    clip.text = HFTextEncoder("", 16, config, "mean_pooler", "linear", pretrained=False)
    with pytest.raises(UserError, match=r"text tower \(HFTextEncoder\)"):
        tower_blocks(clip, "text")


@pytest.mark.parametrize(
    ("vision", "fact"), [("scaled_cosine_attn", "logit_scale"), ("patch_dropout", "patch dropout")]
)
def test_towers_that_compute_something_else_are_refused(vision: str, fact: str) -> None:
    clip = build("ViT-B-32", {"width": 64, vision: 0.5}, {})
    with pytest.raises(UserError, match=fact):
        vision_view(clip)
