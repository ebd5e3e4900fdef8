"""The loader: walks through a plan in global steps and hands this process its share, as normalised images.

An engine (`engines`) is given `Views` and returns pixels; order, sharding and the short ends of an epoch are decided
here, for all of them.
"""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.config import Config
from pipelines.data.augment import altered
from pipelines.data.dataset import Split
from pipelines.data.engines.base import Engine
from pipelines.data.engines.factory import make_engine
from pipelines.data.mixing import MOST_OTHERS, MixedViews, mixed, mixed_views
from pipelines.data.plan import Plan, TrainPlan, ViewsInOrder, eval_plan, share, train_plan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.distributed.copies import to_device
from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.sync import local_world_size
from pipelines.errors import UserError
from pipelines.text import printable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm


class Partners(NamedTuple):
    """What the photos of a batch are mixed with. labels: int64 [n], the partners'. shares: float32 [n], what each
    photo's own label counts; the rest is the partner's. Both on the device."""

    labels: torch.Tensor
    shares: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this process.

    images: float32 [n, 3, H, W], normalised, on the device, in channels-last memory; [0, 3, H, W] where the epoch was
    asked for without them.
    labels: int64 [n], on the device.
    indices: int64 [n], on the CPU: positions in the dataset's split.
    partners: None where no photo is mixed with another. keys: of training photos, uint64 [n], as `plan.Views` has them.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    partners: Partners | None = None
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def names(self, classes: Sequence[str]) -> list[str]:
        """What each photo is, for a picture: of mixed ones two lines with the shares."""
        own = [classes[label] for label in self.labels.tolist()]
        if self.partners is None:
            return own
        others, shares = (each.tolist() for each in self.partners)
        return [
            name if share >= 0.995 else f"{share:.2f} {name}\n{1 - share:.2f} {classes[other]}"
            for name, other, share in zip(own, others, shares, strict=True)
        ]


@dataclass(frozen=True)
class Step:
    """One global batch: `size` positions of the plan over all processes, and this process's micro-batches (maybe none).

    rounds: how many micro-batches the process with the most has; the same on all processes. The micro-batches are made
    ready in the background and must be taken in order, before the next step.
    """

    size: int
    rounds: int
    batches: Iterator[Batch]


