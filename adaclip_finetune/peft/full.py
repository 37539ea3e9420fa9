"""Full finetuning: everything that `freeze_layer_num` and `freeze_clip` leave learns."""

from __future__ import annotations

from adaclip_finetune.peft.base import PeftMethod


class FullFinetuning(PeftMethod):
    """The base as it is."""
