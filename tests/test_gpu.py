"""What needs an NVIDIA GPU: `pytest -m gpu`. What a CPU can do of the same code runs everywhere.

A GPU decodes JPEG with an inverse cosine transform of its own, so its pixels are a few levels off the CPU's. What
involves DALI runs in a process of its own: a crash is one failed test.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import train
from pipelines.data.augment import altered
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.loader import Loader
from pipelines.data.plan import Alterations, EvalPlan, Plan, TrainPlan, one_operation
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.distributed.exits import run_script
from tests.helpers.corpus import encoded, exif, picture
from tests.helpers.engines import HERE, levels
from tests.helpers.paths import ROOT
from tests.helpers.runs import ask_at, newest, rows, same_bits, status

import numpy as np
import pytest
import torch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NO_GPU = pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
TWO_GPUS = pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")
ON_A_GPU = [pytest.mark.gpu, NO_GPU]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
ENGINES = [pytest.param(name, marks=[pytest.mark.slow] if name == "dali" else []) for name in HERE]
# Grey levels of 255 between a GPU's decoder and Pillow: on average, and the share of values that are 4 apart at most.
MEAN_LEVELS, WITHIN_4 = 1.0, 0.99

# All that a plan may draw besides crop and flip; photos of few views are not mixed.
DRAWN = ["--vertical-flip-probability", "0.5", "--quarter-turns", "--rotation", "20", "--shear", "10"]
DRAWN += ["--translation", "0.1", "--brightness", "0.4", "--contrast", "0.4", "--saturation", "0.4", "--hue", "0.1"]
DRAWN += ["--augment", "strong", "--grey-probability", "0.2", "--blur-probability", "0.3", "--erase-probability", "0.5"]
DRAWN += ["--dropout", "0.2"]
MIXED = ["--mixup-alpha", "0.2", "--cutmix-alpha", "1"]

KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "4-4-4": {"subsampling": 0},
    "4-2-2": {"subsampling": 1},
    "restart markers": {"restart_marker_blocks": 4},
} | {f"exif {value}": {"exif": exif(value)} for value in range(1, 9)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """JPEGs with colour noise, 4:2:0, of many sizes; the kinds above stand in `train` too."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 49), ("val", 20)):
        for number in range(count):
            file = folder / split / ("ant", "bee")[number % 2] / f"{number:02}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo = picture(200 + 31 * number % 300, 220 + 47 * number % 300, number)
            file.write_bytes(encoded(photo=photo, quality=92))
    for number, (name, options) in enumerate(KINDS.items()):
        file = folder / "train" / ("ant", "bee")[number % 2] / f"kind {name}.jpg"
        file.write_bytes(encoded(photo=picture(230, 310, number), quality=92, **options))
    return folder


def run_case(case: Callable[..., None], device: str, engine: str, *arguments: Any) -> None:
    """Calls a case with these arguments, which JSON can carry; in a process of its own where it involves DALI."""
    words = [device, engine, *(str(each) if isinstance(each, Path) else each for each in arguments)]
    if engine != "dali":
        case(*words)
        return
    code = f"import json, sys; from tests import test_gpu; test_gpu.{case.__name__}(*json.loads(sys.argv[1]))"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    print(done.stdout)
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    assert done.returncode == 0, f"{case.__name__}: {ended}\n{done.stderr[-3000:]}"


