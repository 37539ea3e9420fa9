"""Intel's extension for PyTorch, where it happens to be installed. XPU works without it (torch.xpu).

It was archived in March 2026; each version fits one version of torch only, and ends the process when imported beside
another. So its version is asked for before it is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

_NAME = "intel_extension_for_pytorch"
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def usable_ipex(device: torch.device, say: Callable[[str], None]) -> ModuleType | None:
    """The extension, if `device` is an XPU and a version that fits torch is installed. Says it if one is there but of
    no use: ask once a run."""
    if device.type != "xpu":
        return None
    try:
        found = version(_NAME)
    except PackageNotFoundError:
        return None
    if _major_minor(found) != _major_minor(torch.__version__):
        say(f"{_NAME} {found} does not fit torch {torch.__version__} and is left unused: XPU works without it")
        return None
    try:
        return importlib.import_module(_NAME)
    except (Exception, SystemExit) as error:
        say(f"{_NAME} {found} cannot be imported and is left unused ({error}): XPU works without it")
        return None


def optimized_for_xpu(
    ipex: ModuleType | None, model: AnyModule, optimizer: Optimizer, say: Callable[[str], None]
) -> tuple[AnyModule, Optimizer]:
    """Model and optimizer as the extension improves them for training, in place; as they are, without it."""
    if ipex is None:
        return model, optimizer
    try:
        improved: tuple[AnyModule, Optimizer] = ipex.optimize(model.train(), optimizer=optimizer, inplace=True)
    except Exception as error:
        say(f"{_NAME} could not optimize the model ({error}); it is trained as it is")
        return model, optimizer
    return improved


def _major_minor(text: str) -> list[str]:
    return text.split(".")[:2]
