"""Shrunk copies of large photos: of what size, by what they are known, and how they are kept. Nothing is decoded here.

A copy is a JPEG, upright, RGB, without EXIF or comment. The same photo and versions make the same bytes.
"""

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pipelines.files import atomic_write

import numpy as np
import PIL

_FORMAT = 1  # another one where copies would have other pixels
# 4:4:4. At quality 90 copies are a third smaller, and differ by 2.1 levels of 255 on average in place of 1.5.
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
# A JPEG is decoded scaled, to so many times its copy's size at least: of phone photos 0.6 to 0.9 levels, on average,
# from one that is decoded whole, in a third of the time. What is seen of them is no farther from what is seen of the
# photos (docs/benchmarks.md).
SPARE = 1.4
_BYTES_A_PIXEL = 0.6  # 0.5 of copies of 512 pixels, 0.7 of smaller ones


@dataclass(frozen=True)
class ShrunkCopies:
    """What photos are shrunk to, and where their copies are kept.

    shrink: pixels of the shorter side. cache: the cache folder; None: a copy is made whenever it is looked at.
    """

    shrink: int
    cache: Path | None = None

    def file(self, photo: bytes, signature: int, mtime: int, transparency: str) -> Path | None:
        """Where a photo's copy is kept, by all that its pixels depend on; None where none is kept.

        photo: its path below the root of its data, since pictures without compression may be alike in signature and
        time. The other values are those of `Split`.
        """
        if self.cache is None:
            return None
        name = blake2b(photo + f" {signature} {mtime}".encode(), digest_size=16).hexdigest()
        kind = f"{self.shrink}-{transparency}-{_FORMAT}-pillow-{PIL.__version__}"
        return copies_folder(self.cache) / kind / f"{name}.jpg"


def copies_folder(cache: Path) -> Path:
    """The folder of all copies."""
    return cache / "shrunk"


def shrunk_sizes(sizes: np.ndarray, shrink: int) -> np.ndarray:
    """int32 [N, 2]: height and width of copies of photos of `sizes`; of those that are no larger their own."""
    shorter = np.maximum(sizes.min(axis=1, keepdims=True), 1).astype(np.int64)
    scaled = (2 * sizes * shrink + shorter) // (2 * shorter)
    return np.where(shorter > shrink, scaled, sizes).astype(np.int32)


def likely_bytes(sizes: np.ndarray) -> int:
    """About what copies of `sizes` (int [N, 2]) take on a disk."""
    return int(sizes.prod(axis=1, dtype=np.int64).sum() * _BYTES_A_PIXEL)


def is_whole(copy: Path) -> bool:
    """Whether a copy is there from its beginning to its end."""
    try:
        with open(copy, "rb") as file:
            ends = file.read(2)
            file.seek(-2, os.SEEK_END)
            return ends + file.read(2) == b"\xff\xd8\xff\xd9"
    except OSError:
        return False


def keep_copy(copy: Path, content: bytes) -> None:
    """Writes a copy, which others may write or have opened at the same time. Raises OSError where it cannot be."""
    for attempt in (1, 2):
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(copy, shared=True) as partial:
                partial.write_bytes(content)
            return
        except FileNotFoundError:  # another run has made room meanwhile, and removed what was being written
            if attempt == 2:
                raise
        except PermissionError:
            if is_whole(copy):  # Windows replaces no file that somebody reads
                return
            raise
