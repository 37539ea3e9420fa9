"""The flags of commands that load a trained model: settings of its run that may be others where it is used."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.settings.flags import Parser
from adaclip_finetune.settings.layers import read_object

_MODEL = ("clip_weights", "device", "precision", "num_workers", "val_batch_size")


def add_model_flags(parser: Parser, *others: str) -> None:
    """`others` are further settings of the same name and help."""
    group = parser.add_argument_group("Settings of the run that may be given anew")
    group.add_argument(
        "--config", metavar="FILE", help="settings of a checkpoint that does not bring its own (a published one)"
    )
    for name in (*others, *_MODEL):
        field = Config.model_fields[name]
        number = field.annotation is int
        group.add_argument(
            f"--{name}",
            metavar="N" if number else "NAME",
            type=int if number else str,
            help=(field.description or "").replace("%", "%%"),
        )


def model_settings(arguments: Namespace) -> dict[str, Any]:
    """What was given of them, and the settings of --config below that. Raises UserError."""
    settings = read_object(arguments.config) if arguments.config else {}
    given = {name: getattr(arguments, name) for name in _MODEL}
    return settings | {name: value for name, value in given.items() if value is not None}
