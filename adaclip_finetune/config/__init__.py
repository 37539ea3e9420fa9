"""All settings of a run, and loading them from defaults, a JSON file and flags. Does not import torch."""

from adaclip_finetune.config.choices import (
    ADAPTATIONS,
    CAPTIONERS,
    OBJECTIVES,
    PEFT,
    TASKS,
    TOWERS,
    BitFitSettings,
    Choice,
    ChoiceSettings,
    Chosen,
    ContrastiveSettings,
    FullSettings,
    IbsSettings,
    LoraSettings,
    PerFrameSettings,
    SigmoidSettings,
    implementation,
)
from adaclip_finetune.config.settings import Config, load_config

__all__ = [
    "ADAPTATIONS",
    "CAPTIONERS",
    "OBJECTIVES",
    "PEFT",
    "TASKS",
    "TOWERS",
    "BitFitSettings",
    "Choice",
    "ChoiceSettings",
    "Chosen",
    "Config",
    "ContrastiveSettings",
    "FullSettings",
    "IbsSettings",
    "LoraSettings",
    "PerFrameSettings",
    "SigmoidSettings",
    "implementation",
    "load_config",
]
