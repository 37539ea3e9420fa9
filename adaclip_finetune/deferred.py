"""Import a package without some of the packages that it imports; those are imported when they are first used."""

from __future__ import annotations

import sys
from functools import cached_property
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def import_deferring(name: str, *later: str) -> ModuleType:
    """Import a module, and while that lasts give stand-ins to everything that imports from the modules `later`.

    A stand-in imports the module that it stands for when it is called, derived from, or asked for an attribute or an
    instance. One that is used during the import ends the deferring, and what follows is imported as always. If the
    import fails, as for `StandIn | None`, it is repeated without any. Modules that were imported before, or are not
    installed, have no stand-ins.
    """
    absent = [module for module in later if module not in sys.modules and find_spec(module.partition(".")[0])]
    sys.meta_path.insert(0, _Finder(absent))
    sys.modules.update({module: _StandInModule(module) for module in absent})
    before = set(sys.modules)
    try:
        return import_module(name)
    except Exception:
        _stop()
        for imported in sys.modules.keys() - before:
            if imported.startswith(f"{name}."):
                del sys.modules[imported]
        return import_module(name)
    finally:
        _stop()


def _stop() -> None:
    sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandInModule)]:
        del sys.modules[name]


class _Finder:
    """Finds and loads stand-ins for the submodules of some modules.

    It ends the deferring when the package around such a module is imported, which needs the module itself.
    """

    def __init__(self, modules: list[str]) -> None:
        self._modules = modules

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if any(name.startswith(f"{module}.") for module in self._modules):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        if name in {module.rpartition(".")[0] for module in self._modules}:
            _stop()
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandInModule(ModuleType):
    """Stands for a module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks all modules for
            raise AttributeError(name)
        return _StandIn(self.__name__, name)


class _StandIn:
    """Stands for something in a module: a class, a function or a submodule."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    @cached_property
    def _itself(self) -> Any:
        _stop()
        return getattr(import_module(self._module), self._name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._itself(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._itself, name)

    def __instancecheck__(self, thing: object) -> bool:
        return isinstance(thing, self._itself)

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return (self._itself,)
