"""How many photos a GPU takes at a time; what its memory would say is a stand-in, as there is none here."""

from pipelines.config import Config
from pipelines.training.micro_batch import decoded_bytes, largest_that_fits

import numpy as np
import pytest
import torch


@pytest.mark.slow
def test_the_largest_batch_that_fits():
    """The out-of-memory error is a stand-in: a CPU has none."""
    tried = []

    def stand_in_for_a_gpu(size: int) -> None:
        tried.append(size)
        if size > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    assert largest_that_fits(100, stand_in_for_a_gpu) == 12
    assert tried == [100, 50, 25, 12]

    def full(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    assert largest_that_fits(7, full) == 0
    with pytest.raises(ValueError, match="a fault"):
        largest_that_fits(8, lambda size: (_ for _ in ()).throw(ValueError("a fault")))


def test_memory_is_kept_back_for_the_photos_that_dali_decodes():
    small, large = np.full((1000, 2), (375, 500)), np.full((1000, 2), (3000, 4000))
    mixed = np.concatenate([small, large[:10]])
    config, most = Config(prefetch=2, eval_batch_per_device=64), 40 * 10**9
    assert decoded_bytes(config, {"train": large, "val": small}, 256, most=most) == 3 * 256 * 3000 * 4000 * 3
    assert decoded_bytes(config, {"train": small, "val": large}, 8, most=most) == 3 * 64 * 3000 * 4000 * 3
    pixels = 10 * 3000 * 4000 + 54 * 375 * 500
    assert decoded_bytes(config, {"train": mixed, "val": small}, 64, most=most) == 9 * pixels
    assert decoded_bytes(config, {"train": small[:5], "val": small[:3]}, 64, most=most) == 9 * 5 * 375 * 500
    assert decoded_bytes(config, {"train": large, "val": small}, 1000, most=most) == most
