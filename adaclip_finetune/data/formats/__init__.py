"""The formats in which data sets are published, each one file that reads it: a format's name meets its reader here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Protocol

from adaclip_finetune.data.formats import (
    activitynet,
    clipvip,
    didemo,
    lsmdc,
    msrvtt,
    msvd,
    table,
    vatex,
    webvid,
    youcook2,
)
from adaclip_finetune.data.formats.clip import Source


class Format(Protocol):
    """A module that knows one format."""

    HELP: str

    def add_flags(self, parser: ArgumentParser) -> None:
        """Its own flags: the files it needs."""

    def read(self, arguments: Namespace) -> dict[str, Source]:
        """The splits (train, val, test) of the source. Raises UserError that names file and row."""


FORMATS: dict[str, Format] = {
    "msrvtt": msrvtt,
    "msvd": msvd,
    "activitynet": activitynet,
    "didemo": didemo,
    "youcook2": youcook2,
    "lsmdc": lsmdc,
    "vatex": vatex,
    "webvid": webvid,
    "clipvip": clipvip,
    "table": table,
}
