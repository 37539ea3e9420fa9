"""Training objectives, one in each file, chosen by the setting `objective`."""

from __future__ import annotations

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.config.choices.objectives import OBJECTIVES
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Objective
from adaclip_finetune.objectives.contrastive import Contrastive
from adaclip_finetune.objectives.sigmoid import Sigmoid

__all__ = ["Objective", "build_objective"]


def build_objective(config: Config, retriever: VideoRetriever) -> Objective:
    """Return the objective that the config names.

    The default is what the CLIP was trained with: `sigmoid` for towers with a `logit_bias` (SigLIP), `contrastive` for
    others.
    """
    if config.objective is not None:
        chosen: Objective = implementation(OBJECTIVES, config.objective)(config.objective.config, retriever)
        return chosen
    default = Contrastive if retriever.scorer.logit_bias() is None else Sigmoid
    return default(default.settings_class(), retriever)
