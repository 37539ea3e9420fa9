"""Forward and backward of attention whose weights are frozen, as PyTorch has it and as `open_model` sets it up.

    OMP_NUM_THREADS=1 python scripts/bench/attention.py

One `nn.MultiheadAttention` of ViT-B/32 on 8 images of 50 tokens, with a bias that learns as in BitFit. Times are
processor times, the shortest of 6 in turns; gradients of the input are compared first.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

from adaclip_finetune.model.attention import speed_up_frozen_attention


def main() -> None:
    """Print the times in ms of both, in both precisions, with frozen weights and with weights that learn."""
    torch.manual_seed(0)
    tokens = torch.randn(8, 50, 768)
    for dtype in (torch.float32, torch.bfloat16):
        for learns in (False, True):
            plain = nn.MultiheadAttention(768, 12, batch_first=True).to(dtype).requires_grad_(learns)
            plain.in_proj_bias.requires_grad_(True)
            ours = copy.deepcopy(plain)
            speed_up_frozen_attention(ours)
            torch.testing.assert_close(gradient(plain, tokens), gradient(ours, tokens), atol=1e-2, rtol=1e-2)
            seconds: dict[str, list[float]] = {"PyTorch": [], "ours": []}
            for _ in range(6):
                for name, module in (("PyTorch", plain), ("ours", ours)):
                    started = time.process_time()
                    gradient(module, tokens)
                    seconds[name].append(time.process_time() - started)
            found = ", ".join(f"{name} {1000 * min(times):.1f} ms" for name, times in seconds.items())
            print(f"{dtype}, weights {'learn' if learns else 'frozen'}: {found}")


def gradient(module: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Return the gradient of the summed output with respect to the tokens."""
    x = tokens.to(module.in_proj_weight.dtype, copy=True).requires_grad_()
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert x.grad is not None
    return x.grad


if __name__ == "__main__":
    main()
