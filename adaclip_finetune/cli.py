"""The `adaclip` program: find the command, run it, and turn errors into messages and exit codes.

A command is a module in `commands/` and a line in `COMMANDS`; it is imported when it runs. Exit codes: 0 success,
1 partial failure, 2 an error that the user can fix (one message; a traceback only with --debug), 75 stopped by SIGTERM
(continue with --resume), 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from adaclip_finetune import __version__
from adaclip_finetune.errors import UserError, debug_requested
from adaclip_finetune.printable import printable

# Errors caused by a file name that the user gave.
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that is not UTF-8 shows escapes instead of failing
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(words)
        if sys.stdout is not None:  # None where Python was started with a closed standard output
            sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(str(error), words)
    except KeyboardInterrupt as stop:
        print("adaclip: interrupted", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # as in `adaclip schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _NAME_ERRORS or error.filename is None:
            raise
        return _refused(f"{printable(os.fsdecode(error.filename))}: {error.strerror}", words)


# Name → line of help. Each name is a module of `commands` with a function `run(words) -> exit code`.
COMMANDS = {
    "train": "finetune a retriever, or evaluate one (also: python train.py)",
    "evaluate": "compare checkpoints and zero-shot CLIP in one table",
    "compare": "train several methods under one recipe and compare them in one table",
    "predict": "write the best videos of each query to a file",
    "export": "convert a checkpoint for the published AdaCLIP, open_clip or transformers",
    "push": "upload a run to the Hugging Face Hub",
    "convert": "convert annotations of published data sets, or tables, to JSON",
    "index": "embed a folder of videos for searching",
    "calibrate": "measure from which score on a search has found something",
    "search": "find videos in an index by text, picture or video",
    "cut": "write the moments that a search finds as video files",
    "serve": "serve a web page that searches an index",
    "caption": "caption videos, and write an annotation",
    "classify": "tell which classes videos and pictures belong to",
    "check": "check data and settings before a run, and estimate its cost",
    "bench": "measure how fast this package is on this machine",
    "extract": "extract frames of videos as images (also: python utils/frame_extraction.py)",
    "pack": "pack extracted frames into one LMDB file, for slow disks",
    "schema": "print the JSON Schema of the settings",
}

_OVERVIEW = """usage: adaclip COMMAND ...

Parameter-efficient finetuning of CLIP for text-video retrieval.

{}

Run `adaclip COMMAND --help` for the options of a command, `adaclip --version` for the version."""


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_OVERVIEW.format("\n".join(f"  {name:10} {help_line}" for name, help_line in COMMANDS.items())))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"adaclip {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from difflib import get_close_matches

        alike = get_close_matches(words[0], COMMANDS, n=1)
        meant = f"; did you mean {alike[0]}?" if alike else ":"
        raise UserError(f"unknown command {words[0]}{meant} see adaclip --help")
    try:
        command = import_module(f"adaclip_finetune.commands.{words[0]}")
        return int(command.run(words[1:]))
    except SystemExit as done:  # argparse printed its help
        return int(done.code or 0)


def _refused(message: str, words: Sequence[str]) -> int:
    if debug_requested(words):
        traceback.print_exc()
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")  # of torchrun and accelerate
    process = "" if rank == "0" else f" (process {rank} of 0 to {int(count) - 1})"
    print(f"adaclip{process}: error: {message}", file=sys.stderr)
    return 2
