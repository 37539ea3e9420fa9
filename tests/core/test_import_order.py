"""Imports run downwards only (docs/architecture.md): no cycle, no work at import time, no torch before it is needed."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "adaclip_finetune"
ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# From the top down. The parts of one line do not import each other.
LAYERS = [
    {"cli"},
    {"commands"},
    {"bench", "check"},
    {"compare", "export", "extract", "search", "tuning"},
    {"training"},
    {"report"},
    {"evaluation"},
    {"objectives", "peft"},
    {"model"},
    {"weights"},
    {"data"},
    {"config", "hub"},
    {"strict_json"},
    {"lock", "processes"},
    {"deferred", "durable", "errors", "printable"},
    {"__init__"},
]
HEIGHT = {unit: -depth for depth, units in enumerate(LAYERS) for unit in units}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module or "" for name in inner]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield name if name in MODULES else f"{PACKAGE}.__init__"


def unit(module: str) -> str:
    """Return the folder or file right under the package that a module belongs to."""
    return module.split(".")[1]


def test_every_part_of_the_package_has_its_place() -> None:
    assert {unit(module) for module in MODULES} <= set(HEIGHT), "give the new part a line in LAYERS, and in the docs"


def test_imports_run_downwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, tree in MODULES.items()
        for other in imported(tree)
        if unit(other) != unit(module) and HEIGHT[unit(other)] >= HEIGHT[unit(module)]
    ]
    assert not upwards


def test_no_cycle() -> None:
    graph = {module: set(imported(tree)) - {module} for module, tree in MODULES.items()}
    while free := {module for module, others in graph.items() if not others}:
        graph = {module: others - free for module, others in graph.items() if module not in free}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_only_commands_import_argparse() -> None:
    importing = set()
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and "argparse" in [alias.name for alias in node.names]:
                importing.add(unit(module))
            if isinstance(node, ast.ImportFrom) and node.module == "argparse":
                importing.add(unit(module))
    assert importing == {"commands"}


def test_no_two_classes_have_the_same_name() -> None:
    places = defaultdict(list)
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(module)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_nothing_happens_at_import() -> None:
    """A module only defines things. It calls nothing for its effect and changes no environment or logger."""
    work = [f"{m}, line {node.lineno}" for m, tree in MODULES.items() for node in tree.body if not defines(node)]
    assert not work


def defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        targets = [name for target in node.targets for name in getattr(target, "elts", [target])]
        return all(isinstance(target, ast.Name) for target in targets)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If):  # its body never runs, its `else` always does
        only_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return only_for_types and all(defines(other) for other in node.orelse)
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return isinstance(node, ast.AnnAssign | ast.Import | ast.ImportFrom | functions)


def test_settings_and_commands_do_not_import_torch() -> None:
    code = f"""
import sys, threading
import {PACKAGE}.config, {PACKAGE}.cli
heavy = set(sys.modules) & {{"torch", "torchvision", "open_clip", "numpy", "accelerate", "av", "matplotlib", "optuna"}}
assert not heavy, heavy
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
