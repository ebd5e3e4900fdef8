"""How many photos a second each loader delivers, without a model: both engines, DALI's own reader, torchvision's.

    python benchmarks/loader.py --data photos/ --runs 5 --threads 1 2 4

A run of a variant is some epochs of training crops over the split `train`, planned or drawn by the library itself. The
variants take turns, so that a busy moment of the machine meets all of them. Each makes its loader anew in its turn, and
that is measured too: nobody reads ahead while others have theirs. The table gives the median and its ratio to the
first; raw numbers go to --out as JSON lines.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.cache import cache_folder
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.loader import Loader
from pipelines.data.plan import TrainPlan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.samples import locate
from pipelines.distributed.hardware import machine
from pipelines.run.folder import versions
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
    parser.add_argument("--runs", type=int, default=5, help="turns of each variant")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="+", help="torchvision's processes (default: 0 and --threads)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON lines, one a run")
    options = parser.parse_args()

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cache = cache_folder()
    dataset = load_dataset(scan_dataset(locate(options.data, cache), cache, 0.2))
    split = dataset.splits["train"]
    variants: dict[str, Callable[[int], int]] = {}
    for engine in ("pillow", "dali"):
        for threads in options.threads:
            variants[f"{engine}, {threads} threads"] = partial(_planned, split, engine, threads, device, options)
    for threads in options.threads:
        variants[f"DALI's own reader, {threads}"] = partial(
            _dalis_own, dataset.root / "train", threads, device, options
        )
    for workers in options.workers or (0, *options.threads):
        variants[f"torchvision, {workers} workers"] = partial(_torchvision, dataset.root / "train", workers, options)

    rates: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(options.runs + 1):  # the first only warms up: files come into memory, libraries are loaded
        for name, epochs in variants.items():
            started = time.perf_counter()
            photos = epochs(run)
            rate = photos / (time.perf_counter() - started)
            if run:
                rates[name].append(rate)
                if options.out:
                    with open(options.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"variant": name, "run": run, "images_per_s": rate}) + "\n")
    first = statistics.median(next(iter(rates.values())))
    print(f"{machine()}; {device}; {len(split)} photos; n = {options.runs}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{'variant':<26}{'images/s':>10}{'least':>9}{'most':>9}{'ratio':>8}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<26}{median:>10.1f}{min(values):>9.1f}{max(values):>9.1f}{median / first:>8.2f}")


def _planned(split: Split, engine: str, threads: int, device: torch.device, options: Any, run: int) -> int:
    plan = TrainPlan(split.sizes, seed=run, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    size = options.batch_size
    executor = make_engine(engine, split, image_size=224, micro_batch=size, device=device, threads=threads)
    labels = split.labels.astype(np.int64)
    loader = Loader(plan, split, labels, executor, batch_size=size, micro_batch=size, prefetch=2, device=device)
    epochs = (batch for epoch in range(options.epochs) for step in loader.epoch(epoch) for batch in step.batches)
    photos = sum(len(batch) for batch in epochs)
    loader.close()
    return photos


def _dalis_own(folder: Path, threads: int, device: torch.device, options: Any, run: int) -> int:
    """DALI's file reader and random crops, as in NVIDIA's ResNet-50 example; on a GPU whole photos are decoded."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    gpu = device.type == "cuda"

    @pipeline_def(batch_size=options.batch_size, num_threads=threads, device_id=0 if gpu else None, seed=run)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        crop: dict[str, Any] = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        size: dict[str, Any] = {"size": [224, 224], "interp_type": types.INTERP_LINEAR, "antialias": True}
        if gpu:
            images = fn.random_resized_crop(
                fn.decoders.image(encoded, device="mixed", output_type=types.RGB), **crop, **size
            )
        else:
            images = fn.resize(fn.decoders.image_random_crop(encoded, output_type=types.RGB, **crop), **size)
        mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), dtype=types.FLOAT, output_layout="HWC", mean=mean, std=std
        ), labels

    batches = DALIClassificationIterator(
        pipeline(), reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )
    return sum(len(batch[0]["label"]) for _ in range(options.epochs) for batch in batches)


def _torchvision(folder: Path, workers: int, options: Any, run: int) -> int:
    normalise = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    transform = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    torch.manual_seed(run)
    loader = DataLoader(
        datasets.ImageFolder(folder, transform),
        options.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return sum(len(labels) for _ in range(options.epochs) for _, labels in loader)


if __name__ == "__main__":
    main()
