"""What every choice shares: a settings class, a line in a table, and the section of the config that they make.

In a config a choice is a section `{"method": name, "config": {...}}`. The class that a line names is imported when it
is used: these files do not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, create_model

from adaclip_finetune.config.base import Problem, Settings, setting


class ChoiceSettings(Settings):
    """Base class of the settings of a choice."""

    def contradictions(self, config: Any) -> Iterator[Problem]:
        """Yield combinations of these settings with the rest of `config` that are impossible; by default none."""
        yield from ()

    def with_fitting_batches(self, fit: Callable[[int], int]) -> ChoiceSettings:
        """Return a copy in which `fit` has replaced every batch size among these settings (auto_batch_size)."""
        return self


class Chosen(Settings):
    """A section of the config: the name of a choice, and its settings."""

    method: str
    config: ChoiceSettings


class Choice(NamedTuple):
    """A choice: its settings class, and the class it configures as `module:name` below adaclip_finetune."""

    settings: type[ChoiceSettings]
    implementation: str


def implementation(table: Mapping[str, Choice], section: Chosen) -> Any:
    """Import and return the class that `section.method` names."""
    module, name = table[section.method].implementation.split(":")
    return getattr(import_module(f"adaclip_finetune.{module}"), name)


def section_type(table: Mapping[str, Choice], kind: str, help: str) -> Any:
    """Return the type of a section: a union of one class per choice of the table, discriminated by `method`."""
    options = []
    for name, choice in table.items():
        fields: Any = {
            "method": (Literal[name], setting(..., help)),
            "config": (choice.settings, setting({}, "settings of the method")),
        }
        title = choice.settings.__name__.removesuffix("Settings").removesuffix(kind) + kind
        section = create_model(title, __base__=Chosen, __module__=__name__, __doc__=choice.settings.__doc__, **fields)
        globals()[title] = section  # where pickle looks for it when a config is sent to a data loader process
        options.append(section)
    return Annotated[reduce(or_, options), Field(discriminator="method")] if len(options) > 1 else options[0]
