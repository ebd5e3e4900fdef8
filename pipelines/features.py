"""What a model's frozen part makes of photos, computed once where it is always the same for a view."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.errors import PassStopped
from pipelines.loader import Batch, Loader, share_bad_photos
from pipelines.model import TransferModel

import torch
from accelerate import Accelerator
from tqdm import tqdm

# 512 MiB are 2,600 photos' maps behind ResNet-18's layer3 and 260,000 photos' features. They wait in the host's memory,
# as a GPU's is for the batch that was found to fit.
_LIMIT = 2**29


@dataclass
class FeatureCache:
    """Of validation: what a fixed frozen part made of each micro-batch of this process's share.

    limit: bytes. What is larger is computed each time.
    """

    limit: int = _LIMIT
    features: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    size: int = 0
    complete: bool = False

    def clear(self) -> None:
        self.features.clear()
        self.size = 0

    def add(self, hidden: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> None:
        self.size += hidden.nbytes
        if self.size <= self.limit:
            self.features.append((hidden.cpu(), labels, indices))
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

    def report(self) -> list[str]:
        """For the start of a run: whether the views are kept, where there are few; at most one line."""
        if not self.bytes:
            return []
        size = f"{self.bytes / 2**20:,.0f} MiB"
        return [
            f"frozen part: computed once for each of {self._views_per_photo} views of a photo, {size} in memory"
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
        features = self._now[batch.indices].to(self._accelerator.device)
        return features.contiguous(memory_format=torch.channels_last) if features.ndim == 4 else features

    def _compute(self, epoch: int, name: str, stop: Callable[[], bool]) -> torch.Tensor:
        device = self._accelerator.device
        loader = self._training.in_order()
        waited = loader.wait_seconds
        known = self._of_none.new_empty((loader.plan.length, *self._of_none.shape[1:]), device="cpu")
        steps = tqdm(
            loader.epoch(epoch),
            total=loader.steps_per_epoch,
            desc=name,
            leave=False,
            disable=not self._accelerator.is_main_process or not sys.stderr.isatty(),
        )
        for number, step in enumerate(steps):
            if self._accelerator.reduce(torch.tensor([float(stop())], device=device), "sum").item():
                raise PassStopped
            first = number * loader.batch_size
            # Each process fills the rows of its share, and the sum with the others' zeros has all of them.
            rows = torch.zeros((step.places, *self._of_none.shape[1:]), device=device)
            for batch in step.batches:
                if len(batch):
                    rows[(batch.indices - first).to(device)] = self._frozen_part(batch.images).float()
            known[first : first + step.places] = self._accelerator.reduce(rows, "sum").to(known.dtype).cpu()
        share_bad_photos(self._training)
        self._training.wait_seconds += loader.wait_seconds - waited
        return known

    def _frozen_part(self, images: torch.Tensor) -> torch.Tensor:
        with self._accelerator.autocast():
            return self._network.frozen_part(images)
