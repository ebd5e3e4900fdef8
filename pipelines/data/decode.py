"""From a photo's file to its pixels, upright and RGB, with Pillow: the same for whoever asks. Loads no PyTorch."""

import io
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress

from pipelines.data.dataset import Split
from pipelines.data.headers import FAULTS, FORMAT, MAX_PIXELS, SHRUNK, exif_orientation, inspect_file, white_level
from pipelines.data.plan import EvalPlan, Views
from pipelines.data.preprocess import Preprocess
from pipelines.data.shrink import JPEG, SPARE, ShrunkCopies, keep_copy, shrunk_sizes
from pipelines.data.structure import TOO_COSTLY
from pipelines.text import printable

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# Odd EXIF data and transparent palettes are no news: the scan has judged the file.
warnings.filterwarnings("ignore", module=r"PIL\.")

SIZE_HAS_CHANGED = "its size has changed since the scan"
LARGEST_RESIZED = MAX_PIXELS // 4  # pixels; a graph that resizes computes all of a strip, to gigabytes

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 0x0112: what turns the stored picture upright


def pixels_of_file(path: str, preprocess: Preprocess, *, whole: bool) -> np.ndarray | str:
    """What a model is given of any file, uint8 [H, W, 3]; or why there is no picture in it. No file raises an error.

    whole: the upright photo, for a graph that resizes; else the square of image_size that the network sees.
    """
    split = split_of([path], preprocess)
    inspect_at(split, 0)
    if fault := FAULTS[split.faults[0]]:
        return fault
    views = views_of_sound(split, preprocess, range(1))
    if whole and views.resized[0].prod(dtype=np.int64) > LARGEST_RESIZED:
        return "too long and narrow for the ONNX graph"
    try:
        return np.asarray(window_of(split, views, 0) if whole else view_of(split, views, 0))
    except MemoryError:
        return TOO_COSTLY
    except Exception as error:  # Pillow's parsers raise many kinds of error on broken data
        return undecodable(decoding_error(error))


def view_of_file(path: str, preprocess: Preprocess) -> np.ndarray:
    """uint8 [image_size, image_size, 3]: what a network sees of a sound photo. Raises whatever Pillow raises."""
    split = split_of([path], preprocess)
    inspect_at(split, 0)
    return np.asarray(view_of(split, views_of_sound(split, preprocess, range(1)), 0))


def photo_of_file(path: str, preprocess: Preprocess) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A sound photo, upright and RGB, or its shrunk copy, and left, top, right, bottom of what a network sees of it.
    Raises whatever Pillow raises."""
    split = split_of([path], preprocess)
    inspect_at(split, 0)
    views = views_of_sound(split, preprocess, range(1))
    return window_of(split, views, 0), kept_box(views, 0)


def view_of(split: Split, views: Views, position: int) -> Image.Image:
    """The RGB picture, image_size x image_size, of one view.

    Of a larger resized window only the square that is kept is computed. Raises as `window_of` does.
    """
    # resize(box=...) computes the pixels that resizing the whole window and cutting out would give, but for roundings:
    # by the sizes Pillow chooses which axis comes first, and rounds to 8 bits in between.
    size, box = (views.image_size, views.image_size), kept_box(views, position)
    picture = window_of(split, views, position).resize(size, Image.Resampling.BILINEAR, box=box)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flips[position] else picture


def kept_box(views: Views, position: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the square that is kept of a view, in the pixels of its window."""
    (top, left), (height, width) = views.anchors[position].tolist(), views.windows[position, 2:].tolist()
    scale_y, scale_x = height / views.resized[position, 0], width / views.resized[position, 1]
    return left * scale_x, top * scale_y, (left + views.image_size) * scale_x, (top + views.image_size) * scale_y


def window_of(split: Split, views: Views, position: int) -> Image.Image:
    """The window of one view in the photo's own pixels, or those of its shrunk copy, upright and RGB; nothing beside it
    is turned or converted.

    Raises ValueError where the photo is not of the size that was planned for, and whatever Pillow raises.
    """
    index, window = int(views.indices[position]), views.windows[position]
    if split.memory is None or not split.memory.fits[index]:
        return _decoded_window(split, index, window)
    whole = np.array([0, 0, *split.sizes[index]])
    photo = split.memory.photo(index, lambda: np.asarray(_decoded_window(split, index, whole)))
    assert photo is not None, "Pillow raises where it cannot decode"
    top, left, height, width = window.tolist()
    return Image.fromarray(np.ascontiguousarray(photo[top : top + height, left : left + width]))


def _decoded_window(split: Split, index: int, place: np.ndarray) -> Image.Image:
    if split.kinds[index] & SHRUNK:
        return _shrunk_photo(split, index).crop(stored_box(place, 1, (0, 0)))
    with Image.open(split.path(index)) as photo:
        _scale_key(photo)
        photo.load()  # Pillow turns a TIFF now, and reads what stands behind the pixels of a PNG
        orientation = exif_orientation(photo)
        upright = photo.size if orientation >= 5 else photo.size[::-1]
        if upright != tuple(split.sizes[index].tolist()):
            raise ValueError(SIZE_HAS_CHANGED)
        white = white_level(photo) if photo.mode[0] in "IF" else None
        window = photo.crop(stored_box(place, orientation, photo.size))
        picture = _to_rgb(window, white, split.transparency)
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def shrunk_jpeg(split: Split, index: int) -> bytes:
    """A JPEG of a photo of `split`, upright and shrunk to the size that the split says. Raises as `window_of` does."""
    assert split.copies
    wanted = split.sizes[index]
    with Image.open(split.path(index)) as photo:
        _scale_key(photo)
        if not isinstance(photo, JpegImageFile):
            photo.load()
        orientation = exif_orientation(photo)
        is_turned = orientation >= 5
        upright = photo.size if is_turned else photo.size[::-1]
        if not np.array_equal(shrunk_sizes(np.array([upright]), split.copies.shrink)[0], wanted):
            raise ValueError(SIZE_HAS_CHANGED)
        width, height = (int(side) for side in (wanted if is_turned else wanted[::-1]))
        # Of a JPEG; the box is the photo's end where the scaled picture has a part of a pixel more.
        scaled = photo.draft(None, (int(SPARE * width), int(SPARE * height)))
        photo.load()
        white = white_level(photo) if photo.mode[0] in "IF" else None
        picture = _to_rgb(photo, white, split.transparency)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=scaled[1] if scaled else None)
    picture = picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
    picture.info.clear()  # a comment would be written
    content = io.BytesIO()
    picture.save(content, **JPEG)
    return content.getvalue()


