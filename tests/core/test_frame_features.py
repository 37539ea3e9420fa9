"""The selector's backbones: pooled features of torchvision, frozen weights, and the names of published tensors."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import build_tiny_clip
from golden import load_golden
from tiny import SPEC, VOCABULARY, build_retriever, random_frames, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.data.preprocess import IMAGENET, Views, normalise
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.frame_features import CnnBackbone, FrozenClipBackbone, RawBackbone
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.plain import strict_load
from adaclip_finetune.weights.published import to_our_names

CNNS = ["mobilenet_v3_large", "mobilenet_v2", "resnet50"]


def pooled_features(cnn: Any, name: str, pixels: Tensor) -> Tensor:
    """Compute what comes before the classifier, by torchvision's modules in their own order."""
    features = cnn.features(pixels).mean(dim=(2, 3))
    if name == "mobilenet_v2":
        return features
    hidden = cnn.classifier[0]
    return nn.functional.hardswish(features @ hidden.weight.T + hidden.bias)


@functools.cache
def random_cnn(name: str) -> Any:
    """Return the network with batch statistics of some images; without, features of random weights are all alike."""
    torch.manual_seed(0)
    cnn = torchvision.models.get_model(name, weights=None).train()
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        cnn(torch.randn(4, 3, 64, 64))
    return cnn.eval()


@pytest.mark.parametrize("name", CNNS[:2])
@torch.no_grad()
def test_features_are_the_pooled_features_of_torchvision(tmp_path: Path, name: str) -> None:
    """The weights of the last layer are the given ones as well; the published system replaces them by random ones."""
    cnn = random_cnn(name)
    state = {key: tensor for key, tensor in cnn.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "cnn.pth")  # as old files of torchvision, without the counters
    backbone = CnnBackbone(name, str(tmp_path / "cnn.pth"), frozen=True).train()
    frames, mask = random_frames(2, 2, 3, 64, 64), torch.tensor([[True, True], [True, False]])
    features = backbone(frames, mask, torch.float32)
    assert features.shape == (2, 2, backbone.feature_dim) == (2, 2, 1280)
    mean, std = torch.tensor(IMAGENET.mean)[:, None, None], torch.tensor(IMAGENET.std)[:, None, None]
    pixels = (frames.flatten(0, 1) / 255 - mean) / std
    pixels[3] = 0
    expected = pooled_features(cnn, name, pixels)
    torch.testing.assert_close(features.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)
    assert features.flatten(0, 1).std(dim=0).max() > 0.01


def test_a_resnet_without_its_classifier() -> None:
    with torch.device("meta"):
        backbone = CnnBackbone("resnet50", "random", frozen=True)
        pooled = backbone.cnn(torch.empty(2, 3, 64, 64))
    assert pooled.shape == (2, backbone.feature_dim) == (2, 2048)
    assert not any(name.startswith("fc.") for name in backbone.cnn.state_dict())


def test_initialisation_leaves_pretrained_cnn_layers_alone(tmp_path: Path) -> None:
    """The published system initialises the CNN's last layer at random, and then freezes it."""
    state = random_cnn("mobilenet_v3_large").state_dict()
    torch.save(state, tmp_path / "cnn.pth")
    settings = {"policy_backbone": "mobilenet_v3_large", "policy_weights": str(tmp_path / "cnn.pth")}
    model = build_retriever(frame_agg="mlp", **settings)
    assert model.selector is not None and model.selector.backbone is not None
    own = model.selector.backbone.cnn.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in own.items())
    assert set(state) - set(own) == {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_cnn_changes_neither_weights_nor_statistics(frozen: bool) -> None:
    backbone = CnnBackbone("mobilenet_v3_large", "random", frozen).train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    features = backbone(random_frames(1, 2, 3, 32, 32), torch.ones(1, 2, dtype=torch.bool), torch.float32)
    same = all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert same == frozen and features.requires_grad != frozen
    if not frozen:
        features.sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def frozen_backbone(name: str) -> CnnBackbone:
    backbone = CnnBackbone(name, "random", frozen=True).double().train()
    strict_load(backbone.cnn, {key: random_cnn(name).state_dict()[key] for key in backbone.cnn.state_dict()}, "test")
    return backbone


def plain_features(backbone: CnnBackbone, frames: Tensor) -> Tensor:
    pixels = normalise(frames.flatten(0, 1), IMAGENET.mean, IMAGENET.std)
    return backbone.cnn(pixels.to(next(backbone.cnn.parameters()).dtype)).unflatten(0, frames.shape[:2])


@pytest.mark.parametrize("name", CNNS)
@torch.no_grad()
def test_fixed_norms_are_folded_into_the_convolutions(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(CnnBackbone, "_frames_at_once", 3)
    backbone, frames, mask = frozen_backbone(name), random_frames(2, 2, 3, 64, 64), torch.ones(2, 2, dtype=torch.bool)
    expected, names, calls = plain_features(backbone, frames), list(backbone.state_dict()), []
    for part in backbone.modules():
        part.register_forward_hook(lambda module, *_: calls.append(type(module)))
    features = backbone(frames, mask, torch.float64)
    torch.testing.assert_close(features, expected, atol=1e-9, rtol=1e-9)
    assert nn.Conv2d in calls and nn.BatchNorm2d not in calls
    assert list(backbone.state_dict()) == names


@pytest.mark.parametrize("change", ["statistics", "weights", "precision", "norms by batch"])
@torch.no_grad()
def test_folded_norms_follow_every_change(change: str) -> None:
    backbone, frames, mask = frozen_backbone(CNNS[0]), random_frames(2, 2, 3, 64, 64), torch.ones(2, 2).bool()
    before = backbone(frames, mask, torch.float64)
    norms = [part for part in backbone.cnn.modules() if isinstance(part, nn.BatchNorm2d)]
    if change == "statistics":
        norms[0].running_var.mul_(2)
    elif change == "weights":
        first, *rest = backbone.cnn.state_dict().items()
        strict_load(backbone.cnn, dict([(first[0], first[1] * 1.1), *rest]), "test")
    elif change == "precision":
        backbone.float()
    else:
        norms[0].train().momentum = 0
    after = backbone(frames, mask, next(backbone.parameters()).dtype)
    within = 1e-3 if change == "precision" else 1e-9
    torch.testing.assert_close(after, plain_features(backbone, frames), atol=within, rtol=within)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
def test_imagenet_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with torch.device("meta"), pytest.raises(UserError, match=r"(?s)policy_weights: .*mobilenet_v3_large.*TORCH_HOME"):
        CnnBackbone("mobilenet_v3_large", "imagenet", frozen=True)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cnn.pth"
    torch.save(random_cnn("mobilenet_v2").state_dict(), path)
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"policy_weights: .*cnn\.pth does not fit .*(\n.*)*conv1"),
    ):
        CnnBackbone("resnet50", str(path), frozen=True)


