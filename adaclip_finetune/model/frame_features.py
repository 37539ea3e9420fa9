"""Backbones: cheap features of each candidate frame, which the selector scores (the policy of AdaCLIP, Hu et al. 2023).

Each backbone says in `view` how the reader must prepare frames for it; None means that it takes CLIP's own frames.

`frame_mask` (B, N) is False for the padding frames of `num_frm_subset`, which are zero after normalisation.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.ops.misc import Conv2dNormActivation

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import IMAGENET, ImageSpec, normalise
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.weights.clip_weights import read_state_dict
from adaclip_finetune.weights.plain import plain_copy, strict_load


class RawBackbone(nn.Module):
    """Takes the pixels of grey thumbnails as features: uint8 (B, N, 1, P, P) → (B, N, P²) in 0…1."""

    def __init__(self, rescale_size: int) -> None:
        super().__init__()
        self.view = ImageSpec(rescale_size, (0.0,), (1.0,), resize_mode="squash", grey=True)
        self.feature_dim = rescale_size**2

    def forward(self, policy_frames: Tensor, frame_mask: Tensor, dtype: torch.dtype) -> Tensor:
        return policy_frames.flatten(2).to(dtype) / 255 * frame_mask[..., None]


class CnnBackbone(nn.Module):
    """Computes the pooled features of a torchvision CNN: uint8 (B, N, 3, size, size) → (B, N, F).

    A frozen CNN (`freeze_cnn`) stays in evaluation mode, so that its batch statistics do not change either. Where
    nothing of the CNN changes, a copy of it with folded batch norms computes the same features in half the time; the
    copy belongs to no state dict.
    """

    _frames_at_once = 512  # limits the memory of activations

    _copy: tuple[object, nn.Module] | None = None  # in a tuple, so that it is no submodule

    def __init__(self, name: str, weights: str, frozen: bool, size: int = IMAGENET.size) -> None:
        super().__init__()
        # As much of the frame as with ImageNet's 224 of 256 pixels.
        self.view = replace(IMAGENET, size=size, resize_to=round(size * 256 / 224))
        self.cnn, self.feature_dim = _without_classifier(name, _torchvision_model(name, weights))
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> CnnBackbone:
        super().train(mode and not self.frozen)
        return self

    def forward(self, policy_frames: Tensor, frame_mask: Tensor, dtype: torch.dtype) -> Tensor:
        frames, mask = policy_frames.flatten(0, 1), frame_mask.flatten()[:, None, None, None]
        if self._may_change():
            return self._features(self.cnn, frames, mask, dtype).reshape(*frame_mask.shape, -1)
        # Convolutions are faster if the channels of a pixel are side by side in memory.
        frames, cnn = frames.contiguous(memory_format=torch.channels_last), self._folded()
        parts = zip(torch.split(frames, self._frames_at_once), torch.split(mask, self._frames_at_once), strict=True)
        features = torch.cat([self._features(cnn, *part, dtype) for part in parts])
        return features.reshape(*frame_mask.shape, -1)

    @staticmethod
    def _features(cnn: nn.Module, frames: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        features: Tensor = cnn(normalise(frames, IMAGENET.mean, IMAGENET.std).to(dtype) * mask)
        return features

    def _may_change(self) -> bool:
        """Return whether parameters learn, or batch norms use the statistics of a batch (as for `adabn`)."""
        learns = any(parameter.requires_grad for parameter in self.cnn.parameters())
        return learns or any(part.training for part in self.cnn.modules() if isinstance(part, _BatchNorm))

    def _folded(self) -> nn.Module:
        """Return a copy of the CNN for inference, made anew if a weight or a statistic has changed since the last call.

        Batch norms are folded into the convolutions, and under autocast its weights have the reduced precision already.
        """
        tensors = list(chain(self.cnn.parameters(), self.cnn.buffers()))
        kind = tensors[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
        state = dtype, [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._copy is None or self._copy[0] != state:
            folded = copy.deepcopy(self.cnn)
            for part in list(folded.modules()):
                for (name, layer), (norm_name, norm) in pairwise(list(part.named_children())):
                    if isinstance(layer, nn.Conv2d) and isinstance(norm, _BatchNorm):
                        setattr(part, name, fuse_conv_bn_eval(layer, norm))
                        setattr(part, norm_name, nn.Identity())
            if kind == "cpu" and dtype == torch.float32:
                _fuse_activations(folded)
            self._copy = state, folded.to(dtype).to(memory_format=torch.channels_last)
        return self._copy[1]


class _ActivatedConvolution(nn.Module):
    """A convolution and its activation in one pass over memory: the operation that `torch.compile` takes on a CPU."""

    def __init__(self, convolution: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.convolution, self.activation = convolution, activation

    def forward(self, x: Tensor) -> Tensor:
        own = self.convolution
        places = own.padding, own.stride, own.dilation, own.groups
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, own.weight, own.bias, *places, self.activation, [], "")
        return out


def _fuse_activations(cnn: nn.Module) -> None:
    """Join each convolution, whose norm is folded, and the activation behind it, if this PyTorch can do so."""
    names = {nn.ReLU: "relu", nn.Hardswish: "hardswish"}
    for part in [part for part in cnn.modules() if isinstance(part, Conv2dNormActivation)] if _can_fuse() else []:
        if (name := names.get(type(part[-1]))) is not None:
            part[0], part[-1] = _ActivatedConvolution(part[0], name), nn.Identity()


@cache
def _can_fuse() -> bool:
    """Return whether the operation, which is not part of PyTorch's public interface, exists and computes this."""
    with torch.random.fork_rng(devices=[]):
        convolution, pixels = nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2)
    try:
        with torch.no_grad():
            found = _ActivatedConvolution(convolution, "hardswish")(pixels)
            return torch.allclose(found, nn.functional.hardswish(convolution(pixels)), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return False


class FrozenClipBackbone(nn.Module):
    """Encodes frames by a frozen copy of the pretrained image tower: normalised pixels (B, N, 3, S, S) → (B, N, D)."""

    view = None

    def __init__(self, clip: nn.Module, width: int) -> None:
        super().__init__()
        self.visual = plain_copy(clip.get_submodule("visual")).requires_grad_(False).eval()
        self.feature_dim = width

    def train(self, mode: bool = True) -> FrozenClipBackbone:
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return encode_images(self, pixels.flatten(0, 1)).reshape(*pixels.shape[:2], -1)


Backbone = RawBackbone | CnnBackbone | FrozenClipBackbone


def build_backbone(config: Config, clip: nn.Module, width: int) -> Backbone | None:
    """Return the backbone that `policy_backbone` names; None for `clip`, whose features are the frame embeddings."""
    if config.policy_backbone == "raw":
        return RawBackbone(config.rescale_size)
    if config.policy_backbone == "frozen_clip":
        return FrozenClipBackbone(clip, width)
    if config.policy_backbone == "clip":
        return None
    return CnnBackbone(config.policy_backbone, config.policy_weights, config.freeze_cnn, config.policy_size)


def _without_classifier(name: str, cnn: Any) -> tuple[nn.Module, int]:
    """Return the CNN without its classifier, and the number of features that it returns."""
    if name == "resnet50":
        width, cnn.fc = cnn.fc.in_features, nn.Identity()
    elif name == "mobilenet_v2":
        width, cnn.classifier = cnn.classifier[1].in_features, nn.Identity()
    else:
        # MobileNetV3's last hidden layer is pretrained too: its output, activated, is the features.
        cnn.classifier = cnn.classifier[:2]
        width = cnn.classifier[0].out_features
    return cnn, width


def _torchvision_model(name: str, weights: str) -> nn.Module:
    """Return the CNN with the weights that `policy_weights` names: imagenet, random, or a file."""
    try:
        cnn: nn.Module = torchvision.models.get_model(name, weights="DEFAULT" if weights == "imagenet" else None)
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        raise UserError(
            f"policy_weights: torchvision's ImageNet weights of {name} could not be downloaded ({error}).\n"
            "Run once with a network (the weights stay in torch's hub cache, TORCH_HOME); set policy_weights to a "
            "file with these weights, or to random; or choose a policy_backbone that needs none (raw, clip, "
            "frozen_clip)."
        ) from error
    if weights not in ("imagenet", "random"):
        strict_load(cnn, read_state_dict(Path(weights)), f"policy_weights: {weights}")
    return cnn
