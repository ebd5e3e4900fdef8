"""Memory for the batches of an engine on the CPU, which is used again."""

import math
import weakref

import numpy as np


class ReusedMemory:
    """Arrays for batches, each handed out again once nothing is left of what was made of it.

    New memory comes from the system page by page, which takes several times as long as normalising a photo into it.
    """

    LARGEST = 1 << 26  # bytes: whoever has larger ones keeps what is ahead as levels of a byte, a quarter of it
    _MOST = 4  # those ahead, at the default `prefetch`, and the one in use; what is asked for beyond is not kept

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32, of any content. A tensor that `torch.from_numpy` makes of it keeps it from being handed out again,
        an array that shares its memory does not."""
        length = math.prod(shape)
        for number, (array, handed_out) in enumerate(self._arrays):
            if handed_out() is None:
                if array.size < length:
                    array = np.empty(length, np.float32)
                taken = array[:length].reshape(shape)
                self._arrays[number] = (array, weakref.ref(taken))
                return taken
        array = np.empty(length, np.float32)
        taken = array.reshape(shape)
        if len(self._arrays) < self._MOST:
            self._arrays.append((array, weakref.ref(taken)))
        return taken
