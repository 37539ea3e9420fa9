"""Read files of weights that others wrote, as data: safetensors, torch's files, TorchScript. Nothing in them runs.

A TorchScript archive, the form in which OpenAI published CLIP (Radford et al. 2021), is a zip of a pickle (`data.pkl`:
modules and their attributes), the bytes of the tensors, and the code of the modules. `torch.jit.load` compiles that
code, with a parser that was not made for hostile input. Here the code is not opened: the pickle is read with a stand-in
for every name in it, so that nothing is called, and the tensors are made from the plain tree that results.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from adaclip_finetune.errors import UserError

_ASKED_FOR = re.compile(r"GLOBAL (\w[\w.]*)")
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors
_AGAIN = "copy or download it again"

# Keys under which training programs keep the weights, and what wrappers put in front of each name: DataParallel and
# DistributedDataParallel `module.`, Lightning `model.`. torch.compile puts `_orig_mod.` in front of what it compiled.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")
_COMPILED = "_orig_mod."

# Names in a TorchScript pickle that describe modules, tensors and typed lists; no archive of weights has others.
_EXPECTED = re.compile(r"__torch__\.|torch\.jit\._pickle\.|torch\._utils\._rebuild_|torch\.\w+Storage$|collections\.")
_TENSOR = "torch._utils._rebuild_tensor_v2"


def read_untrusted(path: Path) -> tuple[Any, dict[str, str]]:
    """Return what a file of weights holds (tensors by name, or any plain containers), and its safetensors metadata.

    Raise UserError for a file that is something else, or that is not whole.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if mistaken := _mistaken(path, start):
            raise UserError(f"{path} {mistaken}")
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_EasyDict, "easydict.EasyDict")]):
            warnings.simplefilter("ignore")
            if is_torchscript(path):
                return _read_torchscript(path), {}
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # torch's own message advises to run the code in the file.
        asked_for = _ASKED_FOR.search(str(error))
        asks = f" (it asks for {asked_for[1]})" if asked_for else ""
        raise UserError(
            f"{path} is not a file of weights: it cannot be read as safetensors, nor as a torch file of tensors, "
            f"numbers, text and containers of them{asks}. A file that needs code to be read is not opened; nothing in "
            "it was run"
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


def is_torchscript(path: Path) -> bool:
    """Return whether the file is a TorchScript archive. Raise OSError if it cannot be read."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _mistaken(path: Path, start: bytes) -> str | None:
    """Return what is wrong with a file that is often taken for weights, in words, or None."""
    size = path.stat().st_size
    if size == 0:
        return f"is empty; {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which stands for the weights; fetch them with `git lfs pull` in its repository"
    if start.lstrip()[:1] == b"<":
        return "is a web page, as a download that failed leaves behind; download the file itself"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"is incomplete: it ends after {size:,} bytes, without the directory at the end of a zip; {_AGAIN}"
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= _LONGEST_HEADER:
        with path.open("rb") as file:
            file.seek(8)
            header = file.read(length)
        whole = 8 + length
        if len(header) == length:
            try:
                whole += max(entry["data_offsets"][1] for name, entry in json.loads(header).items() if name[:2] != "__")
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                return None  # safetensors will say what is wrong with it
        if size < whole:
            return f"is incomplete: it has {size:,} of at least {whole:,} bytes; {_AGAIN}"
    return None


class _EasyDict:
    """A stand-in for easydict.EasyDict, a dict that keeps its items as attributes too.

    torch fills only real dicts, so the stand-in makes one: an OrderedDict, whose attributes may be set as well.
    """

    def __new__(cls, *_: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


class _StandIn:
    """An object that a pickle asked for by `name`: it keeps its arguments and its state, and does nothing."""

    __slots__ = ("args", "state")
    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        self = object.__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage(NamedTuple):
    dtype: torch.dtype
    record: str


class _ArchiveUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if not _EXPECTED.match(full_name):
            raise pickle.UnpicklingError(f"GLOBAL {full_name} has no place in an archive of weights")
        return type("_Named", (_StandIn,), {"name": full_name, "__slots__": ()})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, record, *_ = pid
        if not kind.name.endswith("Storage"):
            raise pickle.UnpicklingError(f"GLOBAL {kind.name} is not a storage")
        return _Storage(getattr(torch, kind.name.removeprefix("torch.")).dtype, record)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return parameters and buffers of the archived module by dotted name, in the precision of the file.

    Raise OSError, UnpicklingError, ValueError or KeyError for a file that is not such an archive.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        module = _ArchiveUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        if not _is_module(module):
            raise ValueError("the archive holds no module")
        return {name: _tensor(call, archive, root) for name, call in _tensors(module)}


def _is_module(value: Any) -> bool:
    return isinstance(value, _StandIn) and value.name.startswith("__torch__.") and isinstance(value.state, dict)


def _tensors(module: _StandIn, prefix: str = "") -> Iterator[tuple[str, _StandIn]]:
    for name, value in module.state.items():
        if _is_module(value):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, _StandIn) and value.name == _TENSOR:
            yield prefix + name, value


def _tensor(call: _StandIn, archive: zipfile.ZipFile, root: str) -> Tensor:
    storage, offset, size, stride, *_ = call.args
    raw = bytearray(archive.read(f"{root}/data/{storage.record}"))
    values = torch.frombuffer(raw, dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)
    # as_strided refuses a view beyond the bytes that are there.
    return values.as_strided(size, stride, offset).clone()