def keep_shrunk(split: Split, index: int, content: bytes) -> None:
    """Keeps what `shrunk_jpeg` has made, unless the file is not any more what the scan saw, by its size and edges where
    its time is another, as that of a copy on another node's disk. OSError where it cannot."""
    copy, path = split.copy_file(index), split.path_bytes(index)
    if not copy:
        return
    with suppress(FileNotFoundError):  # removed since it was read
        is_same_time = os.stat(path).st_mtime_ns == split.mtimes[index]
        if is_same_time or inspect_file(path).signature == split.signatures[index]:
            keep_copy(copy, content)


def source_of(split: Split, index: int) -> str | bytes:
    """What is opened for a photo's pixels: the path of its file, or of its copy; or the content of a copy that was not
    there, and is from now on, unless a disk is full. Raises as `window_of` does."""
    return os.fsdecode(split.source(index)) if split.has_source(index) else _made_anew(split, index)


def _made_anew(split: Split, index: int) -> bytes:
    content = shrunk_jpeg(split, index)
    with suppress(OSError):
        keep_shrunk(split, index, content)
    return content


def _shrunk_photo(split: Split, index: int) -> Image.Image:
    """A photo's copy, decoded; made anew where it is damaged, too."""
    source = source_of(split, index)
    if isinstance(source, str):
        with suppress(Exception), Image.open(source) as copy:  # Pillow's parsers raise many kinds of error
            copy.load()
            if (copy.mode, *copy.size) == ("RGB", *split.sizes[index].tolist()[::-1]):
                return copy
        source = _made_anew(split, index)
    with Image.open(io.BytesIO(source)) as made:
        made.load()
    return made


def central_views(split: Split, indices: np.ndarray, plan: EvalPlan) -> list[np.ndarray]:
    """What the network sees of validation photos (positions in the split): uint8 [image_size, image_size, 3] each."""
    views = plan.views(0, indices)
    return [np.asarray(view_of(split, views, position)) for position in range(len(views))]


def decoding_error(error: Exception) -> str:
    """Why a photo cannot be decoded, in a few words and without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "no picture in it"
    return " ".join(str(error).split()) or type(error).__name__


def turned_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 [H, W, 3] of the stored picture, turned as EXIF's orientation says."""
    turned = pixels
    if orientation in (5, 6, 7, 8):
        turned = turned.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if turned is pixels:
        return pixels
    upright = np.empty(turned.shape, np.uint8)
    for channel in range(3):  # of three values at a time NumPy copies two to eight times as slowly
        upright[..., channel] = turned[..., channel]
    return upright


def stored_box(window: np.ndarray, orientation: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
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


def split_of(paths: Sequence[str], preprocess: Preprocess) -> Split:
    """Any files as a split without labels; `inspect_at` fills in sizes and faults as the files' turn comes."""
    # Not `abspath`, which takes `link/..` for the folder that the link is in.
    names = [os.fsencode(path if os.path.isabs(path) else os.path.join(os.getcwd(), path)) for path in paths]
    count = len(names)
    return Split(
        name="",
        classes=(),
        labels=np.zeros(count, np.int32),
        sizes=np.zeros((count, 2), np.int32),
        faults=np.zeros(count, np.uint8),
        root=b"",
        path_blob=np.frombuffer(b"".join(names), np.uint8),
        path_offsets=np.cumsum([0, *map(len, names)]).astype(np.uint64),
        signatures=np.zeros(count, np.uint64),
        mtimes=np.zeros(count, np.int64),
        kinds=np.zeros(count, np.uint8),
        transparency=preprocess.transparency,
        copies=ShrunkCopies(preprocess.shrink) if preprocess.shrink else None,
    )


def inspect_at(split: Split, index: int) -> None:
    """Fills in a file's size, kind and fault."""
    fault, split.sizes[index], _, split.kinds[index] = inspect_file(split.path_bytes(index))
    split.faults[index] = FAULTS.index(fault)
    if split.copies and split.sizes[index].min() > split.copies.shrink:
        split.sizes[index] = shrunk_sizes(split.sizes[index][None], split.copies.shrink)[0]
        split.kinds[index] = split.kinds[index] & FORMAT | SHRUNK


def views_of_sound(split: Split, preprocess: Preprocess, indices: range) -> Views:
    """The views of the sound files at `indices`."""
    sizes = {"image_size": preprocess.image_size, "resize": preprocess.resize}
    plan = EvalPlan(split.sizes, **sizes, crop_mode=preprocess.crop_mode)
    sound = np.asarray(indices)[split.faults[indices.start : indices.stop] == 0]
    return plan.views(0, sound)


def undecodable(reason: str) -> str:
    """The error of an answer."""
    return f"cannot be decoded ({printable(reason)})"
