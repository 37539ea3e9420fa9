"""Sequences whose items are made when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T], ABC):
    """A sequence of which a subclass gives the length and single items; slices are lists."""

    @abstractmethod
    def _row(self, index: int) -> T:
        """Return the item at `index`, from 0 to len(self) - 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        numbers = range(len(self))[index]  # raises IndexError
        return self._row(numbers) if isinstance(numbers, int) else [self._row(number) for number in numbers]
