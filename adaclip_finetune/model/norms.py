"""Layer norms of which either the weight or the bias learns, and not both.

On CUDA, PyTorch's fused backward of such a norm loses the bias's gradient from 65,536 rows on (pytorch pull requests
192016 and 193016): training ends with "NativeLayerNormBackward0 returned an invalid gradient". Computed as a norm
without bias, plus the bias, it has the same values and the gradients that it should have.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import Tensor, nn


def split_frozen_norms(module: nn.Module) -> None:
    """Make every layer norm of `module` compute its bias apart while just one of weight and bias learns, on CUDA."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and not isinstance(part, _Split):
            part.__class__ = _split_class(cast(Hashable, type(part)))


def norm_plus_bias(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What `norm` gives for x, its bias being added at the end."""
    wide = x.float() if isinstance(norm, LayerNormFp32) else x
    out = F.layer_norm(wide, norm.normalized_shape, norm.weight, None, norm.eps)
    return (out + norm.bias).to(x.dtype if isinstance(norm, LayerNorm | LayerNormFp32) else out.dtype)


class _Split(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        parts = (self.weight, self.bias)
        one_learns = None not in parts and self.weight.requires_grad != self.bias.requires_grad
        return norm_plus_bias(self, input) if one_learns and input.is_cuda else super().forward(input)


@cache
def _split_class(kind: Any) -> Any:
    """A subclass of a layer norm's class, under its name."""
    return type(kind.__name__, (_Split, kind), {})
