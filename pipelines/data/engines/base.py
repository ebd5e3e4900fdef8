"""What every engine takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from pipelines.data.dataset import Split
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


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made with. micro_batch: the most views of one `submit`. device: where its images are. threads:
    on the CPU. mean, std: 3 values each, on the 0..1 scale.
    """

    split: Split
    micro_batch: int
    device: torch.device
    threads: int
    mean: Sequence[float]
    std: Sequence[float]


class Engine(Protocol):
    """Decodes, crops, resizes, flips and normalises; first in, first out. It draws nothing and orders nothing.

    LIBRARIES: as pip names them, those on whose versions the pixels depend; of alternatives all.
    """

    LIBRARIES: ClassVar[tuple[str, ...]]

    def __init__(self, settings: EngineSettings) -> None: ...

    def submit(self, views: Views) -> None:
        """Starts work on `views` (1 to `micro_batch` of them) in the background."""
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


class Fault(NamedTuple):
    """Why an engine cannot run, and what a person can do about it; "" where the machine is at fault."""

    reason: str
    remedy: str = ""


class EngineModule(Protocol):
    """A module of this package whose name is a value of the setting `loader`. It loads its library where it is used.

    AUTO_WITH: of "a GPU" and "no GPU", with which of them `auto` takes the engine where it has no fault.
    USES_MEMORY: whether it looks for photos in `Split.memory`, and keeps them there.
    """

    ENGINE: type[Engine]
    AUTO_WITH: tuple[str, ...]
    USES_MEMORY: bool

    def fault(self, device: torch.device) -> Fault | None:
        """Why the engine cannot run on `device`; None where it can. May try it."""
        ...