def test_raw_thumbnails() -> None:
    frames, mask = random_frames(2, 3, 1, 4, 4), torch.tensor([[True] * 3, [True, False, True]])
    features = RawBackbone(4)(frames, mask, torch.float64)
    expected = frames.double().reshape(2, 3, 16) / 255
    expected[1, 1] = 0
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, expected)


def test_frozen_clip_is_a_copy_that_does_not_learn() -> None:
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    backbone = FrozenClipBackbone(clip, 64).train()
    pixels = torch.randn(2, 3, 3, 32, 32)
    features = backbone(pixels)
    assert features.shape == (2, 3, 64) and not features.requires_grad
    torch.testing.assert_close(features.flatten(0, 1), clip.encode_image(pixels.flatten(0, 1)).detach())
    with torch.no_grad():
        clip.visual.proj.zero_()
    assert torch.equal(backbone(pixels), features)
    assert not any(module.training for module in backbone.modules() if module is not backbone)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_views_say_how_the_reader_prepares_frames() -> None:
    for policy in ("clip", "frozen_clip"):
        assert build_retriever(policy_backbone=policy).views() == Views(SPEC)
    assert build_retriever(policy_backbone="raw", use_policy=False).views() == Views(SPEC)
    assert build_retriever(policy_backbone="mobilenet_v3_large").views() == Views(SPEC, IMAGENET)
    half = replace(IMAGENET, size=112, resize_to=128)
    small = build_retriever(policy_backbone="mobilenet_v3_large", policy_weights="random", policy_size=112)
    assert small.views() == Views(SPEC, half)
    videos = random_videos(view=(3, 112, 112))
    assert small.encode_video(videos).selection is not None
    grey = build_retriever(policy_backbone="raw", rescale_size=10).views().selector
    assert grey is not None
    assert (grey.size, grey.channels, grey.resize_mode, grey.interpolation) == (10, 1, "squash", "bicubic")


# The beginning of a layout's name, and its settings.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"policy_backbone": "mobilenet_v3_large", "frame_agg": "mlp"},
    "policy raw, rnn bilstm": {"policy_backbone": "raw", "rnn": "bilstm", "frame_agg": "mlp"},
    "policy raw, rnn lstm": {"policy_backbone": "raw", "rnn": "lstm", "mlp_type": "fc", "frame_agg": "transformer"},
    "policy clip": {"policy_backbone": "clip", "use_rnn": False, "sim_header": "transformer"},
    "no policy": {"use_policy": False, "sim_header": "seqTransf", "frame_agg": "qscore"},
    "policy raw, word_agg mlp": {"policy_backbone": "raw", "word_agg": "mlp"},
    "policy raw, word_agg transformer": {"policy_backbone": "raw", "word_agg": "transformer"},
}


def test_published_tensors_and_ours_correspond_one_to_one() -> None:
    layouts = load_golden("checkpoint_layout")["settings"]
    assert len(layouts) == len(PUBLISHED)
    with torch.device("meta"):
        loaded = load_clip(load_config(None, {}), with_weights=False)
        for begin, settings in PUBLISHED.items():
            (published,) = (layout for name, layout in layouts.items() if name.startswith(begin))
            config = load_config(None, {"policy_weights": "random", "num_frm": 32, "top_k": 16, **settings})
            ours = {name: list(tensor.shape) for name, tensor in VideoRetriever(config, loaded).state_dict().items()}
            if not any(name.startswith("clip.") for name in published):
                ours = {name: shape for name, shape in ours.items() if not name.startswith("clip.")}
            assert to_our_names(published) == ours, begin
