"""What a model's frozen part makes of photos, computed once where it is always the same for a view."""

import hashlib
import inspect
import json
import math
import os
import platform
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from pipelines.data.loader import Batch, Loader, share_bad_photos
from pipelines.data.plan import random_bits
from pipelines.distributed.copies import free_bytes_on, read_later, to_device
from pipelines.errors import StopAgreed
from pipelines.model.feature_store import FeatureStore
from pipelines.model.network import TransferModel
from pipelines.text import counted

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm import tqdm

# 512 MiB are 2,600 photos' maps behind ResNet-18's layer3 and 260,000 photos' features. They are kept on the GPU where
# they are a small part of its memory; elsewhere in the host's, as a GPU's is for the batch that was found to fit.
MEMORY_LIMIT = 2**29
# What decodes, crops and computes: another version of one of these may give other numbers.
_MAKERS = (
    *("pipelines.data.augment", "pipelines.data.decode", "pipelines.data.engines.pillow", "pipelines.data.headers"),
    *("pipelines.data.loader", "pipelines.data.preprocess", "pipelines.data.shrink"),
    *("pipelines.model.features", "pipelines.model.folding", "pipelines.model.network", "pipelines.model.teacher"),
)
_LIBRARIES = ("torch", "torchvision", "numpy")
# Photos of a pass's batch on a CPU, where small batches run faster than large ones. The same on all machines, as the
# last bits may depend on it.
_CPU_BATCH = 8
_ROWS = 4096  # that are sent to the other processes at once


