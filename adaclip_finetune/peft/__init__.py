"""Parameter-efficient finetuning: where a settings class of config/choices.py meets the method that it configures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from adaclip_finetune.config import BitFitSettings, Config, FullSettings, IbsSettings
from adaclip_finetune.peft.base import PeftMethod
from adaclip_finetune.peft.bitfit import BitFit
from adaclip_finetune.peft.freezing import apply_freezing
from adaclip_finetune.peft.full import FullFinetuning
from adaclip_finetune.peft.ibs import ImportanceSelection
from adaclip_finetune.peft.report import TrainableReport, trainable_report

__all__ = ["METHODS", "PeftMethod", "TrainableReport", "apply_freezing", "prepare_peft", "trainable_report"]

METHODS: Mapping[type, Callable[[Any], PeftMethod]] = MappingProxyType(
    {
        FullSettings: FullFinetuning,
        BitFitSettings: BitFit,
        IbsSettings: ImportanceSelection,
    }
)


def prepare_peft(model: nn.Module, config: Config) -> PeftMethod:
    """Freeze what the config freezes in `model.clip`, then let the configured method choose what learns.

    Call it with pretrained weights in place, before the optimizer and before any wrapper.
    """
    apply_freezing(model.get_submodule("clip"), config.freeze_layer_num, config.freeze_clip)
    method = METHODS[type(config.peft.config)](config.peft.config)
    method.prepare(model)
    return method
