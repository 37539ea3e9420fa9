"""MSVD (Chen and Dolan, ACL 2011): lists of ids `<YouTube id>_<start>_<end>`, and a pickle {id: [[token, …], …]}."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from adaclip_finetune.data.formats.clip import Clip, Source
from adaclip_finetune.data.formats.pickled import read_plain_pickle
from adaclip_finetune.data.formats.reading import add_split_flags, expect, needed_splits, read_ids

HELP = "MSVD: raw-captions.pkl, and train_list.txt, val_list.txt, test_list.txt"


def add_flags(parser: ArgumentParser) -> None:
    """The flags of `adaclip convert msvd`."""
    parser.add_argument(
        "--captions", metavar="FILE", type=Path, required=True, help="raw-captions.pkl; nothing in it is run"
    )
    add_split_flags(parser, "list of the video ids, one a line")


def read(arguments: Namespace) -> dict[str, Source]:
    """A split for each list. Raises UserError."""
    lists = needed_splits(arguments)
    path = arguments.captions
    captions = expect(str(path), read_plain_pickle(path), dict, "a dict {id: [[token, …], …]}")
    return {split: _listed(read_ids(ids), captions, path) for split, ids in lists.items()}


def _listed(ids: list[str], captions: dict[object, object], path: Path) -> Source:
    clips = []
    for video in ids:
        if video in captions:
            where = f"{path}: video {video!r}"
            source, duration = _source(video)
            clips.append(Clip(where, video, _sentences(where, captions[video]), duration=duration, group=source))
    return Source(clips, absent=[video for video in ids if video not in captions])


def _sentences(where: str, value: object) -> list[str]:
    sentences = []
    for row, tokens in enumerate(expect(where, value, list, "a list of captions, each a list of tokens"), start=1):
        expect(f"{where}: caption {row}", tokens, (list, tuple), "a list of tokens")
        sentences.append(" ".join(expect(f"{where}: caption {row}", token, str, "a text") for token in tokens))
    return sentences


def _source(video: str) -> tuple[str | None, float | None]:
    """The YouTube id, which has underscores too, and the seconds from start to end."""
    source, *times = video.rsplit("_", 2)
    if len(times) < 2 or not all(time.isascii() and time.isdigit() for time in times):
        return None, None
    length = float(times[1]) - float(times[0])
    return source, length if length > 0 else None
