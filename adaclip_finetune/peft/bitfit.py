"""BitFit: only biases learn (Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning")."""

from __future__ import annotations

import logging

from torch import nn

from adaclip_finetune.config import BitFitSettings
from adaclip_finetune.peft.base import PeftMethod, clip_of, holds_keyword, learning, warn_of_idle_keywords
from adaclip_finetune.weights.plain import plain_name

_log = logging.getLogger(__name__)
_FEW = 0.1  # percent


class BitFit(PeftMethod):
    """Trains `*.bias`, names with a keyword and, with `include_qkv_bias`, the fused biases of q, k and v."""

    settings: BitFitSettings

    def choose(self, model: nn.Module) -> None:
        clip = clip_of(model)
        warn_of_idle_keywords(clip, self.settings.keep_module_keywords)
        sizes = {name: parameter.numel() for name, parameter in clip.named_parameters() if "logit" not in name}
        biases = 100 * sum(size for name, size in sizes.items() if name.endswith("bias")) / sum(sizes.values())
        if biases < _FEW:
            _log.warning(
                "peft bitfit: only %.3f %% of this CLIP's parameters are biases; peft lora or ssf can change more",
                biases,
            )
        for name, parameter in learning(clip):
            parameter.requires_grad_(self._learns(plain_name(name) or ""))

    def _learns(self, name: str) -> bool:
        # OpenAI's fused biases are called `in_proj_bias`, without the dot, so the published rule leaves them out.
        fused = self.settings.include_qkv_bias and name.endswith("in_proj_bias")
        return fused or name.endswith(".bias") or holds_keyword(name, self.settings.keep_module_keywords)
