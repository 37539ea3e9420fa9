"""Full finetuning: everything that `freeze_layer_num` and `freeze_clip` leave learns."""

from __future__ import annotations

from adaclip_finetune.config import FullSettings
from adaclip_finetune.peft.base import PeftMethod


class FullFinetuning(PeftMethod):
    """The base as it is."""

    def __init__(self, settings: FullSettings) -> None:
        self.settings = settings
