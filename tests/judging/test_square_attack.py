"""The windows of the Square attack."""

import numpy as np
import pytest

from tfjacreg.judging import square_attack


@pytest.mark.parametrize(
    ("query", "side"),
    # 10,000 queries on 28x28: sqrt(784 * 0.8 / 2^k) rounded.
    [
        (0, 25),
        (10, 25),
        (11, 18),
        (50, 18),
        (51, 13),
        (200, 13),
        (201, 9),
        (501, 6),
        (1001, 4),
        (2001, 3),
        (4001, 2),
        (6001, 2),
        (8001, 1),
        (9999, 1),
    ],
)
def test_the_windows_shrink_as_in_the_published_attack(query, side):
    assert square_attack.window_size(query, 10_000, 28, 28) == side
    assert square_attack.window_size(query // 10, 1000, 28, 28) == square_attack.window_size(
        query // 10 * 10, 10_000, 28, 28
    )


def test_the_windows_fit_and_reach_every_edge():
    sizes = np.full(64, 5)
    corners, signs = square_attack.windows(np.arange(50), 0, 0, sizes, (9, 7, 3))
    assert corners.shape == (50, 64, 2) and signs.shape == (50, 64, 3)
    np.testing.assert_array_equal(np.unique(corners[..., 0]), np.arange(5))
    np.testing.assert_array_equal(np.unique(corners[..., 1]), np.arange(3))
    assert set(np.unique(signs)) == {-1, 1} and abs(signs.mean()) < 0.05
