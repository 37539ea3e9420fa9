"""Which settings of a checkpoint may be replaced where it is evaluated. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adaclip_finetune.config.roles import names_with

# Evaluation never tunes, fits a batch size or writes into a run folder, whatever the settings of the run say.
AS_IT_IS: Mapping[str, Any] = MappingProxyType(
    {
        "do_inference": True,
        "no_output": True,
        "save_similarity": None,
        "optuna_cfg": None,
        "do_training_af_optuna": False,
        "policy_weights": "random",  # the checkpoint holds the weights of the selector's CNN
    }
)

# These describe how the checkpoint was made; --annot names what it is evaluated on.
_ANNOTATIONS = frozenset({"train_annot", "val_annot", "test_annot"})


def overridable() -> frozenset[str]:
    """Return the names of the settings that may replace those of the checkpoint: where data and CLIP lie, and those of
    the machine."""
    names = names_with("data", "machine") | names_with("model", paths=True)
    return names - _ANNOTATIONS - AS_IT_IS.keys()
