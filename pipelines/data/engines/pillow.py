"""The Pillow engine: threads on the CPU, which normalise as well where that is the device. Runs everywhere.

Threads, not worker processes: Pillow lets go of Python's lock while it decodes and resizes, so threads use all cores,
start at once, share the memory and die with their process.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

from pipelines.data.decode import decoding_error, view_of
from pipelines.data.engines.base import Engine, EngineSettings, Fault, Pixels
from pipelines.data.engines.reused_memory import ReusedMemory
from pipelines.data.plan import Views

import numpy as np
import torch


class PillowEngine:
    """See `base.Engine`. `threads` photos are decoded at a time."""

    LIBRARIES: ClassVar[tuple[str, ...]] = ("pillow", "pillow-heif")

    def __init__(self, settings: EngineSettings) -> None:
        self._split = settings.split
        self._device = settings.device
        self._scale, self._shift = (part.to(self._device) for part in scale_and_shift(settings.mean, settings.std))
        self._memory = ReusedMemory()
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")
        # Of each batch the photos, uint8 or, where the threads have normalised them, float32: [n, size, size, 3].
        self._submitted: deque[tuple[torch.Tensor, list[Future[str | None]]]] = deque()

    def submit(self, views: Views) -> None:
        shape = (len(views), views.image_size, views.image_size, 3)
        target = self._memory.take(shape) if self._device.type == "cpu" else None
        if target is not None:
            pixels = torch.from_numpy(target)
        else:
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            target = pixels.numpy()
        jobs = [self._pool.submit(self._execute, views, position, target) for position in range(len(views))]
        self._submitted.append((pixels, jobs))

    def fetch(self) -> Pixels:
        pixels, jobs = self._submitted.popleft()
        failed = {position: reason for position, job in enumerate(jobs) if (reason := job.result())}
        if failed:
            kept = [position for position in range(len(jobs)) if position not in failed]
            pixels = pixels[kept]
        if pixels.dtype == torch.float32:
            return Pixels(pixels.permute(0, 3, 1, 2), failed)
        return Pixels(normalised(pixels.to(self._device, non_blocking=True), self._scale, self._shift), failed)

    def cancel(self) -> None:
        for _, jobs in self._submitted:
            for job in jobs:
                job.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self.cancel()
        self._pool.shutdown(cancel_futures=True)
        self._memory = ReusedMemory()

    def _execute(self, views: Views, position: int, target: np.ndarray) -> str | None:
        """Puts one view's pixels in its place, normalised where that has floats; returns a reason where the photo
        cannot be decoded."""
        try:
            target[position] = self._pixels(views, position)
        except Exception as error:  # Pillow's parsers raise many kinds of error on broken data
            return decoding_error(error)
        if target.dtype == np.float32:  # with the bits of `normalised`
            rows = target[position].reshape(views.image_size, -1)  # of three values each it would take 15 times as long
            rows *= np.tile(self._scale.numpy(), views.image_size)
            rows += np.tile(self._shift.numpy(), views.image_size)
        return None

    def _pixels(self, views: Views, position: int) -> np.ndarray:
        """uint8 [image_size, image_size, 3], of one view. Raises where the photo cannot be decoded."""
        return np.asarray(view_of(self._split, views, position))


ENGINE: type[Engine] = PillowEngine
AUTO_WITH = ("a GPU", "no GPU")
USES_MEMORY = True


def fault(device: torch.device) -> Fault | None:
    return None


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [3] each, of `normalised`: (x / 255 - mean) / std == x * scale + shift."""
    return 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)


def network_input(
    squares: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> `normalised`, on the device."""
    scale, shift = (part.to(device) for part in scale_and_shift(mean, std))
    return normalised(torch.from_numpy(squares.copy()).to(device), scale, shift)


def normalised(pixels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W], channels last in memory."""
    return pixels.float().mul_(scale).add_(shift).permute(0, 3, 1, 2)
