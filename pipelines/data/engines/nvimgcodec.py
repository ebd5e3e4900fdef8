"""The nvImageCodec engine: JPEGs decoded by NVIDIA's library on the CPU, of each only what a view needs, and resized by
PyTorch.

nvImageCodec comes with DALI; it needs no GPU and no driver here. Its libjpeg-turbo gives Pillow's pixels bit for bit,
PyTorch's antialiased resize of uint8 those of torchvision's v2 transforms on tensors. Whatever is no plain JPEG, or is
not taken, Pillow does.
"""

import io
import math
import os
import threading
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar

from pipelines.data.decode import source_of, stored_box, turned_upright
from pipelines.data.engines.base import Engine, EngineSettings, Fault
from pipelines.data.engines.pillow import PillowEngine
from pipelines.data.headers import FORMATS, SHRUNK, exif_orientation
from pipelines.data.plan import Views

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

_JPEG = FORMATS.index("JPEG")
# Times the square that is kept: of a long strip all is resized here, and Pillow does that part alone.
_LARGEST_RESIZED = 8
_NOT_TAKEN = -1


class NvImageCodecEngine(PillowEngine):
    """See `base.Engine`. `threads` photos are decoded at a time."""

    LIBRARIES: ClassVar[tuple[str, ...]] = (
        *PillowEngine.LIBRARIES,
        *("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),  # one of them, with DALI
    )

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._of_thread = threading.local()
        self._orientations = np.zeros(len(settings.split), np.int8)  # 0 is not known yet

    def _pixels(self, views: Views, position: int) -> np.ndarray:
        index, size = int(views.indices[position]), views.image_size
        window, (top, left) = views.windows[position], views.anchors[position].tolist()
        rows = _needed(int(window[2]), int(views.resized[position, 0]), top, size)
        columns = _needed(int(window[3]), int(views.resized[position, 1]), left, size)
        is_strip = views.resized[position].prod(dtype=np.int64) > _LARGEST_RESIZED * size**2
        kind = int(self._split.kinds[index])
        is_taken = (kind == _JPEG or kind & SHRUNK) and not is_strip
        part = None
        if is_taken:
            with suppress(Exception):  # of many kinds; Pillow tells it of a photo, and makes a damaged copy anew
                part = self._decoded(index, window, rows, columns)
        if part is None:
            return super()._pixels(views, position)
        square = _resized(part, window[2:], rows, columns, views.resized[position], (top, left), size)
        if views.flips[position]:
            square = square.flip(3)  # NumPy copies pixels of three values backwards in ten times the time
        return square[0].permute(1, 2, 0).numpy()

    def _decoded(self, index: int, window: np.ndarray, rows: range, columns: range) -> np.ndarray | None:
        """uint8 [rows, columns, 3], upright, of a window; None where Pillow is to decode, or to say what is wrong."""
        if (orientation := self._orientation(index)) == _NOT_TAKEN:
            return None
        top, left = int(window[0]) + rows.start, int(window[1]) + columns.start
        memory, size = self._split.memory, tuple(self._split.sizes[index].tolist())
        if memory is None or not memory.fits[index]:
            return self._read(index, np.array([top, left, len(rows), len(columns)]), size, orientation)
        photo = memory.photo(index, lambda: self._read(index, np.array([0, 0, *size]), size, orientation))
        if photo is None:
            self._orientations[index] = _NOT_TAKEN
            return None
        return photo[top : top + len(rows), left : left + len(columns)]

    def _read(self, index: int, within: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray | None:
        """uint8, upright, the window `within` of a photo of this upright size."""
        source = source_of(self._split, index)
        stored_size = size if orientation >= 5 else size[::-1]
        left, top, right, bottom = stored_box(within, orientation, stored_size)
        pixels = self._decoder().window(source, top, left, bottom, right, of=stored_size)
        return None if pixels is None else turned_upright(pixels, orientation)

    def _orientation(self, index: int) -> int:
        """EXIF's, from a photo's header, which is read again where its time has changed; _NOT_TAKEN where Pillow is to
        decode it, or to say what is wrong. Copies are upright."""
        if self._split.kinds[index] & SHRUNK:
            return 1
        path = self._split.path(index)
        if not self._orientations[index] or os.stat(path).st_mtime_ns != self._split.mtimes[index]:
            with Image.open(path) as photo:
                is_plain = photo.mode == "L" or (photo.mode == "RGB" and photo.info.get("adobe_transform") != 0)
                self._orientations[index] = exif_orientation(photo) if is_plain else _NOT_TAKEN
        return int(self._orientations[index])

    def _decoder(self) -> "_Decoder":
        """This thread's own: it decodes in the thread that asks."""
        if not hasattr(self._of_thread, "decoder"):
            self._of_thread.decoder = _Decoder()
        return self._of_thread.decoder


class _Decoder:
    """nvImageCodec's, without a GPU and without threads of its own."""

    def __init__(self) -> None:
        # Read as it is loaded. Whatever it says of a photo, on stderr itself, Pillow's error tells too.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        nvimgcodec: Any = import_module("nvidia.nvimgcodec")
        self._library = nvimgcodec
        self._as_stored = nvimgcodec.DecodeParams(apply_exif_orientation=False)
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
        )

    def window(
        self, source: str | bytes, top: int, left: int, bottom: int, right: int, of: tuple[int, int]
    ) -> np.ndarray | None:
        """uint8 [bottom - top, right - left, 3] of a JPEG, a file or its content, as it is stored; None where it is not
        decoded, or not `of` this width and height."""
        stream = self._library.CodeStream(source)
        if (stream.width, stream.height) != of:
            return None
        part = stream.get_sub_code_stream(region=self._library.Region(top, left, bottom, right))
        decoded = self._decoder.decode(part, params=self._as_stored)
        pixels = None if decoded is None else np.asarray(decoded)
        return pixels if pixels is not None and pixels.shape == (bottom - top, right - left, 3) else None


ENGINE: type[Engine] = NvImageCodecEngine
AUTO_WITH = ("a GPU", "no GPU")
USES_MEMORY = True


def fault(device: torch.device) -> Fault | None:
    """Decodes a window of a drawn photo, which must be Pillow's."""
    noise, file = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    try:
        found = _Decoder().window(file.getvalue(), 9, 17, 40, 60, of=(64, 48))
    except ModuleNotFoundError:
        return Fault("nvImageCodec is not installed here", "install nvidia-nvimgcodec-cu13")
    except Exception as error:  # of a library for another system, of many kinds
        return Fault(f"nvImageCodec does not work here ({' '.join(str(error).split())[:200] or type(error).__name__})")
    with Image.open(file) as photo:
        is_right = found is not None and np.array_equal(found, np.asarray(photo)[9:40, 17:60])
    return None if is_right else Fault("nvImageCodec's pixels are not Pillow's here")


def _needed(length: int, resized: int, first: int, kept: int) -> range:
    """Which of `length` pixels of a side the `kept` ones from `first` on are made of, once it is `resized` long.

    PyTorch's antialiasing triangle reaches a step of the resized side to both directions, and a pixel at least.
    """
    step = length / resized
    reach = max(1.0, step) + 1
    return range(max(0, math.floor(first * step - reach)), min(length, math.ceil((first + kept) * step + reach)))


def _resized(
    part: np.ndarray,
    size: np.ndarray,
    rows: range,
    columns: range,
    resized: np.ndarray,
    anchor: tuple[int, int],
    image_size: int,
) -> torch.Tensor:
    """uint8 [1, 3, image_size, image_size], channels last: what resizing a window of `size` to `resized` and cutting
    the square at `anchor` out of it gives, where `part` is what that is made of: `rows` and `columns` of the window.
    """
    whole = part
    if part.shape[:2] != tuple(size.tolist()):
        whole = np.empty((*size.tolist(), 3), np.uint8)  # what stands elsewhere decides nothing that is kept
        whole[rows.start : rows.stop, columns.start : columns.stop] = part
    # A dimension that NumPy adds has no stride, and PyTorch does not see then that pixels lie together: it would take
    # the channels apart, which costs as much again as the resize, here and where they are put together.
    image = torch.from_numpy(np.ascontiguousarray(whole))[None].permute(0, 3, 1, 2)
    found = functional.interpolate(image, tuple(resized.tolist()), mode="bilinear", antialias=True)
    top, left = anchor
    return found[:, :, top : top + image_size, left : left + image_size]
