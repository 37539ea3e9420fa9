"""The flags of commands that load a trained model: settings of its run that may be others where it is used."""

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
    """`others` are further settings of the same name and help."""
    group = parser.add_argument_group("Settings of the run that may be given anew")
    group.add_argument(
        "--config",
        metavar="FILE",
        type=not_empty,
        help="settings of a checkpoint that does not bring its own (a published one)",
    )
    for name in (*others, *_MODEL):
        field = Config.model_fields[name]
        number, path = field.annotation is int, is_path(name)
        group.add_argument(
            f"--{name}",
            metavar="N" if number else "PATH" if path else "NAME",
            type=int if number else not_empty,
            help=(field.description or "").replace("%", "%%"),
        )


def a_path(word: str) -> Path:
    """For argparse. `Path("")` would be the current folder, and nobody means that by an unset variable in quotes."""
    return Path(not_empty(word))


def not_empty(word: str) -> str:
    """For argparse."""
    if not word:
        raise ArgumentTypeError("is empty")
    return word


def model_settings(arguments: Namespace, *others: str) -> dict[str, Any]:
    """What was given of them (and of `others`), over the settings of --config. Raises UserError."""
    settings = read_object(arguments.config) if arguments.config else {}
    return settings | given_of(arguments, *others, *_MODEL)


def given_of(arguments: Namespace, *names: str) -> dict[str, Any]:
    """Of these flags, those that were given."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
