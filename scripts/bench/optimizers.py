"""What one update of each optimizer costs on a CPU, beside PyTorch's AdamW as it is.

    OMP_NUM_THREADS=1 python scripts/bench/optimizers.py

51 million parameters in tensors like those of CLIP's text tower, random gradients; processor time, in turns.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from adaclip_finetune.training.optimizer import BertAdam, ClipVipAdamW

TURNS = 9


def main() -> None:
    torch.manual_seed(0)
    shapes = [(49408, 512), *[(512, 2048)] * 24, *[(512,)] * 120]
    parameters = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    betas = (0.9, 0.98)
    optimizers: dict[str, Optimizer] = {
        "PyTorch's AdamW, not fused": AdamW(parameters, 1e-4, betas, fused=False),
        "adamw": AdamW(parameters, 1e-4, betas, fused=True),
        "clip_vip_adamw": ClipVipAdamW(parameters, 1e-4, betas, 1e-6),
        "bertadam": BertAdam(parameters, 1e-4, betas, 0.2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(TURNS + 1):
        for name, optimizer in optimizers.items():
            began = time.process_time()
            optimizer.step()
            if turn:  # the first one makes the moments
                seconds[name].append(time.process_time() - began)
    for name, found in seconds.items():
        print(f"{name:28}{1000 * statistics.median(found):6.0f} ms")


if __name__ == "__main__":
    main()
