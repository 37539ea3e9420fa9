"""Every setting of a run, and how a config is read: defaults, below a file, below flags. Torch-free."""

from adaclip_finetune.config.choices import BitFitSettings, FullSettings, IbsSettings, MethodSettings, Peft, PeftChoice
from adaclip_finetune.config.settings import (
    AggregationSettings,
    Config,
    DataSettings,
    DeviceSettings,
    FrameSettings,
    ModelSettings,
    OptimisationSettings,
    PeftGroup,
    RunSettings,
    SearchGroup,
    SelectionSettings,
    contradictions,
    load_config,
)

__all__ = [
    "AggregationSettings",
    "BitFitSettings",
    "Config",
    "DataSettings",
    "DeviceSettings",
    "FrameSettings",
    "FullSettings",
    "IbsSettings",
    "MethodSettings",
    "ModelSettings",
    "OptimisationSettings",
    "Peft",
    "PeftChoice",
    "PeftGroup",
    "RunSettings",
    "SearchGroup",
    "SelectionSettings",
    "contradictions",
    "load_config",
]
