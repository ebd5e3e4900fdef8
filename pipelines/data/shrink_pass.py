"""The pass that makes shrunk copies of large photos, before anything is read from them; and when they are worth it."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event

from pipelines.cache import cache_folder, files_below, make_room
from pipelines.config import Config
from pipelines.data.dataset import Split, in_threads
from pipelines.data.decode import central_views, decoding_error, keep_shrunk, shrunk_jpeg
from pipelines.data.headers import SHRUNK
from pipelines.data.loader import bad_photo_error, decoding_threads
from pipelines.data.plan import EvalPlan
from pipelines.data.shrink import ShrunkCopies, copies_folder, likely_bytes
from pipelines.distributed.sync import local_world_size, wait_for_all
from pipelines.errors import MachineError, StopAgreed, UserError
from pipelines.text import counted

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

_TIMED = 3  # photos
_LEAST_GAIN = 1.5


def check_room(splits: Sequence[Split], config: Config) -> None:
    """UserError where the copies that `splits` need are more than the cache may have."""
    if not has_room(splits, config):
        size = _needed_bytes(splits)
        raise UserError(
            f"shrink: copies of {config.shrink} pixels take about {size / 1e9:.3g} GB, and --cache-gb is "
            f"{config.cache_gb:g}: give --cache-gb {1.2 * size / 1e9:.3g}, or a smaller --shrink"
        )


def has_room(splits: Sequence[Split], config: Config) -> bool:
    """Whether the cache may have all copies that `splits` need."""
    return _needed_bytes(splits) <= config.cache_gb * 1e9


def _needed_bytes(splits: Sequence[Split]) -> int:
    return sum(likely_bytes(split.sizes[split.kinds & SHRUNK > 0]) for split in splits)


def shrink_report(splits: Sequence[Split], config: Config) -> list[str]:
    """For the start of a run: what is read from copies, or what they would gain; at most one line."""
    if not config.shrink:
        return shrink_advice(splits[0], resize=config.resize, image_size=config.evaluation_size)
    count = sum(np.count_nonzero(split.kinds & SHRUNK) for split in splits)
    total = counted(sum(map(len, splits)), "photo")
    if not count:
        return [f"shrink: plays no part, as no photo has a shorter side of more than {config.shrink} pixels"]
    size = f"about {_needed_bytes(splits) / 1e6:,.0f} MB in {copies_folder(cache_folder())}"
    return [f"shrink: {count} of {total} are read from copies of {config.shrink} pixels, {size}"]


def shrink_advice(split: Split, *, resize: int, image_size: int) -> list[str]:
    """A line with the gain that `shrink` would bring, measured on a few photos, where most are large; else none."""
    sound = np.flatnonzero(split.faults == 0)
    side = int(np.median(split.sizes[sound].min(axis=1))) if len(sound) else 0
    if side <= 2 * resize:
        return []
    few = np.unique(sound[np.linspace(0, len(sound) - 1, _TIMED).astype(int)])

    def seconds(of: Split) -> float:
        started = time.perf_counter()
        central_views(of, few, EvalPlan(of.sizes, image_size=image_size, resize=resize))
        return time.perf_counter() - started

    with suppress(Exception), tempfile.TemporaryDirectory() as folder:  # advice ends no run
        shrunk = split.shrunk(ShrunkCopies(2 * resize, Path(folder)))
        as_they_lie, _, again = seconds(split), seconds(shrunk), seconds(shrunk)
        if (gain := as_they_lie / again) >= _LEAST_GAIN:
            return [
                f"shrink: with --shrink {2 * resize} these photos, whose shorter sides are {side} pixels (median), "
                f"would be read {gain:.1f} times as fast from the second epoch on (timed on {len(few)} of them)"
            ]
    return []


def make_copies(
    splits: Sequence[Split], config: Config, state: PartialState, stop: Callable[[], bool] = lambda: False
) -> None:
    """Makes the copies of large photos that are missing, where they are kept, each process its share of its node's.

    stop: asked again and again. Where it says yes on any process, StopAgreed is raised on all. A photo that cannot be
    decoded is a UserError, or left to the loader, which leaves it out, with skip_bad_files.
    """
    kept = [split for split in splits if split.copies and split.copies.cache]
    wanted = [(split, int(index)) for split in kept for index in np.flatnonzero(split.kinds & SHRUNK)]
    if not wanted:
        return
    if state.is_local_main_process:
        _make_room(wanted, config)
    here = local_world_size()
    mine = wanted[state.local_process_index % here :: here]
    # Nodes that share a cache folder begin in different places, and skip what another has made.
    node, nodes = state.process_index // here, max(1, state.num_processes // here)
    start = len(mine) * node // nodes
    mine = mine[start:] + mine[:start]
    is_asked = Event()

    def make(row: int) -> None:
        split, index = mine[row]
        if is_asked.is_set() or stop():
            is_asked.set()
        elif split.has_source(index):
            with suppress(OSError):
                os.utime(split.source(index))  # used just now
        else:
            _make(split, index, config)

    share = f", share of {here} processes" if here > 1 else ""
    title = f"photos shrunk to {config.shrink} pixels{share}"
    in_threads(make, len(mine), title, decoding_threads(config), is_shown=state.is_main_process)
    if wait_for_all(state, lambda: is_asked.is_set() or stop()):
        is_asked.set()
    if any(gather_object([is_asked.is_set()])):
        raise StopAgreed


def _make(split: Split, index: int, config: Config) -> None:
    try:
        content = shrunk_jpeg(split, index)
    except Exception as error:  # Pillow's parsers raise many kinds of error on broken data
        if config.skip_bad_files:
            return
        raise bad_photo_error(split, index, decoding_error(error)) from None
    try:
        keep_shrunk(split, index, content)
    except OSError as error:
        raise MachineError(
            f"{copies_folder(_cache_of(split))}: a shrunk photo cannot be kept there ({error.strerror}): make room, or "
            "set the variable DALITUNE_CACHE to a folder elsewhere",
            on_one_process=True,
        ) from None


def _cache_of(split: Split) -> Path:
    assert split.copies is not None
    assert split.copies.cache is not None, "there, copies are kept"
    return split.copies.cache


def _make_room(wanted: Sequence[tuple[Split, int]], config: Config) -> None:
    """Removes what other runs have left, where there would be more than the cache may have."""
    folder = copies_folder(_cache_of(wanted[0][0]))
    needed = {file: split.sizes[index] for split, index in wanted if (file := split.copy_file(index))}
    missing = needed.keys() - {file for file, _ in files_below(folder)}
    size = likely_bytes(np.array([needed[file] for file in missing], np.int64).reshape(-1, 2))
    make_room(folder, size, int(config.cache_gb * 1e9), needed.keys())
