"""What a model's frozen part makes of photos, computed once where it is always the same for a view."""

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.copies import read_later, room_on, to_device, to_host
from pipelines.errors import PassStopped
from pipelines.loader import Batch, Loader, share_bad_photos
from pipelines.model import TransferModel

import torch
from accelerate import Accelerator
from tqdm import tqdm

# 512 MiB are 2,600 photos' maps behind ResNet-18's layer3 and 260,000 photos' features. They are kept on the GPU where
# they are a small part of its memory; elsewhere in the host's, as a GPU's is for the batch that was found to fit.
_LIMIT = 2**29


@dataclass
class FeatureCache:
    """Of validation: what a fixed frozen part made of each micro-batch of this process's share.

    limit: bytes. What is larger is computed each time. room: bytes of them that stay on the GPU.
    """

    limit: int = _LIMIT
    room: int = 0
    features: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    size: int = 0
    complete: bool = False

    def clear(self) -> None:
        self.features.clear()
        self.size = 0

    def add(self, hidden: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> None:
        self.size += hidden.nbytes
        if self.size <= self.limit:
            self.features.append((hidden if self.size <= self.room else to_host(hidden), labels, indices))
        else:
            self.features.clear()


class TrainingFeatures:
    """Of training: what the frozen part makes of a batch, looked up where the photo's view has been seen before.

    Views are kept where the `epochs` of the run show some of them again, the frozen part is fixed and all fit into
    `limit` bytes. A view is computed for all photos in one pass in the dataset's order, before its first epoch in this
    life of the run: the last bits may depend on the company that a photo is computed in, and so a resume finds them
    again.
    """

    def __init__(
        self,
        network: TransferModel,
        training: Loader,
        accelerator: Accelerator,
        *,
        views_per_photo: int | None,
        epochs: int,
        limit: int = _LIMIT,
    ) -> None:
        self._network = network
        self._training = training
        self._accelerator = accelerator
        self._views_per_photo = views_per_photo or 0
        self._views: dict[int, torch.Tensor] = {}
        self._now: torch.Tensor | None = None
        self.bytes = 0
        if views_per_photo and views_per_photo < epochs and network.frozen_part_is_fixed:
            self._of_none = self._frozen_part(training.empty_batch().images)
            numbers = math.prod(self._of_none.shape[1:])
            self.bytes = views_per_photo * training.plan.length * numbers * self._of_none.element_size()
        self.are_kept = 0 < self.bytes <= limit
        self._home = accelerator.device if self.bytes <= room_on(accelerator.device) else torch.device("cpu")

    def report(self) -> list[str]:
        """For the start of a run: whether the views are kept, where there are few; at most one line."""
        if not self.bytes:
            return []
        size, whose = f"{self.bytes / 2**20:,.0f} MiB", "" if self._home.type == "cpu" else "the GPU's "
        return [
            f"frozen part: computed once for each of {self._views_per_photo} views of a photo, {size} in {whose}memory"
            if self.are_kept
            else f"frozen part: computed every time, as all views would take {size} of memory"
        ]

    def prepare(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Before `epoch`: computes its view of all photos, unless that is known. Called on all processes.

        stop: asked before each batch. Where it says yes on any process, PassStopped is raised on all.
        """
        if not self.are_kept:
            return
        view = epoch % self._views_per_photo
        if view not in self._views:
            self._views[view] = self._compute(epoch, f"view {view + 1} of {self._views_per_photo}", stop)
        self._now = self._views[view]

    def of(self, batch: Batch) -> torch.Tensor:
        """What the model's `forward` takes, on the device, for a batch of the epoch that was prepared."""
        if self._now is None:
            return self._network.frozen_part(batch.images)
        rows = self._now.index_select(0, to_device(batch.indices, self._now.device))
        _, channels, *sides = self._of_none.shape
        return to_device(rows, self._accelerator.device).unflatten(1, (*sides, channels)).movedim(-1, 1)

    def _compute(self, epoch: int, name: str, stop: Callable[[], bool]) -> torch.Tensor:
        device = self._accelerator.device
        loader = self._training.in_order()
        waited = loader.wait_seconds
        # A photo's features are one row with the channels last, as the trained part wants them when they are looked up.
        numbers = math.prod(self._of_none.shape[1:])
        known = self._of_none.new_empty((loader.plan.length, numbers), device=self._home)
        asked: deque[Callable[[], list[float]]] = deque()
        steps = tqdm(
            loader.epoch(epoch),
            total=loader.steps_per_epoch,
            desc=name,
            leave=False,
            disable=not self._accelerator.is_main_process or not sys.stderr.isatty(),
        )
        for number, step in enumerate(steps):
            asked.append(read_later(self._accelerator.reduce(torch.full((1,), float(stop()), device=device), "sum")))
            if number and any(asked.popleft()()):  # a batch later, so that the GPU is not waited for
                raise PassStopped
            first = number * loader.batch_size
            # Each process fills the rows of its share, and the sum with the others' zeros has all of them.
            rows = torch.zeros((step.places, numbers), device=device)
            for batch in step.batches:
                if len(batch):
                    features = self._frozen_part(batch.images).movedim(1, -1).flatten(1)
                    rows[to_device(batch.indices - first, device)] = features.float()
            known[first : first + step.places] = self._accelerator.reduce(rows, "sum")
        share_bad_photos(self._training)
        self._training.wait_seconds += loader.wait_seconds - waited
        return known

    def _frozen_part(self, images: torch.Tensor) -> torch.Tensor:
        with self._accelerator.autocast():
            return self._network.frozen_part(images)
