"""Checkpoints as other systems write them, and files that attack the program that opens them."""

import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

# Entries of OpenAI's files that are not weights.
NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


class EasyDict(dict):
    """A dict that pickles as easydict.EasyDict does, with an attribute for each item."""

    __module__ = "easydict"

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in values.items():
            value = EasyDict(value) if isinstance(value, dict) else value
            self[name] = value
            self.__dict__[name] = value


def write_published(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any], zipped: bool = True) -> Path:
    """Write a published AdaCLIP checkpoint in torch's format, or with `zipped=False` in torch's older one.

    Its settings name the class of a package that is gone when the file is read.
    """
    optimizer = {"state": {0: {"step": 7, "next_m": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {"arch": "AdaCLIP", "epoch": 4, "state_dict": dict(state), "optimizer": optimizer}
    package = ModuleType("easydict")
    package.EasyDict = EasyDict  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"easydict": package}):
        torch.save({**content, "config": EasyDict(settings)}, path, _use_new_zipfile_serialization=zipped)
    return path


class Holder(nn.Module):
    """A module with the given tensors, nested as in their names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in dict.fromkeys(name.split(".")[0] for name in tensors):
            if name in tensors and tensors[name].is_floating_point():
                self.register_parameter(name, nn.Parameter(tensors[name]))
            elif name in tensors:
                self.register_buffer(name, tensors[name])
            else:
                inside = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
                self.add_module(name, Holder(inside))


def write_jit(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write CLIP as OpenAI published it: a TorchScript archive in float16, with three numbers among the tensors."""
    torch.jit.script(Holder({n: t.half() for n, t in state.items()} | NUMBERS)).save(str(path))


class Evil:
    """An object that makes the folder `canary` when the standard library unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def write_evil(path: Path, canary: Path, content: Mapping[str, Any], how: str) -> None:
    """Write `content` with an `Evil` in it: a torch zip, torch's older format, or a pickle of protocol 2 or 4."""
    evil = {**content, "evil": Evil(canary)}
    if how == "zip":
        torch.save(evil, path)
    elif how == "old":
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(evil, protocol=int(how)))
