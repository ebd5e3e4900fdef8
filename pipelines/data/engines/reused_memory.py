"""Memory for the batches of an engine on the CPU, which is used again."""

import math
import weakref

import numpy as np

_MOST_BYTES = 1 << 28


class ReusedMemory:
    """Arrays for batches, each handed out again once nothing is left of what was made of it.

    New memory comes from the system page by page, which takes several times as long as normalising a photo into it.
    """

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """float32, of any content; None where 256 MiB in all are handed out, or would be.

        A tensor that `torch.from_numpy` makes of it keeps it from being handed out again, another array that shares its
        memory does not.
        """
        length = math.prod(shape)
        # What is too small and free is let go.
        arrays = [(array, view) for array, view in self._arrays if view() is not None or array.size >= length]
        self._arrays = arrays
        free = next((number for number, (_, view) in enumerate(arrays) if view() is None), None)
        if free is None and 4 * (sum(array.size for array, _ in arrays) + length) > _MOST_BYTES:
            return None
        array = np.empty(length, np.float32) if free is None else arrays.pop(free)[0]
        taken = array[:length].reshape(shape)
        arrays.append((array, weakref.ref(taken)))
        return taken
