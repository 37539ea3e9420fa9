"""Show text that comes from elsewhere, such as file names, on a terminal."""

from __future__ import annotations


def printable(text: object) -> str:
    """Return `str(text)` with line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
