"""What a data set's size costs: the index, its memory, the plan, and a resume in mid-epoch; of made-up data sets.

    python benchmarks/scaling.py                          # 10 thousand, 1 million and 14 million photos, 4 processes
    python benchmarks/scaling.py --photos 100000 --processes 8

An index is made as a scan makes it, of made-up paths and sizes; no photo is opened, so the reading itself is not in it.
Then several processes map that file, as those of a node do, and plan batches from all over an epoch. A stand-in for the
engine takes paths and decodes nothing. Memory is Linux's own account, /proc/self/smaps_rollup.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from pipelines.dataset import _LAYOUT as INDEX_LAYOUT
from pipelines.dataset import Split, _collect, _fingerprint, _write_index, load_dataset, map_labels
from pipelines.loader import Loader, Pixels
from pipelines.plan import TrainPlan, Views
from pipelines.runs import versions

import numpy as np
import torch

CLASSES, BATCH, PREFETCH, BATCHES, RESUMES = 1000, 256, 2, 300, 21


class PathsOnly:
    """A stand-in for an engine: it looks up the photos' paths and decodes nothing."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def submit(self, views: Views) -> None:
        for index in views.indices:
            self._split.path_bytes(index)

    def fetch(self) -> Pixels:
        return Pixels(torch.empty(0), {})

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[10_000, 1_000_000, 14_000_000])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines, one a size")
    options = parser.parse_args()

    print(f"{platform.machine()}, {os.cpu_count()} cores; {options.processes} processes; batches of {BATCH}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for photos in options.photos:
            index, answers = Path(folder) / f"{photos}.safetensors", spawn.Queue()
            barrier = spawn.Barrier(options.processes)
            builder = spawn.Process(target=build_index, args=(photos, index, answers))
            builder.start()
            result = {"photos": photos} | answers.get()
            builder.join()
            readers = [
                spawn.Process(target=use_index, args=(index, barrier, answers)) for _ in range(options.processes)
            ]
            for reader in readers:
                reader.start()
            each = [answers.get() for _ in readers]
            for reader in readers:
                reader.join()
            result |= {name: statistics.median(one[name] for one in each) for name in each[0]}
            result["bytes_per_photo_on_the_node"] = sum(one["share_bytes"] for one in each) / photos
            index.unlink()
            print("\n".join([""] + [f"{name:<40}{value:>16,.3f}" for name, value in result.items()]), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")


def build_index(photos: int, index: Path, answers: "Queue[dict[str, float]]") -> None:
    """Makes the index file of so many made-up photos, a twentieth of them in `val`."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    table, splits, _ = _collect(_made_up(photos), val_fraction=0.2)
    listed = time.perf_counter()
    rng = np.random.default_rng(0)
    table["sizes"][:] = rng.integers(200, 600, table["sizes"].shape)
    table["byte_sizes"][:] = rng.integers(50_000, 200_000, photos)
    table["duplicates"] = np.zeros((0, 2), np.int64)
    header = {"layout": INDEX_LAYOUT, "data": "made up", "root": "/photos", "splits": splits, "val_fraction": None}
    _write_index(index, table, {**header, "fingerprint": _fingerprint(table, splits)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    answers.put(
        {
            "list_seconds": listed - started,
            "write_seconds": time.perf_counter() - listed,
            "peak_bytes_per_photo_of_the_scan": peak * 1024 / photos,
            "index_bytes_per_photo": index.stat().st_size / photos,
        }
    )


def use_index(index: Path, barrier: Barrier, answers: "Queue[dict[str, float]]") -> None:
    """Opens the index, plans batches from all over an epoch, and starts epochs at their first and their last step."""
    train_plan(np.zeros((1, 2))).views(0, np.arange(1))  # what is loaded at a first use is not the data's
    before, started = _memory(), time.perf_counter()
    split = load_dataset(index).splits["train"]
    labels = map_labels(split, split.classes)
    result: dict[str, float] = {"open_seconds": time.perf_counter() - started}

    plan, engine = train_plan(split.sizes), PathsOnly(split)
    rng, times = np.random.default_rng(os.getpid()), []
    for first in rng.integers(0, max(1, plan.length - BATCH), BATCHES):
        started = time.perf_counter()
        views = plan.views(1, np.arange(first, min(first + BATCH, plan.length)))
        times.append(time.perf_counter() - started)
        labels[views.indices]
        engine.submit(views)
    result["plan_batch_ms"] = 1000 * statistics.median(times)

    last = plan.length // BATCH - PREFETCH - 2  # as many batches are left as are made ready at the first step
    for name, step in {"first": 0, "middle": last // 2, "last": last}.items():
        # The least of many, as timeit's: a busy machine only ever adds.
        result[f"begin_at_{name}_step_ms"] = 1000 * min(_begin(split, labels, epoch, step) for epoch in range(RESUMES))
    for column in (split.labels, split.sizes, split.faults, split.path_offsets, split.path_blob):
        column.max()  # all of it, as after many epochs
    barrier.wait()
    after = _memory()
    barrier.wait()
    result["own_bytes_per_photo_of_a_process"] = (after["Anonymous"] - before["Anonymous"]) / len(split)
    result["share_bytes"] = after["Pss"] - before["Pss"]
    answers.put(result)


def _begin(split: Split, labels: np.ndarray, epoch: int, step: int) -> float:
    """Seconds to the first batch of an epoch that begins at `step`, as a resumed run's does."""
    started = time.perf_counter()
    loader = Loader(
        train_plan(split.sizes),
        split,
        labels,
        PathsOnly(split),
        batch_size=BATCH,
        micro_batch=BATCH,
        prefetch=PREFETCH,
        device=torch.device("cpu"),
    )
    next(next(loader.epoch(epoch, step)).batches)
    return time.perf_counter() - started


def train_plan(sizes: np.ndarray) -> TrainPlan:
    """A plan with the usual settings."""
    return TrainPlan(sizes, seed=0, image_size=224, crop_scale_min=0.08, flip_probability=0.5)


def _made_up(photos: int) -> Iterator[tuple[str, str, bytes]]:
    """Paths of the length and the form of ImageNet's."""
    for number in range(photos):
        split = "val" if number % 20 == 0 else "train"
        name = f"n{number * CLASSES // photos:08}"
        yield split, name, f"{split}/{name}/{name}_{number}.JPEG".encode()


def _memory() -> dict[str, int]:
    """Bytes of this process: Anonymous, its own alone; Pss, its share of all, mapped files divided by their users."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


if __name__ == "__main__":
    main()
