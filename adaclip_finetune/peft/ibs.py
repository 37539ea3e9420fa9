"""Importance-based selection (IBS): everything learns for a few epochs, then only the tensors that changed most.

Publications call it IBS-G if tensors are compared within groups (`normalization`). Tensors that are not retained are
reset to CLIP's pretrained values, so that the result differs from CLIP in the retained ones only.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

from adaclip_finetune.config import IbsSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.peft.base import (
    MethodState,
    PeftMethod,
    Phase,
    clip_of,
    holds_keyword,
    learning,
    warn_of_idle_keywords,
)
from adaclip_finetune.peft.importance import TensorImportance, importance, select_tensors, snapshot


class ImportanceSelection(PeftMethod):
    """Selects among CLIP's learning tensors, except those that `keep_module_keywords` name, which always learn."""

    settings: IbsSettings

    def __init__(self, settings: IbsSettings) -> None:
        super().__init__(settings)
        self._pretrained: dict[str, Tensor] = {}  # candidates before training, on the CPU
        self._rows: list[TensorImportance] = []  # empty until the selection

    def phases(self, num_epochs: int, batch_size: int) -> list[Phase]:
        first = self.settings.num_pre_epochs
        assert first < num_epochs, "the config refuses this"
        return [
            Phase(first, self.settings.pre_batch_size or batch_size, may_be_best=False),
            Phase(num_epochs - first, batch_size),
        ]

    def choose(self, model: nn.Module) -> None:
        """Keep a copy of the pretrained values of the candidates."""
        self._clip = clip_of(model)
        keywords = self.settings.keep_module_keywords
        warn_of_idle_keywords(self._clip, keywords)
        candidates = [(name, tensor) for name, tensor in learning(self._clip) if not holds_keyword(name, keywords)]
        if not candidates:
            raise UserError(
                "peft ibs has nothing to select from: freeze_clip, freeze_layer_num and keep_module_keywords exclude "
                "all tensors of CLIP; change one of them"
            )
        self._candidates = [name for name, _ in candidates]
        self._pretrained = {name: snapshot(parameter) for name, parameter in candidates}

    def on_epoch_start(self, epoch: int) -> bool:
        if epoch < self.settings.num_pre_epochs or self._rows:
            return False
        parameters = dict(self._clip.named_parameters())
        moved = {
            name: (importance(before, parameters[name], self.settings.metric), before.numel())
            for name, before in self._pretrained.items()
        }
        self._rows = select_tensors(moved, self.settings)
        if not self.settings.keep_evolved:
            with torch.no_grad():
                for row in self._rows:
                    if not row.retained:
                        parameters[row.name].copy_(self._pretrained[row.name])
        self._pretrained = {}
        self._freeze_the_rest()
        return True

    def parameter_rows(self) -> list[TensorImportance]:
        """Return the candidates by name, as in `ibs_parameters.csv`; none before the selection."""
        return list(self._rows)

    def changed_parameters(self, model: nn.Module) -> set[str]:
        evolved = self._candidates if self.settings.keep_evolved else []
        return super().changed_parameters(model).union(evolved)

    def state_dict(self) -> MethodState:
        """Return the pretrained values before the selection, and the rows after it."""
        return MethodState(dict(self._pretrained), {"rows": [asdict(row) for row in self._rows]})

    def load_state_dict(self, state: MethodState) -> None:
        self._pretrained = dict(state.tensors)
        self._rows = [TensorImportance(**row) for row in state.values["rows"]]
        if self._rows:
            self._freeze_the_rest()

    def _freeze_the_rest(self) -> None:
        parameters = dict(self._clip.named_parameters())
        for row in self._rows:
            if not row.retained:
                parameters[row.name].requires_grad_(False).grad = None
