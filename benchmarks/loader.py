"""How many photos a second each loader delivers, without a model: our engines, DALI's own reader, torchvision's with
Pillow (v1) and with tensors (v2), timm's and SPDL's where they are installed.

    python benchmarks/loader.py --data photos/ phones/ --runs 5 --threads 2

A run of a variant is some epochs over the split `train`, seen as training sees it (random crops, planned or drawn by
the library itself) or as validation does. The variants take turns, so that a busy moment of the machine meets all of
them. Each makes its loader anew in its turn, with its threads and processes, and that is measured too: nobody reads
ahead while others have theirs. The table gives medians, per second on the clock and per second of a processor, and the
ratio to the first, Pillow's. What is read "from memory" stays there decoded, as with --memory_gb, from the run before
those that are measured. With `--shrink 512` our engines read copies too, which are there, and "shrink" is the pass that
makes them. Raw numbers go to --out as JSON lines.
"""

import argparse
import importlib.util
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.cache import cache_folder
from pipelines.config import Config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.decode import central_views
from pipelines.data.engines.factory import ENGINES, choose_engine, engine_module, make_engine
from pipelines.data.loader import Loader
from pipelines.data.plan import EvalPlan, Plan, TrainPlan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.samples import locate
from pipelines.data.shrink import ShrunkCopies
from pipelines.data.shrink_pass import make_copies
from pipelines.distributed.hardware import machine
from pipelines.errors import MachineError, UserError
from pipelines.run.folder import versions
from pipelines.text import lasting_streams

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

_SIZE, _RESIZE, _SCALE = 224, 256, (0.08, 1.0)
_MEMORY = 1 << 31  # bytes of decoded photos, for the variants that read from memory
_BESIDE = ("pillow, {} threads", "torchvision, {} workers")  # what the last line compares with