class FrozenFeatures:
    """Of a split: what the frozen part makes of a batch, looked up where the photo's view has been seen before.

    Views are kept where a photo has few, for the run's later `epochs` and in `store` for other runs, the frozen part is
    fixed and all that are shown fit into `limit` bytes. A view is computed for all photos in one pass in the dataset's
    order, before its first epoch in this attempt at the run: the last bits may depend on the
    other photos of a photo's batch, and so a resume finds them again.

    micro_batch: photos of a pass's batch on a process, at most. mirrored: each view together with its mirror image, as
    `view_features` of a network with `test_flips` has them. store: on the main process, or None. A view in which a
    photo could not be decoded is not stored: each run is to meet that photo, and to say so or end. name: what computes
    them, for people.
    """

    def __init__(
        self,
        network: TransferModel,
        loader: Loader,
        accelerator: Accelerator,
        *,
        views_per_photo: int | None,
        epochs: int,
        micro_batch: int,
        mirrored: bool = False,
        limit: int = MEMORY_LIMIT,
        store: FeatureStore | None = None,
        name: str = "frozen part",
    ) -> None:
        self.name = name
        self._network = network
        self._loader = loader
        self._accelerator = accelerator
        self._views_per_photo = views_per_photo or 0
        self._shown = min(self._views_per_photo, epochs)
        self._micro_batch = min(micro_batch, _CPU_BATCH) if accelerator.device.type == "cpu" else micro_batch
        self._copies = 1 + mirrored
        self._store = store
        self._views: dict[int, torch.Tensor] = {}
        self._now: torch.Tensor | None = None
        self.bytes = 0
        if views_per_photo and network.frozen_part_is_fixed:
            with accelerator.autocast():
                self._of_none = network.forward_frozen(loader.empty_batch().images)
            self._numbers = math.prod(self._of_none.shape[1:])
            self.bytes = self._shown * self._copies * loader.plan.length * self._numbers * self._of_none.element_size()
        self.are_kept = 0 < self.bytes <= limit
        self._limit = limit
        self._home = accelerator.device if self.bytes <= free_bytes_on(accelerator.device) else torch.device("cpu")

    def report(self) -> list[str]:
        """For the start of a run: whether the views are kept, where there are few; at most one line."""
        if not self.bytes:
            return []
        views = "the one view" if self._views_per_photo == 1 else f"each of {self._views_per_photo} views"
        size, most = (f"{each / 2**20:,.0f} MiB" for each in (self.bytes, max(0, self._limit)))
        whose = "" if self._home.type == "cpu" else "the GPU's "
        return [
            f"{self.name}: computed once for {views} of a photo, {size} in {whose}memory"
            if self.are_kept
            else f"{self.name}: computed every time, as all views would take {size} of memory, with {most} to take"
        ]

    def in_store(self) -> str:
        """Words on how many views other runs have left, on the main process; "" where there are none."""
        views = range(self._shown if self._store and self.are_kept else 0)
        found = sum(self._store.has(self._maker, self._photos(view)) for view in views if self._store)
        photos = counted(self._loader.plan.length, f"{self._loader.split.name} photo")
        return f"{counted(found, 'view')} of {photos}" if found else ""

    def prepare(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Before `epoch`: finds or computes its view of all photos, unless that is known. Called on all processes.

        stop: asked before each batch. Where it says yes on any process, StopAgreed is raised on all.
        """
        if not self.are_kept:
            return
        view = epoch % self._views_per_photo
        if view not in self._views:
            rows = self._stored(view)
            self._views[view] = self._compute(view, stop) if rows is None else rows
        self._now = self._views[view]

    def of(self, batch: Batch) -> torch.Tensor:
        """What the model's `forward_trained` takes, on the device, for a batch of the epoch that was prepared."""
        if self._now is None:
            return self._compute_of(batch.images)
        at = (
            batch.indices if self._copies == 1 else torch.cat([batch.indices, batch.indices + self._loader.plan.length])
        )
        rows = self._now.index_select(0, to_device(at, self._now.device))
        _, channels, *sides = self._of_none.shape
        return to_device(rows, self._accelerator.device).unflatten(1, (*sides, channels)).movedim(-1, 1)

    @property
    def head_inputs(self) -> int:
        """How many numbers the head takes of a photo, behind the trained part too."""
        return self._network.head.in_features

    @property
    def droppable_blocks(self) -> int:
        """Of how many blocks something may be left out now, as the model's `droppable` says."""
        return len(self._network.droppable)

    @property
    def rows(self) -> torch.Tensor:
        """Of the view that was prepared: [N, numbers], of each photo of the split, zeros where it cannot be read; or
        [2N, numbers], with those of the mirror images behind them."""
        assert self._now is not None, "no view is prepared"
        return self._now

    def _compute(self, view: int, stop: Callable[[], bool]) -> torch.Tensor:
        device = self._accelerator.device
        loader = self._loader.in_order(self._micro_batch)
        waited = loader.wait_seconds
        # A photo's features are one row with the channels last, as the trained part wants them when they are looked up.
        known = self._of_none.new_empty((self._copies, loader.plan.length, self._numbers), device=self._home)
        asked: deque[Callable[[], list[float]]] = deque()
        steps = tqdm(
            loader.epoch(view),
            total=loader.steps_per_epoch,
            desc=f"{self.name}: {loader.split.name}, view {view + 1} of {self._views_per_photo}",
            leave=False,
            disable=not self._accelerator.is_main_process or not sys.stderr.isatty(),
        )
        for number, step in enumerate(steps):
            asked.append(read_later(self._accelerator.reduce(torch.full((1,), float(stop()), device=device), "sum")))
            if number and any(asked.popleft()()):  # a batch later, so that the GPU is not waited for
                raise StopAgreed
            first = number * loader.batch_size
            # Each process fills the rows of its share, and the sum with the others' zeros has all of them.
            rows = torch.zeros((self._copies, step.size, self._numbers), device=device)
            for batch in step.batches:
                if len(batch):
                    with self._accelerator.autocast():
                        features = self._compute_of(batch.images).movedim(1, -1).flatten(1)
                    rows[:, to_device(batch.indices - first, device)] = features.float().unflatten(
                        0, (self._copies, -1)
                    )
            known[:, first : first + step.size] = self._accelerator.reduce(rows, "sum")
        share_bad_photos(self._loader)
        self._loader.wait_seconds += loader.wait_seconds - waited
        if self._store and not self._loader.bad and not _has_changed(self._loader):
            self._store.keep(self._maker, self._photos(view), known.flatten(0, 1).cpu())
        return known.flatten(0, 1)

    def _stored(self, view: int) -> torch.Tensor | None:
        """The view as the main process finds it in its store, on all processes."""
        device, total = self._accelerator.device, self._copies * self._loader.plan.length
        found = self._store.read(self._maker, self._photos(view)) if self._store else None
        if found is not None and (found.shape[1], found.dtype) != (self._numbers, self._of_none.dtype):
            found = None
        if not self._accelerator.reduce(torch.full((1,), float(found is not None), device=device), "sum").item():
            return None
        if self._accelerator.num_processes == 1 and found is not None:
            return found.to(self._home)
        known = self._of_none.new_empty((total, self._numbers), device=self._home)
        for first in range(0, total, _ROWS):
            rows = torch.empty((min(_ROWS, total - first), self._numbers), device=device)
            if found is not None:
                rows.copy_(found[first : first + _ROWS])
            known[first : first + _ROWS] = broadcast(rows)
        return known

    def _photos(self, view: int) -> np.ndarray:
        """int64, one for each row, of a photo's content and view: the same wherever the two are."""
        split = self._loader.split
        views = self._loader.in_order(1).plan.views(view, np.arange(self._loader.plan.length))
        others = [views.windows.T, views.resized.T, views.anchors.T]
        if altered := views.alterations:
            colours = altered.colours.view(np.uint32)
            others += [altered.vertical_flips, altered.transposed, altered.geometry.view(np.uint32).T, colours.T]
            others += [altered.operations, altered.magnitudes.view(np.uint32)]
            others += [altered.blurs.view(np.uint32), altered.erased.T]
        columns = [
            split.signatures,
            split.mtimes,
            split.faults,
            split.path_keys,
            *(row for each in others for row in np.atleast_2d(each)),
        ]
        flips = [views.flips, ~views.flips][: self._copies]
        return np.concatenate([random_bits(*columns, flip) for flip in flips]).view(np.int64)

    @cached_property
    def _maker(self) -> str:
        """Hex, of all that a row depends on besides the photo and its view.

        The number of processes and of photos at a time is in it, as the last bits may depend on both.
        """
        device, split, engine = self._accelerator.device, self._loader.split, type(self._loader.engine)
        is_gpu = device.type == "cuda"
        versions = map(_version, (*_LIBRARIES, *engine.LIBRARIES))
        facts = [
            self._network.frozen_digest(),
            [self._loader.plan.image_size, split.transparency, split.copies and split.copies.shrink, engine.__name__],
            [self._accelerator.num_processes, self._micro_batch, self._accelerator.mixed_precision],
            [device.type, torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability()],
            [platform.machine(), torch.are_deterministic_algorithms_enabled(), *versions],
            [inspect.getsource(import_module(name)) for name in dict.fromkeys([*_MAKERS, engine.__module__])],
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _compute_of(self, images: torch.Tensor) -> torch.Tensor:
        return self._network.forward_frozen(images) if self._copies == 1 else self._network.view_features(images)


def store_report(*kinds: FrozenFeatures) -> list[str]:
    """For the start of a run: what earlier ones have left for these of one name; at most one line."""
    found = [words for features in kinds if (words := features.in_store())]
    return [f"{kinds[0].name}: {' and '.join(found)} from the cache"] if found else []


def _has_changed(loader: Loader) -> bool:
    """Whether a photo is not any more what the scan has seen, so that its features would go by a wrong name."""
    split = loader.split
    for index in np.flatnonzero(split.faults == 0).tolist():
        with suppress(OSError):
            if os.stat(split.path_bytes(index)).st_mtime_ns == split.mtimes[index]:
                continue
        return True
    return False


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
