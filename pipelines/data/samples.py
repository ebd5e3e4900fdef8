"""Photos for people who have none yet: the tutorial's ants and bees, and a small folder of drawn shapes."""

import os
import stat
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from urllib.error import URLError
from urllib.request import Request, urlopen

import pipelines.vision  # noqa: F401 (torchvision comes with it)
from pipelines.errors import MachineError, UserError
from pipelines.files import file_digest
from pipelines.text import path_on_disk

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

HYMENOPTERA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
# From the tutorials' own build, .jenkins/download_data.py in pytorch/tutorials.
HYMENOPTERA_SHA256 = "fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209"
HYMENOPTERA_PHOTOS = {"train/ants": 123, "train/bees": 121, "val/ants": 70, "val/bees": 83}
TIMEOUT = 20  # seconds, for each single wait on the network
# The real archive is 47 MB with some 400 entries: one far beyond that is something else.
MAX_BYTES, MAX_ENTRIES = 200_000_000, 1_000

SHAPE_CORNERS = {"circle": 90, "square": 4, "star": 10, "triangle": 3}
SHAPES_PER_CLASS = {"train": 100, "val": 30}


def locate(data: str | None, cache: Path) -> Path:
    """The folder or CSV file that the setting `data` means.

    None: the folder in the variable DALITUNE_DATA, else the ants and bees. "shapes": the drawn shapes (a folder of
    that name is "./shapes"). Anything else is a path. UserError if it does not exist.
    """
    if data == "shapes":
        return shapes(cache)
    if data is not None:
        # An empty text, as of an unset shell variable, would be the current folder.
        if not data or not os.path.exists(path := os.path.expanduser(path_on_disk(data))):
            raise UserError(
                f"data: there is no {data!r}: give a folder ROOT/<split>/<class>/*, a CSV file path,label[,split], "
                'or "shapes" for drawn ones'
            )
        return Path(path)
    if given := os.environ.get("DALITUNE_DATA"):
        if not os.path.isdir(path := os.path.expanduser(given)):
            raise UserError(f"DALITUNE_DATA is {given!r}, which is no folder: set it to one that holds train/ and val/")
        return Path(path)
    return hymenoptera(cache)


def hymenoptera(cache: Path, url: str = HYMENOPTERA_URL) -> Path:
    """CACHE/hymenoptera_data, which holds train/ and val/ of PyTorch's transfer learning tutorial: fetched once.

    MachineError, with nothing left behind, if it cannot be fetched or is not the tutorial's archive.
    """

    def fetch(folder: Path) -> None:
        archive = folder.with_suffix(".zip")
        try:
            _download(url, archive)
            if (digest := file_digest(archive, "sha256")) != HYMENOPTERA_SHA256:
                raise ValueError(f"its SHA-256 is {digest}, not {HYMENOPTERA_SHA256}")
            _unpack(archive, folder.parent)
            if (found := _count_photos(folder)) != HYMENOPTERA_PHOTOS:
                raise ValueError(f"it holds the photos {found}, not {HYMENOPTERA_PHOTOS}")
        # Of every kind: a broken archive alone can raise half a dozen.
        except Exception as error:
            reason = error.reason if type(error) is URLError else error
            raise MachineError(
                f"the ants-and-bees photos could not be fetched from {url} "
                f"({' '.join(str(reason).split()) or type(error).__name__}): name your own with --data DIR or the "
                "variable DALITUNE_DATA, or take drawn ones with --data shapes"
            ) from error

    return _make_once(cache / "hymenoptera_data", HYMENOPTERA_PHOTOS, fetch)


def shapes(cache: Path) -> Path:
    """CACHE/shapes-v1/{train,val}/{circle,square,star,triangle}/*.jpg: small pictures, drawn once, in two seconds.

    The same library versions draw the same bytes. Place, size, turn and colours say nothing of the class, and either
    the shape or its ground is the darker: colours and single pixels do not tell the classes apart, outlines do.
    """

    def draw(folder: Path) -> None:
        for split_number, (split, photos) in enumerate(SHAPES_PER_CLASS.items()):
            for shape_number, shape in enumerate(SHAPE_CORNERS):
                (folder / split / shape).mkdir(parents=True)
                for number in range(photos):
                    picture = _picture(shape, np.random.default_rng([split_number, shape_number, number]))
                    picture.save(folder / split / shape / f"{number:03}.jpg", quality=90)

    expected = {f"{split}/{shape}": photos for split, photos in SHAPES_PER_CLASS.items() for shape in SHAPE_CORNERS}
    return _make_once(cache / "shapes-v1", expected, draw)


