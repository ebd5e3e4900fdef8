"""Geometry after the resize, as here, beside one affine map of crop, resize and geometry together.

    python benchmarks/affine.py --data hymenoptera_data/train              # photos of half a megapixel
    python benchmarks/affine.py --data PHONES --photos 24                  # the larger a photo, the more is left out

Of each decoded photo a training crop is made, turned by up to 10 degrees (`augment: light`): as this suite does it, the
crop resized with antialiasing and then turned by bilinear sampling, and in one bilinear sampling of the photo, which
reads four pixels for each of the square's however many lie between. PyTorch samples floats only, and so the second way
makes floats of the crop's bytes first; a third one has them already. Decoding counts for none. The ways take turns,
photo by photo, in one thread; how far each is from the mean of 8 x 8 samples for each pixel is told in grey levels, of
what lies within the crop: outside of it the one is ImageNet's mean colour, and the other the photo itself.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.config import Config
from pipelines.data.augment import altered
from pipelines.data.engines.nvimgcodec import _resized
from pipelines.data.plan import Views, train_plan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.distributed.hardware import machine
from pipelines.run.folder import versions

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from tqdm import tqdm

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
FINE = 8  # samples a side of each pixel of the reference


def main() -> None:
    """Parses the command line, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of JPEGs, at any depth")
    parser.add_argument("--photos", type=int, default=48, help="how many of them, from all over the folder")
    parser.add_argument("--runs", type=int, default=9, help="how often each way has its turn at a photo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    paths = [paths[index] for index in np.linspace(0, len(paths) - 1, min(options.photos, len(paths))).astype(int)]
    photos = [np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in paths]
    sizes = np.array([photo.shape[:2] for photo in photos], np.int32)
    config = Config(crop_scale_min=0.25, rotation=10, flip_probability=0, views_per_photo=1)
    plan = train_plan(config, sizes, np.zeros(len(photos), np.int32))
    ways: dict[str, Callable[[np.ndarray, Views], torch.Tensor]] = {
        "resized": lambda photo, view: normalised(resized(photo, view)),
        "resized, then turned (as here)": lambda photo, view: turned(normalised(resized(photo, view)), view),
        "one affine map": in_one,
        "one affine map, of floats": in_one,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for index, photo in enumerate(tqdm(photos, unit="photo", disable=None)):
        view = plan.views_in_order(0, np.array([index], np.int32))
        exact, inside = in_one(photo, view, FINE), (source_of(view, view.image_size).abs() < 0.99).all(3)
        of_photo: dict[str, list[float]] = {name: [] for name in ways}
        floats = photo.astype(np.float32)
        for _ in range(options.runs):
            for name, way in ways.items():
                started = time.perf_counter()
                found = way(floats if name.endswith("of floats") else photo, view)
                of_photo[name].append(time.perf_counter() - started)
                if len(of_photo[name]) == 1:
                    errors[name].append(((found - exact) * STD * 255).abs()[:, :, inside[0]].numpy())
        for name, times in of_photo.items():
            seconds[name].append(statistics.median(times))
    print(machine(), ", ".join(f"{library} {number}" for library, number in versions().items()), sep="\n")
    print(table(seconds, errors))


def resized(photo: np.ndarray, view: Views) -> torch.Tensor:
    """uint8 [1, 3, size, size]: the view's window of a photo, resized as the nvImageCodec engine does it."""
    top, left, height, width = view.windows[0].tolist()
    window, all_of_it = photo[top : top + height, left : left + width], (range(height), range(width))
    return _resized(window, view.windows[0, 2:], *all_of_it, view.resized[0], (0, 0), view.image_size)


def normalised(levels: torch.Tensor) -> torch.Tensor:
    """float32, as ImageNet's, of levels from 0 to 255."""
    return (levels.float() / 255 - MEAN) / STD


def turned(images: torch.Tensor, view: Views) -> torch.Tensor:
    """The square, turned as a training does it."""
    assert view.alterations is not None
    return altered(images, view.alterations)


def in_one(photo: np.ndarray, view: Views, samples: int = 1) -> torch.Tensor:
    """float32 [1, 3, size, size]: crop, resize and turn in one bilinear sampling; with `samples` the mean of that many
    a side for each pixel."""
    top, left, height, width = view.windows[0].tolist()
    across, down = source_of(view, view.image_size * samples).unbind(3)
    across, down = left + width * (1 + across) / 2, top + height * (1 + down) / 2  # in pixels of the photo
    first_row, last_row = max(0, int(down.min()) - 1), min(photo.shape[0], int(down.max()) + 2)
    first_column, last_column = max(0, int(across.min()) - 1), min(photo.shape[1], int(across.max()) + 2)
    part = torch.from_numpy(photo[first_row:last_row, first_column:last_column].astype(np.float32, copy=False))
    grid = torch.stack([2 * (across - first_column) / part.shape[1] - 1, 2 * (down - first_row) / part.shape[0] - 1], 3)
    levels = functional.grid_sample(part.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False)
    return normalised(functional.avg_pool2d(levels, samples) if samples > 1 else levels)


def source_of(view: Views, side: int) -> torch.Tensor:
    """float32 [1, side, side, 2]: where in its crop, from -1 to 1 across and down, a square's pixels come from."""
    assert view.alterations is not None
    turn = np.radians(float(view.alterations.geometry[0, 1]))
    middles = (2 * torch.arange(side) + 1) / side - 1
    x, y = middles.view(1, 1, -1), middles.view(1, -1, 1)
    return torch.stack([x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)], 3)


def table(seconds: dict[str, list[float]], errors: dict[str, list[np.ndarray]]) -> str:
    """The Markdown table. seconds: of each way, the median of each photo; errors: float32 [1, 3, pixels] each."""
    lines = ["| way | ms a photo, median | range | levels off, mean | 99th percentile |", "|---|---|---|---|---|"]
    for name, times in seconds.items():
        found = [1000 * each for each in times]
        levels = np.concatenate([each.ravel() for each in errors[name]])
        told = f"{levels.mean():.1f} | {np.percentile(levels, 99):.1f}" if name != "resized" else "|"
        lines.append(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
