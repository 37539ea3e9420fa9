"""A package is imported without some of the packages that it imports, which are imported when they are first used."""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import new_class

import pytest

from adaclip_finetune.deferred import import_deferring

FILES = {
    "heavy_library/__init__.py": """
from heavy_library.parts import deeper
class Base: ...
def double(number): return 2 * number
""",
    "heavy_library/parts/__init__.py": "",
    "heavy_library/parts/deeper.py": "from heavy_library.parts.deepest import SIZES",
    "heavy_library/parts/deepest.py": "SIZES = [3]",
    "light_library.py": """
import heavy_library.parts.deeper
from heavy_library import Base, double
from heavy_library.parts.deepest import SIZES
""",
    "hasty_library.py": """
from heavy_library import Base, double
class Derived(Base): ...
import heavy_library
""",
    "odd_library/__init__.py": "from odd_library import early, late",
    "odd_library/early.py": "from heavy_library import double",
    "odd_library/late.py": "from heavy_library import Base; Maybe = Base | None",
    "inner_library.py": """
from heavy_library.parts.deepest import SIZES
import heavy_library.parts.deeper
""",
}


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_library")]:
        del sys.modules[name]


def is_imported() -> bool:
    return any(name.startswith("heavy_library") for name in sys.modules)


@pytest.mark.parametrize(
    "use",
    [
        lambda light: light.double(2) == light.heavy_library.double(2) == 4,
        lambda light: light.heavy_library.parts.deeper.SIZES.index(3) == light.SIZES.index(3) == 0,
        lambda light: isinstance(light.heavy_library.Base(), light.Base) and not isinstance(3, light.Base),
        lambda light: isinstance(new_class("Derived", (light.Base,))(), sys.modules["heavy_library"].Base),
    ],
    ids=["called", "asked for an attribute", "asked for an instance", "derived from"],
)
def test_is_imported_at_first_use(use: Callable[..., bool]) -> None:
    light = import_deferring("light_library", "heavy_library")
    assert not is_imported() and find_spec("heavy_library") is not None
    assert use(light)
    assert is_imported()


def test_use_during_the_import_ends_the_deferring() -> None:
    hasty = import_deferring("hasty_library", "heavy_library")
    assert issubclass(hasty.Derived, sys.modules["heavy_library"].Base)
    assert hasty.heavy_library is sys.modules["heavy_library"] and hasty.double(2) == 4


def test_an_import_that_stand_ins_make_fail_is_repeated_without_any() -> None:
    odd, heavy = import_deferring("odd_library", "heavy_library"), sys.modules["heavy_library"]
    assert odd.late.Base is heavy.Base and odd.early.double is heavy.double


def test_a_package_does_not_get_stand_ins_for_its_own_modules() -> None:
    inner = import_deferring("inner_library", "heavy_library.parts.deepest")
    assert sys.modules["heavy_library.parts.deeper"].SIZES == [3]
    assert inner.SIZES.index(3) == 0


def test_what_is_not_installed_is_missed_as_always() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        import_deferring("no_such_library", "neither_this_library")
    assert find_spec("neither_this_library") is None


def test_what_was_imported_before_is_itself() -> None:
    import heavy_library  # type: ignore[import-not-found]

    assert import_deferring("light_library", "heavy_library").Base is heavy_library.Base
