"""The arithmetic of an index: which vectors are equal, and which are nearest."""

import faiss
import numpy as np
import pytest

from adaclip_finetune.search import index
from adaclip_finetune.search.index import first_of_equal, nearest


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("width", [4, 5, 512])
def test_the_first_of_equal_vectors(dtype: type, width: int) -> None:
    different = np.random.default_rng(0).standard_normal((50, width)).astype(dtype)
    rows = np.random.default_rng(1).integers(0, 50, 200)
    expected = [int(np.flatnonzero(rows == row)[0]) for row in rows]
    assert first_of_equal(different[rows]).tolist() == expected
    assert first_of_equal(different).tolist() == list(range(50))
    assert first_of_equal(different[:0]).tolist() == []


def test_vectors_with_the_same_sum_are_told_apart() -> None:
    one, other = np.random.default_rng(0).integers(0, 2**64, 2, dtype=np.uint64)
    words = np.array([[other, 0], [0, one], [other, 0]], np.uint64)  # one · other in all rows
    assert first_of_equal(words.view(np.float32)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["Flat", "SQfp16"])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_many_queries_find_what_each_finds_alone(monkeypatch: pytest.MonkeyPatch, kind: str, k: int) -> None:
    monkeypatch.setattr(index, "_BLOCK", 30)
    random = np.random.default_rng(0)
    flat = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    flat.add(random.standard_normal((100, 16), np.float32))
    queries = random.standard_normal((20, 16), np.float32)
    scores, rows = nearest(flat, queries, k)
    for query, own_scores, own_rows in zip(queries, scores, rows, strict=True):
        (expected,), (alone,) = nearest(flat, query[None], k)
        assert own_rows.tolist() == alone.tolist()
        np.testing.assert_allclose(own_scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Flat", "SQfp16"])
@pytest.mark.parametrize("count", [1, 9])
def test_only_the_vectors_at_these_places_are_compared(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    monkeypatch.setattr(index, "_BLOCK", 30)
    random = np.random.default_rng(0)
    flat = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    flat.add(random.standard_normal((100, 16), np.float32))
    queries, places = random.standard_normal((count, 16), np.float32), np.arange(3, 100, 2)
    scores, rows = nearest(flat, queries, 60, places)
    assert scores.shape == rows.shape == (count, len(places))
    products = queries @ flat.reconstruct_n(0, 100).T
    for product, own_scores, own_rows in zip(products, scores, rows, strict=True):
        assert own_rows.tolist() == places[np.argsort(-product[places])].tolist()
        np.testing.assert_allclose(own_scores, product[own_rows], rtol=1e-5, atol=1e-5)
    assert nearest(flat, queries, 3, places[:0])[1].shape == (count, 0)


def test_the_first_results_do_not_depend_on_how_many_are_asked_for() -> None:
    """Not even where most vectors are equally near."""
    random = np.random.default_rng(0)
    vectors = np.zeros((3000, 4), np.float32)
    vectors[:, 0] = random.integers(0, 3, 3000)
    flat = faiss.index_factory(4, "Flat", faiss.METRIC_INNER_PRODUCT)
    flat.add(vectors)
    query = np.eye(4, dtype=np.float32)[:1]
    every = np.lexsort((np.arange(3000), -vectors[:, 0])).tolist()
    for k in (1, 10, 100, 999, 1000, 2500, 3000):
        assert nearest(flat, query, k)[1][0].tolist() == every[:k]
