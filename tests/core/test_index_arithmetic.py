"""The arithmetic of an index: which vectors are equal, and which are nearest."""

import numpy as np
import pytest
import torch

from adaclip_finetune.search import nearest as search
from adaclip_finetune.search.nearest import first_of_equal, nearest


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("queries", [1, 2, 20])
@pytest.mark.parametrize("k", [1, 10, 100, 200])
def test_the_nearest_are_those_with_the_largest_products(
    monkeypatch: pytest.MonkeyPatch, dtype: type, queries: int, k: int
) -> None:
    """In blocks of 30 vectors, of which float16 ones are converted 7 at a time."""
    monkeypatch.setattr(search, "_CONVERTED", 7)
    monkeypatch.setattr(search, "_PRODUCTS", 30 * queries)
    vectors, asked = random_vectors(100, dtype), random_vectors(queries)
    products = asked @ vectors.astype(np.float32).T
    scores, rows = nearest(vectors, asked, k)
    assert rows.tolist() == np.argsort(-products, axis=1)[:, :k].tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("step", [1, 2, 5, 70])
def test_only_the_chosen_vectors_are_compared(
    monkeypatch: pytest.MonkeyPatch, dtype: type, queries: int, step: int
) -> None:
    """Where few are chosen they are copied, and in some blocks there is none."""
    monkeypatch.setattr(search, "_CONVERTED", 30)
    monkeypatch.setattr(search, "_PRODUCTS", 1)
    vectors, asked, places = random_vectors(100, dtype), random_vectors(queries), np.arange(3, 100, step)
    chosen = np.isin(np.arange(100), places)
    scores, rows = nearest(vectors, asked, 60, chosen)
    products = asked @ vectors.astype(np.float32).T
    assert rows.tolist() == places[np.argsort(-products[:, places], axis=1)[:, :60]].tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, axis=1), rtol=1e-5, atol=1e-5)
    assert nearest(vectors, asked, 3, np.zeros(100, np.bool_))[1].shape == (queries, 0)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_first_results_do_not_depend_on_how_many_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    """Not even where most vectors are equally near."""
    monkeypatch.setattr(search, "_CONVERTED", 1000)
    monkeypatch.setattr(search, "_PRODUCTS", 1)
    vectors = np.zeros((3000, 4), np.float32)
    vectors[:, 0] = np.random.default_rng(0).integers(0, 3, 3000)
    asked = np.eye(4, dtype=np.float32)[np.zeros(queries, np.int64)]
    every = np.lexsort((np.arange(3000), -vectors[:, 0])).tolist()
    for k in (1, 10, 100, 999, 1000, 2500, 3000):
        assert nearest(vectors, asked, k)[1].tolist() == [every[:k]] * queries


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_of_one_product_are_put_together(threads: int) -> None:
    """Also where the vectors cannot be divided evenly among the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 3, 7, 100):
            vectors, asked = random_vectors(count), random_vectors(1)
            scores, rows = nearest(vectors, asked, count)
            np.testing.assert_allclose(scores[0], (vectors @ asked[0])[rows[0]], rtol=1e-5, atol=1e-5)
            assert sorted(rows[0].tolist()) == list(range(count))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("queries", [1, 2])
def test_products_are_exact_while_a_model_computes_in_bfloat16(queries: int) -> None:
    vectors, asked = random_vectors(100), random_vectors(queries)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = nearest(vectors, asked, 5)
    np.testing.assert_array_equal(scores, nearest(vectors, asked, 5)[0])


def test_no_query_finds_nothing() -> None:
    assert len(nearest(random_vectors(100), random_vectors(0), 5)[1]) == 0


def random_vectors(count: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 16)).astype(dtype)
