"""Text of others, such as names of files, as it can be shown."""

from __future__ import annotations


def printable(text: object) -> str:
    """On one line, and without what would steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
