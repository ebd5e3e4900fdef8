"""How many photos a second each loader delivers, without a model: both engines, and torchvision's DataLoader.

    python benchmarks/loader.py --data photos/ --runs 5 --threads 1 2 4

Every run of every variant is one epoch of planned training crops over the split `train`. The variants take turns, so
that a busy moment of the machine meets all of them; the table gives the median and its ratio to the first. Raw numbers
go to --out as JSON lines.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.dataset import Split, load_dataset, scan_dataset
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD, Loader, make_engine
from pipelines.photos import cache_folder, locate
from pipelines.plan import TrainPlan
from pipelines.runs import versions
from pipelines.text import lasting_streams

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T


@lasting_streams()
def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train/ and val/ (default: ants and bees, or DALITUNE_DATA)")
    parser.add_argument("--runs", type=int, default=5, help="epochs of each variant")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON lines, one a run")
    options = parser.parse_args()

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cache = cache_folder()
    dataset = load_dataset(scan_dataset(locate(options.data, cache), cache, 0.2))
    split = dataset.splits["train"]
    variants: dict[str, Callable[[int], int]] = {}
    for engine in ("torch", "dali"):
        for threads in options.threads:
            variants[f"{engine}, {threads} threads"] = _planned(split, engine, threads, options.batch_size, device)
    for workers in (0, *options.threads):
        variants[f"torchvision, {workers} workers"] = _torchvision(dataset.root / "train", workers, options.batch_size)

    rates: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(options.runs + 1):  # the first only warms up: files into memory, threads and processes started
        for name, epoch in variants.items():
            started = time.perf_counter()
            photos = epoch(run)
            rate = photos / (time.perf_counter() - started)
            if run:
                rates[name].append(rate)
                if options.out:
                    with open(options.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"variant": name, "run": run, "images_per_s": rate}) + "\n")
    first = statistics.median(next(iter(rates.values())))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {device}; {len(split)} photos; n = {options.runs}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{'variant':<26}{'images/s':>10}{'least':>9}{'most':>9}{'ratio':>8}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<26}{median:>10.1f}{min(values):>9.1f}{max(values):>9.1f}{median / first:>8.2f}")


def _planned(split: Split, engine: str, threads: int, batch_size: int, device: torch.device) -> Callable[[int], int]:
    plan = TrainPlan(split.sizes, seed=0, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    executor = make_engine(engine, split, image_size=224, micro_batch=batch_size, device=device, threads=threads)
    labels = split.labels.astype(np.int64)
    loader = Loader(
        plan, split, labels, executor, batch_size=batch_size, micro_batch=batch_size, prefetch=2, device=device
    )
    return lambda run: sum(len(batch) for step in loader.epoch(run) for batch in step.batches)


def _torchvision(folder: Path, workers: int, batch_size: int) -> Callable[[int], int]:
    normalise = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    transform = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    loader = DataLoader(
        datasets.ImageFolder(folder, transform),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda run: sum(len(labels) for _, labels in loader)


if __name__ == "__main__":
    main()
