"""The model of a run, to be measured and thrown away. Weights that would have to be fetched are random in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from adaclip_finetune.config import Config
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.checkpoints import Checkpoint, check_settings, read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import build_towers, find_towers, load_clip
from adaclip_finetune.peft import PeftMethod, prepare_peft
from adaclip_finetune.training.checkpoint import fill
from adaclip_finetune.training.device import make_accelerator


@dataclass(frozen=True)
class TrialModel:
    """On its device, with what learns in it in the first epoch."""

    config: Config
    accelerator: Accelerator
    loaded: LoadedClip
    model: VideoRetriever
    method: PeftMethod


def build_trial_model(config: Config) -> TrialModel:
    """Raises UserError where a run would, downloads aside."""
    accelerator = make_accelerator(config)
    config, checkpoint = _with_checkpoint(config)
    if checkpoint is not None and checkpoint.is_foreign:
        check_settings(checkpoint, config)
    weights = checkpoint.towers() if checkpoint else None
    if config.clip_weights is not None or weights is not None:
        loaded = load_clip(config, from_checkpoint=weights)
    else:
        loaded = replace(load_clip(config, with_weights=False), module=build_towers(find_towers(config), "cpu"))
    elsewhere = checkpoint is not None or config.policy_weights == "imagenet"
    model = VideoRetriever(config.model_copy(update={"policy_weights": "random"}) if elsewhere else config, loaded)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if checkpoint is not None:
        fill(model, checkpoint)
    method = prepare_peft(model, config)
    method.on_epoch_start(0)
    return TrialModel(config, accelerator, loaded, model.to(accelerator.device), method)


def load_tokenizer(config: Config) -> LoadedClip:
    """The towers of the run as shapes alone, for what they say of texts. Raises UserError."""
    config, checkpoint = _with_checkpoint(config)
    return load_clip(config, with_weights=False, from_checkpoint=checkpoint.towers() if checkpoint else None)


def _with_checkpoint(config: Config) -> tuple[Config, Checkpoint | None]:
    """The checkpoint of `resume`, and the settings as it completes them."""
    if config.resume is None:
        return config, None
    checkpoint = read_checkpoint(Path(config.resume))
    return with_its_clip(checkpoint, config), checkpoint
