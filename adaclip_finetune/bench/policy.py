"""Row `policy`: features of the frame selector's frozen CNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.data.preprocess import IMAGENET, normalise
from adaclip_finetune.model.frame_features import CnnBackbone
from adaclip_finetune.training.device import keep_freed_memory


def policy(setup: Setup) -> Iterator[Measured]:
    """Compare MobileNetV3 with ViT-B/32 on the same number of frames, and with torchvision's own module.

    "112 pixels" is the same network on frames of half the side.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32-alt" if setup.quick else "ViT-B-32-quickgelu", device=setup.device).eval()
    backbone = with_statistics(CnnBackbone("mobilenet_v3_large", "random", frozen=True)).to(setup.device)
    for count in (2,) if setup.quick else (32,) if setup.device.type == "cpu" else (32, 512):
        frames = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=setup.device)
        small = interpolate(frames.float(), scale_factor=0.5, mode="area").byte()
        pixels = torch.randn(count, 3, 224, 224, device=setup.device)
        with torch.no_grad():
            check("the features of the CNN", ours(backbone, frames), plain(backbone, frames), 1e-4)
            with setup.autocast():
                alternatives: dict[str, Callable[[], object]] = {
                    "CLIP": partial(clip.visual, pixels),
                    "torchvision": partial(plain, backbone, frames),
                    "ours": partial(ours, backbone, frames),
                    "112 pixels": partial(ours, backbone, small),
                }
                seconds = in_turns(setup, alternatives)
        against_clip = Aim("ours", "CLIP", 8 if setup.device.type == "cpu" and setup.precision == "fp32" else None)
        aims = [against_clip, Aim("ours", "torchvision"), Aim("112 pixels", "CLIP")]
        yield Measured(f"{count} frames, {setup.precision}", seconds, aims)


def ours(backbone: CnnBackbone, frames: Tensor) -> Tensor:
    """Return the features (n, F) of frames (n, 3, S, S) as the frame selector gets them."""
    mask = torch.ones(1, len(frames), dtype=torch.bool, device=frames.device)
    features: Tensor = backbone(frames[None], mask, torch.float32)
    return features[0]


def plain(backbone: CnnBackbone, frames: Tensor) -> Tensor:
    """Return the same features from torchvision's module as it is."""
    features: Tensor = backbone.cnn(normalise(frames, IMAGENET.mean, IMAGENET.std))
    return features


def with_statistics(backbone: CnnBackbone, pixels: Tensor | None = None) -> CnnBackbone:
    """Give the batch norms of a random CNN the statistics of pixels, without which all features are alike.

    `pixels` (n, 3, S, S) are normalised; the default is noise.
    """
    norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    usual = norms[0].momentum
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        backbone.cnn(torch.randn(8, 3, 64, 64) if pixels is None else pixels)
    for norm in norms:
        norm.momentum = usual
    return backbone.eval()
