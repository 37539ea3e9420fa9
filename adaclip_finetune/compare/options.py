"""Which settings of a checkpoint may be replaced where it is evaluated. Imports no torch."""

from __future__ import annotations

from typing import Any

from adaclip_finetune.config.roles import names_with

# Evaluation never tunes, fits a batch size or writes into a run folder, whatever the settings of the run say. The
# checkpoint holds the weights of the selector's CNN.
AS_IT_IS: dict[str, Any] = {
    "do_inference": True,
    "no_output": True,
    "tracker": [],
    "tensorboard_dir": None,
    "save_similarity": None,
    "optuna_cfg": None,
    "do_training_af_optuna": False,
    "policy_weights": "random",
}


def overridable() -> frozenset[str]:
    """Return the names of the settings that may replace those of the checkpoint: where data and CLIP lie, and those of
    the machine. The annotations describe how it was made; --annot names what it is evaluated on."""
    names = names_with("data", "machine") | names_with("model", paths=True)
    return names - {"train_annot", "val_annot", "test_annot"} - AS_IT_IS.keys()
