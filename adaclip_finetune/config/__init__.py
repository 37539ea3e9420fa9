"""All settings of a run, and loading them from defaults, a JSON file and flags. Does not import torch."""

from adaclip_finetune.config.choices.adaptations import ADAPTATIONS
from adaclip_finetune.config.choices.base import Choice, ChoiceSettings, Chosen, implementation
from adaclip_finetune.config.choices.captioners import CAPTIONERS
from adaclip_finetune.config.choices.objectives import OBJECTIVES, ContrastiveSettings, SigmoidSettings
from adaclip_finetune.config.choices.peft import PEFT, BitFitSettings, FullSettings, IbsSettings, LoraSettings
from adaclip_finetune.config.choices.tasks import TASKS
from adaclip_finetune.config.choices.towers import TOWERS, PerFrameSettings
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
