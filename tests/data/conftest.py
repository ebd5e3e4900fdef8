"""Photos that loaders and engines share."""

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from tests.helpers.engines import write_photo

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """23 JPEGs of many sizes, two of them turned by EXIF, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(23):
        exif = Image.Exif()
        if number in (3, 4):
            exif[0x0112] = (6, 3)[number - 3]
        name = root / "train" / ("ant", "bee")[number % 2] / f"{number:02}.jpg"
        write_photo(name, 60 + 37 * number % 400, 80 + 53 * number % 400, number, quality=92, exif=exif)
    return load_dataset(scan_dataset(root, root / "cache", 0.0001)).splits["train"]
