"""An exponential moving average of the weights, which is validated and saved in place of the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


class Ema:
    """Averages what learns in a module, and the statistics of its batch norms: average ← d · average + (1 − d) · live.

    Whatever else the module holds stays as it is. In update t, from 1, d is min(decay, (1 + t) / (10 + t)), as in
    TensorFlow's ExponentialMovingAverage, since the average of a short run would otherwise stay near its start. A decay
    of 0 averages nothing.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Begin with the values that the module has, for the parameters that learn now."""
        self.decay = decay
        named = chain(module.named_parameters(), module.named_buffers()) if decay else ()
        self._live = {name: own for name, own in named if own.requires_grad or name.endswith(_STATISTICS)}
        self._average = {name: own.detach().clone() for name, own in self._live.items()}

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Move the average towards the module, after its update number `t`."""
        if self._live:
            share = 1 - min(self.decay, (1 + t) / (10 + t))
            torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Return the context in which the module has the averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, own in self._live.items():
            live = own.clone()
            own.copy_(self._average[name])
            self._average[name].copy_(live)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged values by the names of the module."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with what `state_dict` returned."""
        for name, average in self._average.items():
            average.copy_(state[name])
