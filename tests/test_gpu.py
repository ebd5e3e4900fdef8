"""What needs an NVIDIA GPU: `pytest -m gpu`. The code is the same as on the CPU, with another device.

A GPU decodes JPEG with an inverse cosine transform of its own, so its pixels are a few levels off the CPU's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipelines.dataset import load_dataset, scan_dataset
from pipelines.loader import Loader, make_engine
from pipelines.plan import EvalPlan, Plan, TrainPlan

import numpy as np
import pytest
import torch
from test_loader import levels, write_photo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false"),
]
ROOT = Path(__file__).resolve().parent.parent
MEAN_LEVELS = 1.0  # grey levels of 255 between the GPU's decoder and Pillow, on average
WITHIN_4 = 0.99  # share of the pixel values that are at most 4 levels apart


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 96), ("val", 40)):
        for number in range(count):
            name = folder / split / ("ant", "bee")[number % 2] / f"{number:02}.jpg"
            write_photo(name, 200 + 31 * number % 300, 220 + 47 * number % 300, number, quality=92)
    return folder


def loader_on(device: str, engine: str, root: Path, plan: Plan, split) -> Loader:
    where = torch.device(device)
    executor = make_engine(engine, split, image_size=plan.image_size, micro_batch=16, device=where, threads=4)
    labels = split.labels.astype(np.int64)
    return Loader(plan, split, labels, executor, batch_size=16, micro_batch=16, prefetch=3, device=where)


@pytest.mark.parametrize("engine", ["dali", "torch"])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_are_the_cpus(root, tmp_path, engine, train):
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    split = load_dataset(scan_dataset(root, tmp_path, 0.2)).splits["train"]
    plan: Plan = EvalPlan(split.sizes, image_size=224, resize=256)
    if train:
        plan = TrainPlan(split.sizes, seed=1, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    device, reference = loader_on("cuda:0", engine, root, plan, split), loader_on("cpu", "torch", root, plan, split)
    differences = []
    for one, other in zip(device.epoch(0), reference.epoch(0), strict=True):
        batch, expected = next(one.batches), next(other.batches)
        assert batch.images.device.type == batch.labels.device.type == "cuda"
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        differences.append((levels(batch.images.cpu()) - levels(expected.images)).abs().flatten())
    device.close()
    reference.close()
    difference = torch.cat(differences)
    print(f"{engine}, train {train}: mean {difference.mean():.3f}, largest {difference.max():.1f} grey levels")
    assert difference.mean() <= MEAN_LEVELS
    assert (difference <= 4).float().mean() >= WITHIN_4


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("engine", ["dali", "torch"])
@pytest.mark.parametrize("few_views", [False, True])
def test_a_run_trains_in_each_precision(root, tmp_path, random_weights, precision, engine, few_views):
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--mixed_precision", precision]
    settings = ["--data", str(root), "--loader", engine, "--epochs", "3", "--batch-size", "16"]
    if few_views:
        settings += ["--weights", str(random_weights), "--freeze", "layer3", "--views-per-photo", "2"]
    else:
        settings += ["--weights", "none", "--freeze", "none", "--batchnorm", "train"]
    outputs = ["--tracker", "none", "--runs", str(tmp_path), "--run", "gpu"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *settings, *outputs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "DALITUNE_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on cuda, precision {precision}" in done.stdout
    assert ("computed once for each of 2 views" in done.stdout) == few_views
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("engine", ["dali", "torch"])
def test_memory_is_flat_over_the_steps(root, tmp_path, engine):
    """The whole device's memory, DALI's included, which PyTorch's own count would leave out."""
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI")
    split = load_dataset(scan_dataset(root, tmp_path, 0.2)).splits["train"]
    plan = TrainPlan(split.sizes, seed=1, image_size=224, crop_scale_min=0.08, flip_probability=0.5)
    loader = loader_on("cuda:0", engine, root, plan, split)
    used = []
    for epoch in range(30):
        for step in loader.epoch(epoch):
            next(step.batches)
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
    loader.close()
    assert max(used[10:]) - used[9] <= 64 * 2**20, [round(value / 2**20) for value in used]
