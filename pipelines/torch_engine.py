"""The PyTorch engine: Pillow in threads on the CPU, normalisation on the device. Runs everywhere.

Threads, not worker processes: Pillow lets go of Python's lock while it decodes and resizes, so threads use all cores,
start at once, share the memory and die with their process.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.dataset import Split
from pipelines.headers import exif_orientation, white_level
from pipelines.loader import Pixels
from pipelines.plan import EvalPlan, Views

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

# Odd EXIF data and transparent palettes are no news: the scan has judged the file.
warnings.filterwarnings("ignore", module=r"PIL\.")

SIZE_HAS_CHANGED = "its size has changed since the scan"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 0x0112: what turns the stored picture upright


class TorchEngine:
    """See `loader.Engine`. `threads` photos are decoded at a time."""

    def __init__(
        self,
        split: Split,
        image_size: int,
        device: torch.device,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._split = split
        self._image_size = image_size
        self._device = device
        # One multiplication and one addition per pixel: (x / 255 - mean) / std == x * scale + shift.
        self._scale = (1 / (255 * torch.tensor(std))).to(device)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).to(device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._submitted: deque[tuple[torch.Tensor, list[Future[str | None]]]] = deque()

    def submit(self, views: Views) -> None:
        size = self._image_size
        pixels = torch.empty((len(views), size, size, 3), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        target = pixels.numpy()
        jobs = [self._pool.submit(self._execute, views, position, target) for position in range(len(views))]
        self._submitted.append((pixels, jobs))

    def fetch(self) -> Pixels:
        pixels, jobs = self._submitted.popleft()
        failed = {position: reason for position, job in enumerate(jobs) if (reason := job.result())}
        if failed:
            kept = [position for position in range(len(jobs)) if position not in failed]
            pixels = pixels[kept]
        images = pixels.to(self._device, non_blocking=True).float().mul_(self._scale).add_(self._shift)
        return Pixels(images.permute(0, 3, 1, 2), failed)

    def cancel(self) -> None:
        for _, jobs in self._submitted:
            for job in jobs:
                job.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self.cancel()
        self._pool.shutdown(cancel_futures=True)

    def _execute(self, views: Views, position: int, target: np.ndarray) -> str | None:
        """Puts one view's pixels in its place; returns a reason where the photo cannot be decoded."""
        try:
            pixels = np.asarray(view_of(self._split, views, position, self._image_size))
        except Exception as error:  # Pillow's parsers raise many kinds of error on broken data
            return decoding_error(error)
        target[position] = pixels[:, ::-1] if views.flips[position] else pixels
        return None


def view_of(split: Split, views: Views, position: int, image_size: int) -> Image.Image:
    """The RGB picture, image_size x image_size, of one view (not flipped).

    Of a larger resized window only the square that is kept is computed. Raises as `window_of` does.
    """
    picture = window_of(split, views, position)
    # resize(box=...) computes the pixels that resizing the whole window and cutting out would give, but for roundings:
    # by the sizes Pillow chooses which axis comes first, and rounds to 8 bits in between.
    (top, left), resized = views.anchors[position], views.resized[position]
    scale_y, scale_x = picture.height / resized[0], picture.width / resized[1]
    box = (left * scale_x, top * scale_y, (left + image_size) * scale_x, (top + image_size) * scale_y)
    return picture.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def window_of(split: Split, views: Views, position: int) -> Image.Image:
    """The window of one view in the photo's own pixels, upright and RGB; nothing beside it is turned or converted.

    Raises ValueError where the photo is not of the size that was planned for, and whatever Pillow raises.
    """
    index = int(views.indices[position])
    with Image.open(split.path(index)) as photo:
        _scale_key(photo)
        photo.load()  # Pillow turns a TIFF now, and reads what stands behind the pixels of a PNG
        orientation = exif_orientation(photo)
        upright = photo.size if orientation >= 5 else photo.size[::-1]
        if upright != tuple(split.sizes[index].tolist()):
            raise ValueError(SIZE_HAS_CHANGED)
        white = white_level(photo) if photo.mode[0] in "IF" else None
        window = photo.crop(_stored_box(views.windows[position], orientation, photo.size))
        picture = _to_rgb(window, white, split.transparency)
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def central_views(split: Split, indices: np.ndarray, *, image_size: int, resize: int) -> list[np.ndarray]:
    """What the network sees of validation photos (positions in the split): uint8 [image_size, image_size, 3] each."""
    views = EvalPlan(split.sizes, image_size=image_size, resize=resize).views(0, indices)
    return [np.asarray(view_of(split, views, position, image_size)) for position in range(len(views))]


def decoding_error(error: Exception) -> str:
    """Why a photo cannot be decoded, in a few words and without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "no picture in it"
    return " ".join(str(error).split()) or type(error).__name__


def _stored_box(window: np.ndarray, orientation: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in the stored picture of a window that is given in the upright one."""
    top, left, height, width = (int(value) for value in window)
    if orientation in (5, 6, 7, 8):
        top, left, height, width = left, top, width, height
    if orientation in (2, 3, 7, 8):
        left = size[0] - left - width
    if orientation in (3, 4, 6, 7):
        top = size[1] - top - height
    return left, top, left + width, top + height


def _scale_key(photo: ImageFile.ImageFile) -> None:
    """Brings the transparent colour of a PNG of 2, 4 or 16 bits to the 8 bits that Pillow brings the pixels to."""
    key, mode = photo.info.get("transparency"), photo.tile[0][3] if photo.format == "PNG" and photo.tile else None
    if isinstance(key, int) and mode in ("L;2", "L;4"):
        photo.info["transparency"] = key * 255 // (3 if mode == "L;2" else 15)
    elif isinstance(key, tuple) and mode == "RGB;16B":
        photo.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(picture: Image.Image, white: int | None, transparency: str) -> Image.Image:
    """white: of a grey picture of 16 or 32 bits, whose values Pillow's own conversion cuts off at 255."""
    if white:
        values = np.asarray(picture)
        grey = (values.astype(np.float32) * (255 / white)).round().astype(np.uint8)
        opaque = np.where(values == picture.info.get("transparency"), 0, 255).astype(np.uint8)
        picture = Image.fromarray(np.stack([grey, opaque], axis=2), "LA")
    if transparency != "ignored" and picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, transparency)
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")
