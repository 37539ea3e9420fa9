"""Full finetuning: everything learns that `freeze_layer_num` and `freeze_clip` do not freeze."""

from __future__ import annotations

from adaclip_finetune.peft.base import PeftMethod


class FullFinetuning(PeftMethod):
    """The base method, unchanged."""
