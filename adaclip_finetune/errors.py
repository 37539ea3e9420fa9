"""The exception for errors that the user can fix.

The command line prints its message without a traceback and exits with code 2. The message says what is wrong (the file,
the setting or row, the value) and what to do about it.
"""

from collections.abc import Sequence


class UserError(Exception):
    """An error that the user can fix. The user sees `str(error)` and nothing else."""


class NotFinite(UserError, ValueError):
    """Weights or scores have become NaN or infinite, usually because training diverged."""


class NotACheckpoint(UserError):
    """There is no such file or run folder, or no known program wrote it as the checkpoint of a whole retriever."""


def debug_requested(words: Sequence[str]) -> bool:
    """Return whether the command line asks for tracebacks (`--debug`), before anything is parsed."""
    following = dict(zip(words, [*words[1:], ""], strict=True))
    return "--debug=true" in words or following.get("--debug", "false").lower() != "false"
