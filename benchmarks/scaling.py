"""What a data set's size costs: the index, its memory, the plan, and a resume in mid-epoch; of made-up data sets.

    python benchmarks/scaling.py                          # 10 thousand, 1 million and 14 million photos, 4 processes
    python benchmarks/scaling.py --photos 100000 --processes 8

First some thousand links to two photos are scanned for real, from memory: how fast a disk is stays out of it.
Then an index is made as a scan makes it, of made-up paths and sizes; no photo is opened. Several processes map that
file, as those of a node do, and plan batches from all over an epoch. A stand-in for the engine takes paths and decodes
nothing. Memory is Linux's own account, /proc/self/smaps_rollup.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import ClassVar

from pipelines.data.dataset import _LAYOUT as INDEX_LAYOUT
from pipelines.data.dataset import Split, _collect, _fingerprint, _write_index, load_dataset, map_labels, scan_dataset
from pipelines.data.engines.base import Pixels
from pipelines.data.known_photos import keep_photos
from pipelines.data.loader import Loader
from pipelines.data.plan import TrainPlan, Views
from pipelines.distributed.hardware import machine
from pipelines.run.folder import versions
from pipelines.run.predictions import read_predictions, write_predictions
from pipelines.text import lasting_streams
from pipelines.training.evaluation import RECORD

import numpy as np
import torch
from PIL import Image

CLASSES, BATCH, PREFETCH, BATCHES, RESUMES, SCANNED = 1000, 256, 2, 300, 21, 4000


class PathsOnly:
    """A stand-in for an engine: it looks up the photos' paths and decodes nothing."""

    LIBRARIES: ClassVar[tuple[str, ...]] = ()

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


