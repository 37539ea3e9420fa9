"""Full finetuning: everything learns that `freeze_layer_num` and `freeze_clip` do not freeze, of one tower or both."""

from __future__ import annotations

from torch import nn

from adaclip_finetune.config.choices.peft import FullSettings
from adaclip_finetune.peft.base import PeftMethod, clip_of, learning


class FullFinetuning(PeftMethod):
    """Trains the parameters of the chosen towers. What belongs to neither, the logit scale, always learns."""

    settings: FullSettings

    def choose(self, model: nn.Module) -> None:
        other = {"image": "text", "text": "image"}.get(self.settings.towers)
        for name, parameter in learning(clip_of(model)):
            parameter.requires_grad_(tower_of(name) != other)


def tower_of(name: str) -> str | None:
    """Return the tower that a parameter of CLIP belongs to, "image" or "text"; None for logit scale and bias."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"