def _make_once(target: Path, photos: dict[str, int], make: Callable[[Path], None]) -> Path:
    """`target`, a folder of so many photos; if there is none, make(folder) fills one that then becomes it."""
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
                make(Path(beside, target.name))
                os.replace(Path(beside, target.name), target)
        except OSError as error:
            # Another process may have been faster: its folder is as good.
            if not target.exists():
                raise MachineError(
                    f"{target} cannot be written ({error}): make room, or set the variable DALITUNE_CACHE"
                ) from error
    if (found := _count_photos(target)) != photos:
        raise MachineError(f"{target} holds the photos {found}, not {photos}: delete that folder and start again")
    return target


def _count_photos(root: Path) -> dict[str, int]:
    """{"train/ants": 123, ...}: the files in ROOT/<split>/<class>/ that ImageFolder takes for photos, by extension."""
    photos = (path for path in root.glob("*/*/*") if path.name.lower().endswith(IMG_EXTENSIONS))
    return dict(sorted(Counter(path.parent.relative_to(root).as_posix() for path in photos).items()))


def _download(url: str, file: Path) -> None:
    with urlopen(Request(url, headers={"User-Agent": "dalitune"}), timeout=TIMEOUT) as response, file.open("wb") as out:
        size = int(response.headers.get("Content-Length", 0))
        # disable=None: no bar where nobody watches.
        with tqdm(total=size or None, desc="ants and bees", unit="B", unit_scale=True, disable=None) as bar:
            if bar.disable:
                print(f"downloading the ants-and-bees photos from {url}", file=sys.stderr, flush=True)
            while chunk := response.read(1 << 16):
                bar.update(out.write(chunk))
                if out.tell() > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES:,} bytes")
        if size and out.tell() != size:
            raise ValueError(f"the connection ended after {out.tell():,} of {size:,} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Refuses an archive with a symbolic link, a path that leads elsewhere, or more content than the limits above."""
    with zipfile.ZipFile(archive) as packed:
        entries = packed.infolist()
        # zipfile never writes more of an entry than the size it states.
        if len(entries) > MAX_ENTRIES or sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise ValueError(f"more than {MAX_ENTRIES:,} entries or {MAX_BYTES:,} bytes")
        for entry in entries:
            # A Windows path knows both separators and drive letters.
            path = PureWindowsPath(entry.filename)
            if path.anchor or ".." in path.parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"its entry {entry.filename!r} leads out of the folder")
        packed.extractall(folder)


def _picture(shape: str, rng: np.random.Generator) -> Image.Image:
    """One RGB picture, 90 to 200 pixels a side, of one filled shape on a busy ground."""
    short = int(rng.integers(90, 151))
    width, height = rng.permutation([short, int(short * rng.uniform(1, 4 / 3))]).tolist()
    # Two colours for each; either may be the ground, so that brightness says nothing of the class.
    dark, light = rng.uniform(0, 110, size=(2, 3)), rng.uniform(145, 255, size=(2, 3))
    ground, fill = rng.permutation([dark, light])
    picture = Image.fromarray(_gradient(width, height, ground, rng).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for colour in rng.integers(0, 256, size=(rng.integers(2, 5), 3)).tolist():
        centre, radius = rng.uniform(0, [width, height]), short * rng.uniform(0.05, 0.15)
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=tuple(colour))
    # Sharp spots would be circles.
    picture = picture.filter(ImageFilter.GaussianBlur(short / 25))
    draw = ImageDraw.Draw(picture)
    for colour in rng.integers(0, 256, size=(rng.integers(2, 6), 3)).tolist():
        draw.line(rng.uniform(0, [width, height] * 2).tolist(), fill=tuple(colour))
    mask = _mask(shape, width, height, short * rng.uniform(0.2, 0.28), rng)
    pixels = np.asarray(picture) * (1 - mask) + _gradient(width, height, fill, rng) * mask
    pixels += rng.normal(0, rng.uniform(3, 12), size=pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _mask(shape: str, width: int, height: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """The part (H x W x 1, 0 to 1) of each pixel inside a shape as large as a circle of `radius` pixels."""
    corner = np.arange(SHAPE_CORNERS[shape])
    # A first corner on top, or two for a square; then turned by up to 29 degrees either way.
    angle = (corner + (shape == "square") / 2) * 2 * np.pi / len(corner) - np.pi / 2 + rng.uniform(-0.5, 0.5)
    distance = np.where((shape == "star") & (corner % 2 == 1), 0.45, 1)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    area = np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2
    # Near the middle: a centre crop must not cut the shape away.
    centre = np.array([width, height]) / 2 + radius * rng.uniform(-0.3, 0.3, size=2)
    points = centre + radius * np.sqrt(np.pi / area) * np.stack([x, y], axis=1)
    # Drawn four times as large, which smooths the edges.
    mask = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(mask).polygon((4 * points).ravel().tolist(), fill=255)
    return np.asarray(mask.reduce(4))[..., None] / 255


def _gradient(width: int, height: int, colours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels (H x W x 3) that run from the first of two colours to the second, in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    share = 0.5 + (x * np.cos(angle) + y * np.sin(angle))[..., None] / np.sqrt(2)
    return colours[0] * (1 - share) + colours[1] * share
