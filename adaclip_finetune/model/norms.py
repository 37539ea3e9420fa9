"""Layer norms in which only the weight or only the bias learns.

On CUDA, PyTorch's fused backward pass of such a norm loses the bias's gradient from 65,536 rows on (pytorch pull
requests 192016 and 193016), and training ends with "NativeLayerNormBackward0 returned an invalid gradient". A norm
without bias, plus the bias, has the same values and correct gradients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import Tensor, nn

_MANY_ROWS = 65_536


def split_frozen_norms(module: nn.Module) -> None:
    """Make every layer norm of `module` add its bias separately when PyTorch would lose a gradient.

    That is in training on CUDA, with many rows, if either the weight or the bias is frozen.
    """
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and not isinstance(part, _Split):
            part.__class__ = _split_class(cast(Hashable, type(part)))


def norm_plus_bias(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Return `norm(x)`, computed as a norm without bias plus the bias."""
    wide = x.float() if isinstance(norm, LayerNormFp32) else x
    out = F.layer_norm(wide, norm.normalized_shape, norm.weight, None, norm.eps)
    return (out + norm.bias).to(x.dtype if isinstance(norm, LayerNorm | LayerNormFp32) else out.dtype)


class _Split(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return norm_plus_bias(self, input) if input.is_cuda and self.loses_a_gradient(input) else super().forward(input)

    def loses_a_gradient(self, x: Tensor) -> bool:
        """Return whether PyTorch's fused backward pass would lose a gradient for this input on CUDA."""
        if self.weight is None or self.bias is None or not torch.is_grad_enabled():
            return False
        rows = x.numel() // math.prod(self.normalized_shape)
        return rows >= _MANY_ROWS and self.weight.requires_grad != self.bias.requires_grad


@cache
def _split_class(kind: Any) -> Any:
    """Return a subclass of a layer norm's class, with the same name."""
    return type(kind.__name__, (_Split, kind), {})
