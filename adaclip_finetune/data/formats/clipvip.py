"""The annotation files of CLIP-ViP (Xue et al., ICLR 2023): JSONL of {clip_id, text}, a caption a line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from adaclip_finetune.data.formats.clip import Clip, Source, merged
from adaclip_finetune.data.formats.reading import (
    add_split_flags,
    member,
    needed_splits,
    read_jsonl,
    texts,
    without_extension,
)

HELP = "CLIP-ViP's files: JSONL of {clip_id, text}"


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert clipvip`."""
    add_split_flags(parser, "JSONL of {clip_id, text}")


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each file. Raises UserError."""
    return {split: Source(merged(_rows(path))) for split, path in needed_splits(arguments).items()}


def _rows(path: Path) -> Iterator[Clip]:
    for line, entry in read_jsonl(path):
        where = f"{path}: line {line}"
        video, extension = without_extension(member(where, entry, "clip_id", str, "a text"))
        text = member(where, entry, "text", (str, list), "a text, or a list of them")
        yield Clip(where, video, [text] if isinstance(text, str) else texts(where, text), extension=extension)
