"""What every engine takes and returns."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from pipelines.data.plan import Views

import torch


@dataclass(frozen=True)
class Pixels:
    """What an engine made of some views.

    images: float32 [k, 3, H, W] of the k photos that could be decoded, in order.
    failed: position among the views -> reason, of the photos that could not.
    """

    images: torch.Tensor
    failed: dict[int, str]


class Engine(Protocol):
    """Decodes, crops, resizes, flips and normalises; first in, first out. It draws nothing and orders nothing.

    LIBRARIES: as pip names them, those on whose versions the pixels depend; of alternatives all.
    """

    LIBRARIES: ClassVar[tuple[str, ...]]

    def submit(self, views: Views) -> None:
        """Starts work on `views` (1 to the engine's largest micro-batch of them) in the background."""
        ...

    def fetch(self) -> Pixels:
        """Waits for the oldest submitted views."""
        ...

    def cancel(self) -> None:
        """Forgets everything that was submitted and not fetched."""
        ...

    def close(self) -> None:
        """Ends its threads and frees its memory."""
        ...
