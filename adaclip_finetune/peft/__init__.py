"""Parameter-efficient finetuning: a file a method, which `config.choices.PEFT` names."""

from __future__ import annotations

from torch import nn

from adaclip_finetune.config import PEFT, Config, implementation
from adaclip_finetune.peft.base import PeftMethod
from adaclip_finetune.peft.freezing import apply_freezing
from adaclip_finetune.peft.report import TrainableReport, trainable_report

__all__ = ["PeftMethod", "TrainableReport", "apply_freezing", "prepare_peft", "trainable_report"]


def prepare_peft(model: nn.Module, config: Config) -> PeftMethod:
    """Freeze what the config freezes in `model.clip`, then let the configured method choose what learns.

    Call it with pretrained weights in place, before the optimizer and before any wrapper.
    """
    apply_freezing(model.get_submodule("clip"), config.freeze_layer_num, config.freeze_clip)
    method: PeftMethod = implementation(PEFT, config.peft)(config.peft.config)
    method.prepare(model)
    return method
