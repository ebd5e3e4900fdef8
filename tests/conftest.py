"""What the tests of several rooms share."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# OpenMP's threads spin while they wait. Where other processes want the cores too, that makes torch 50 times slower.
# It is read as torch is loaded, which is later than here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Callable[[Mapping[str, Mapping[str, int]]], Path]:
    """Makes a folder of small noisy JPEGs: {split: {class: number of photos}} -> ROOT/<split>/<class>/00.jpg ..."""

    def make(counts: Mapping[str, Mapping[str, int]]) -> Path:
        root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
        for split, classes in counts.items():
            for name, count in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    height, width = rng.integers(70, 120, 2)
                    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    Image.fromarray(noise).save(folder / f"{number:02}.jpg", quality=90)
        return root

    return make
