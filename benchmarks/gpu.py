"""What a GPU shows of this suite: one command, 25 minutes at most, and a page with expected beside found.

    python benchmarks/gpu.py --out gpu-page                # gpu-page/page.md and page.json
    python benchmarks/gpu.py --only decode training       # the checks whose names begin so
    PYTHONPATH=. python benchmarks/gpu.py --dry-run        # on a CPU: the code of every check, small, and no figures

It makes its own photos and needs no network and no data. Each check runs in a process of its own with its own limit: a
crash or a hang is a line of the page, and the next one goes on. DALI's checks are left out where its decoder fails.
Exit code: 0 where all is as expected, 1 where something is not, 3 without a GPU.
"""

import argparse
import ctypes
import importlib.util
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import train
from pipelines.config import parse_config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.loader import Loader, Step, train_loader
from pipelines.data.open import open_dataset
from pipelines.data.plan import EvalPlan, Plan, TrainPlan
from pipelines.data.preprocess import IMAGENET_STD
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import build_model
from pipelines.model.optimizer import make_optimizer
from pipelines.model.weights import read_weights
from pipelines.run.folder import versions
from pipelines.training.progress import Interval, StepWatch

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parent.parent
DRY = "**A dry run on a CPU: no GPU was seen, and no figure here means anything.**"
LOADS = (0.0, 0.65, 1.0)  # hw_decoder_load: the share of photos for the GPU's own JPEG decoder; 0.65 is DALI's default
PILLOW_MEAN = 1.0  # grey levels of 255 by which a GPU's decoder may be off Pillow's on average


@dataclass(frozen=True)
class Place:
    """Where a check runs. folder: photos, weights, logs. engine: dali, or torch where DALI does not decode."""

    folder: Path
    dry: bool
    engine: str

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    def of(self, full: int, small: int) -> int:
        """A number of photos, steps, pixels: the real one, or that of a dry run."""
        return small if self.dry else full


@dataclass(frozen=True)
class Finding:
    """found: for the page. ok: whether it is what was expected; None where nothing is to be compared."""

    found: str
    ok: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """minutes: its limit. dali: left out where DALI does not decode. figures: judged by what no dry run has."""

    name: str
    minutes: float
    expected: str
    run: Callable[[Place], Finding]
    dali: bool = False
    figures: bool = False


# The photos


def make_photos(place: Place) -> Finding:
    """JPEGs with colour noise, 4:2:0: many of 500 x 375 pixels and some of 12 megapixels; and random weights."""
    started, jobs = time.perf_counter(), []
    for split, photos in (("train", place.of(4096, 24)), ("val", place.of(256, 8))):
        jobs += [
            (place.folder / "photos" / split / "ab"[n % 2] / f"{n}.jpg", 375, 500, n, photos) for n in range(photos)
        ]
        large = place.of(256, 8) if split == "train" else 4
        height, width = place.of(3000, 375), place.of(4000, 500)
        jobs += [
            (place.folder / "large" / split / "ab"[n % 2] / f"{n}.jpg", height, width, n % 16, 0) for n in range(large)
        ]
    for file, *_ in jobs:
        file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job[0].write_bytes(_encoded(_picture(*job[1:]), quality=90)), jobs))
    torch.save(resnet18().state_dict(), place.folder / "weights.pth")
    return Finding(f"{len(jobs)} photos in {time.perf_counter() - started:.0f} s", True)


def _picture(height: int, width: int, *seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.minimum(np.asarray(coarse), 231) + noise)


def _encoded(photo: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, kind, **options)
    return buffer.getvalue()


# What is there, and what decodes


def versions_here(place: Place) -> Finding:
    """GPU, driver, libraries, and what DALI's codec says of its hardware decoder as it starts."""
    known = versions() | {"nvJPEG": _nvjpeg_version()}
    gpu, hardware = "no GPU", []
    if not place.dry:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = _output(query) or torch.cuda.get_device_name(0)
    if _has_dali():
        said = _output(_command(place, "decode whole, hw load 1.0"), DALI_NVIMGCODEC_LOG_LEVEL="3")
        hardware = list(dict.fromkeys(re.findall(r"[^\n\]]*(?:HW decoder|num_hw_engines)[^\n]*", said)))
    listed = ", ".join(f"{name} {version}" for name, version in known.items())
    found = f"{gpu}; {os.cpu_count()} CPU cores; {listed}; {'; '.join(hardware).strip() or 'no word of a HW decoder'}"
    return Finding(found, None, {"gpu": gpu, "versions": known})


