"""Queries that combine several texts."""

from __future__ import annotations

import pytest

from adaclip_finetune.search.query import Term, terms_of


@pytest.mark.parametrize(("query", "terms"), [
    ('"a dog" + "snow" - "a sled"', [(1, "a dog"), (1, "snow"), (-1, "a sled")]),
    ('"a dog"+.5"snow"-2 "a sled"', [(1, "a dog"), (0.5, "snow"), (-2, "a sled")]),
    ('- "snow" + 3 " dogs "', [(-1, "snow"), (3, "dogs")]),
    ("a dog + snow - a sled", None),
    ('a "dog" in the snow', None),
    ('"a dog"', None),
    ('"a dog" "snow"', None),
    ('"a dog" + snow', None),
    ('"a dog" + " "', None),
    ("-5 degrees", None),
])  # fmt: skip
def test_terms_of_a_query(query: str, terms: list[tuple[float, str]] | None) -> None:
    assert terms_of(query) == ([Term(*term) for term in terms] if terms else [Term(1, query)])
