"""The nvImageCodec engine gives torchvision's v2 pixels on tensors, of Pillow's decoding, bit for bit; or leaves it."""

from pathlib import Path
from typing import Any

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.engines.pillow import PillowEngine
from pipelines.data.plan import EvalPlan, Plan, TrainPlan
from tests.helpers.engines import CPU, write_photo

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

pytest.importorskip("nvidia.nvimgcodec", reason="needs nvImageCodec, which comes with DALI")

KINDS: dict[str, dict[str, Any]] = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "411": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True, "quality": 95},
    "restarts": {"restart_marker_rows": 1},
    "coarse": {"quality": 10},
    **{f"orientation_{value}": {"exif": value} for value in range(1, 9)},
}
SIZES = [(97, 130), (130, 97), (240, 60), (64, 64), (301, 457)]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    root = tmp_path_factory.mktemp("photos")
    for number, (name, options) in enumerate(KINDS.items()):
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options = {"exif": exif}
        for size in SIZES:
            path = root / "train" / "ab"[number % 2] / f"{name}-{size[0]}x{size[1]}.jpg"
            write_photo(path, *size, number, **options)
    write_photo(root / "train" / "a" / "plain.jpg", 70, 90, 3)
    with Image.open(root / "train" / "a" / "plain.jpg") as photo:
        photo.convert("L").save(root / "train" / "b" / "grey.jpg")
        photo.convert("L").save(root / "train" / "b" / "grey_progressive.jpg", progressive=True)
    return load_dataset(scan_dataset(root, root / "cache", 0.0001)).splits["train"]


def plans(split: Split) -> list[Plan]:
    return [
        *(TrainPlan(split.sizes, seed=s, image_size=64, crop_scale_min=0.08, flip_probability=0.5) for s in range(3)),
        EvalPlan(split.sizes, image_size=64, resize=72),
        EvalPlan(split.sizes, image_size=64, resize=64),
        EvalPlan(split.sizes, image_size=224, resize=256),  # larger than some of the photos
        EvalPlan(split.sizes, image_size=64, resize=72, crop_mode="squash"),
    ]


def expected(split: Split, plan: Plan, index: int, window: np.ndarray, resize: int) -> np.ndarray:
    with Image.open(split.path(index)) as photo:
        tensor = F.pil_to_tensor(ImageOps.exif_transpose(photo).convert("RGB"))
    size = [plan.image_size, plan.image_size]
    if isinstance(plan, TrainPlan):
        tensor = F.resized_crop(tensor, *window.tolist(), size, antialias=True)
    elif plan.crop_mode == "squash":
        tensor = F.resize(tensor, size, antialias=True)
    else:
        tensor = F.center_crop(F.resize(tensor, [resize], antialias=True), size)
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("number", range(7))
def test_pixels_are_torchvisions_on_tensors(split, number, monkeypatch):
    def not_by_pillow(*_: Any) -> None:
        raise AssertionError("nvImageCodec was to decode it")

    plan = plans(split)[number]
    monkeypatch.setattr(PillowEngine, "_pixels", not_by_pillow)
    engine = make_engine("nvimgcodec", split, micro_batch=8, device=CPU, threads=1)
    views = plan.views(0, np.arange(len(split)))
    for position, index in enumerate(views.indices.tolist()):
        found = engine._pixels(views, position)  # type: ignore[attr-defined]
        right = expected(split, plan, index, views.windows[position], getattr(plan, "_resize", 0))
        right = right[:, ::-1] if views.flips[position] else right
        if not np.array_equal(found, right):
            difference = np.abs(found.astype(int) - right).max()
            raise AssertionError(f"{Path(split.path(index)).name}: {difference} levels")
    engine.close()


OTHERS: dict[str, Any] = {
    "cmyk.jpg": {"mode": "CMYK"},
    "adobe_rgb.jpg": {"keep_rgb": True},
    "rgb.png": {},
    "strip.jpg": {"size": (4, 3000)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plain_jpeg_is_pillows(tmp_path, name):
    options = dict(OTHERS[name])
    mode, size = options.pop("mode", "RGB"), options.pop("size", (90, 120))
    for label in "ab":
        path = tmp_path / "train" / label / name
        write_photo(path.with_suffix(".bmp"), *size, 1)
        with Image.open(path.with_suffix(".bmp")) as photo:
            photo.convert(mode).save(path, **options)
        path.with_suffix(".bmp").unlink()
        write_photo(tmp_path / "val" / label / "a.png", 10, 10, 1)
    split = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.2)).splits["train"]
    plan = EvalPlan(split.sizes, image_size=64, resize=72)
    views = plan.views(0, np.arange(2))
    pixels = {}
    for engine in ("pillow", "nvimgcodec"):
        made = make_engine(engine, split, micro_batch=8, device=CPU, threads=1)
        made.submit(views)
        pixels[engine] = made.fetch().images
        made.close()
    assert torch.equal(pixels["pillow"], pixels["nvimgcodec"])


def test_many_threads_give_the_same_pixels(split):
    plan = plans(split)[0]
    views = plan.views(0, np.arange(len(split)))
    found = []
    for threads in (1, 8):
        engine = make_engine("nvimgcodec", split, micro_batch=len(split), device=CPU, threads=threads)
        engine.submit(views)
        found.append(engine.fetch().images)
        engine.close()
    assert torch.equal(*found)


def test_a_photo_that_was_turned_meanwhile_is_seen_so(tmp_path):
    """An orientation is remembered; a file that has changed is asked again."""
    for name in ("train/a/0.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/3.jpg"):
        write_photo(tmp_path / name, 64, 64, 0)
    split = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.2)).splits["train"]
    views = EvalPlan(split.sizes, image_size=64, resize=64).views(0, np.arange(1))
    engine = make_engine("nvimgcodec", split, micro_batch=1, device=CPU, threads=1)
    seen = []
    for orientation in (1, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        write_photo(tmp_path / "train/a/0.jpg", 64, 64, 0, exif=exif)
        engine.submit(views)
        seen.append(engine.fetch().images)
    engine.close()
    assert torch.equal(seen[1], seen[0].flip(2, 3))
