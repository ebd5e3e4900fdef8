"""The engines, and loaders that go through them."""

from pathlib import Path

from pipelines.data.dataset import Split
from pipelines.data.engines import factory
from pipelines.data.engines.factory import engine_module, make_engine
from pipelines.data.loader import Loader
from pipelines.data.mixing import MOST_OTHERS
from pipelines.data.plan import Plan, TrainPlan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD

import numpy as np
import pytest
import torch
from PIL import Image

CPU = torch.device("cpu")
FAULTS = {name: engine_module(name).fault(CPU) for name in factory.ENGINES}
HERE = [name for name, fault in FAULTS.items() if not fault]
ENGINES = [
    pytest.param(name, marks=[pytest.mark.skip(reason=fault.reason)] if fault else []) for name, fault in FAULTS.items()
]
LEVELS, MEAN_LEVELS = 1, 0.2  # grey levels of 255 by which the engines and torchvision may differ at most, on average
# DALI's filter repeats a window's last pixel, Pillow's leaves the outside out. That touches the outermost rows and
# columns only, by at most 1/8 of the contrast there and in a corner by 15/64. The largest that these photos have, and
# of PyTorch's resize, which rounds otherwise:
EDGE_LEVELS = dict.fromkeys(factory.ENGINES, LEVELS) | {"nvimgcodec": 2, "dali": 16}


def write_photo(path: Path, height: int, width: int, seed: int, **options) -> None:
    """A photo-like picture: smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-20, 20, (height, width, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **options)


def train_plan(split: Split, image_size: int = 64) -> TrainPlan:
    return TrainPlan(split.sizes, seed=3, image_size=image_size, crop_scale_min=0.08, flip_probability=0.5)


def make_loader(split: Split, engine: str, plan: Plan | None = None, **options) -> Loader:
    plan = plan or train_plan(split)
    settings = {"batch_size": 8, "micro_batch": 8, "prefetch": 2, "device": CPU, **options}
    mixes = isinstance(plan, TrainPlan) and plan.mixing(0, np.arange(1)) is not None
    most = settings["micro_batch"] + MOST_OTHERS * mixes
    executor = make_engine(engine, split, micro_batch=most, device=CPU, threads=2)
    return Loader(plan, split, split.labels.astype(np.int64), executor, **settings)


def levels(images: torch.Tensor) -> torch.Tensor:
    """Normalised images back as pixel values, 0 to 255."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean) * 255
