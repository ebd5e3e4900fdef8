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
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.headroom import Training
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.loader import Loader
from pipelines.data.plan import EvalPlan, Plan, TrainPlan
from pipelines.data.preprocess import IMAGENET_STD
from pipelines.distributed.hardware import cpu_cores
from pipelines.run.folder import versions

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parent.parent
DRY = "**A dry run on a CPU: no GPU was seen, and no figure here means anything.**"
LOADS = (0.0, 0.65, 1.0)  # hw_decoder_load: the share of photos for the GPU's own JPEG decoder; 0.65 is DALI's default
PILLOW_MEAN = 1.0  # grey levels of 255 by which a GPU's decoder may be off Pillow's on average


@dataclass(frozen=True)
class Setup:
    """Where a check runs. folder: photos, weights, logs. engine: dali, or pillow where DALI does not decode."""

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
    run: Callable[[Setup], Finding]
    dali: bool = False
    figures: bool = False


# The photos


def make_photos(setup: Setup) -> Finding:
    """JPEGs with colour noise, 4:2:0: many of 500 x 375 pixels and some of 12 megapixels; and random weights."""
    started, jobs = time.perf_counter(), []
    for split, photos in (("train", setup.of(4096, 24)), ("val", setup.of(256, 8))):
        jobs += [
            (setup.folder / "photos" / split / "ab"[n % 2] / f"{n}.jpg", 375, 500, n, photos) for n in range(photos)
        ]
        large = setup.of(256, 8) if split == "train" else 4
        height, width = setup.of(3000, 375), setup.of(4000, 500)
        jobs += [
            (setup.folder / "large" / split / "ab"[n % 2] / f"{n}.jpg", height, width, n % 16, 0) for n in range(large)
        ]
    for file, *_ in jobs:
        file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(cpu_cores()) as pool:
        list(pool.map(_write_photo, jobs, chunksize=8))
    torch.save(resnet18().state_dict(), setup.folder / "weights.pth")
    return Finding(f"{len(jobs)} photos in {time.perf_counter() - started:.0f} s", True)


def _write_photo(job: tuple[Path, int, int, int, int]) -> None:
    file, *shape_and_seed = job
    file.write_bytes(_encoded(_picture(*shape_and_seed), quality=90))


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


def versions_here(setup: Setup) -> Finding:
    """GPU, driver, libraries, and what DALI's codec says of its hardware decoder as it starts."""
    known = versions() | {"nvJPEG": _nvjpeg_version()}
    gpu, hardware = "no GPU", []
    if not setup.dry:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = _output(query) or torch.cuda.get_device_name(0)
    if _has_dali():
        said = _output(_command(setup, "decode whole, hw load 1.0"), DALI_NVIMGCODEC_LOG_LEVEL="3")
        hardware = list(dict.fromkeys(re.findall(r"[^\n\]]*(?:HW decoder|num_hw_engines)[^\n]*", said)))
    listed = ", ".join(f"{name} {version}" for name, version in known.items())
    found = f"{gpu}; {cpu_cores()} CPU cores; {listed}; {'; '.join(hardware).strip() or 'no word of a HW decoder'}"
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


def decodes(setup: Setup, *, what: str, load: float | None) -> Finding:
    """16 photos through DALI's decoder alone, compared with Pillow."""
    files = _files(setup, 16)
    differences = []
    for file, pixels in zip(files, _decoded(setup, files, 16, what, load), strict=True):
        expected = np.asarray(Image.open(file).convert("RGB")).astype(np.int16)
        expected = expected if what == "whole" else expected[8:72, 8:72]
        differences.append(np.abs(pixels - expected).mean())
    mean = float(np.mean(differences))
    return Finding(f"{len(files)} photos, mean {mean:.2f} levels off Pillow", mean <= PILLOW_MEAN, {"mean": mean})


def _files(setup: Setup, photos: int) -> list[Path]:
    return sorted((setup.folder / "photos" / "train").rglob("*.jpg"))[:photos]


