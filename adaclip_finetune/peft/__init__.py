"""Parameter-efficient finetuning methods, one in each file, chosen by the setting `peft`."""

from __future__ import annotations

from torch import nn

from adaclip_finetune.config import Config
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.config.choices.peft import PEFT
from adaclip_finetune.peft.base import PeftMethod
from adaclip_finetune.peft.freezing import apply_freezing
from adaclip_finetune.peft.report import TrainableReport, trainable_report
from adaclip_finetune.weights.loaded import has_new_logit_bias

__all__ = ["PeftMethod", "TrainableReport", "build_method", "choose_what_learns", "trainable_report"]


def build_method(config: Config) -> PeftMethod:
    """Return the method that the config names, not attached to a model yet."""
    method: PeftMethod = implementation(PEFT, config.peft)(config.peft.config)
    method.seed = config.seed
    return method


def choose_what_learns(method: PeftMethod, model: nn.Module, config: Config) -> None:
    """Freeze what the config freezes in `model.clip`, then let the method choose what learns among the rest.

    Call it after all weights are loaded, and before the optimizer and any wrapper are built.
    """
    clip = model.get_submodule("clip")
    apply_freezing(clip, config.freeze_layer_num, config.freeze_clip)
    if has_new_logit_bias(clip):  # the objective's, which no method may count among CLIP's own
        clip.get_parameter("logit_bias").requires_grad_(False)
    method.choose(model)
