"""Decoded photos in memory, as many as fit: made by whoever needs one first, and there for all. Loads no PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np


class PhotoMemory:
    """Room for whole photos of a split, uint8 [height, width, 3], upright, from the first one to the last that fits.

    sizes: int32 [N, 2], of the split. limit: bytes of them. area: gives as many writable bytes as it is asked for, all
    zero, maybe the same ones to several processes. Who decode the same photo at once write the same bytes.
    """

    def __init__(self, sizes: np.ndarray, limit: int, area: Callable[[int], Any]) -> None:
        self._sizes = sizes
        ends = np.cumsum(3 * sizes.prod(axis=1, dtype=np.int64))
        self._starts = np.concatenate([[0], ends[:-1]])
        self.fits = (ends <= limit) & (sizes[:, 0] > 0)
        self.bytes = int(ends[self.fits][-1]) if self.fits.any() else 0
        self._all = np.frombuffer(area(self.bytes + len(sizes)), np.uint8)
        self._is_there = self._all[self.bytes :]

    def photo(self, index: int, decode: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """A photo that fits: as it is there, or else what `decode` gives, uint8, kept from now on; None for None."""
        if (there := self.get(index)) is not None:
            return there
        pixels = decode()
        return None if pixels is None else self.keep(index, pixels)

    def get(self, index: int) -> np.ndarray | None:
        """A photo that is there."""
        return self._place(index) if self._is_there[index] else None

    def keep(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """Keeps a photo that fits, and returns it."""
        self._place(index)[:] = pixels
        self._is_there[index] = 1
        return self._place(index)

    def _place(self, index: int) -> np.ndarray:
        start, (height, width) = int(self._starts[index]), self._sizes[index].tolist()
        return self._all[start : start + 3 * height * width].reshape(height, width, 3)
