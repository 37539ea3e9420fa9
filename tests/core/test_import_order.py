"""Imports run downwards only (docs/architecture.md): no cycle, no work at import time, no torch before it is needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "adaclip_finetune"
ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# From the top down; what stands in one line does not import each other.
LAYERS = [
    {"cli"},
    {"commands"},
    {"check"},
    {"compare", "export", "extract", "search", "tuning"},
    {"training"},
    {"report"},
    {"evaluation"},
    {"objectives", "peft"},
    {"model"},
    {"weights"},
    {"data"},
    {"config"},
    {"strict_json"},
    {"lock", "processes"},
    {"durable", "errors", "printable"},
    {"__init__"},
]
HEIGHT = {unit: -depth for depth, units in enumerate(LAYERS) for unit in units}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported anywhere in a file, inside functions too."""
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
    """The folder or file right under the package."""
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


def test_nothing_happens_at_import() -> None:
    """Files define things: no call for its effect, no loop, no file read, no environment or logger changed."""
    work = [f"{m}, line {node.lineno}" for m, tree in MODULES.items() for node in tree.body if not defines(node)]
    assert not work


def defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        targets = [name for target in node.targets for name in getattr(target, "elts", [target])]
        return all(isinstance(target, ast.Name) for target in targets)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If):  # what stands below it is never run, what stands below its `else` always
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
