"""Questions to the JSON Schema of a settings class: what stands where, and what is allowed there, in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from adaclip_finetune.config.base import Settings

Node = dict[str, Any]


class Schema:
    """The JSON Schema of one settings class; a node is one of its parts, as a plain dict."""

    def __init__(self, settings: type[Settings]):
        self.root: Node = settings.model_json_schema()
        self._defs: Node = self.root.get("$defs", {})

    def resolve(self, node: Node) -> Node:
        """The node itself, where it is a reference; what is said beside the reference wins."""
        while "$ref" in node:
            beside = {key: value for key, value in node.items() if key != "$ref"}
            node = self._defs[node["$ref"].removeprefix("#/$defs/")] | beside
        return node

    def alternatives(self, node: Node) -> list[Node]:
        """The types a value may have, null apart: one for nearly all settings, several for a choice of methods."""
        node = self.resolve(node)
        options: list[Node] = node.get("oneOf") or node.get("anyOf") or []
        if not options:
            return [] if node.get("type") == "null" else [node]
        return [alternative for option in options for alternative in self.alternatives(option)]

    def nullable(self, node: Node) -> bool:
        """Whether null is allowed."""
        return {"type": "null"} in self.resolve(node).get("anyOf", [])

    def is_section(self, node: Node) -> bool:
        """Whether the value is an object, not a single value."""
        return all(option.get("type") == "object" for option in self.alternatives(node))

    def children(self, node: Node) -> dict[str, list[Node]]:
        """Name -> node under that name in each alternative that knows it, each one once."""
        found: dict[str, list[Node]] = {}
        for option in self.alternatives(node):
            for name, child in option.get("properties", {}).items():
                known = found.setdefault(name, [])
                if child not in known:
                    known.append(child)
        return found

    def locate(self, steps: Sequence[str | int]) -> tuple[tuple[str | int, ...], list[Node]]:
        """The steps of a pydantic error without the tags of unions, and the nodes there (none: no such setting)."""
        nodes, named = [self.root], list[str | int]()
        for step in steps:
            options = [option for node in nodes for option in self.alternatives(node)]
            tagged = [ref for node in nodes if (ref := self._choices(node).get(step)) is not None]
            if tagged:
                nodes = [{"$ref": ref} for ref in tagged]
                continue
            named.append(step)
            nodes = [child for option in options if (child := _child(option, step)) is not None]
        return tuple(named), nodes

    def paths(self) -> dict[str, list[Node]]:
        """Dotted name -> nodes of every setting and every section, in the order of declaration."""
        found: dict[str, list[Node]] = {}

        def descend(prefix: str, nodes: list[Node]) -> None:
            for node in nodes:
                for name, children in self.children(node).items():
                    known = found.setdefault(prefix + name, [])
                    known += [child for child in children if child not in known]
                    descend(f"{prefix}{name}.", [child for child in children if self.is_section(child)])

        descend("", [self.root])
        return found

    def tag(self, node: Node) -> str | None:
        """The name of the key that chooses among the alternatives of a section (`method`), if there is one."""
        name: str | None = self._discriminator(node).get("propertyName")
        return name

    def _choices(self, node: Node) -> dict[str | int, str]:
        """What may be chosen there by name -> reference to its node; empty where nothing is."""
        choices: dict[str | int, str] = self._discriminator(node).get("mapping", {})
        return choices

    def _discriminator(self, node: Node) -> Node:
        """That of the node, or of the one alternative beside null."""
        node = self.resolve(node)
        options = [option for option in (node, *node.get("anyOf", [])) if "discriminator" in option]
        found: Node = options[0]["discriminator"] if options else {}
        return found

    def owners(self, path: str) -> list[str]:
        """Which choices of a section's alternatives know a nested setting: `peft.config.metric` is of ibs."""
        section, *rest = path.split(".")
        mapping = self._choices(self.root["properties"][section])
        owners = [str(tag) for tag in mapping if self.locate([section, tag, *rest])[1]]
        return owners if len(owners) < len(mapping) else []

    def words(self, *nodes: Node) -> str:
        """What is allowed, as it stands in help and in errors: `a whole number >= 1`, `one of uniform, random`."""
        if len(nodes) != 1:
            constants = [node["const"] for node in map(self.resolve, nodes) if "const" in node]
            all_constant = constants and len(constants) == len(nodes)
            return (
                self.words({"enum": constants}) if all_constant else " or ".join(dict.fromkeys(map(self.words, nodes)))
            )
        node = self.resolve(nodes[0])
        text = node.get("allowed") or " or ".join(dict.fromkeys(self._words(o, node) for o in self.alternatives(node)))
        return f"{text}, or null" if self.nullable(node) else text

    def _words(self, node: Node, outer: Node) -> str:
        kind, unit = node.get("type"), outer.get("unit", "")
        if "enum" in node or "const" in node:
            choices = node.get("enum", [node.get("const")])
            return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
        if kind == "boolean":
            return "true or false"
        if kind in ("integer", "number"):
            return ("a whole number" if kind == "integer" else "a number") + _range(node)
        if kind == "array":
            items = node.get("prefixItems", [node.get("items", {})])
            count = f"{len(items)} values" if "prefixItems" in node else "a list"
            return f"{count}, each {self.words(items[0])}"
        if kind == "object":
            names = ", ".join(node.get("properties", {}))
            return f"an object with {names}" if names else "an object"
        return f"the path of a {unit}" if unit.startswith(("file", "folder")) else "text"


@cache
def schema_of(settings: type[Settings]) -> Schema:
    """The schema of a settings class, made once."""
    return Schema(settings)


def show(value: object) -> str:
    """A value as it would stand in JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, TypeError, RecursionError):  # numbers of thousands of digits, keys that are no text, depth
        text = f"<{type(value).__name__}, too long to show>"
    return text if len(text) <= 80 else text[:77] + "..."


def _child(option: Node, step: str | int) -> Node | None:
    if isinstance(step, int):
        items: list[Node] = option.get("prefixItems", [])
        return items[step] if step < len(items) else option.get("items")
    child: Node | None = option.get("properties", {}).get(step)
    rest = option.get("additionalProperties")
    return child if child is not None or not isinstance(rest, dict) else rest


def _range(node: Node) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f" {sign} {node[key]:g}" if node[key] < 1e6 else f" {sign} {node[key]}"
        for key, sign in signs.items()
        if key in node
    ]
    return " and".join(bounds)