def _nvjpeg_version() -> str:
    for folder in map(Path, sys.path):
        for file in [*folder.glob("nvidia/*/lib/libnvjpeg.so.*"), *folder.glob("nvidia/*/lib64/libnvjpeg.so.*")]:
            number, parts = ctypes.c_int(), []
            library = ctypes.CDLL(str(file))
            for part in range(3):
                library.nvjpegGetProperty(part, ctypes.byref(number))
                parts.append(str(number.value))
            return ".".join(parts)
    return "not found"


def decodes(place: Place, *, what: str, load: float | None) -> Finding:
    """16 photos through DALI's decoder alone, compared with Pillow."""
    files = _files(place, 16)
    differences = []
    for file, pixels in zip(files, _decoded(place, files, 16, what, load), strict=True):
        expected = np.asarray(Image.open(file).convert("RGB")).astype(np.int16)
        expected = expected if what == "whole" else expected[8:72, 8:72]
        differences.append(np.abs(pixels - expected).mean())
    mean = float(np.mean(differences))
    return Finding(f"{len(files)} photos, mean {mean:.2f} levels off Pillow", mean <= PILLOW_MEAN, {"mean": mean})


def _files(place: Place, photos: int) -> list[Path]:
    return sorted((place.folder / "photos" / "train").rglob("*.jpg"))[:photos]


def _decoded(place: Place, files: Sequence[Path], batch: int, what: str, load: float | None) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each file. what: whole; slice, 64 x 64 cut out of it; roi, the decoder's own window."""
    for pixels in _decoder(place, files, batch, what, load):
        pixels = pixels if place.dry else pixels.as_cpu()
        yield from (np.array(pixels.at(number)) for number in range(len(pixels)))


