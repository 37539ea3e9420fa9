"""The one exception that is meant for users.

Whatever a user can get wrong (a key, a path, a broken video) ends here: the command line prints the message alone
and exits with code 2. The message names the file, the key or row, the value and the way out.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend. `str(error)` is all they will see."""


def debug_requested(words: Sequence[str]) -> bool:
    """Return whether the command line asks for tracebacks (`--debug`), before anything is parsed."""
    following = dict(zip(words, [*words[1:], ""], strict=True))
    return "--debug=true" in words or following.get("--debug", "false").lower() != "false"
