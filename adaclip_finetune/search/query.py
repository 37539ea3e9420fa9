"""Queries that combine several texts: `"a dog" + "snow" - 0.5 "a sled"`."""

from __future__ import annotations

import re
from typing import NamedTuple

_TERM = re.compile(r'\s*(?P<sign>[+-]?)\s*(?P<weight>\d+(?:\.\d*)?|\.\d+)?\s*"(?P<text>[^"]*[^"\s][^"]*)"\s*')


class Term(NamedTuple):
    """A text of a query, and the weight of its vector: negative where it is subtracted."""

    weight: float
    text: str


def terms_of(query: str) -> list[Term]:
    """Return the texts of a query and their weights.

    A combination is at least two texts in double quotes with + or - between them, each with a weight before it if it is
    not 1. Every other query is one text, as it stands.
    """
    terms: list[Term] = []
    place = 0
    while place < len(query):
        found = _TERM.match(query, place)
        if found is None or (terms and not found["sign"]):
            return [Term(1.0, query)]
        weight = float(found["weight"] or 1)
        terms.append(Term(-weight if found["sign"] == "-" else weight, found["text"].strip()))
        place = found.end()
    return terms if len(terms) > 1 else [Term(1.0, query)]


def is_one_text(query: str) -> bool:
    """Return whether a query is a single text as it stands, whose score means what that of a caption means."""
    return terms_of(query) == [Term(1.0, query)]