def _decoded(setup: Setup, files: Sequence[Path], batch: int, what: str, load: float | None) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each file. what: whole; slice, 64 x 64 cut out of it; roi, the decoder's own window."""
    for pixels in _decoder(setup, files, batch, what, load):
        pixels = pixels if setup.dry else pixels.as_cpu()
        yield from (np.array(pixels.at(number)) for number in range(len(pixels)))


def _decoder(setup: Setup, files: Sequence[Path], batch: int, what: str, load: float | None) -> Iterator[Any]:
    """The batches as DALI has them: file.read, decoder, and nothing else of the suite."""
    from nvidia.dali import fn, pipeline_def, types

    options = {"device": "cpu" if setup.dry else "mixed", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    options |= {} if load is None else {"hw_decoder_load": load}
    window: dict[str, Any] = {"start": [8, 8], "shape": [64, 64], "axis_names": "HW"}

    @pipeline_def(batch_size=batch, num_threads=8, device_id=None if setup.dry else 0, prefetch_queue_depth=1)
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


def tests(setup: Setup, *, chosen: str, small: str) -> Finding:
    """tests/test_gpu.py, a part of it; each failed test is named."""
    if not importlib.util.find_spec("pytest"):
        return Finding("pytest is not installed")
    words = ["-m", "", "-k", small] if setup.dry else ["-m", "gpu", "-k", chosen]
    files = ["tests/test_gpu.py", "tests/training/test_progress.py"]
    said = _output([sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *files, *words])
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    last = said.strip().splitlines()[-1] if said.strip() else "no word"
    return Finding(f"{last}{': ' if failed else ''}{', '.join(failed)}", "passed" in last and "failed" not in said)


# Pixels


def odd_photos(setup: Setup) -> Finding:
    """Every kind of JPEG, and a PNG, through the suite's DALI engine beside Pillow; and one that is cut off."""
    root, kinds = setup.folder / "odd", dict[str, bytes]()
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
    for engine, device in (("pillow", torch.device("cpu")), ("dali", setup.device)):
        with _loader(split, engine, device, len(split), train=False) as loader:
            batch = next(next(loader.epoch(0)).batches)
            images[engine] = dict(zip(batch.indices.tolist(), batch.images.cpu(), strict=True))
            left_out.append(f"{engine}: {'yes' if cut in loader.bad else 'no'}")
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    means = {
        Path(split.path(index)).name: ((images["dali"][index] - pixels).abs() * std).mean().item()
        for index, pixels in images["pillow"].items()
        if index in images["dali"] and index != cut
    }
    worst = max(means, key=lambda name: means[name])
    found = f"{len(means)} kinds, mean at most {means[worst]:.2f} levels ({worst})"
    found += f"; cut off after the scan, left out: {', '.join(left_out)}"
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
    executor = make_engine(engine, split, micro_batch=batch, device=device, threads=threads)
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


def batch_composition(setup: Setup) -> Finding:
    """Whether a photo's pixels depend on its batch or on the run: the decoder alone, and the suite's engine."""
    files, small = _files(setup, setup.of(256, 16)), setup.of(16, 4)
    numbers: dict[str, Any] = {}
    for load in LOADS:
        runs = [
            [pixels.tobytes() for pixels in _decoded(setup, files, batch, "whole", load)]
            for batch in (small, small, 4 * small)
        ]
        numbers[f"load {load:g}"] = [sum(a != b for a, b in zip(runs[0], other, strict=True)) for other in runs[1:]]
    split, sums = _split(setup.folder / "photos", "train"), []
    for batch in (small, small, 4 * small):
        with _loader(split, "dali", setup.device, batch) as loader:
            steps = islice(loader.epoch(0), 4 * small * 4 // batch)
            sums.append(torch.cat([next(step.batches).images.cpu() for step in steps]))
    numbers["the engine"] = [int((sums[0] != other).flatten(1).any(dim=1).sum()) for other in sums[1:]]
    found = "; ".join(f"{name}: {again}, {larger}" for name, (again, larger) in numbers.items())
    return Finding(f"photos that differ again, in a larger batch: {found}", numbers["the engine"] == [0, 0], numbers)


# Speed


def loader_rates(setup: Setup) -> Finding:
    """benchmarks/loader.py on the photos: each engine, and others beside it."""
    rows = setup.folder / "loader.jsonl"
    rows.unlink(missing_ok=True)
    words = ["--runs", str(setup.of(3, 1)), "--epochs", str(setup.of(4, 1)), "--batch-size", str(setup.of(256, 8))]
    words += ["--out", str(rows), "--views", "train", "--only", "pillow,", "dali,", "DALI's", "torchvision,"]
    words += ["--threads", *(["1"] if setup.dry else ["4", "16"])]
    script = str(ROOT / "benchmarks" / "loader.py")
    said = _output([sys.executable, script, "--data", str(setup.folder / "photos"), *words])
    if not rows.exists():
        return Finding(said.strip().splitlines()[-1] if said.strip() else "no word", False)
    rates: dict[str, list[float]] = {}
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        rates.setdefault(row["variant"], []).append(row["images_per_s"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((rate for name, rate in medians.items() if name.startswith("dali")), default=0.0)
    listed = ", ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items())
    return Finding(f"photos/s: {listed}", best >= 10_000, medians)


def decoder_rates(setup: Setup) -> Finding:
    """Photos a second of DALI's decoder alone, by the share of its hardware; in turn, median of 3."""
    files, batch = _files(setup, setup.of(4096, 16)), setup.of(256, 8)
    rates: dict[str, list[float]] = {f"load {load:g}": [] for load in LOADS}
    for turn in range(4):  # the first warms up
        for load in LOADS:
            batches = _decoder(setup, files, batch, "slice", load)
            next(batches)
            started = time.perf_counter()
            rest = sum(len(pixels) for pixels in batches)
            if turn:
                rates[f"load {load:g}"].append(rest / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Finding("photos/s: " + ", ".join(f"{name}: {rate:,.0f}" for name, rate in medians.items()), None, medians)


def _training(setup: Setup) -> Training:
    """In bf16: a ResNet-18 from random weights, configs/imagenet.yaml."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as the launcher would say it
    words = ["--config", str(ROOT / "configs" / "imagenet.yaml"), "--data", str(setup.folder / "photos")]
    words += ["--batch-size", str(setup.of(256, 8)), "--lr", "0.01", "--tracker", "none", *_small(setup)]
    return Training(words)


def _small(setup: Setup) -> list[str]:
    return ["--image-size", "64", "--resize", "72"] if setup.dry else []


@contextmanager
def _cuda_says_where_it_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisation(setup: Setup) -> Finding:
    """20 steps under CUDA's own check, and where each warning comes from."""
    training = _training(setup)
    loader = training.loader(setup.engine)
    steps = training.steps(loader)
    training.train(loader, steps, setup.of(5, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = nullcontext if setup.dry else _cuda_says_where_it_waits
        training.train(loader, steps, setup.of(20, 2), watched)
    loader.close()
    waits = [each for each in caught if "called a synchronizing CUDA operation" in str(each.message)]
    spots = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)
    listed = ", ".join(f"{where} ({times})" for where, times in spots.most_common()) or "nowhere"
    return Finding(f"waits {listed}", not spots, dict(spots))


def training_rates(setup: Setup) -> Finding:
    """Photos a second of the loop, batch 256, in turn, median of 3: a batch that lies on the GPU, and each engine."""
    batch, number = setup.of(256, 8), setup.of(60, 2)
    training = _training(setup)
    loaders = {engine: training.loader(engine) for engine in dict.fromkeys(("pillow", setup.engine))}
    ways = {"resident": (loaders["pillow"], training.resident(loaders["pillow"]))}
    ways |= {engine: (loader, training.steps(loader)) for engine, loader in loaders.items() if engine == "dali"}
    rates, waits = dict[str, list[float]](), dict[str, float]()
    for turn in range(setup.of(4, 2)):  # the first warms up
        for name, (loader, steps) in ways.items():
            waited = loader.wait_seconds
            seconds = training.train(loader, steps, number)
            if turn:
                rates.setdefault(name, []).append(batch * number / seconds)
                waits[name] = (loader.wait_seconds - waited) / seconds
    steps = training.steps(loaders["pillow"])  # last, as it takes the loader from the resident batch
    rates["pillow"] = [
        batch * number / 4 / training.train(loaders["pillow"], steps, number // 4 or 1) for _ in range(3)
    ]
    for loader in loaders.values():
        loader.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians[setup.engine] / medians["resident"]
    found = ", ".join(f"{name} {rate:,.0f}/s" for name, rate in medians.items())
    found += f"; {setup.engine} {ratio:.2f} of resident, waiting {waits.get(setup.engine, 0):.1%}"
    return Finding(found, ratio >= 0.95, medians | {"ratio": ratio, "data_wait": waits})


def without_a_search(setup: Setup) -> Finding:
    """The resident batch again, without cuDNN's search for the fastest algorithms, which a short run does without."""
    batch, number = setup.of(256, 8), setup.of(60, 1)
    training = _training(setup)
    torch.backends.cudnn.benchmark = False
    loader = training.loader("pillow")
    steps = training.resident(loader)
    training.train(loader, steps, number)
    rate = statistics.median(batch * number / training.train(loader, steps, number) for _ in range(3))
    loader.close()
    return Finding(f"resident {rate:,.0f}/s", None, {"rate": rate})


def profile(setup: Setup) -> Finding:
    """The share of 20 steps in which the GPU works, and what of that work is DALI's and what is largest."""
    from torch.profiler import ProfilerActivity

    training = _training(setup)
    loader = training.loader(setup.engine)
    steps = training.steps(loader)
    training.train(loader, steps, setup.of(20, 1))
    wanted = "CPU" if setup.dry else "CUDA"
    with torch.profiler.profile(activities=[getattr(ProfilerActivity, wanted)]) as profiler:
        training.train(loader, steps, setup.of(20, 1))
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


def recipe(setup: Setup, *, launcher: Sequence[str], flags: Sequence[str] = (), small: bool = False) -> Finding:
    """The default recipe through `accelerate launch`: its pass over the photos, and some hundred steps of batch 8."""
    if setup.dry and not small:
        return Finding("left out of a dry run: the same code with other flags")
    name = re.sub(r"\W+", "-", " ".join([*launcher, *flags])).strip("-")[:80]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *launcher]
    command += [str(ROOT / "train.py"), "--data", str(setup.folder / "photos"), "--weights"]
    command += [str(setup.folder / "weights.pth"), "--epochs", "2", "--views-per-photo", "1", "--loader", setup.engine]
    command += ["--max-steps", str(setup.of(700, 4)), "--tracker", "none", *flags, *_small(setup)]
    command += ["--runs", str(setup.folder / "runs"), "--run", name]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode:
        return Finding(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}", False)
    rows = map(json.loads, (setup.folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [row for row in rows if "train/loss" in row][-1]
    found = f"exit code 0, {seconds:.0f} s, {last['perf/images_per_s']:,.0f} photos/s, loss {last['train/loss']:.3f}"
    return Finding(found, True, {"seconds": seconds} | last)


def memory(setup: Setup) -> Finding:
    """256 photos of 12 megapixels a batch, 5 batches: the GPU's memory, DALI's included."""
    split = _split(setup.folder / "large", "train")
    before, used = _memory_used(setup), []
    with _loader(split, setup.engine, setup.device, setup.of(256, 4)) as loader:
        for step in islice((step for epoch in count() for step in loader.epoch(epoch)), 5):
            next(step.batches)
            used.append((_memory_used(setup) - before) / 1e9)
    found = f"{max(used):.1f} GB at most, after each batch: {', '.join(f'{value:.1f}' for value in used)}"
    return Finding(found, max(used) <= 30, {"gigabytes": used})


def _memory_used(setup: Setup) -> int:
    if setup.dry:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


# The table of checks, and what runs it

_CRASH = "a crash (nvImageCodec issue 55), or 16 photos"
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
    Check("odd photos", 1, f"mean at most {PILLOW_MEAN:g} level; cut off: by Pillow alone", odd_photos, dali=True),
    Check(
        "batch composition", 1.5, "loads 0 and 1 and the engine: 0, 0; load 0.65: not 0", batch_composition, dali=True
    ),
    Check("loader", 4, "dali 10,000 or more; Pillow, 16 threads, 3,500 to 4,500", loader_rates, True, True),
    Check("decoder alone", 1.5, "8,000 with load 1 on an H100, 4,000 with 0", decoder_rates, True, True),
    Check("waiting", 1.5, "waits nowhere", synchronisation),
    Check(
        "training",
        4,
        "resident 11,000/s on an H100; dali 0.95 of it or more, waiting below 3 %",
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
        setup = Setup(Path(folder), options.dry_run, engine)
        finding = next(check for check in CHECKS if check.name == name).run(setup)
        (setup.folder / f"{_slug(name)}.json").write_text(json.dumps(asdict(finding)), encoding="utf-8")
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "error: no NVIDIA GPU here (torch.cuda.is_available() is false): --dry-run tries the code", file=sys.stderr
        )
        return 3
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    wanted = [c for c in CHECKS if c.name == "photos" or not options.only or c.name.startswith(tuple(options.only))]
    with tempfile.TemporaryDirectory(prefix="dalitune-gpu-") as folder:
        rows = run_all(wanted, Setup(Path(folder), options.dry_run, "dali"), options.out, 60 * options.minutes)
    return 1 if any(row["ok"] is False for row in rows) else 0


def run_all(checks: Sequence[Check], setup: Setup, out: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs the checks in order, each in a process of its own, and writes the page after each of them."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    fits = _has_dali()
    for number, check in enumerate(checks, start=1):
        whole = [row["ok"] for row in rows if row["name"].startswith("decode whole")]
        decodes_here = fits and (any(whole) or not whole)
        setup = Setup(setup.folder, setup.dry, "dali" if decodes_here else "pillow")
        begun = time.monotonic()
        left = seconds - (begun - started)
        if check.dali and not decodes_here:
            finding = Finding("left out: DALI does not decode here" if fits else "left out: DALI is not installed")
        elif left < 5:
            finding = Finding("left out: the time was up")
        else:
            finding = run_check(check, setup, out / "logs" / f"{_slug(check.name)}.log", min(60 * check.minutes, left))
        # A decoder that crashes by region is expected, and nothing rests on it; a dry run has no figures to judge.
        if (finding.numbers and setup.dry and check.figures) or "roi" in check.name:
            finding = Finding(finding.found, None, finding.numbers)
        row = {"name": check.name, "expected": check.expected, **asdict(finding), "seconds": time.monotonic() - begun}
        rows.append(row)
        at = time.monotonic() - started
        print(f"[{number}/{len(checks)}, {at:.0f} s] {check.name}: {_verdict(row)} {finding.found}", flush=True)
        _write_page(out, rows, setup)
    return rows


def run_check(check: Check, setup: Setup, log: Path, limit: float) -> Finding:
    """One check in a process of its own; what ends it early is what is found. limit: seconds."""
    answer = setup.folder / f"{_slug(check.name)}.json"
    answer.unlink(missing_ok=True)  # `versions` has one of the decoders run, too
    with open(log, "wb") as file:
        child = subprocess.Popen(
            _command(setup, check.name),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment(setup),
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


def _command(setup: Setup, name: str) -> list[str]:
    words = ["--dry-run"] if setup.dry else []
    return [sys.executable, str(Path(__file__).resolve()), *words, "--child", name, str(setup.folder), setup.engine]


def _environment(setup: Setup) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["DALITUNE_CACHE"] = str(setup.folder / "cache")
    return environment | ({"ACCELERATE_USE_CPU": "true"} if setup.dry else {})


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


def _write_page(out: Path, rows: list[dict[str, Any]], setup: Setup) -> None:
    """page.md and page.json, after every check anew, so that what ends the whole leaves what was found."""
    gpu = "a CPU" if setup.dry else torch.cuda.get_device_name(0)
    commit = _output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    lines = [DRY if setup.dry else f"# What a GPU shows: {gpu}", ""]
    lines += [f"`python benchmarks/gpu.py`, commit {commit}, {date}; each check once unless it says otherwise.", ""]
    lines += ["| check | expected | found | | s |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], row["expected"], row["found"], _verdict(row), f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    (out / "page.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = {"dry_run": setup.dry, "gpu": None if setup.dry else gpu, "commit": commit, "date": date, "checks": rows}
    (out / "page.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
