"""The flags of commands that load a trained model: settings of its run that may differ where it is used."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config import Config
from adaclip_finetune.config.layers import read_object
from adaclip_finetune.config.roles import is_path

_MODEL = ("clip_weights", "device", "precision")


def add_model_flags(parser: Parser, *others: str) -> None:
    """Add the flags, and one for each further setting named in `others`, with the name and help of the setting."""
    group = parser.add_argument_group("Settings of the run that may be changed here")
    group.add_argument(
        "--config",
        metavar="FILE",
        type=not_empty,
        help="settings for a checkpoint that does not contain its own (a published one)",
    )
    for name in (*others, *_MODEL):
        setting = Config.model_fields[name]
        number, path = setting.annotation is int, is_path(name)
        group.add_argument(
            f"--{name}",
            metavar="N" if number else "PATH" if path else "NAME",
            type=int if number else not_empty,
            help=(setting.description or "").replace("%", "%%"),
        )


def a_path(word: str) -> Path:
    """Return the word as a path, for argparse. Raise ArgumentTypeError for "", which would be the current folder."""
    return Path(not_empty(word))


def not_empty(word: str) -> str:
    """Return the word, for argparse. Raise ArgumentTypeError for "", as an unset variable in quotes gives it."""
    if not word:
        raise ArgumentTypeError("is empty")
    return word


def model_settings(arguments: Namespace, *others: str) -> dict[str, Any]:
    """Return the settings of --config with the given flags over them. Raise UserError."""
    settings = read_object(arguments.config) if arguments.config else {}
    return settings | given_of(arguments, *others, *_MODEL)


def given_of(arguments: Namespace, *names: str) -> dict[str, Any]:
    """Return those of the named flags that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
