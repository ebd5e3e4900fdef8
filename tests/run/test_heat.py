"""A heat map lies where the network looked."""

from pipelines.run.heat import laid_over

import numpy as np

HEAT = np.array([[0, 0], [1, 0]], np.float32)


def test_hot_and_cold_lie_in_their_places() -> None:
    grey = np.full((40, 60, 3), 100, np.uint8)
    heated = laid_over(grey, HEAT).astype(int)
    assert heated.shape == grey.shape
    redness = heated[..., 0] - heated[..., 2]
    row, column = np.unravel_index(heated.sum(axis=2).argmax(), redness.shape)
    assert (row >= 30) & (column <= 15)
    assert (redness[:10] < 0).all()
    assert (redness[:, 45:] < 0).all()
    assert (redness[30:, :15] > 30).all()


def test_over_a_part_of_a_photo_it_is_as_over_that_part_alone() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    whole = laid_over(photo, HEAT, (30.0, 10.0, 62.0, 42.0))
    np.testing.assert_array_equal(whole[10:42, 30:62], laid_over(photo[10:42, 30:62], HEAT))
    beside = np.ones((50, 90), bool)
    beside[10:42, 30:62] = False
    assert (whole[beside] < 0.4 * photo[beside] + 1).all()
