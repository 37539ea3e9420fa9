"""The model of a run, to be measured and thrown away. Weights that would have to be fetched are random in it."""

from __future__ import annotations

from pathlib import Path

from adaclip_finetune.config import Config
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.session import Session, open_model
from adaclip_finetune.weights.checkpoints import read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip


def build_trial_model(config: Config) -> Session:
    """On its device, with what learns in it in the first epoch. Raises UserError where a run would, downloads aside."""
    session = open_model(config, values="random", accelerator=make_accelerator(config), learn=not config.do_inference)
    session.method.on_epoch_start(0)
    return session


def load_tokenizer(config: Config) -> LoadedClip:
    """The towers of the run as shapes alone, for what they say of texts. Raises UserError.

    They are to be had even where a run is refused since its checkpoint does not fit its settings.
    """
    if config.resume is None:
        return load_clip(config, with_weights=False)
    checkpoint = read_checkpoint(Path(config.resume))
    return load_clip(with_its_clip(checkpoint, config), with_weights=False, from_checkpoint=checkpoint.towers())