@lasting_streams()
def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[10_000, 1_000_000, 14_000_000])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON lines, one a size")
    options = parser.parse_args()

    print(f"{machine()}; {options.processes} processes; batches of {BATCH}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print("\n".join(f"{name:<40}{value:>16,.3f}" for name, value in scan_costs().items()), flush=True)
    fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        built, indices = [], [Path(folder) / f"{photos}.safetensors" for photos in options.photos]
        for photos, index in zip(options.photos, indices, strict=True):
            answers = fork.Queue()
            builder = fork.Process(target=build_index, args=(photos, index, answers))
            builder.start()
            built.append({"photos": photos} | answers.get())
            builder.join()
        # The readers begin as a launcher's processes do, with nothing in common.
        answers, barrier = spawn.Queue(), spawn.Barrier(options.processes)
        readers = [
            spawn.Process(target=use_indices, args=(indices, barrier, answers)) for _ in range(options.processes)
        ]
        for reader in readers:
            reader.start()
        for result in built:
            each = [answers.get() for _ in readers]
            result |= {name: statistics.median(one[name] for one in each) for name in each[0]}
            result["megabytes_of_all_processes"] = sum(one["share_megabytes"] for one in each)
            print("\n".join(["", *(f"{name:<40}{value:>16,.3f}" for name, value in result.items())]), flush=True)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
        for reader in readers:
            reader.join()


def scan_costs() -> dict[str, float]:
    """CPU time of a first scan, which reads each JPEG (115 kB) to its end, and of one that finds nothing changed."""
    with tempfile.TemporaryDirectory() as folder:
        for seed, split in enumerate(("train", "val")):
            photo = Path(folder) / f"{split}.jpg"
            noise = np.random.default_rng(seed).integers(0, 256, (375, 500, 3), dtype=np.uint8)
            Image.fromarray(noise).save(photo, quality=75)
            for label in ("a", "b"):
                (Path(folder) / "photos" / split / label).mkdir(parents=True)
                for number in range(SCANNED // 4):
                    os.link(photo, Path(folder) / "photos" / split / label / f"{number}.jpg")
        costs = {}
        for name in ("first_scan_cpu_ms_a_photo", "next_scan_cpu_ms_a_photo"):
            started = time.process_time()
            scan_dataset(Path(folder) / "photos", Path(folder), 0.2)
            costs[name] = 1000 * (time.process_time() - started) / SCANNED
        return costs


def build_index(photos: int, index: Path, answers: "Queue[dict[str, float]]") -> None:
    """Makes the index file of so many made-up photos, a twentieth of them in `val`."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    table, splits, _ = _collect(_made_up(photos), val_fraction=0.2)
    listed = time.perf_counter()
    rng = np.random.default_rng(0)
    table["sizes"][:] = rng.integers(200, 600, table["sizes"].shape)
    table["byte_sizes"][:] = rng.integers(50_000, 200_000, photos)
    table["signatures"][:] = rng.integers(0, 2**63, photos)
    table |= {name: np.zeros((0, 2), np.int64) for name in ("duplicates", "contradictions")}
    header = {"layout": INDEX_LAYOUT, "data": "made up", "root": "/photos", "splits": splits, "val_fraction": None}
    _write_index(index, table, {**header, "findings": {}, "fingerprint": _fingerprint(table, splits)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    written = time.perf_counter()
    with open(index.with_suffix(".npz"), "wb") as kept:
        keep_photos(index, kept)
    answers.put(
        {
            "list_seconds": listed - started,
            "write_seconds": written - listed,
            "keep_seconds": time.perf_counter() - written,
            "kept_bytes_per_photo": index.with_suffix(".npz").stat().st_size / photos,
            "peak_bytes_per_photo_of_the_scan": peak * 1024 / photos,
            "index_bytes_per_photo": index.stat().st_size / photos,
            **predictions_costs(load_dataset(index).splits["val"], index.with_suffix(".csv")),
        }
    )


def predictions_costs(split: Split, file: Path) -> dict[str, float]:
    """CPU time and size of predictions.csv, with five answers a photo."""
    records, rng = np.zeros(len(split), RECORD), np.random.default_rng(0)
    records["index"], records["label"], records["loss"] = range(len(split)), split.labels, rng.random(len(split))
    records["answers"] = rng.integers(0, CLASSES, records["answers"].shape)
    records["probabilities"] = rng.random(records["probabilities"].shape)
    started = time.process_time()
    write_predictions(records, split, [f"n{number:08}" for number in range(CLASSES)], file)
    written = time.process_time()
    assert len(read_predictions(file)) == len(split)
    return {
        "predictions_bytes_per_photo": file.stat().st_size / len(split),
        "write_predictions_cpu_us_a_photo": 1e6 * (written - started) / len(split),
        "read_predictions_cpu_us_a_photo": 1e6 * (time.process_time() - written) / len(split),
    }


def use_indices(indices: list[Path], barrier: Barrier, answers: "Queue[dict[str, float]]") -> None:
    """Measures the use of one index after another, all processes at the same time."""
    train_plan(np.zeros((1, 2))).views(0, np.arange(1))  # what is loaded at a first use is not the data's
    load_dataset(indices[0])
    for index in indices:
        answers.put(_use_index(index, barrier))
        barrier.wait()


def _use_index(index: Path, barrier: Barrier) -> dict[str, float]:
    """Opens the index, plans batches from all over an epoch, and starts epochs at their first and their last step."""
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
    seconds = [[_begin(split, labels, epoch, step) for step in (0, last)] for epoch in range(RESUMES)]
    # Of this thread's CPU: a busy machine stretches milliseconds to tens of them, now here, now there.
    first, last = 1000 * np.median(seconds, axis=0)
    result |= {"begin_at_first_step_cpu_ms": first, "begin_at_last_step_cpu_ms": last}
    for column in (split.labels, split.sizes, split.faults, split.path_offsets, split.path_blob):
        column.max()  # all of it, as after many epochs
    barrier.wait()
    after = _memory()
    barrier.wait()
    result["own_megabytes_of_a_process"] = (after["Anonymous"] - before["Anonymous"]) / 1e6
    result["share_megabytes"] = (after["Pss"] - before["Pss"]) / 1e6
    return result


def _begin(split: Split, labels: np.ndarray, epoch: int, step: int) -> float:
    """CPU seconds to the first batch of an epoch that begins at `step`, as a resumed run's does."""
    started = time.thread_time()
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
    return time.thread_time() - started


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
