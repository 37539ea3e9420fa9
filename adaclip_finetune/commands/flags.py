"""The parser of the commands, flags generated from settings, and the files that a command reads and writes.

argparse only splits the command line. The settings decide what a word means (`16` is a number, `true` a boolean, `none`
null), and flags are validated together with the config file, so that both give the same error messages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from adaclip_finetune.compare.options import overridable
from adaclip_finetune.config import Config
from adaclip_finetune.config.base import Settings
from adaclip_finetune.config.layers import nearest, read_object
from adaclip_finetune.config.schema import Described, described
from adaclip_finetune.config.settings import GROUPS
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import decoded, parse_json

MODEL = ("clip_weights", "device", "precision")
"""The settings of a model that may differ where it searches."""


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


def a_word(word: str) -> str:
    """Return the word. Raise ArgumentTypeError for "", as from a variable that is not set."""
    if not word:
        raise argparse.ArgumentTypeError("is empty")
    return word


def a_path(word: str) -> Path:
    """Return the word as a path. Raise ArgumentTypeError for "", which would be the current folder."""
    return Path(a_word(word))


def a_place(word: str) -> str:
    """Return the word: a folder, or an address such as milvus://…, which as a path would lose a slash. Raise
    ArgumentTypeError for ""."""
    return word if "://" in word else str(a_path(word))


# ---- flags of settings ----


def add_flags(parser: Parser, settings: type[Settings]) -> None:
    """Add a flag for every setting, in the groups of `GROUPS`."""
    names = list(settings.model_fields)
    starts = [*map(names.index, GROUPS), len(names)]
    for (start, end), title in zip(pairwise(starts), GROUPS.values(), strict=True):
        add_some_flags(parser, settings, names[start:end], title)


def add_some_flags(parser: Parser, settings: type[Settings], names: Collection[str], title: str) -> None:
    """Add a group of flags for the named settings and everything inside them."""
    group = parser.add_argument_group(title)
    for path, one in described(settings).items():
        if path.split(".")[0] in names:
            _add_flag(group, path, one)


def add_checkpoint_flags(parser: Parser, *names: str) -> None:
    """Add --config, and flags for the named settings, or else all, that may differ from those of the checkpoint."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings for a weights file that holds none")
    title = "Replacing settings of the checkpoint (the defaults are those of `adaclip train`)"
    add_some_flags(parser, Config, names or overridable(), title)


def add_index(parser: Parser, what: str = "the folder that `adaclip index` made, or milvus://…") -> None:
    """Add NAME.index, --model, and flags for the settings of the model that may differ where it searches."""
    parser.add_argument("index", metavar="NAME.index", type=a_place, help=what)
    moved = "the run or checkpoint that the index was made with, if it has moved"
    parser.add_argument("--model", metavar="RUN", type=a_path, help=moved)
    add_checkpoint_flags(parser, *MODEL)


def require(rules: Iterable[tuple[object, str]]) -> None:
    """Raise UserError with the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def add_adapt_flags(parser: Parser, what: str) -> None:
    """Add --adapt, which does `what`, --reward, and flags for the settings of the adaptation."""
    add = parser.add_argument_group("Adapting to each query").add_argument
    add("--adapt", choices=("clip_reward",), help=what)
    reward = "CLIPs that reward, with --adapt: names, files or folders of weights, runs, or self"
    add("--reward", metavar="CLIP[,CLIP...]", type=lambda text: text.split(","), help=reward)
    add_some_flags(parser, Config, ["adaptation"], "Settings of --adapt")


def adaptation_settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of --adapt, --reward and the flags beside them: {} without --adapt.

    Raise UserError if they do not go together.
    """
    own = {name: value for name, value in given(namespace).items() if name.split(".")[0] == "adaptation"}
    if bool(namespace.adapt) != bool(namespace.reward):
        raise UserError("--adapt and --reward belong together")
    if own and not namespace.adapt:
        raise UserError(f"--{next(iter(own))} belongs to --adapt")
    if not namespace.adapt:
        return {}
    return {**own, "adaptation.method": namespace.adapt, "adaptation.config.reward": namespace.reward}


def model_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of --config with the given flags over them, without those of --adapt. Raises UserError."""
    flags = {name: value for name, value in given(arguments).items() if name.split(".")[0] != "adaptation"}
    return (read_object(arguments.config) if arguments.config else {}) | flags


PLACES = ("video_dir", "frames_dir", "img_tmpl")
"""The settings that say where the videos of an annotation are."""


def places_of(settings: Mapping[str, Any], videos: object, is_annotation: bool) -> dict[str, Any]:
    """Return those of the settings that are `PLACES`, of which a given one replaces that of the run. Raise UserError
    if `videos` is no annotation."""
    places = {name: settings[name] for name in PLACES if name in settings}
    if places and not is_annotation:
        raise UserError(f"--{next(iter(places))} says where the videos of an annotation are, but {videos} is a folder")
    return {"video_dir": None, "frames_dir": None} | places if places.keys() & {"video_dir", "frames_dir"} else places


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return dotted name → value of the settings flags that were given."""
    overrides: dict[str, Any] = getattr(namespace, "overrides", {})
    return overrides


class _Override(argparse.Action):
    """Store the words of a flag as the value of a setting."""

    def __init__(self, described: Described, **options: Any):
        super().__init__(default=argparse.SUPPRESS, **options)
        self.described = described

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if not hasattr(namespace, "overrides"):
            namespace.overrides = {}
        words = ["false"] if self.nargs == 0 else [values] if isinstance(values, str) else values
        namespace.overrides[self.dest] = _value(words, self.described, f"--{self.dest}")


