"""Both engines execute the same plan to the same pixels, torchvision's."""

import os
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.plan import EvalPlan, Plan, TrainPlan, Views
from tests.helpers.engines import (
    EDGE_LEVELS,
    ENGINES,
    HERE,
    LEVELS,
    MEAN_LEVELS,
    levels,
    make_loader,
    train_plan,
    write_photo,
)

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as F


def torchvisions(split: Split, views: Views, plan: Plan) -> torch.Tensor:
    """What torchvision's own transforms make of the views' photos and windows, as pixel values."""
    pictures, image_size = [], plan.image_size
    for index, window, flip in zip(views.indices, views.windows, views.flips, strict=True):
        photo = ImageOps.exif_transpose(Image.open(split.path(int(index)))).convert("RGB")
        if isinstance(plan, TrainPlan):
            top, left, height, width = (int(value) for value in window)
            photo = F.resized_crop(photo, top, left, height, width, [image_size, image_size])
            photo = F.hflip(photo) if flip else photo
        elif isinstance(plan, EvalPlan) and plan.crop_mode == "squash":
            photo = F.resize(photo, [image_size, image_size])
        else:
            photo = F.center_crop(F.resize(photo, image_size * 256 // 224), image_size)
        pictures.append(F.pil_to_tensor(photo).float())
    return torch.stack(pictures)


def assert_torchvisions_pixels(split: Split, engine: str, plan: Plan) -> None:
    loader = make_loader(split, engine, plan, batch_size=64, micro_batch=64)
    largest, edge, total, count = 0.0, 0.0, 0.0, 0
    for number, step in enumerate(loader.epoch(0)):
        batch = next(step.batches)
        views = plan.views(0, np.arange(number * 64, number * 64 + step.size))
        expected = torchvisions(split, views, plan)
        difference = (levels(batch.images) - expected).abs()
        largest = max(largest, difference[..., 1:-1, 1:-1].max().item())
        edge = max(edge, difference.max().item())
        total, count = total + difference.sum().item(), count + difference.numel()
    loader.close()
    print(f"{engine} {type(plan).__name__}: {largest:.3f}, edge {edge:.3f}, mean {total / count:.4f} grey levels")
    assert largest <= LEVELS + 0.01  # normalising and back costs a little
    assert edge <= EDGE_LEVELS[engine] + 0.01
    assert total / count <= MEAN_LEVELS


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_are_torchvisions(split, engine):
    assert_torchvisions_pixels(split, engine, train_plan(split))
    assert_torchvisions_pixels(split, engine, EvalPlan(split.sizes, image_size=56, resize=64))
    assert_torchvisions_pixels(split, engine, EvalPlan(split.sizes, image_size=56, resize=64, crop_mode="squash"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_are_torchvisions_on_the_real_photos(engine, tmp_path):
    if not os.environ.get("DALITUNE_DATA"):
        pytest.skip("needs the ants-and-bees photos: set DALITUNE_DATA to the folder that holds train/ and val/")
    photos = load_dataset(scan_dataset(Path(os.environ["DALITUNE_DATA"]), tmp_path, 0.2)).splits["val"]
    assert len(photos) == 153
    assert_torchvisions_pixels(photos, engine, EvalPlan(photos.sizes, image_size=224, resize=256))
    assert_torchvisions_pixels(photos, engine, train_plan(photos, image_size=224))


FORMATS = {
    "progressive.jpg": ("RGB", {"progressive": True, "quality": 90}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "rgba.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "one_bit.png": ("1", {}),
    "grey.png": ("L", {}),
    "grey_alpha.png": ("LA", {}),
    "grey_16_bit.png": ("I;16", {}),
    "photo.webp": ("RGB", {"lossless": True}),
    "photo.bmp": ("RGB", {}),
    "photo.tiff": ("RGB", {}),
    "photo.ppm": ("RGB", {}),
} | {f"orientation_{value}.jpg": ("RGB", {"exif": value}) for value in range(1, 9)}


def test_engines_agree_on_every_format_and_orientation(tmp_path):
    for number, (name, (mode, options)) in enumerate(FORMATS.items()):
        path = tmp_path / "train" / ("a", "b")[number % 2] / name
        write_photo(path.with_suffix(".png"), 130, 97, number)
        picture = Image.open(path.with_suffix(".png"))
        picture.load()
        path.with_suffix(".png").unlink()
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        else:
            picture = picture.convert(mode)
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options = {"exif": exif, "quality": 92}
        picture.save(path, **options)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.0001))
    photos = photos.splits["train"]
    assert len(photos) + 2 >= len(FORMATS)  # val takes one of each class
    assert not photos.faults.any(), photos.faulty_files()
    images = {}
    for engine in HERE:
        loader = make_loader(photos, engine, batch_size=len(photos), micro_batch=len(photos))
        images[engine] = next(next(loader.epoch(0)).batches)
        loader.close()
    for engine in HERE:
        assert torch.equal(images["pillow"].indices, images[engine].indices)
        difference = (levels(images["pillow"].images) - levels(images[engine].images)).abs()
        assert difference.max() <= EDGE_LEVELS[engine] + 0.01
        difference = difference[..., 1:-1, 1:-1].amax(dim=(1, 2, 3))
        names = [Path(photos.path(index)).name for index in images["pillow"].indices.tolist()]
        worst = dict(zip(names, difference.tolist(), strict=True))
        assert max(worst.values()) <= LEVELS + 0.01, (engine, worst)


def odd_exif(order: str, entries: Sequence[tuple[int, int, bytes]]) -> bytes:
    """EXIF data of orientations alone: of each the type and how many it says there are, and four bytes."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    parts = [struct.pack(f"{order}HHI", 0x0112, kind, count) + value for kind, count, value in entries]
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(parts)) + b"".join(parts) + bytes(4)


BYTE, SHORT, LONG = 1, 3, 4
ODD_EXIF = {
    "long_big": odd_exif(">", [(LONG, 1, struct.pack(">I", 3))]),
    "long_big_sideways": odd_exif(">", [(LONG, 1, struct.pack(">I", 6))]),
    "long_little": odd_exif("<", [(LONG, 1, struct.pack("<I", 6))]),
    "byte_big": odd_exif(">", [(BYTE, 1, b"\x06\0\0\0")]),
    "byte_little": odd_exif("<", [(BYTE, 1, b"\x06\0\0\0")]),
    "none_of_it": odd_exif(">", [(SHORT, 0, struct.pack(">HH", 6, 0))]),
    "two": odd_exif(">", [(SHORT, 1, struct.pack(">HH", 6, 0)), (SHORT, 1, struct.pack(">HH", 3, 0))]),
    "cut": odd_exif(">", [(SHORT, 1, struct.pack(">HH", 6, 0))])[:-8],
    "plain": odd_exif(">", [(SHORT, 1, struct.pack(">HH", 6, 0))]),
    "plain_little": odd_exif("<", [(SHORT, 1, struct.pack("<HH", 3, 0))]),
}


@pytest.mark.parametrize("engine", HERE)
def test_engines_turn_photos_of_odd_exif_data_alike(tmp_path, engine):
    """Readers differ where an orientation is not of the standard's type, or where there are two."""
    for number, (name, exif) in enumerate(ODD_EXIF.items()):
        photo = tmp_path / "train" / "ab"[number % 2] / f"{name}.jpg"
        write_photo(photo, 130, 97, number, exif=exif)
        for ending in ("png", "webp"):
            write_photo(photo.with_suffix(f".{ending}"), 130, 97, number, exif=exif)
    content = (tmp_path / "train" / "a" / "plain.jpg").read_bytes()
    at = content.index(b"\xff\xe1")
    other = content[at : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")].replace(b"\0\6\0\0", b"\0\3\0\0")
    (tmp_path / "train" / "b" / "two_segments.jpg").write_bytes(content[:at] + other + content[at:])
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.0001)).splits["train"]
    assert not photos.faults.any(), photos.faulty_files()
    for epoch in range(2):
        images = {}
        for each in ("pillow", engine):
            loader = make_loader(photos, each, batch_size=len(photos), micro_batch=len(photos))
            images[each] = next(next(loader.epoch(epoch)).batches)
            loader.close()
        assert torch.equal(images["pillow"].indices, images[engine].indices)
        difference = (levels(images["pillow"].images) - levels(images[engine].images)).abs()[..., 1:-1, 1:-1]
        names = [Path(photos.path(index)).name for index in images["pillow"].indices.tolist()]
        worst = dict(zip(names, difference.amax(dim=(1, 2, 3)).tolist(), strict=True))
        assert max(worst.values()) <= LEVELS + 0.01, worst


ENCODINGS = [
    ("jpg", {}),
    ("jpg", {"progressive": True}),
    ("png", {}),
    ("webp", {}),
    ("tiff", {"compression": "tiff_lzw"}),
]


def test_engines_fail_on_the_same_damaged_photos(tmp_path, capfd):
    """200 files with bytes changed behind their header: each is decoded, or named and left out, by all alike."""
    rng = np.random.default_rng(11)
    for number in range(200):
        ending, options = ENCODINGS[number % len(ENCODINGS)]
        photo = tmp_path / "train" / "ab"[number // 5 % 2] / f"{number:03}.{ending}"
        write_photo(photo, 160, 170, number, **options)
        data = bytearray(photo.read_bytes())
        start = data.index(b"\xff\xda") + 14 if ending == "jpg" else 60
        for at in rng.integers(start, len(data) - 12, (1, 2, 5, 30)[number // 5 % 4]):
            data[at] = rng.integers(256)
        photo.write_bytes(data)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.01)).splits["train"]
    bad = []
    for engine, epoch in product(HERE, (0, 1)):
        loader = make_loader(photos, engine, batch_size=16, micro_batch=16, skip_bad_files=True)
        seen = [index for step in loader.epoch(epoch) for batch in step.batches for index in batch.indices.tolist()]
        loader.close()
        assert sorted([*seen, *loader.bad, *np.flatnonzero(photos.faults)]) == list(range(len(photos)))
        bad.append(sorted(loader.bad))
    assert all(each == bad[0] for each in bad)
    assert 0 < len(bad[0]) < len(photos) // 2
    assert (photos.faults > 0).any()
    assert "nvimgcodec" not in capfd.readouterr().err, "what Pillow's error tells"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 20_000)])
def test_of_a_strip_only_the_square_that_is_kept_is_computed(tmp_path, shape):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    for label in "ab":
        write_photo(tmp_path / "train" / label / "strip.png", *shape, seed=0)
        write_photo(tmp_path / "train" / label / "photo.png", 90, 120, seed=1)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.01)).splits["train"]
    assert_torchvisions_pixels(photos, "dali", EvalPlan(photos.sizes, image_size=224, resize=256))
