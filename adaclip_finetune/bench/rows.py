"""The rows of the benchmark: a name, a line of help, and the function that measures it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adaclip_finetune.bench.measure import Measured, Setup


class BenchmarkRow(NamedTuple):
    """A row: `place` is its function, `module:name` in this package, which yields one `Measured` for each case."""

    help: str
    place: str

    def function(self) -> Callable[[Setup], Iterator[Measured]]:
        """Import the function."""
        module, _, name = self.place.partition(":")
        function: Callable[[Setup], Iterator[Measured]] = getattr(
            import_module(f"adaclip_finetune.bench.{module}"), name
        )
        return function


ROWS = {
    "policy": BenchmarkRow("the frozen CNN of the frame selector, beside CLIP", "policy:policy"),
    "step": BenchmarkRow("a training step, beside one that encodes all frames", "step:step"),
    "evaluation": BenchmarkRow("ranks in both directions, beside sorting twice", "evaluation:evaluation"),
    "reading": BenchmarkRow("frames from images and videos, beside Pillow and extraction", "reading:reading"),
    "start": BenchmarkRow("how long commands take to start, beside `import torch`", "starting:start"),
    "search": BenchmarkRow("searching, opening and serving an index, beside a plain product", "searching:search"),
    "embedding": BenchmarkRow("vectors of videos, beside encoding all frames", "embedding:embedding"),
    "demo": BenchmarkRow("cfgs/demo.json as a whole, beside its reading, forward and backward", "demo:demo"),
    "hard_topk": BenchmarkRow("the frame selection, beside a plain loop", "hard_topk:hard_topk"),
}