def _add_flag(group: Any, path: str, one: Described) -> None:
    how: dict[str, Any] = {"action": _Override, "dest": path, "described": one}
    what = how | {"help": _help(path, one), "metavar": _metavar(path, one)}
    if one.kinds != {"boolean"}:
        group.add_argument(f"--{path}", nargs="+" if one.kinds == {"array"} else None, **what)
        return
    group.add_argument(f"--{path}", nargs="?", const="true", **what)
    above, dot, name = path.rpartition(".")
    if not name.startswith("no_"):
        off = f"--{above}{dot}no_{name.removeprefix('use_')}"
        shown = f"the same as --{path} false" if one.facts.get("default") is True else argparse.SUPPRESS
        group.add_argument(off, nargs=0, help=shown, **how)


def _metavar(path: str, one: Described) -> str:
    unit, kinds = str(one.facts.get("unit", "")), one.kinds
    if unit.startswith(("file", "folder")):
        return {"file": "FILE", "folder": "DIR"}.get(unit, "PATH")
    if kinds == {"object"}:
        return "JSON" if "." in path else "FILE"
    if kinds == {"array"}:
        kinds = _item_kinds(one)
    names = {"boolean": "true|false", "integer": "N", "number": "X", "None": "JSON"}  # None: a list of sections
    return names.get(next(iter(kinds)), "NAME")


def _help(path: str, one: Described) -> str:
    unit, default = str(one.facts.get("unit", "")), one.facts.get("default")
    facts = [f"for {', '.join(one.methods)}"] if one.methods else []
    if one.kinds == {"object"}:
        facts += ["a JSON object" if "." in path else "a JSON file with this section alone"]
    elif "allowed" in one.facts:
        facts += [one.words]
    elif one.kinds != {"boolean"} and not unit.startswith(("file", "folder")):
        facts += [re.sub(r" from (-?\d+) to \d{4,}", r" >= \1", one.words)] + ([f"unit: {unit}"] if unit else [])
    if "default" in one.facts and ("." not in path or one.kinds != {"object"}):
        items = default if isinstance(default, list) else [default]
        shown = " ".join(item if isinstance(item, str) else json.dumps(item) for item in items) or "[]"
        facts += [f"default: {shown}"]
    return f"{one.facts.get('description', '')} [{'; '.join(facts)}]".replace("%", "%%")


def _value(words: list[str], one: Described, flag: str) -> Any:
    """Return the value of the words of a flag. Words that fit no type stay text, which validation refuses."""
    first = words[0] if len(words) == 1 else ""
    if first.lower() in ("none", "null") and one.nullable:
        return None
    if first.startswith(("[", "{")) and one.kinds & {"array", "object"}:
        return parse_json(first, flag)
    return [_read(word, _item_kinds(one)) for word in words] if one.kinds == {"array"} else _read(first, one.kinds)


def _item_kinds(one: Described) -> set[str]:
    """Return the names of the types of a list's items."""
    items = [node.get("prefixItems", [node.get("items", {})])[0] for node in one.types if node.get("type") == "array"]
    return {str(item.get("type")) for item in items}


def _read(word: str, kinds: Collection[str]) -> Any:
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float) if {"integer", "number"} & set(kinds) else ():
        try:
            return kind(word)
        except ValueError:
            continue
    return word


# ---- files ----


def check_inputs(inputs: Mapping[str, Iterable[Path | str | None]]) -> None:
    """Raise UserError for an input (flag → files) that is given twice or does not exist."""
    for flag, paths in inputs.items():
        files = [Path(path) for path in paths if path]
        for number, path in enumerate(files):
            if path in files[:number]:
                raise UserError(f"{flag} {path} is given twice")
            if not path.is_file():
                reason = "is a folder, not a file" if path.is_dir() else f"no such file (looked for in {Path.cwd()})"
                raise UserError(f"{flag} {path}: {reason}")


def read_queries(path: Path) -> list[str]:
    """Return the lines of --queries, a file or - for standard input, that are not blank. Raise UserError.

    Only a line feed ends a line: other characters that end lines may be part of a query.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UserError(f"--queries {path}: cannot be read ({error.strerror})") from error
    lines = [line.strip() for line in decoded(content, f"--queries {path}").split("\n")]
    if not any(lines):
        raise UserError(f"--queries {path}: holds no query; write one per line")
    return [line for line in lines if line]


def check_outputs(outputs: Mapping[str, Path | None], suffixes: Mapping[str, str], inputs: Iterable[object]) -> None:
    """Raise UserError, before hours of work, for an output (flag → file) that cannot or must not be written.

    That is one with another suffix than its flag has in `suffixes` (separated by spaces), if any, one without a folder
    to write into, and one that would replace an input or a file in a run folder that is an input.
    """
    read = [Path(str(path)).resolve() for path in inputs if path is not None]
    for flag, path in ((flag, path) for flag, path in outputs.items() if path is not None):
        place = path.resolve()
        if flag in suffixes and path.suffix not in suffixes[flag].split():
            raise UserError(f"{flag} {path}: must end in {suffixes[flag].replace(' ', ' or ')}")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise UserError(f"{flag} {path}: {place.parent} is not a folder that you can write into")
        if place in read:
            raise UserError(f"{flag} {path}: this file is read by the same command; choose another name")
        if runs := [folder for folder in read if folder in place.parents]:
            raise UserError(f"{flag} {path}: {runs[0]} is a run folder, which stays as it is; choose another place")


def write_output(flag: str, path: Path, content: str | bytes) -> None:
    """Replace the file at `path`, or where it links to, as a whole. Raises UserError.

    Text is written as UTF-8. Half a surrogate pair, as in file names that are not UTF-8, is written as its escape.
    """
    try:
        whole = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        write_durably(path.resolve(), whole)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error
