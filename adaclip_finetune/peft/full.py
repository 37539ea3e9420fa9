"""Full finetuning: everything learns that `freeze_layer_num` and `freeze_clip` do not freeze, of one tower or both."""

from __future__ import annotations

from torch import nn

from adaclip_finetune.config.choices.peft import FullSettings
from adaclip_finetune.peft.base import PeftMethod, clip_of, learning


class FullFinetuning(PeftMethod):
    """Trains the parameters of the chosen towers, and the logit scale and bias, which belong to neither."""

    settings: FullSettings

    def choose(self, model: nn.Module) -> None:
        if self.settings.towers == "both":
            return
        for name, parameter in learning(clip_of(model)):
            tower = "image" if name.startswith("visual.") else "text"
            parameter.requires_grad_(tower == self.settings.towers or name.startswith("logit_"))
