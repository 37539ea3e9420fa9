"""The retriever as a whole: encoding only what is needed equals encoding everything, whatever selector and head."""

import copy
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from adaclip_finetune.training.objective import contrastive_loss
from conftest import build_tiny_clip
from torch import Tensor, nn

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model import clip as towers
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever

SPEC = ImageSpec(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
SMALL = {"num_frm": 6, "top_k": 2, "hidden_dim": 64, "mlp_hidden_dim": 32, "rescale_size": 8, "policy_backbone": "raw"}


def build(clip: nn.Module | None = None, **settings: Any) -> tuple[VideoRetriever, Config]:
    config = load_config(None, {**SMALL, **settings})
    torch.manual_seed(1)
    loaded = LoadedClip(clip or build_tiny_clip(), SPEC, None, None, 77, "test")  # type: ignore[arg-type]
    return VideoRetriever(config, loaded), config


def make_batch(videos: int = 4, num_frm: int = 6, policy: str = "raw") -> tuple[VideoBatch, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"raw": (1, 8, 8), "mobilenet_v3_large": (3, 32, 32)}
    policy_frames = None
    if policy in shapes:
        shape = (videos, num_frm, *shapes[policy])
        policy_frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    batch = VideoBatch(
        frames=torch.randint(0, 256, (videos, num_frm, 3, 32, 32), generator=generator, dtype=torch.uint8),
        frame_mask=torch.ones(videos, num_frm, dtype=torch.bool),
        policy_frames=policy_frames,
        frame_indices=torch.arange(num_frm).expand(videos, num_frm),
        video_ids=[f"v{i}" for i in range(videos)],
    )
    return batch, open_clip.tokenize(["a red square", "two small blue circles meet", "it", "a star grows then fades"])


def encode_everything(model: VideoRetriever, batch: VideoBatch, k: int, temperature: float, noise: Tensor) -> Tensor:
    """The published way, as an oracle: all N frames through CLIP with gradients, then the actions choose."""
    frames = model._encode(batch.frames, batch.frame_mask)
    selector = model.selector
    assert selector is not None
    features = frames if selector.backbone is None else model._policy_features(batch)
    selection = selector(features, k, temperature, noise)
    chosen = selection.weights.to(frames.dtype) @ frames
    if model.header is not None:
        chosen = model.header(chosen)
    return model.aggregator(chosen)


@pytest.mark.parametrize("policy", ["raw", "clip", "frozen_clip", "mobilenet_v3_large"])
@pytest.mark.parametrize("head", [{"frame_agg": "mlp"}, {"sim_header": "transformer"}])
@pytest.mark.parametrize("k", [1, 4, 6])
def test_encoding_only_what_is_needed_equals_encoding_everything(policy: str, head: dict[str, str], k: int) -> None:
    settings = {"policy_backbone": policy, "policy_weights": "random", "warmup_epochs": 2, "num_epochs": 2, **head}
    model, _ = build(**settings)
    model = model.double().train()
    oracle = copy.deepcopy(model)
    batch, ids = make_batch(policy=policy)
    noise = -torch.empty(4, 6, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(3)).log()
    text, video = model(batch, ids, k=k, temperature=0.7, noise=noise)
    loss = contrastive_loss(model.similarity(text, video))
    loss.backward()

    whole_text = oracle.clip.encode_text(ids)
    whole_video = encode_everything(oracle, batch, k, 0.7, noise)
    assert video.video is not None
    torch.testing.assert_close(text, whole_text, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(video.video, whole_video, atol=1e-9, rtol=1e-9)
    whole_loss = contrastive_loss(oracle.similarity(whole_text, video._replace(video=whole_video)))
    whole_loss.backward()
    torch.testing.assert_close(loss, whole_loss, atol=1e-9, rtol=1e-9)
    gradients = dict(oracle.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if gradients[name].grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-9, rtol=1e-7, msg=name)
            compared += 1
    assert compared > 50


def count_encoded(clip: nn.Module) -> list[int]:
    seen: list[int] = []
    clip.visual.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    return seen


def test_evaluation_encodes_only_the_selected_frames() -> None:
    model, _ = build(frame_agg="mlp")
    seen = count_encoded(model.clip)
    with torch.no_grad():
        model.eval().encode_video(make_batch()[0])
    assert seen == [4 * 2]


def test_evaluation_equals_encoding_everything() -> None:
    model, _ = build(frame_agg="mlp")
    model = model.double().eval()
    batch, _ = make_batch()
    with torch.no_grad():
        video = model.encode_video(batch)
        everything = model._encode(batch.frames, batch.frame_mask)
        assert video.selection is not None and video.video is not None
        chosen = everything[torch.arange(4)[:, None], video.selection.indices]
        torch.testing.assert_close(video.video, model.aggregator(chosen), atol=1e-9, rtol=1e-9)


def test_fault_clip_policy_encoding_twice_or_crashing() -> None:
    """A fault of the published system: clip policies encoding twice or crashing."""
    model, _ = build(policy_backbone="clip")
    seen = count_encoded(model.clip)
    model.encode_video(make_batch(policy="clip")[0], temperature=1.0)
    assert seen == [4 * 6]


def test_text_is_encoded_up_to_the_longest_caption() -> None:
    model, _ = build()
    lengths: list[int] = []
    model.clip.transformer.register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    _, ids = make_batch()
    model.encode_text(ids)
    assert lengths == [int((ids != 0).sum(dim=1).max())]


def test_fault_k_annealing_with_the_transformer_header() -> None:
    model, config = build(sim_header="transformer", warmup_epochs=3, num_epochs=4)
    video = model.encode_video(make_batch()[0], k=config.num_frm - 1, temperature=1.0)
    assert video.frames.shape == (4, 5, 64)


@pytest.mark.parametrize("frame_agg", [None, "mlp", "transformer", "qscore"])
@pytest.mark.parametrize("sim_header", ["meanP", "transformer", "seqTransf"])
def test_every_head_runs_on_a_width_that_the_published_code_cannot(frame_agg: str | None, sim_header: str) -> None:
    clip = open_clip.CLIP(
        embed_dim=40,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
        text_cfg={"width": 64, "heads": 1, "layers": 1},
    )
    model, _ = build(clip, frame_agg=frame_agg, sim_header=sim_header)
    batch, ids = make_batch()
    text, video = model(batch, ids, temperature=1.0)
    assert (video.video is None) == (frame_agg == "qscore")
    similarity = model.similarity(text, video)
    assert similarity.shape == (4, 4)
    assert similarity.isfinite().all()


def test_blank_frames_are_zero_after_normalisation() -> None:
    model, _ = build(use_policy=False)
    batch, _ = make_batch()
    mask = batch.frame_mask.clone()
    mask[:, 4:] = False
    blank = VideoBatch(batch.frames, mask, None, batch.frame_indices, batch.video_ids)
    seen: list[Tensor] = []
    model.clip.visual.register_forward_hook(lambda _m, args, _o: seen.append(args[0].unflatten(0, (4, 6))))
    model.encode_video(blank)
    assert seen[0][:, 4:].abs().max() == 0
    expected = (batch.frames[:, :4].float() / 255 - torch.tensor(SPEC.mean)[:, None, None]) / torch.tensor(SPEC.std)[
        :, None, None
    ]
    torch.testing.assert_close(seen[0][:, :4], expected)


def frozen_modules(model: nn.Module) -> Iterator[nn.Module]:
    yield from (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_frozen_cnn_stays_in_evaluation_mode() -> None:
    model, _ = build(policy_backbone="mobilenet_v3_large", policy_weights="random", freeze_cnn=True)
    model.train()
    assert not any(module.training for module in frozen_modules(model))
    assert model.clip.training
    model.encode_video(make_batch(policy="mobilenet_v3_large")[0], temperature=1.0).frames.sum().backward()
    assert model.selector is not None and model.selector.backbone is not None
    assert all(p.grad is None for p in model.selector.backbone.parameters())


def test_headers_start_from_the_text_tower() -> None:
    clip = build_tiny_clip()
    model, _ = build(clip, sim_header="seqTransf")
    assert model.header is not None
    blocks = model.header.transformer.resblocks
    for own, pretrained in zip(blocks, towers.text_blocks(clip), strict=False):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, pretrained.state_dict()[name])
    assert torch.equal(model.header.positions.weight, clip.positional_embedding)
    assert blocks[0].ln_1.eps == 1e-12


def test_selector_layers_start_small() -> None:
    model, _ = build(hidden_dim=512, mlp_hidden_dim=1024, frame_agg="mlp")
    assert model.selector is not None
    for linear in (model.selector.scorer[0], model.aggregator.scorer[0], model.selector.encoder.projection):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias.abs().max() == 0
