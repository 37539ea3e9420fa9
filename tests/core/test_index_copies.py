"""Equal vectors of an index are found by their bytes."""

import numpy as np
import pytest

from adaclip_finetune.search.index import first_of_equal


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
