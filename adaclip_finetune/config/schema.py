"""What a settings class declares, read from its JSON Schema: dotted names, types, and the accepted values in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from adaclip_finetune.config.base import Settings

Node = dict[str, Any]


@dataclass
class Described:
    """One setting or section. A setting that several methods have, such as `peft.config.rank`, is described once."""

    facts: Node
    """The setting in the JSON Schema (description, unit, default), as the first method declares it."""
    nullable: bool = False
    types: list[Node] = field(default_factory=list)
    """The types that a value may have, except null, as nodes of the JSON Schema."""
    methods: list[str] = field(default_factory=list)
    """The methods that have the setting, if it belongs to only some of the methods of its section."""

    @property
    def kinds(self) -> set[str]:
        """The names of the types, such as {"integer"}."""
        return {str(node.get("type")) for node in self.types}

    @property
    def words(self) -> str:
        """The accepted values, such as `a whole number from 1 to 4096` or `one of uniform, random`."""
        text = self.facts.get("allowed") or _words(self.types, self.facts.get("unit", ""))
        return text + (", or null" if self.nullable else "")


@cache
def described(settings: type[Settings]) -> dict[str, Described]:
    """Return dotted name → description of every setting and section, in the order of declaration."""
    root = settings.model_json_schema()
    found: dict[str, Described] = {}

    def alternatives(node: Node) -> Iterator[Node]:
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
        options = node.get("anyOf") or node.get("oneOf")
        yield from (found for option in options for found in alternatives(option)) if options else [node]

    def descend(prefix: str, section: Node, method: str | None) -> None:
        for name, node in section.get("properties", {}).items():
            one = found.setdefault(prefix + name, Described(node))
            one.methods += [method] if method else []
            for option in alternatives(node):
                if option.get("type") == "null":
                    one.nullable = True
                    continue
                if option not in one.types:
                    one.types.append(option)
                inner = option.get("properties", {}).get("method", {}).get("const", method)
                descend(f"{prefix}{name}.", option, inner)

    descend("", root, None)
    for name, one in found.items():
        parts = name.split(".")
        around = (f"{'.'.join(parts[:end])}.method" for end in range(len(parts) - 1, 0, -1))
        chosen = next((found[section] for section in around if section in found), None)
        if chosen is not None and len(one.methods) == len(chosen.types):  # all methods have it
            one.methods = []
    return found


def show(value: object) -> str:
    """Return a value as JSON, shortened to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, TypeError, RecursionError):  # very long numbers, keys that are not text, deep nesting
        text = f"<{type(value).__name__}, too long to show>"
    return text if len(text) <= 80 else text[:77] + "..."


def _words(types: Sequence[Node], unit: str = "") -> str:
    choices = [choice for node in types for choice in node.get("enum", [node["const"]] if "const" in node else [])]
    texts = [("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))] if choices else []
    texts += [_type_in_words(node, unit) for node in types if "enum" not in node and "const" not in node]
    return " or ".join(dict.fromkeys(texts))


def _type_in_words(node: Node, unit: str) -> str:
    kind = node.get("type")
    if kind == "boolean":
        return "true or false"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(node)
    if kind == "array":
        items = node.get("prefixItems", [node.get("items", {})])
        count = f"{len(items)} values" if "prefixItems" in node else "a list"
        return f"{count}, each {_words(items[:1])}"
    if kind == "object":
        return f"an object with {', '.join(node['properties'])}" if node.get("properties") else "an object"
    return f"the path of a {unit}" if unit.startswith(("file", "folder")) else "text"


def _range(node: Node) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']:.10g} to {node['maximum']:.10g}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " and".join(f" {sign} {node[key]:.10g}" for key, sign in signs.items() if key in node)
