"""What is done to photos before a network sees them."""

from pipelines.data.preprocess import choose_crop_mode

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ([(300, 400)] * 5, "center"),
        ([(1000, 1740)] * 5, "center"),
        ([(1000, 1750)] * 5, "squash"),
        ([(1750, 1000)] * 5, "squash"),  # a photo that stands
        ([(300, 400)] * 3 + [(100, 400)] * 2, "center"),  # the median counts
        ([], "center"),
    ],
)
def test_wide_photos_are_squashed(sizes, mode):
    chosen, line = choose_crop_mode(np.array(sizes, np.int32).reshape(-1, 2))
    assert chosen == mode
    assert line.startswith(f"crop_mode: {mode}, as the median photo's sides are ")
