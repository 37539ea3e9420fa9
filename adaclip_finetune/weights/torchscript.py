"""The tensors of a TorchScript archive, as OpenAI published CLIP (Radford et al. 2021), without running what it holds.

Such an archive is a zip of a pickle (`data.pkl`: modules and their attributes), the bytes of the tensors, and the code
of the modules. `torch.jit.load` compiles that code, by a parser that was never meant to face an attacker. Here the code
is not opened: the pickle is read with a stand-in for every name in it, so that nothing it asks for is ever called, and
the tensors are made from the plain tree that comes out.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# Names that describe modules, tensors and typed lists. Any other would be harmless too, but no archive has one.
_EXPECTED = re.compile(r"__torch__\.|torch\.jit\._pickle\.|torch\._utils\._rebuild_|torch\.\w+Storage$|collections\.")
_TENSOR = "torch._utils._rebuild_tensor_v2"
_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive. Raises OSError."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archived module by their dotted names, in the precision of the file.

    Raises OSError, pickle.UnpicklingError or another ValueError, KeyError … for what is no such archive.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        module = _Reader(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        if not _is_module(module):
            raise ValueError(f"{path}: holds no module")
        return {name: _tensor(call, archive, root) for name, call in _tensors(module)}


class _StandIn:
    """What the pickle asked for by `name`: it remembers its arguments and its state, and does nothing."""

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


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if not _EXPECTED.match(full_name):
            raise pickle.UnpicklingError(f"GLOBAL {full_name} has no place in an archive of weights")
        return type("_Named", (_StandIn,), {"name": full_name, "__slots__": ()})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, record, *_ = pid
        return _Storage(_DTYPES[kind.name], record)


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
    # Refuses a view beyond the bytes that are there.
    return values.as_strided(size, stride, offset).clone()
