"""Files of weights that others wrote, read as data: safetensors, torch's pickles, TorchScript. Nothing in them runs."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.weights.torchscript import is_torchscript, read_torchscript

_ASKED_FOR = re.compile(r"GLOBAL (\w[\w.]*)")


def read_untrusted(path: Path) -> Any:
    """What the file holds: tensors by name, or whatever plain containers a torch file has. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_EasyDict, "easydict.EasyDict")]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        # What torch says here advises to run the code in the file.
        asked_for = _ASKED_FOR.search(str(error))
        asks = f" (it asks for {asked_for[1]})" if asked_for else ""
        raise UserError(
            f"{path}: is no state dict and no checkpoint: it cannot be read as safetensors, nor as a torch file of "
            f"tensors, numbers, text and containers of them{asks}. A file that needs code to be read is not opened; "
            "nothing of it was run"
        ) from error


def without_module_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without the `module.` that a wrapper for several devices puts before each."""
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


class _EasyDict:
    """Stands in for easydict.EasyDict, a dict that keeps its items as attributes too.

    torch fills only real dicts, so that is what is made: an OrderedDict, whose attributes may be set as well.
    """

    def __new__(cls, *_: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()