class Loader:
    """Executes `plan` on the photos of `split` through `engine`.

    labels: int [N], the model's class of each photo. batch_size: positions of a global step. micro_batch: the most
    photos of one `Batch`. prefetch: how many micro-batches are kept in the making. skip_bad_files: leave out a photo
    that cannot be decoded, its place staying empty, instead of ending with a UserError that names it.
    """

    def __init__(
        self,
        plan: Plan,
        split: Split,
        labels: np.ndarray,
        engine: Engine,
        *,
        batch_size: int,
        micro_batch: int,
        prefetch: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        skip_bad_files: bool = False,
    ) -> None:
        self.plan = plan
        self.split = split
        self.engine = engine
        self.batch_size = batch_size
        self.steps_per_epoch = -(-plan.length // batch_size)
        self.wait_seconds = 0.0  # how long the loop has waited for photos, all in all
        self.bad: set[int] = set()  # photos that were met and could not be decoded: they are left out from then on
        self._labels = labels
        self._micro_batch = micro_batch
        self._prefetch = prefetch
        self._device = device
        self._rank, self._world_size = rank, world_size
        self._skip_bad_files = skip_bad_files

    def epoch(self, epoch: int, start_step: int = 0, *, images: bool = True) -> Iterator[Step]:
        """The steps of `epoch` (0 is the first) from `start_step` on. May be abandoned anywhere for another epoch.

        images: False where the labels and indices are all that is wanted; then nothing is decoded.
        """
        self.engine.cancel()
        ahead = self._submitted(epoch, start_step) if images else self._views(epoch, start_step)
        pending: list[MixedViews] = []
        next_batch = self._next_batch if images else self._next_batch_without_images
        for step in range(start_step, self.steps_per_epoch):
            size, mine = self._my_share(step)
            largest_share = -(-size // self._world_size)
            count, rounds = (-(-photos // self._micro_batch) for photos in (len(mine), largest_share))
            yield Step(size, rounds, (next_batch(ahead, pending) for _ in range(count)))

    def in_order(self, micro_batch: int) -> "Loader":
        """The same photos in the dataset's order, as each epoch shows them, `micro_batch` at a time on each process.

        The two share an engine, which must have been made for so many at a time: an epoch of one ends what the other
        has begun. Of a training's loader only with `views_per_photo`.
        """
        other = copy.copy(self)
        other.plan = ViewsInOrder(self.plan) if isinstance(self.plan, TrainPlan) else self.plan
        other._micro_batch, other.batch_size = micro_batch, micro_batch * self._world_size
        other.steps_per_epoch = -(-self.plan.length // other.batch_size)
        return other

    def central(self, config: Config) -> "Loader":
        """Of a training's loader: the same photos as validation sees them. The two share an engine, as above. config:
        with what crop_mode auto has come to."""
        other = copy.copy(self)
        other.plan = eval_plan(config, self.split.sizes)
        return other

    def empty_batch(self) -> Batch:
        """A batch of no photos, for a process without a share in a step: it takes part in forward and backward."""
        nobody = np.empty(0, np.int64)
        labels, keys = self._labels_of(nobody), nobody.astype(np.uint64)
        return Batch(self._no_images(), labels, torch.from_numpy(nobody), keys=keys)

    def close(self) -> None:
        """Ends the engine. The loader cannot be used any more."""
        self.engine.close()

    def _my_share(self, step: int) -> tuple[int, range]:
        first = step * self.batch_size
        size = min(self.batch_size, self.plan.length - first)
        start, stop = share(size, self._rank, self._world_size)
        return size, range(first + start, first + stop)

    def _views(self, epoch: int, start_step: int) -> Iterator[MixedViews]:
        """This process's micro-batches, one after another, without the photos that cannot be read."""
        for step in range(start_step, self.steps_per_epoch):
            _, mine = self._my_share(step)
            for first in range(mine.start, mine.stop, self._micro_batch):
                positions = np.arange(first, min(first + self._micro_batch, mine.stop))
                asked = mixed_views(self.plan, epoch, positions)
                yield asked.select(self._readable(asked.views.indices))

    def _submitted(self, epoch: int, start_step: int) -> Iterator[MixedViews]:
        """Gives the engine one micro-batch after another; each is yielded as soon as it is in the making."""
        for asked in self._views(epoch, start_step):
            if len(asked):
                self.engine.submit(asked.views)
            yield asked

    def _readable(self, indices: np.ndarray) -> np.ndarray:
        sound = self.split.faults[indices] == 0
        return sound & ~np.isin(indices, list(self.bad)) if self.bad else sound

    def _next_batch(self, ahead: Iterator[MixedViews], pending: list[MixedViews]) -> Batch:
        while len(pending) <= self._prefetch and (asked := next(ahead, None)) is not None:
            pending.append(asked)
        asked = pending.pop(0)
        if not len(asked):
            return self.empty_batch()
        started = time.perf_counter()
        pixels = self.engine.fetch()
        self.wait_seconds += time.perf_counter() - started
        if pixels.failed:
            asked = self._without_failed(asked, pixels.failed)
        views, mixing = asked.views, asked.mixing
        images = altered(pixels.images, views.alterations) if views.alterations else pixels.images
        if mixing is None:
            return self._batch(images, asked)
        shares = to_device(torch.from_numpy(mixing.shares), self._device)
        partners = Partners(self._labels_of(views.indices[mixing.partners]), shares)
        return self._batch(mixed(images, mixing), asked, partners)

    def _next_batch_without_images(self, ahead: Iterator[MixedViews], _: list[MixedViews]) -> Batch:
        return self._batch(self._no_images(), next(ahead))

    def _batch(self, images: torch.Tensor, asked: MixedViews, partners: Partners | None = None) -> Batch:
        indices, keys = asked.indices, asked.views.keys
        keys = None if keys is None else keys[: len(asked)]
        return Batch(images, self._labels_of(indices), torch.from_numpy(indices), partners, keys)

    def _labels_of(self, indices: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(self._labels[indices].astype(np.int64)), self._device)

    def _no_images(self) -> torch.Tensor:
        size = self.plan.image_size
        return torch.empty((0, 3, size, size), device=self._device, memory_format=torch.channels_last)

    def _without_failed(self, asked: MixedViews, failed: dict[int, str]) -> MixedViews:
        for position, reason in failed.items():
            if position >= len(asked):  # a partner, which its own batch meets
                continue
            index = int(asked.indices[position])
            if not self._skip_bad_files:
                raise bad_photo_error(self.split, index, reason)
            # Above a progress bar, not into it.
            tqdm.write(f"left out: {_cannot_be_decoded(self.split, index, reason)}", file=sys.stderr)
            self.bad.add(index)
        kept = np.ones(len(asked.views), bool)
        kept[list(failed)] = False
        return asked.select(kept)


def bad_photo_error(split: Split, index: int, reason: str) -> UserError:
    """What a photo ends a run with that one process has met and could not decode."""
    advice = "repair or remove it, or leave such photos out with --skip-bad-files"
    line = f"{_cannot_be_decoded(split, index, reason)}: {advice}"
    return UserError(line, on_one_process=True, bad_photo=(split.name, index))


def _cannot_be_decoded(split: Split, index: int, reason: str) -> str:
    return f"{printable(split.path(index))}: cannot be decoded ({printable(reason)})"


def share_bad_photos(loader: Loader) -> None:
    """Tells all processes which photos any of them could not decode, so that each is met, and said, once."""
    loader.bad.update(*gather_object([loader.bad]))


def train_loader(
    config: Config, split: Split, labels: np.ndarray, state: PartialState, engine: str, micro_batch: int
) -> Loader:
    """Planned random crops and flips of `split`, `config.batch_size` positions a step over all processes.

    micro_batch: the most photos of one batch on one process; with `views_per_photo`, which is a number or None here,
    `in_order` may ask for `config.eval_batch_per_device`.
    """
    plan = train_plan(config, split.sizes, labels)
    largest = largest_training_batch(config, micro_batch)
    return _loader(config, plan, split, labels, state, engine, config.batch_size, micro_batch, largest)


def largest_training_batch(config: Config, micro_batch: int) -> int:
    """Photos that a training's engine decodes at once: a pass over frozen features has evaluation's batches, and mixed
    photos may have partners in other batches."""
    if config.mixes_photos:
        return micro_batch + MOST_OTHERS
    return max(micro_batch, config.eval_batch_per_device) if config.views_per_photo else micro_batch


def eval_loader(
    config: Config,
    split: Split,
    labels: np.ndarray,
    state: PartialState,
    engine: str,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Loader:
    """The central view of every photo of `split`, `config.eval_batch_per_device` at a time on each process."""
    plan = eval_plan(config, split.sizes)
    micro_batch = config.eval_batch_per_device
    batch_size = micro_batch * state.num_processes
    return _loader(config, plan, split, labels, state, engine, batch_size, micro_batch, micro_batch, mean, std)


def decoding_threads(config: Config) -> int:
    """Of a process, in which photos are decoded."""
    return config.loader_threads or max(1, cpu_cores() // local_world_size())


def _loader(
    config: Config,
    plan: Plan,
    split: Split,
    labels: np.ndarray,
    state: PartialState,
    engine: str,
    batch_size: int,
    micro_batch: int,
    largest: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Loader:
    return Loader(
        plan,
        split,
        labels,
        make_engine(
            engine,
            split,
            micro_batch=largest,
            device=state.device,
            threads=decoding_threads(config),
            mean=mean,
            std=std,
        ),
        batch_size=batch_size,
        micro_batch=micro_batch,
        prefetch=config.prefetch,
        device=state.device,
        rank=state.process_index,
        world_size=state.num_processes,
        skip_bad_files=config.skip_bad_files,
    )