def crash(device: str, engine: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signal")
def test_a_crash_is_one_failed_test():
    with pytest.raises(AssertionError, match="crash: SIGSEGV"):
        run_case(crash, "cpu", "dali")


def train_split(root: str | Path, name: str = "train") -> Split:
    return load_dataset(scan_dataset(Path(root), Path(root) / "cache", 0.2)).splits[name]


def open_loader(device: str, engine: str, split: Split, *, train: bool = True, batch: int = 16, **options) -> Loader:
    plan: Plan = EvalPlan(split.sizes, image_size=224, resize=256)
    if train:
        plan = TrainPlan(split.sizes, seed=1, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    executor = make_engine(engine, split, micro_batch=batch, device=where, threads=4)
    settings: dict[str, Any] = {"batch_size": batch, "micro_batch": batch, "prefetch": 3, "device": where, **options}
    return Loader(plan, split, split.labels.astype(np.int64), executor, **settings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_pillows(root, device, engine, train):
    run_case(pixels_are_pillows, device, engine, root, train)


def pixels_are_pillows(device: str, engine: str, root: str, train: bool) -> None:
    split = train_split(root)
    found = open_loader(device, engine, split, train=train)
    reference = open_loader("cpu", "pillow", split, train=train)
    worst: dict[str, float] = {}
    total, within, count = 0.0, 0, 0
    for one, other in zip(found.epoch(0), reference.epoch(0), strict=True):
        batch, expected = next(one.batches), next(other.batches)
        assert batch.images.device.type == batch.labels.device.type == device
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        difference = (levels(batch.images.cpu()) - levels(expected.images)).abs()
        total, within = total + difference.sum().item(), within + int((difference <= 4.01).sum())
        count += difference.numel()
        for index, mean in zip(batch.indices.tolist(), difference.mean(dim=(1, 2, 3)).tolist(), strict=True):
            worst[Path(split.path(index)).name] = mean
    found.close()
    reference.close()
    ranking = sorted(worst.items(), key=lambda each: -each[1])
    print(f"{device}, {engine}, train {train}: mean {total / count:.3f} grey levels, {1 - within / count:.3%} beyond 4")
    print("worst: " + ", ".join(f"{name} {mean:.3f}" for name, mean in ranking[:5]))
    assert total / count <= MEAN_LEVELS
    assert within / count >= WITHIN_4
    assert ranking[0][1] <= 2 * MEAN_LEVELS, "a kind of photo that is decoded otherwise"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_depend_on_neither_the_batch_nor_the_run(root, device, engine):
    run_case(pixels_depend_on_neither_the_batch_nor_the_run, device, engine, root)


def pixels_depend_on_neither_the_batch_nor_the_run(device: str, engine: str, root: str) -> None:
    split = train_split(root)
    runs = []
    for batch in (16, 16, 64):
        loader = open_loader(device, engine, split, batch=batch)
        steps = [next(step.batches) for step in loader.epoch(2)]
        runs.append(torch.cat([each.images for each in steps]).cpu())
        loader.close()
    for name, other in (("another run", runs[1]), ("a larger batch", runs[2])):
        differ = (runs[0] != other).flatten(1).any(dim=1)
        assert not differ.any(), f"{int(differ.sum())} of {len(differ)} photos differ in {name}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_photo_that_is_cut_off_is_left_out(root, tmp_path, device, engine):
    for split in ("train", "val"):
        for number in range(8):
            file = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(photo=picture(200, 300, number)))
    run_case(a_photo_that_is_cut_off_is_left_out, device, engine, tmp_path)


def a_photo_that_is_cut_off_is_left_out(device: str, engine: str, root: str) -> None:
    split = train_split(root)
    file = Path(split.path(5))
    file.write_bytes(file.read_bytes()[:400])  # within its header: every decoder must say so
    loader = open_loader(device, engine, split, batch=4, skip_bad_files=True)
    seen = [index for step in loader.epoch(0) for index in next(step.batches).indices.tolist()]
    loader.close()
    assert (loader.bad, sorted(seen)) == ({5}, [0, 1, 2, 3, 4, 6, 7])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("few_views", [False, True])
def test_no_step_waits_for_the_gpu(root, tmp_path, random_weights, device, engine, few_views):
    run_case(no_step_waits_for_the_gpu, device, engine, root, tmp_path, random_weights, few_views)


def no_step_waits_for_the_gpu(device: str, engine: str, root: str, runs: str, weights: str, few_views: bool) -> None:
    """CUDA's own check, which knows no CPU: there the same run goes without it."""
    steps, update = [], train.update

    def watched(*given: Any) -> Any:
        steps.append(1)
        watch = device == "cuda" and len(steps) > 2  # libraries start in the first ones
        if watch:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return update(*given)
        finally:
            if watch:
                torch.cuda.set_sync_debug_mode("default")

    freeze, views = ("layer3", "2") if few_views else ("layer2", "null")
    settings = ["--data", root, "--weights", weights, "--freeze", freeze, "--views-per-photo", views]
    settings += DRAWN if few_views else [*DRAWN, *MIXED]
    settings += ["--head-init", "zeros", "--loader", engine, "--log-every", "1"]
    settings += ["--epochs", "3", "--batch-size", "16", "--image-size", "64", "--resize", "72"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALITUNE_CACHE", f"{runs}/cache")
        patch.setattr(train, "update", watched)
        assert run_script(train.main, [*settings, "--tracker", "none", "--runs", runs, "--run", "waits"]) == 0
    assert len(steps) == 12


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("few_views", [False, True])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(root, tmp_path, random_weights, engine, few_views):
    run_case(a_stopped_run_ends_as_a_whole_one, "cuda", engine, root, tmp_path, random_weights, few_views)


def a_stopped_run_ends_as_a_whole_one(
    device: str, engine: str, root: str, runs: str, weights: str, few_views: bool
) -> None:
    """In bf16, with all that the plan draws, and the average of the weights: --deterministic, the same bits."""
    settings = ["--data", root, "--weights", weights, "--head-init", "zeros", "--loader", engine, "--deterministic"]
    settings += ["--epochs", "3", "--batch-size", "16", "--image-size", "64", "--resize", "72", "--log-every", "1"]
    settings += ["--lr", "0.01", "--ema-decay", "0.9", "--sampler", "balanced", "--tracker", "none", "--runs", runs]
    if few_views:
        settings += ["--freeze", "layer3", "--views-per-photo", "2", *DRAWN]
    else:
        settings += ["--freeze", "none", "--views-per-photo", "null", *DRAWN, *MIXED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALITUNE_CACHE", f"{runs}/cache")
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        assert run_script(train.main, [*settings, "--run", "whole"]) == 0
        for call in (1, 6):
            with pytest.MonkeyPatch.context() as stop:
                ask_at(stop, "update", call)
                assert run_script(train.main, [*settings, "--run", f"stopped-{call}"]) == 75
            assert run_script(train.main, [*settings, "--run", f"stopped-{call}"]) == 0
        scored = [f"{runs}/whole", "--loader", engine, "--json", f"{runs}/scores.json"]
        assert run_script(evaluate.main, scored) == 0
    whole = Path(runs) / "whole"
    assert status(whole)["state"] == "finished"
    for call in (1, 6):
        stopped = Path(runs) / f"stopped-{call}"
        assert rows(stopped) == rows(whole)
        for file in ("best.pt", f"checkpoints/{newest(whole).name}/state.pt"):
            assert same_bits(stopped / file, whole / file), file
    best = json.loads((whole / "model.json").read_text())["scores"]
    assert json.loads((Path(runs) / "scores.json").read_text())["top1"] == best["val/top1"]


@pytest.mark.gpu
@NO_GPU
def test_photos_are_altered_as_on_a_cpu():
    rng = np.random.default_rng(0)
    # Of whole levels, as an engine's are: what lies between two may be rounded to either.
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (torch.from_numpy(rng.integers(0, 256, (64, 3, 32, 32))) / 255 - mean) / std
    colours = rng.uniform((0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1), (64, 4)).astype(np.float32)
    operations, magnitudes = one_operation(rng.random((64, 3)), 32)
    drawn = Alterations(
        vertical_flips=rng.random(64) < 0.5,
        transposed=rng.random(64) < 0.5,
        operations=operations,
        magnitudes=magnitudes,
        geometry=rng.uniform((-10, -30, -0.2, -0.2), (10, 30, 0.2, 0.2), (64, 4)).astype(np.float32),
        colours=colours,
        blurs=rng.uniform(0, 0.3, 64).astype(np.float32),
        erased=rng.integers(0, 16, (64, 4)).astype(np.int32),
    )
    there, here = (altered(images.to(device), drawn).cpu() for device in ("cuda", "cpu"))
    assert there.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(there, here, rtol=0, atol=5e-3)


ONE_BY_NCCL = ["--config_file", str(ROOT / "accelerate_config.yaml")]  # --multi_gpu itself is refused for one process
LAUNCHES = {"one": [], "nccl, one": ONE_BY_NCCL, "nccl, two": ["--multi_gpu"]}


@pytest.mark.parametrize(
    ("device", "precision", "launch"),
    [
        pytest.param("cpu", "bf16", "one", marks=pytest.mark.slow),
        *[pytest.param("cuda", precision, "one", marks=ON_A_GPU) for precision in ("no", "fp16", "bf16")],
        pytest.param("cuda", "bf16", "nccl, one", marks=ON_A_GPU),
        pytest.param("cuda", "bf16", "nccl, two", marks=[pytest.mark.gpu, TWO_GPUS]),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("few_views", [False, True])
def test_a_run_trains(root, tmp_path, random_weights, device, precision, launch, engine, few_views):
    if device == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    processes = 2 if launch.endswith("two") else 1
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *LAUNCHES[launch]]
    command += ["--mixed_precision", precision, str(ROOT / "train.py")]
    command += ["--data", str(root), "--loader", engine, "--epochs", "3", "--batch-size", "16", "--head-init", "zeros"]
    if few_views:
        command += ["--weights", str(random_weights), "--freeze", "layer3", "--views-per-photo", "2"]
    else:
        command += ["--weights", "none", "--freeze", "none", "--batchnorm", "train", "--views-per-photo", "null"]
    if device == "cpu":
        command += ["--image-size", "64", "--resize", "72"]  # without bf16 of its own a processor takes minutes
    done = subprocess.run(
        [*command, "--lr", "0.01", "--tracker", "none", "--runs", str(tmp_path), "--run", "run"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DALITUNE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"processes: {processes} on {device}, precision {precision}" in done.stdout
    assert ("computed once for each of 2 views" in done.stdout) == few_views
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_flat_over_the_epochs(root, device, engine):
    run_case(memory_is_flat_over_the_epochs, device, engine, root)


def memory_is_flat_over_the_epochs(device: str, engine: str, root: str) -> None:
    """The whole device's memory, DALI's included, which PyTorch's own count would leave out; of a GPU alone."""
    loader = open_loader(device, engine, train_split(root))
    used = []
    for epoch in range(30 if device == "cuda" else 2):
        for step in loader.epoch(epoch):
            next(step.batches)
        free, total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
        used.append(total - free)
    loader.close()
    if device == "cuda":
        assert max(used[10:]) - used[9] <= 64 * 2**20, [round(value / 2**20) for value in used]


@pytest.mark.gpu
@NO_GPU
def test_known_features_stay_on_the_gpu(root, tmp_path, random_weights, monkeypatch, capsys):
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    settings = ["--data", str(root), "--weights", str(random_weights), "--freeze", "layer3", "--views-per-photo", "2"]
    settings += ["--head-init", "zeros", "--loader", "pillow", "--epochs", "3", "--tracker", "none"]
    settings += ["--runs", str(tmp_path)]
    losses = {}
    for where, free in (("the GPU's memory", 2**40), ("in memory", 0)):
        monkeypatch.setattr("pipelines.model.features.free_bytes_on", lambda _, free=free: free)
        assert run_script(train.main, [*settings, "--run", f"free-{free}"]) == 0
        assert where in capsys.readouterr().out
        rows = [json.loads(line) for line in (tmp_path / f"free-{free}" / "metrics.jsonl").read_text().splitlines()]
        losses[free] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] == pytest.approx(losses[2**40], rel=1e-3)