def _decoder(place: Place, files: Sequence[Path], batch: int, what: str, load: float | None) -> Iterator[Any]:
    """The batches as DALI has them: file.read, decoder, and nothing else of the suite."""
    from nvidia.dali import fn, pipeline_def, types

    options = {"device": "cpu" if place.dry else "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    options |= {} if load is None else {"hw_decoder_load": load}
    window: dict[str, Any] = {"start": [8, 8], "shape": [64, 64], "axis_names": "HW"}

    @pipeline_def(batch_size=batch, num_threads=8, device_id=None if place.dry else 0, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.io.file.read(fn.external_source(name="paths", dtype=types.UINT8, ndim=1))
        if what == "roi":
            return fn.decoders.image_slice(encoded, **window, **options)
        photos = fn.decoders.image(encoded, **options)
        return photos if what == "whole" else fn.slice(photos, **window)

    pipeline = graph()
    pipeline.build()
    for first in range(0, len(files), batch):
        paths = [np.frombuffer(os.fsencode(file), np.uint8) for file in files[first : first + batch]]
        pipeline.feed_input("paths", paths)
        yield pipeline.run()[0]


# The tests


def tests(place: Place, *, chosen: str, small: str) -> Finding:
    """tests/test_gpu.py, a part of it; each failed test is named."""
    if not importlib.util.find_spec("pytest"):
        return Finding("pytest is not installed")
    words = ["-k", small] if place.dry else ["-m", "gpu", "-k", chosen]
    files = ["tests/test_gpu.py", "tests/test_progress.py"]
    said = _output([sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *files, *words])
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    last = said.strip().splitlines()[-1] if said.strip() else "no word"
    return Finding(f"{last}{': ' if failed else ''}{', '.join(failed)}", "passed" in last and "failed" not in said)


# Pixels


def odd_photos(place: Place) -> Finding:
    """Every kind of JPEG, and a PNG, through the suite's DALI engine beside Pillow; and one that is cut off."""
    root, kinds = place.folder / "odd", dict[str, bytes]()
    photo = _picture(230, 310, 1)
    for orientation in range(1, 9):
        data = Image.Exif()
        data[0x0112] = orientation
        kinds[f"exif {orientation}.jpg"] = _encoded(photo, exif=data)
    kinds |= {"grey.jpg": _encoded(photo.convert("L")), "cmyk.jpg": _encoded(photo.convert("CMYK"))}
    kinds |= {"progressive.jpg": _encoded(photo, progressive=True), "4-4-4.jpg": _encoded(photo, subsampling=0)}
    kinds |= {"png.png": _encoded(photo, "PNG"), "cut.jpg": _encoded(photo)}
    for part in ("train", "val"):
        for number, (name, content) in enumerate(kinds.items()):
            file = root / part / "ab"[number % 2] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    split = _split(root, "val")
    cut = next(index for index in range(len(split)) if split.path(index).endswith("cut.jpg"))
    Path(split.path(cut)).write_bytes(kinds["cut.jpg"][: len(kinds["cut.jpg"]) // 2])  # after the scan, which finds it
    images, left_out = {}, []
    for engine, device in (("torch", torch.device("cpu")), ("dali", place.device)):
        with _loader(split, engine, device, len(split), train=False) as loader:
            batch = next(next(loader.epoch(0)).batches)
            images[engine] = dict(zip(batch.indices.tolist(), batch.images.cpu(), strict=True))
            left_out.append(f"{engine}: {'yes' if cut in loader.bad else 'no'}")
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    means = {
        Path(split.path(index)).name: ((images["dali"][index] - pixels).abs() * std).mean().item()
        for index, pixels in images["torch"].items()
        if index in images["dali"] and index != cut
    }
    worst = max(means, key=lambda name: means[name])
    found = f"{len(means)} kinds, mean at most {means[worst]:.2f} levels ({worst})"
    found += f"; cut off, left out: {', '.join(left_out)}"
    return Finding(found, len(means) == len(kinds) - 1 and means[worst] <= PILLOW_MEAN, means)


def _split(root: Path, name: str) -> Split:
    return load_dataset(scan_dataset(root, root.parent / "cache", 0.2)).splits[name]


@contextmanager
def _loader(split: Split, engine: str, device: torch.device, batch: int, *, train: bool = True) -> Iterator[Loader]:
    """The suite's own loader, of training crops or central views."""
    plan: Plan = EvalPlan(split.sizes, image_size=224, resize=256)
    if train:
        plan = TrainPlan(split.sizes, seed=0, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    threads = max(1, (os.cpu_count() or 1) // 2)
    executor = make_engine(engine, split, image_size=224, micro_batch=batch, device=device, threads=threads)
    settings: dict[str, Any] = {
        "batch_size": batch,
        "micro_batch": batch,
        "prefetch": 2,
        "device": device,
        "skip_bad_files": True,
    }
    loader = Loader(plan, split, split.labels.astype(np.int64), executor, **settings)
    try:
        yield loader
    finally:
        loader.close()


def company(place: Place) -> Finding:
    """Whether a photo's pixels depend on its batch or on the run: the decoder alone, and the suite's engine."""
    files, small = _files(place, place.of(256, 16)), place.of(16, 4)
    numbers: dict[str, Any] = {}
    for load in LOADS:
        runs = [
            [pixels.tobytes() for pixels in _decoded(place, files, batch, "whole", load)]
            for batch in (small, small, 4 * small)
        ]
        numbers[f"load {load:g}"] = [sum(a != b for a, b in zip(runs[0], other, strict=True)) for other in runs[1:]]
    split, sums = _split(place.folder / "photos", "train"), []
    for batch in (small, small, 4 * small):
        with _loader(split, "dali", place.device, batch) as loader:
            steps = islice(loader.epoch(0), 4 * small * 4 // batch)
            sums.append(torch.cat([next(step.batches).images.cpu() for step in steps]))
    numbers["the engine"] = [int((sums[0] != other).flatten(1).any(dim=1).sum()) for other in sums[1:]]
    found = "; ".join(f"{name}: {again}, {larger}" for name, (again, larger) in numbers.items())
    return Finding(f"photos that differ again, in a larger batch: {found}", numbers["the engine"] == [0, 0], numbers)


# Speed


def loader_rates(place: Place) -> Finding:
    """benchmarks/loader.py on the photos: each engine, and others beside it."""
    rows = place.folder / "loader.jsonl"
    rows.unlink(missing_ok=True)
    words = ["--runs", str(place.of(3, 1)), "--epochs", str(place.of(4, 1)), "--batch-size", str(place.of(256, 8))]
    words += ["--out", str(rows), "--workers", "1" if place.dry else "16"]
    words += ["--threads", *(["1"] if place.dry else ["4", "16"])]
    script = str(ROOT / "benchmarks" / "loader.py")
    said = _output([sys.executable, script, "--data", str(place.folder / "photos"), *words])
    if not rows.exists():
        return Finding(said.strip().splitlines()[-1] if said.strip() else "no word", False)
    rates: dict[str, list[float]] = {}
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        rates.setdefault(row["variant"], []).append(row["images_per_s"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((rate for name, rate in medians.items() if name.startswith("dali")), default=0.0)
    listed = ", ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items())
    return Finding(f"photos/s: {listed}", best >= 10_000, medians)


def decoder_rates(place: Place) -> Finding:
    """Photos a second of DALI's decoder alone, by the share of its hardware; in turn, median of 3."""
    files, batch = _files(place, place.of(4096, 16)), place.of(256, 8)
    rates: dict[str, list[float]] = {f"load {load:g}": [] for load in LOADS}
    for turn in range(4):  # the first warms up
        for load in LOADS:
            batches = _decoder(place, files, batch, "slice", load)
            next(batches)
            started = time.perf_counter()
            rest = sum(len(pixels) for pixels in batches)
            if turn:
                rates[f"load {load:g}"].append(rest / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Finding("photos/s: " + ", ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items()), None, medians)


class Training:
    """train.py's own step and what belongs to it, in bf16: a ResNet-18 from random weights, configs/imagenet.yaml."""

    def __init__(self, place: Place) -> None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as the launcher would say it
        words = ["--config", str(ROOT / "configs" / "imagenet.yaml"), "--data", str(place.folder / "photos")]
        words += ["--batch-size", str(place.of(256, 8)), "--lr", "0.01", "--tracker", "none", *_small(place)]
        self.config, _ = parse_config(words)
        self.state = start_processes()
        self.split = open_dataset(self.state, self.config).splits["train"]
        self.accelerator = start_accelerator(self.config, self.state, None, steps=450_000)
        self.network = build_model(self.config, read_weights(self.config), self.split.classes).to(self.state.device)
        optimizer = make_optimizer(self.network, self.config)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.network.train()
        self._interval, self._watch = Interval(self.state.device), StepWatch()

    def loader(self, engine: str) -> Loader:
        """train.py's, of the photos."""
        labels = self.split.labels.astype(np.int64)
        return train_loader(self.config, self.split, labels, self.state, engine, self.config.batch_size)

    def steps(self, loader: Loader) -> Iterator[Step]:
        """Epoch after epoch, all of whole steps."""
        return (step for epoch in count() for step in loader.epoch(epoch))

    def resident(self, loader: Loader) -> Iterator[Step]:
        """One batch again and again: what the loop could do if photos cost nothing."""
        batch = next(next(loader.epoch(0)).batches)
        while True:
            yield Step(len(batch), 1, iter([batch]))

    def train(self, loader: Loader, steps: Iterator[Step], number: int, watched: Any = nullcontext) -> float:
        """Seconds for so many steps, all of the GPU's work included. watched: a context for the steps alone."""
        features = FrozenFeatures(self.network, loader, self.accelerator, views_per_photo=None, epochs=1, micro_batch=1)
        self._wait()
        started = time.perf_counter()
        with watched():
            for step in islice(steps, number):
                sums, _ = train.update(
                    self.model, features, self.optimizer, step, (False, False), loader, self.accelerator, self.config
                )
                self._interval.add(sums)
                self._watch.add(sums, str)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()


def _small(place: Place) -> list[str]:
    return ["--image-size", "64", "--resize", "72"] if place.dry else []


@contextmanager
def _cuda_says_where_it_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisation(place: Place) -> Finding:
    """20 steps under CUDA's own check, and where each warning comes from."""
    training = Training(place)
    loader = training.loader(place.engine)
    steps = training.steps(loader)
    training.train(loader, steps, place.of(5, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = nullcontext if place.dry else _cuda_says_where_it_waits
        training.train(loader, steps, place.of(20, 2), watched)
    loader.close()
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)
    )
    listed = ", ".join(f"{where} ({times})" for where, times in places.most_common()) or "nowhere"
    return Finding(f"waits {listed}", not places, dict(places))


def training_rates(place: Place) -> Finding:
    """Photos a second of the loop, batch 256, in turn, median of 3: a batch that lies on the GPU, and each engine."""
    batch, number = place.of(256, 8), place.of(60, 2)
    training = Training(place)
    loaders = {engine: training.loader(engine) for engine in dict.fromkeys(("torch", place.engine))}
    ways = {"resident": (loaders["torch"], training.resident(loaders["torch"]))}
    ways |= {engine: (loader, training.steps(loader)) for engine, loader in loaders.items() if engine == "dali"}
    rates, waits = dict[str, list[float]](), dict[str, float]()
    for turn in range(place.of(4, 2)):  # the first warms up
        for name, (loader, steps) in ways.items():
            waited = loader.wait_seconds
            seconds = training.train(loader, steps, number)
            if turn:
                rates.setdefault(name, []).append(batch * number / seconds)
                waits[name] = (loader.wait_seconds - waited) / seconds
    steps = training.steps(loaders["torch"])  # last, as it takes the loader from the resident batch
    rates["torch"] = [batch * number / 4 / training.train(loaders["torch"], steps, number // 4 or 1) for _ in range(3)]
    for loader in loaders.values():
        loader.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians[place.engine] / medians["resident"]
    found = ", ".join(f"{name} {rate:,.0f}/s" for name, rate in medians.items())
    found += f"; {place.engine} {ratio:.2f} of resident, waiting {waits.get(place.engine, 0):.1%}"
    return Finding(found, ratio >= 0.95, medians | {"ratio": ratio, "data_wait": waits})


def without_a_search(place: Place) -> Finding:
    """The resident batch again, without cuDNN's search for the fastest algorithms, which a short run does without."""
    batch, number = place.of(256, 8), place.of(60, 1)
    training = Training(place)
    torch.backends.cudnn.benchmark = False
    loader = training.loader("torch")
    steps = training.resident(loader)
    training.train(loader, steps, number)
    rate = statistics.median(batch * number / training.train(loader, steps, number) for _ in range(3))
    loader.close()
    return Finding(f"resident {rate:,.0f}/s", None, {"rate": rate})


def profile(place: Place) -> Finding:
    """The share of 20 steps in which the GPU works, and what of that work is DALI's and what is largest."""
    from torch.profiler import ProfilerActivity

    training = Training(place)
    loader = training.loader(place.engine)
    steps = training.steps(loader)
    training.train(loader, steps, place.of(20, 1))
    wanted = "CPU" if place.dry else "CUDA"
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, wanted)]) as profiler:
        training.train(loader, steps, place.of(20, 1))
    loader.close()
    spans = [
        (each.time_range.start, each.time_range.end, each.name)
        for each in profiler.events()
        if each.device_type.name == wanted
    ]
    busy, end, total, of_dali, by_name = 0.0, 0.0, 0.0, 0.0, Counter[str]()
    for start, stop, name in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        total += stop - start
        of_dali += (stop - start) * bool(re.search("dali|jpeg|nvimg", name, re.IGNORECASE))
        by_name[name[:60]] += stop - start
    share = busy / max(1e-9, end - min(start for start, *_ in spans))
    largest = ", ".join(f"{name} {spent / total:.1%}" for name, spent in by_name.most_common(3))
    found = f"busy {share:.1%}; DALI's {of_dali / total:.1%} of the work; largest: {largest}"
    return Finding(found, share > 0.95 and of_dali < 0.05 * total, {"busy": share, "dali": of_dali / total})


# Whole runs


def recipe(place: Place, *, launcher: Sequence[str], flags: Sequence[str] = (), small: bool = False) -> Finding:
    """The default recipe through `accelerate launch`: its pass over the photos, and some hundred steps of batch 8."""
    if place.dry and not small:
        return Finding("left out of a dry run: the same code with other flags")
    name = re.sub(r"\W+", "-", " ".join([*launcher, *flags])).strip("-")[:80]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *launcher]
    command += [str(ROOT / "train.py"), "--data", str(place.folder / "photos"), "--weights"]
    command += [str(place.folder / "weights.pth"), "--epochs", "2", "--views-per-photo", "1", "--loader", place.engine]
    command += ["--max-steps", str(place.of(700, 4)), "--tracker", "none", *flags, *_small(place)]
    command += ["--runs", str(place.folder / "runs"), "--run", name]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode:
        return Finding(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}", False)
    rows = map(json.loads, (place.folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [row for row in rows if "train/loss" in row][-1]
    found = f"exit code 0, {seconds:.0f} s, {last['perf/images_per_s']:,.0f} photos/s, loss {last['train/loss']:.3f}"
    return Finding(found, True, {"seconds": seconds} | last)


def memory(place: Place) -> Finding:
    """256 photos of 12 megapixels a batch, 5 batches: the GPU's memory, DALI's included."""
    split = _split(place.folder / "large", "train")
    before, used = _memory_used(place), []
    with _loader(split, place.engine, place.device, place.of(256, 4)) as loader:
        for step in islice((step for epoch in count() for step in loader.epoch(epoch)), 5):
            next(step.batches)
            used.append((_memory_used(place) - before) / 1e9)
    found = f"{max(used):.1f} GB at most, after each batch: {', '.join(f'{value:.1f}' for value in used)}"
    return Finding(found, max(used) <= 30, {"gigabytes": used})


def _memory_used(place: Place) -> int:
    if place.dry:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


# The table of checks, and what runs it

_CRASH = "a crash (exit code 139, nvImageCodec issue 55) or failure 8; 16 photos would be news"
_WHOLE = f"16 photos, mean at most {PILLOW_MEAN:g} level off Pillow"
CHECKS = [
    Check("photos", 2, "made", make_photos),
    Check("versions", 1, "nvJPEG 13.3, a hardware decoder with engines (7 on an H100)", versions_here),
    Check("decode roi, hw load default", 0.7, _CRASH, partial(decodes, what="roi", load=None)),
    Check("decode roi, hw load 0", 0.7, _CRASH, partial(decodes, what="roi", load=0.0)),
    Check("decode whole, hw load 1.0", 0.7, _WHOLE, partial(decodes, what="whole", load=1.0)),
    Check("decode whole, hw load 0.0", 0.7, _WHOLE, partial(decodes, what="whole", load=0.0)),
    Check("tests without DALI", 3, "all pass", partial(tests, chosen="not dali", small="crash")),
    Check("tests with DALI", 5, "all pass", partial(tests, chosen="dali", small="cut_off and dali and cpu"), dali=True),
    Check("odd photos", 1, f"mean at most {PILLOW_MEAN:g} level; cut off: left out by both", odd_photos, dali=True),
    Check("company", 1.5, "loads 0 and 1 and the engine: 0, 0; load 0.65: not 0", company, dali=True),
    Check("loader", 4, "dali 10,000 or more; Pillow, 16 threads, 3,500 to 4,500", loader_rates, True, True),
    Check("decoder alone", 1.5, "14,000 to 16,000", decoder_rates, True, True),
    Check("waiting", 1.5, "waits nowhere", synchronisation),
    Check(
        "training",
        4,
        "7,000 to 10,000/s; dali 0.95 of resident or more, waiting below 3 %",
        training_rates,
        figures=True,
    ),
    Check("cuDNN without a search", 1, "a few per cent below training's resident", without_a_search),
    Check("profile", 1.5, "busy more than 95 %, DALI's below 5 %", profile, figures=True),
    Check("recipe bf16", 1.5, "exit code 0", partial(recipe, launcher=["--mixed_precision", "bf16"], small=True)),
    Check("recipe fp16", 1.5, "exit code 0", partial(recipe, launcher=["--mixed_precision", "fp16"])),
    Check("recipe --compile", 2, "exit code 0", partial(recipe, launcher=[], flags=["--compile"])),
    Check("recipe auto", 1.5, "exit code 0", partial(recipe, launcher=[], flags=["--max-batch-per-device", "auto"])),
    Check("recipe NCCL", 1.5, "exit code 0", partial(recipe, launcher=["--config_file", "accelerate_config.yaml"])),
    Check("memory", 2, "30 GB or less", memory, True, True),
]


def main() -> int:
    """Parses the command line, runs the checks, writes the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-page"), help="folder for page.md, page.json and logs/")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small: tries the code, measures nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the checks whose names begin so")
    parser.add_argument("--minutes", type=float, default=25, help="for everything together")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "FOLDER", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, engine = options.child
        place = Place(Path(folder), options.dry_run, engine)
        finding = next(check for check in CHECKS if check.name == name).run(place)
        (place.folder / f"{_slug(name)}.json").write_text(json.dumps(asdict(finding)), encoding="utf-8")
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "error: no NVIDIA GPU here (torch.cuda.is_available() is false): --dry-run tries the code", file=sys.stderr
        )
        return 3
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    wanted = [c for c in CHECKS if c.name == "photos" or not options.only or c.name.startswith(tuple(options.only))]
    with tempfile.TemporaryDirectory(prefix="dalitune-gpu-") as folder:
        rows = run_all(wanted, Place(Path(folder), options.dry_run, "dali"), options.out, 60 * options.minutes)
    return 1 if any(row["ok"] is False for row in rows) else 0


def run_all(checks: Sequence[Check], place: Place, out: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs the checks in order, each in a process of its own, and writes the page after each of them."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    fits = _has_dali()
    for number, check in enumerate(checks, start=1):
        whole = [row["ok"] for row in rows if row["name"].startswith("decode whole")]
        decodes_here = fits and (any(whole) or not whole)
        place = Place(place.folder, place.dry, "dali" if decodes_here else "torch")
        begun = time.monotonic()
        left = seconds - (begun - started)
        if check.dali and not decodes_here:
            finding = Finding("left out: DALI does not decode here" if fits else "left out: DALI is not installed")
        elif left < 5:
            finding = Finding("left out: the time was up")
        else:
            finding = run_check(check, place, out / "logs" / f"{_slug(check.name)}.log", min(60 * check.minutes, left))
        # A decoder that crashes by region is expected, and nothing rests on it; a dry run has no figures to judge.
        if (finding.numbers and place.dry and check.figures) or "roi" in check.name:
            finding = Finding(finding.found, None, finding.numbers)
        row = {"name": check.name, "expected": check.expected, **asdict(finding), "seconds": time.monotonic() - begun}
        rows.append(row)
        at = time.monotonic() - started
        print(f"[{number}/{len(checks)}, {at:.0f} s] {check.name}: {_verdict(row)} {finding.found}", flush=True)
        _write_page(out, rows, place)
    return rows


def run_check(check: Check, place: Place, log: Path, limit: float) -> Finding:
    """One check in a process of its own; what ends it early is what is found. limit: seconds."""
    answer = place.folder / f"{_slug(check.name)}.json"
    answer.unlink(missing_ok=True)  # `versions` has one of the decoders run, too
    with open(log, "wb") as file:
        child = subprocess.Popen(
            _command(place, check.name),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(place),
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            return Finding(f"nothing within {limit:.0f} s", False)
        finally:
            with suppress(ProcessLookupError):  # what it started goes with it
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if answer.exists():
        return Finding(**json.loads(answer.read_text(encoding="utf-8")))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ended = f"exit code {128 - code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Finding(f"{ended}: {lines[-1][:300] if lines else 'no word'}", False)


def _command(place: Place, name: str) -> list[str]:
    words = ["--dry-run"] if place.dry else []
    return [sys.executable, str(Path(__file__).resolve()), *words, "--child", name, str(place.folder), place.engine]


def _environment(place: Place) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["DALITUNE_CACHE"] = str(place.folder / "cache")
    return environment | ({"ACCELERATE_USE_CPU": "true"} if place.dry else {})


def _output(command: Sequence[str], **variables: str) -> str:
    """What a command prints, both ways; "" where there is no such command."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, **variables},
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def _verdict(row: dict[str, Any]) -> str:
    return {True: "as expected.", False: "NOT as expected.", None: "noted."}[row["ok"]]


def _write_page(out: Path, rows: list[dict[str, Any]], place: Place) -> None:
    """page.md and page.json, after every check anew, so that what ends the whole leaves what was found."""
    gpu = "a CPU" if place.dry else torch.cuda.get_device_name(0)
    commit = _output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lines = [DRY if place.dry else f"# What a GPU shows: {gpu}", ""]
    lines += [f"`python benchmarks/gpu.py`, commit {commit}, {date}; each check once unless it says otherwise.", ""]
    lines += ["| check | expected | found | | s |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], row["expected"], row["found"], _verdict(row), f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    (out / "page.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = {"dry_run": place.dry, "gpu": None if place.dry else gpu, "commit": commit, "date": date, "checks": rows}
    (out / "page.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