@lasting_streams()
def main() -> None:
    """Parses the command line, measures, prints a table for each data set and view."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[None], help="folders (default: ants and bees, or DALITUNE_DATA)")
    parser.add_argument("--views", nargs="+", default=["train", "val"], choices=["train", "val"])
    parser.add_argument("--runs", type=int, default=5, help="turns of each variant")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="threads, and processes of others")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shrink", type=int, help="copies of this shorter side, beside photos as they lie")
    parser.add_argument("--only", nargs="+", help="variants whose names begin with one of these")
    parser.add_argument("--out", type=Path, help="JSON lines, one a run")
    options = parser.parse_args()
    torch.set_num_threads(max(options.threads))
    cache = cache_folder()
    print(machine(), ", ".join(f"{name} {version}" for name, version in versions().items()), sep="\n")
    for data in options.data:
        dataset = load_dataset(scan_dataset(locate(data, cache), cache, 0.2))
        dataset = dataset.remembered(_MEMORY, partial(mmap.mmap, -1))
        for view in options.views:
            _compare(dataset.splits["train"], dataset.root / "train", view, options)


def _compare(split: Split, folder: Path, view: str, options: argparse.Namespace) -> None:
    variants = {
        name: variant
        for name, variant in _variants(split, folder, view, options).items()
        if not options.only or name.startswith(tuple(options.only))
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for run in range(options.runs + 1):  # the first only warms up: files come into memory, libraries are loaded
        for name, photos_of in list(variants.items()):
            started, worked = time.perf_counter(), _processor_seconds()
            try:
                photos, wanted = photos_of(run), len(split) * (1 if name.startswith("shrink") else options.epochs)
                if photos < 0.9 * wanted:  # training loaders drop a last, small batch
                    raise ValueError(f"of {wanted} photos it gave {photos}")
            except Exception as error:  # of a library that is installed and does not work here
                print(f"{name}: left out ({str(error).splitlines()[0][:120]})")
                del variants[name], rates[name]
                continue
            seconds, processor = time.perf_counter() - started, _processor_seconds() - worked
            if not run:
                continue
            rates[name].append((photos / seconds, photos / max(processor, 1e-9)))
            if options.out:
                row = {"data": str(folder), "view": view, "variant": name, "run": run}
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"images_per_s": photos / seconds, "processor_s": processor}) + "\n")
    print(f"\n{folder}, {len(split)} photos, as {view} sees them, n = {options.runs}")
    print(f"{'variant':<34}{'images/s':>10}{'least':>9}{'most':>9}{'ratio':>8}{'per CPU s':>11}")
    medians = {name: statistics.median(rate for rate, _ in values) for name, values in rates.items()}
    first = next(iter(medians.values()))
    for name, values in rates.items():
        clock = [rate for rate, _ in values]
        of_a_processor = statistics.median(rate for _, rate in values)
        print(
            f"{name:<34}{medians[name]:>10.1f}{min(clock):>9.1f}{max(clock):>9.1f}{medians[name] / first:>8.2f}"
            f"{of_a_processor:>11.1f}"
        )
    _print_verdict(medians, max(options.threads))
    if options.shrink and view == "val":
        _print_difference(split, options.shrink)


def _print_verdict(medians: dict[str, float], threads: int) -> None:
    """What auto takes, how it does beside Pillow and torchvision, and whether another engine is faster here."""
    try:
        chosen, _ = choose_engine("auto", _device())
    except (UserError, MachineError):
        return
    ours = medians.get(f"{chosen}, {threads} threads")
    if not ours:
        return
    beside = {name: medians[name] for name in (each.format(threads) for each in _BESIDE) if name in medians}
    engines = {name: rate for name, rate in medians.items() if name.partition(",")[0] in ENGINES}
    fastest = max(engines, key=lambda name: engines[name])
    ratios = [
        f"{ours / rate:.2f} times {name}" for name, rate in beside.items() if name != f"{chosen}, {threads} threads"
    ]
    faster = f"; {fastest} is {engines[fastest] / ours:.2f} times that" if engines[fastest] > 1.02 * ours else ""
    print(f"--loader auto takes {chosen}: {', '.join(ratios) or 'nothing to compare with'}{faster}")


def _variants(split: Split, folder: Path, view: str, options: argparse.Namespace) -> dict[str, Callable[[int], int]]:
    variants: dict[str, Callable[[int], int]] = {}
    plain = replace(split, memory=None)
    here = [engine for engine in reversed(ENGINES) if not engine_module(engine).fault(_device())]
    for engine in here:
        for threads in options.threads:
            planned = partial(_planned, engine=engine, threads=threads, view=view, options=options)
            variants[f"{engine}, {threads} threads"] = partial(planned, plain)
            if split.memory and split.memory.fits.all() and engine_module(engine).USES_MEMORY:
                variants[f"{engine} from memory, {threads} threads"] = partial(planned, split)
            if options.shrink:
                copies = plain.shrunk(ShrunkCopies(options.shrink, cache_folder() / "benchmark"))
                variants[f"shrunk: {engine}, {threads}"] = partial(planned, copies)
    for threads in options.threads:
        if options.shrink:
            variants[f"shrink, {threads} threads"] = partial(_first_pass, plain, options.shrink, threads)
        if "dali" in here:
            variants[f"DALI's own reader, {threads} threads"] = partial(_dalis_own, folder, threads, view, options)
    for workers in (0, *options.threads):
        variants[f"torchvision, {workers} workers"] = partial(_torchvision, folder, workers, view, options)
        variants[f"torchvision v2, {workers} workers"] = partial(_torchvision_v2, folder, workers, view, options)
        if importlib.util.find_spec("timm"):
            variants[f"timm, {workers} workers"] = partial(_timm, folder, workers, view, options)
    if importlib.util.find_spec("spdl") and importlib.util.find_spec("spdl.io"):
        for threads in options.threads:
            variants[f"SPDL, {threads} threads"] = partial(_spdl, split, threads, view, options)
    return variants


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _plan(split: Split, view: str, run: int) -> Plan:
    if view == "val":
        return EvalPlan(split.sizes, image_size=_SIZE, resize=_RESIZE)
    return TrainPlan(split.sizes, seed=run, image_size=_SIZE, crop_scale_min=_SCALE[0], flip_probability=0.5)


def _planned(split: Split, run: int, *, engine: str, threads: int, view: str, options: argparse.Namespace) -> int:
    plan, size = _plan(split, view, run), options.batch_size
    executor = make_engine(engine, split, micro_batch=size, device=_device(), threads=threads)
    labels = split.labels.astype(np.int64)
    loader = Loader(plan, split, labels, executor, batch_size=size, micro_batch=size, prefetch=2, device=_device())
    epochs = (batch for epoch in range(options.epochs) for step in loader.epoch(epoch) for batch in step.batches)
    photos = sum(len(batch) for batch in epochs)
    loader.close()
    return photos


def _first_pass(split: Split, shrink: int, threads: int, run: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = Config(shrink=shrink, resize=64, image_size=64, loader_threads=threads)
        make_copies([split.shrunk(ShrunkCopies(shrink, Path(folder)))], config, PartialState())
    return len(split)


def _print_difference(split: Split, shrink: int) -> None:
    """How far what validation sees of copies is from what it sees of the photos."""
    few = np.flatnonzero(split.faults == 0)[:20]
    whole, copies = (
        central_views(each, few, EvalPlan(each.sizes, image_size=_SIZE, resize=_RESIZE))
        for each in (split, split.shrunk(ShrunkCopies(shrink)))
    )
    difference = np.mean([np.abs(one.astype(int) - other) for one, other in zip(whole, copies, strict=True)])
    print(f"views of copies differ from those of photos by {difference:.2f} grey levels of 255 on average")


def _dalis_own(folder: Path, threads: int, view: str, options: argparse.Namespace, run: int) -> int:
    """DALI's file reader and random crops, as in NVIDIA's ResNet-50 example; on a GPU whole photos are decoded."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    gpu, train = torch.cuda.is_available(), view == "train"

    @pipeline_def(batch_size=options.batch_size, num_threads=threads, device_id=0 if gpu else None, seed=run)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=train, name="reader")
        crop: dict[str, Any] = {"random_area": [*_SCALE], "random_aspect_ratio": [3 / 4, 4 / 3]}
        filtered: dict[str, Any] = {"interp_type": types.INTERP_LINEAR, "antialias": True}
        square: dict[str, Any] = {"size": [_SIZE, _SIZE], **filtered}
        if gpu or not train:
            images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
            images = (
                fn.random_resized_crop(images, **crop, **square)
                if train
                else fn.resize(images, resize_shorter=_RESIZE, **filtered)
            )
        else:
            images = fn.resize(fn.decoders.image_random_crop(encoded, output_type=types.RGB, **crop), **square)
        mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
        mirror = fn.random.coin_flip() if train else 0
        normalised = {"dtype": types.FLOAT, "output_layout": "HWC", "mean": mean, "std": std}
        return fn.crop_mirror_normalize(images, crop=(_SIZE, _SIZE), mirror=mirror, **normalised), labels

    batches = DALIClassificationIterator(
        pipeline(), reader_name="reader", last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )
    return sum(len(batch[0]["label"]) for _ in range(options.epochs) for batch in batches)


