"""Adaptations of a model to the queries of an evaluation. One file for each, chosen by the setting `adaptation`."""

from __future__ import annotations

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices.adaptations import ADAPTATIONS
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.evaluation.adaptation.base import Adaptation


def build_adaptation(config: Config) -> Adaptation:
    """Return the adaptation that the config names."""
    adaptation: Adaptation = implementation(ADAPTATIONS, config.adaptation)(config.adaptation.config)
    return adaptation
