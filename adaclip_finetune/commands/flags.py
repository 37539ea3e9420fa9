"""Command-line flags generated from a settings class: one per setting, nested ones with dots, grouped in `--help`.

argparse only splits the command line. The schema decides what a word means (`16` is a number, `true` a boolean, `none`
null), and flags are validated together with the config file, so that both give the same error messages.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from adaclip_finetune.config.base import Settings
from adaclip_finetune.config.layers import nearest
from adaclip_finetune.config.schema import Node, Schema, schema_of
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags that raises UserError instead of exiting."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None):
        super().__init__(prog=prog, description=description, usage=usage, epilog=epilog, allow_abbrev=False)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the command line. Raises UserError for unknown flags and stray words."""
        namespace, rest = self.parse_known_args(list(words))
        flags = [word.split("=", 1)[0] for word in rest if word.startswith("-") and word.strip("-")]
        known = [option for action in self._actions for option in action.option_strings]
        if flags:
            raise UserError("\n".join(f"unknown flag {flag}; did you mean {nearest(flag, known)}?" for flag in flags))
        if rest:
            way_out = " (a settings file is given as --config FILE)" if "--config" in known else ""
            raise UserError(f"unexpected argument: {' '.join(rest)}{way_out}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the message of argparse."""
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser, settings: type[Settings]) -> None:
    """Add a flag for every setting, grouped by the base class that declares it (its docstring is the title)."""
    schema, nodes = schema_of(settings), schema_of(settings).paths()
    for base in reversed(settings.__bases__):
        group = parser.add_argument_group(f"{base.__doc__}")
        for path in nodes:
            if path.split(".")[0] in base.__annotations__:
                _add_flag(group, path, nodes[path], schema)


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return dotted name → value of the settings flags that were given."""
    overrides: dict[str, Any] = getattr(namespace, "overrides", {})
    return overrides


class _Override(argparse.Action):
    """Store the words of a flag as the value of a setting."""

    def __init__(self, nodes: list[Node], schema: Schema, **options: Any):
        super().__init__(default=argparse.SUPPRESS, **options)
        self.nodes, self.schema = nodes, schema

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if not hasattr(namespace, "overrides"):
            namespace.overrides = {}
        words = ["false"] if self.nargs == 0 else [values] if isinstance(values, str) else values
        namespace.overrides[self.dest] = _value(words, self.nodes, self.schema, f"--{self.dest}")


def _add_flag(group: Any, path: str, nodes: list[Node], schema: Schema) -> None:
    kinds = {option.get("type") for node in nodes for option in schema.alternatives(node)}
    how: dict[str, Any] = {"action": _Override, "dest": path, "nodes": nodes, "schema": schema}
    if kinds == {"boolean"}:
        group.add_argument(
            f"--{path}", nargs="?", const="true", metavar="true|false", help=_help(path, nodes, schema), **how
        )
        *above, name = path.split(".")
        if not name.startswith("no_"):
            off = ".".join([*above, f"no_{name.removeprefix('use_')}"])
            default_on = nodes[0].get("default") is True
            group.add_argument(
                f"--{off}", nargs=0, help=f"the same as --{path} false" if default_on else argparse.SUPPRESS, **how
            )
    else:
        nargs = "+" if kinds == {"array"} else None
        group.add_argument(
            f"--{path}",
            nargs=nargs,
            metavar=_metavar(kinds, path, nodes, schema),
            help=_help(path, nodes, schema),
            **how,
        )


def _metavar(kinds: set[str | None], path: str, nodes: list[Node], schema: Schema) -> str:
    if kinds == {"object"}:
        return "JSON" if "." in path else "FILE"
    if kinds == {"array"}:
        items = [option.get("prefixItems", [option.get("items")])[0] for option in schema.alternatives(nodes[0])]
        kinds = {item.get("type") for item in items}
    unit = str(nodes[0].get("unit", ""))
    if unit.startswith(("file", "folder")):
        return {"file": "FILE", "folder": "DIR"}.get(unit, "PATH")
    return {"integer": "N", "number": "X"}.get(next(iter(kinds)) or "", "NAME")


def _help(path: str, nodes: list[Node], schema: Schema) -> str:
    node, unit = nodes[0], str(nodes[0].get("unit", ""))
    kinds = {option.get("type") for option in schema.alternatives(node)}
    facts = [f"for {', '.join(owners)}"] if (owners := schema.owners(path)) else []
    if kinds == {"object"}:
        facts += ["a JSON object" if "." in path else "a JSON file with this section alone"]
    elif kinds != {"boolean"} and not (unit.startswith(("file", "folder")) and "allowed" not in node):
        facts += [re.sub(r" from (-?\d+) to \d{4,}", r" >= \1", schema.words(*nodes))] + (
            [f"unit: {unit}"] if unit and "allowed" not in node else []
        )
    if "default" in node and ("." not in path or kinds != {"object"}):
        facts += [f"default: {_shown(node['default'])}"]
    return f"{node.get('description', '')} [{'; '.join(facts)}]".replace("%", "%%")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "[]"
    return value if isinstance(value, str) else json.dumps(value)


def _value(words: list[str], nodes: list[Node], schema: Schema, flag: str) -> Any:
    """Return the value of the words of a flag. Words that fit no type stay text, which validation refuses."""
    options = [option for node in nodes for option in schema.alternatives(node)]
    if len(words) == 1 and words[0].lower() in ("none", "null") and any(map(schema.nullable, nodes)):
        return None
    if len(words) == 1 and words[0].startswith(("[", "{")) and any(o["type"] in ("array", "object") for o in options):
        return parse_json(words[0], flag)
    for option in options:
        if option["type"] == "array":
            items = option.get("prefixItems", [option.get("items", {})])
            return [_value([word], [items[min(i, len(items) - 1)]], schema, flag) for i, word in enumerate(words)]
    read = [_READERS.get(option["type"], str)(words[0]) for option in options]
    return next((value for value in read if not isinstance(value, str)), words[0])


def _boolean(word: str) -> bool | str:
    return {"true": True, "false": False}.get(word.lower(), word)


def _number(word: str) -> float | str:
    if re.fullmatch(r"[+-]?\d{1,400}", word, re.ASCII):
        return int(word)
    return float(word) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.ASCII | re.IGNORECASE) else word


_READERS = {"boolean": _boolean, "integer": _number, "number": _number}
