"""Read files of weights that others wrote, as data: safetensors, torch's files, TorchScript. Nothing in them runs.

A TorchScript archive, the form in which OpenAI published CLIP (Radford et al. 2021), is a torch file whose pickle
describes modules, beside the code of the modules. `torch.jit.load` compiles that code, with a parser that was not made
for hostile input. Here the code is left out, and torch's restricted unpickler reads the rest with a stand-in for each
class of modules.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaclip_finetune.errors import UserError

# Keys under which training programs keep the weights, and what wrappers put in front of each name: DataParallel and
# DistributedDataParallel `module.`, Lightning `model.`. torch.compile puts `_orig_mod.` in front of what it compiled.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")
_COMPILED = "_orig_mod."


def read_untrusted(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what a file of weights holds (tensors by name, or any plain containers), and its safetensors metadata.

    Raise UserError for a file that is something else, or that is not whole.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer; fetch the weights with `git lfs pull` in its repository")
        if start.lstrip()[:1] == b"<":
            raise UserError(f"{path} is a web page, as a failed download leaves behind; download the file itself")
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
        with warnings.catch_warnings(), torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
            warnings.simplefilter("ignore")
            if start.startswith(b"PK"):
                with zipfile.ZipFile(path) as archive:
                    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                        return _read_torchscript(archive), {}
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except UserError:
        raise
    except (OSError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read or is incomplete ({error}); copy or download it again") from error
    except Exception as error:  # torch's own message advises to run the code in the file
        raise UserError(
            f"{path} is not a file of weights: it cannot be read as safetensors, nor as a torch file of tensors, "
            "numbers, text and containers of them. A file that needs code to be read is not opened; nothing in it was "
            "run"
        ) from error


def named_tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors by name in the content of a file, without what known wrappers added; {} if there are none."""
    if isinstance(content, dict):
        content = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
    named = content.items() if isinstance(content, dict) else ()
    found = {str(name).replace(_COMPILED, ""): tensor for name, tensor in named if isinstance(tensor, Tensor)}
    while found and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in found)), None)):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


class _Module:
    """A stand-in for every class of modules in a TorchScript archive: a plain object with their attributes."""

    def __init__(self, *_: Any) -> None:
        pass


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return parameters and buffers of the archived module by dotted name, in the precision of the file."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as without_code:
        for name in archive.namelist():
            if "/code/" not in name and not name.endswith("/constants.pkl"):
                without_code.writestr(name, archive.read(name))
    data.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    data.seek(0)
    known = (name for name in names if name.startswith(("__torch__.", "torch.jit._pickle.")))
    with torch.serialization.safe_globals([(_Module, name) for name in known]):
        return dict(_tensors(torch.load(data, map_location="cpu", weights_only=True)))


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value