def _torchvision(folder: Path, workers: int, view: str, options: argparse.Namespace, run: int) -> int:
    """Photos by Pillow and transforms of version 1, as in PyTorch's tutorial."""
    steps = [*_crop(v1, view), v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return _by_workers(datasets.ImageFolder(folder, v1.Compose(steps)), workers, view, options, run)


def _torchvision_v2(folder: Path, workers: int, view: str, options: argparse.Namespace, run: int) -> int:
    """Photos decoded to tensors, and transforms of version 2."""

    def decoded(path: str) -> torch.Tensor:
        return decode_image(path, mode=ImageReadMode.RGB, apply_exif_orientation=True)

    steps = [*_crop(v2, view), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    photos = datasets.ImageFolder(folder, v2.Compose(steps), loader=decoded)
    return _by_workers(photos, workers, view, options, run)


def _crop(version: Any, view: str) -> list[Any]:
    if view == "train":
        return [version.RandomResizedCrop(_SIZE, scale=_SCALE, antialias=True), version.RandomHorizontalFlip()]
    return [version.Resize(_RESIZE, antialias=True), version.CenterCrop(_SIZE)]


def _by_workers(photos: Any, workers: int, view: str, options: argparse.Namespace, run: int) -> int:
    torch.manual_seed(run)
    loader: Any = DataLoader(
        photos, options.batch_size, shuffle=view == "train", num_workers=workers, persistent_workers=workers > 0
    )
    return _count(loader, options.epochs)


def _timm(folder: Path, workers: int, view: str, options: argparse.Namespace, run: int) -> int:
    """timm's folder and loader, its crops and flips and nothing else."""
    timm = import_module("timm.data")
    torch.manual_seed(run)
    loader = timm.create_loader(
        timm.create_dataset("", str(folder)),
        (3, _SIZE, _SIZE),
        options.batch_size,
        is_training=view == "train",
        use_prefetcher=False,
        scale=_SCALE,
        color_jitter=None,
        interpolation="bilinear",
        crop_pct=_SIZE / _RESIZE,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )
    return _count(loader, options.epochs)


def _spdl(split: Split, threads: int, view: str, options: argparse.Namespace, run: int) -> int:
    """SPDL's threads, its decoder (FFmpeg's) and filters, with the crops of our plan, of photos that are not turned."""
    spdl, pipelines = import_module("spdl.io"), import_module("spdl.pipeline")
    plan = _plan(split, view, run)
    spdl.load_image(split.path(0))  # its pipeline says nothing of an FFmpeg that is not there

    def views(epoch: int) -> Iterable[tuple[str, str]]:
        for first in range(0, len(split), options.batch_size):
            found = plan.views(epoch, np.arange(first, min(first + options.batch_size, len(split))))
            for index, window, resized, anchor, flip in zip(
                found.indices, found.windows, found.resized, found.anchors, found.flips, strict=True
            ):
                top, left, height, width = window.tolist()
                filters = [f"crop={width}:{height}:{left}:{top}", f"scale={resized[1]}:{resized[0]}:flags=bilinear"]
                filters += [
                    f"crop={_SIZE}:{_SIZE}:{anchor[1]}:{anchor[0]}",
                    *(["hflip"] if flip else []),
                    "format=rgb24",
                ]
                yield split.path(int(index)), ",".join(filters)

    def decoded(view_of: tuple[str, str]) -> torch.Tensor:
        return spdl.to_torch(spdl.load_image(view_of[0], filter_desc=view_of[1]))

    mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def normalised(images: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(images).float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)

    photos = 0
    for epoch in range(options.epochs):
        pipeline = (
            pipelines.PipelineBuilder()
            .add_source(views(epoch))
            .pipe(decoded, concurrency=threads, output_order="input")
            .aggregate(options.batch_size)
            .pipe(normalised)
            .add_sink(2)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            photos += sum(len(batch) for batch in pipeline)
    return photos


def _count(loader: Any, epochs: int) -> int:
    """Photos of all epochs. The workers end here, and their seconds of a processor count from then on."""
    photos = sum(len(labels) for _ in range(epochs) for _, labels in loader)
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator._shutdown_workers()
    return photos


if __name__ == "__main__":
    main()
