"""Look up settings in the JSON Schema of a settings class, and describe in words which values they accept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from adaclip_finetune.config.base import Settings

Node = dict[str, Any]


class Schema:
    """The JSON Schema of a settings class. A node is a part of it, as a plain dict."""

    def __init__(self, settings: type[Settings]):
        self.root: Node = settings.model_json_schema()
        self._defs: Node = self.root.get("$defs", {})

    def resolve(self, node: Node) -> Node:
        """Follow the references of a node; keys beside a reference override those of its target."""
        while "$ref" in node:
            beside = {key: value for key, value in node.items() if key != "$ref"}
            node = self._defs[node["$ref"].removeprefix("#/$defs/")] | beside
        return node

    def alternatives(self, node: Node) -> list[Node]:
        """Return the types a value may have, except null: one for most settings, several for a choice of methods."""
        node = self.resolve(node)
        options: list[Node] = node.get("oneOf") or node.get("anyOf") or []
        if not options:
            return [] if node.get("type") == "null" else [node]
        return [alternative for option in options for alternative in self.alternatives(option)]

    def nullable(self, node: Node) -> bool:
        """Return whether null is accepted."""
        return {"type": "null"} in self.resolve(node).get("anyOf", [])

    def is_section(self, node: Node) -> bool:
        """Return whether the value is an object rather than a single value."""
        return all(option.get("type") == "object" for option in self.alternatives(node))

    def children(self, node: Node) -> dict[str, list[Node]]:
        """Return name → nodes of that name in all alternatives, without duplicates."""
        found: dict[str, list[Node]] = {}
        for option in self.alternatives(node):
            for name, child in option.get("properties", {}).items():
                known = found.setdefault(name, [])
                if child not in known:
                    known.append(child)
        return found

    def locate(self, steps: Sequence[str | int]) -> tuple[tuple[str | int, ...], list[Node]]:
        """Return the location of a pydantic error without union tags, and its nodes (none for an unknown setting)."""
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
        """Return dotted name → nodes of every setting and section, in the order of declaration."""
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
        """Return the key that chooses among the alternatives of a section (`method`), or None."""
        name: str | None = self._discriminator(node).get("propertyName")
        return name

    def _choices(self, node: Node) -> dict[str | int, str]:
        """Return name → reference of each alternative of a section; empty for other nodes."""
        choices: dict[str | int, str] = self._discriminator(node).get("mapping", {})
        return choices

    def _discriminator(self, node: Node) -> Node:
        """Return the discriminator of the node, or of its only alternative besides null."""
        node = self.resolve(node)
        options = [option for option in (node, *node.get("anyOf", [])) if "discriminator" in option]
        found: Node = options[0]["discriminator"] if options else {}
        return found

    def owners(self, path: str) -> list[str]:
        """Return which choices of a section have a nested setting: `peft.config.metric` → ["ibs"]; all of them → []."""
        section, *rest = path.split(".")
        mapping = self._choices(self.root["properties"][section])
        owners = [str(tag) for tag in mapping if self.locate([section, tag, *rest])[1]]
        return owners if len(owners) < len(mapping) else []

    def words(self, *nodes: Node) -> str:
        """Describe the accepted values: `a whole number from 1 to 4096`, `one of uniform, random`."""
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
    """Return the cached schema of a settings class."""
    return Schema(settings)


def show(value: object) -> str:
    """Return a value as JSON, shortened to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, TypeError, RecursionError):  # very long numbers, keys that are not text, deep nesting
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
    if "minimum" in node and "maximum" in node:
        return f" from {_plain(node['minimum'])} to {_plain(node['maximum'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " and".join(f" {sign} {_plain(node[key])}" for key, sign in signs.items() if key in node)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
