"""`learns: norms`: learn the weights and biases of all norms, as in TENT (Wang et al. 2021, "Tent: Fully Test-Time
Adaptation by Entropy Minimization")."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaclip_finetune.peft.base import PeftMethod, clip_of


class Norms(PeftMethod):
    """Learns what layer and batch norms multiply by and add."""

    def choose(self, model: nn.Module) -> None:
        clip = clip_of(model).requires_grad_(False)
        for part in clip.modules():
            if isinstance(part, nn.LayerNorm | _BatchNorm):
                part.requires_grad_(True)
