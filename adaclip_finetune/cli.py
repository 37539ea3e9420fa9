"""The command line: which command, with which settings. Everything is imported by the command that needs it.

A command is a file in `commands/` and a line in `COMMANDS`. Exit codes: 0 done, 1 done, but some
of it failed, 2 something the user can mend (one message, no traceback unless --debug), 75 stopped by SIGTERM (go on
with --resume), 130 by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from adaclip_finetune import __version__
from adaclip_finetune.errors import UserError, debug_requested
from adaclip_finetune.printable import printable

# What is wrong with a name that somebody gave, wherever it is first asked for.
_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(str(error), words)
    except KeyboardInterrupt as stop:
        print("adaclip: interrupted", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # `adaclip schema | head`: the reader has gone, and nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OF_NAMES or error.filename is None:
            raise
        return _refused(f"{printable(os.fsdecode(error.filename))}: {error.strerror}", words)


# Each name is a module of `commands`, with a function `run(words) -> exit code`.
COMMANDS = {
    "train": "finetune a retriever, or evaluate one; the same as `python train.py`",
    "evaluate": "compare checkpoints with zero-shot and with each other, on one data set or several",
    "predict": "for each query the best videos with their scores, as a file",
    "export": "write a run's weights for the published AdaCLIP, open_clip or transformers",
    "convert": "annotation files of published data sets, or tables, to train/val/test JSON",
    "index": "embed videos with a trained model, to be searched",
    "search": "find videos in an index by a text or a picture",
    "serve": "a page on this machine to search an index by text or picture",
    "check": "what would go wrong in a run, and what it would take",
    "extract": "frames of videos as images; the same as `python utils/frame_extraction.py`",
    "pack": "the images of all videos in one file, for slow disks",
    "schema": "print the JSON Schema of the settings",
}


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"adaclip {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from adaclip_finetune.config.layers import nearest

        raise UserError(
            f"there is no command {words[0]}; the nearest is {nearest(words[0], COMMANDS)} (adaclip --help)"
        )
    try:
        command = import_module(f"adaclip_finetune.commands.{words[0]}")
        return int(command.run(words[1:]))
    except SystemExit as done:  # argparse has printed its help
        return int(done.code or 0)


def _refused(message: str, words: Sequence[str]) -> int:
    if debug_requested(words):
        traceback.print_exc()
    print(f"adaclip{_process()}: error: {message}", file=sys.stderr)
    return 2


def _process() -> str:
    """Which of several processes speaks: torchrun and accelerate number them in the environment."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "" if rank == "0" else f" (process {rank} of 0 to {int(count) - 1})"


def _overview() -> str:
    lines = [f"  {name:10} {help_line}" for name, help_line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: adaclip COMMAND ...",
            "",
            "Parameter-efficient finetuning of CLIP for text-video retrieval.",
            "",
            *lines,
            "",
            "`adaclip COMMAND --help` tells about one command, `adaclip --version` the version.",
        ]
    )
