"""What is done to a training photo's square behind every engine, on the device: turns, one of TrivialAugment's
operations, affine maps, colours, blur, erased boxes.

The plan has drawn all of it (`plan.Alterations`), so it is the same on either engine, on any number of processes and
after a stop. Nothing here waits for the device, and no sum runs over photos: what becomes of one depends on no other.
"""

import math
from collections.abc import Callable

from pipelines.data.plan import BLUR_MOST, OPERATIONS, Alterations
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.distributed.copies import to_device

import numpy as np
import torch
from torch.nn import functional

_GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


def altered(images: torch.Tensor, alterations: Alterations) -> torch.Tensor:
    """Normalised images, altered; what no photo asks for costs nothing.

    images: float32 [n, 3, size, size], normalised as ImageNet's are, channels last in memory; so is what is returned.
    """
    each = alterations
    if each.vertical_flips.any():
        images = torch.where(_of(each.vertical_flips, images), images.flip(2), images)
    if each.transposed.any():
        images = torch.where(_of(each.transposed, images), images.transpose(2, 3), images)
    images = _operated(images, each.operations, each.magnitudes)
    if (is_moved := (each.geometry != 0).any(axis=1)).any():
        images = _changed(images, is_moved, lambda some: _moved(some, each.geometry[is_moved]))
    if (is_coloured := (each.colours != (1, 1, 1, 0)).any(axis=1)).any():
        images = _changed(images, is_coloured, lambda some: _as_colours(some, _coloured, each.colours[is_coloured]))
    if (is_blurred := each.blurs > 0).any():
        images = _changed(images, is_blurred, lambda some: _blurred(some, each.blurs[is_blurred]))
    if each.erased.any():
        is_erased = in_boxes(to_device(torch.from_numpy(each.erased), images.device), images.shape[2])
        images = images.masked_fill(is_erased, 0)  # ImageNet's mean colour
    return images.contiguous(memory_format=torch.channels_last)


def in_boxes(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """bool [n, 1, size, size], on the device of the boxes: which pixels of each square lie in its box.

    boxes: int32 [n, 4], top, left, height, width.
    """
    top, left, height, width = (column.view(-1, 1, 1, 1) for column in boxes.unbind(1))
    pixels = torch.arange(size, device=boxes.device)
    rows, columns = pixels.view(1, 1, -1, 1), pixels.view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def _of(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """[n, 1, 1, 1] on the device, of a value for each image."""
    return to_device(torch.from_numpy(np.ascontiguousarray(values)), images.device).view(-1, 1, 1, 1)


def _changed(images: torch.Tensor, chosen: np.ndarray, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The images, of which those that are `chosen`, bool [n], are changed."""
    places = to_device(torch.from_numpy(np.flatnonzero(chosen)), images.device)
    return images.index_copy(0, places, change(images.index_select(0, places)))


def _as_colours(images: torch.Tensor, change: Callable[..., torch.Tensor], *values: np.ndarray) -> torch.Tensor:
    """Normalised images, changed as colours from 0 to 1."""
    mean, std = (
        to_device(torch.tensor(values), images.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (change(images * std + mean, *values) - mean) / std


def _moved(images: torch.Tensor, geometry: np.ndarray) -> torch.Tensor:
    """torchvision's affine, bilinear, each image by its own values; what comes in from outside is 0."""
    shear, turn = np.radians(geometry[:, :2].astype(np.float64)).T
    right, down = 2 * geometry[:, 2:].astype(np.float64).T  # from -1 to 1 is the square's side
    # The inverse, as it says where a pixel comes from: of the shear and then the turn, whose determinant is 1.
    a, b = -np.sin(turn) * np.tan(shear) + np.cos(turn), np.cos(turn) * np.tan(shear) + np.sin(turn)
    c, d = -np.sin(turn), np.cos(turn)
    return _sampled(images, a, b, c, d, right, down)


def _sampled(images: torch.Tensor, *inverse: np.ndarray) -> torch.Tensor:
    """Bilinear, each image by its own affine map. inverse: float64 [n] each, from where a pixel comes: once it is moved
    back by the last two, right and down, row by row of a matrix; the square reaches from -1 to 1."""
    a, b, c, d, right, down = (_of(each.astype(np.float32), images)[..., 0] for each in inverse)
    size = images.shape[2]
    middles = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    x, y = middles.view(1, 1, -1) - right, middles.view(1, -1, 1) - down
    grid = torch.stack([a * x + b * y, c * x + d * y], dim=3)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blurred(images: torch.Tensor, blurs: np.ndarray) -> torch.Tensor:
    """torchvision's gaussian_blur, each image by its own standard deviation, of a kernel of three times the largest."""
    size = images.shape[2]
    radius = math.ceil(3 * BLUR_MOST * size)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / blurs[:, None]) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    columns = [_of(column, images) for column in weights.T]
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = functional.pad(images, padding, mode="reflect")
        images = torch.zeros_like(images)
        for at, column in enumerate(columns):
            images = images + column * padded.narrow(axis, at, size)
    return images


def _coloured(images: torch.Tensor, colours: np.ndarray) -> torch.Tensor:
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation and adjust_hue, in this order, each image by
    its own values. images: float32 [n, 3, H, W] in [0, 1], or a little beyond by rounding."""
    brightness, contrast, saturation, hue = (_of(column, images) for column in colours.T)
    images = (images * brightness).clamp(0, 1)
    # One sum after the other: of a single image PyTorch would share one sum of both among threads, and round otherwise.
    average = _grey(images).mean(3, keepdim=True).mean(2, keepdim=True)
    images = torch.lerp(average, images, contrast).clamp(0, 1)
    images = torch.lerp(_grey(images), images, saturation).clamp(0, 1)
    return _turned_hue(images, hue) if colours[:, 3].any() else images


def _grey(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def _turned_hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """turn: of the circle of hues, -0.5 to 0.5. By way of HSV (Smith 1978), back by the formula of Travis (1991)."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turn.squeeze(1)
    channels = []
    for first in (5, 3, 1):
        place = (hue + first) % 6
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, 1)


def _operated(images: torch.Tensor, operations: np.ndarray, magnitudes: np.ndarray) -> torch.Tensor:
    """torchvision's TrivialAugmentWide, bilinear, each image by its own operation and magnitude (`one_operation`).

    Posterize, Solarize, AutoContrast and Equalize take each colour for the nearest of 256 levels, and give what
    torchvision gives for uint8; the others round nothing, as torchvision does with floats.
    """
    if not operations.any():
        return images
    images = images.clone()
    for names, change in _CHANGES.items():
        is_one = operations[:, None] == [OPERATIONS.index(name) for name in names]
        if (chosen := is_one.any(axis=1)).any():
            places = to_device(torch.from_numpy(np.flatnonzero(chosen)), images.device)
            values = np.where(is_one, magnitudes[:, None], 0)[chosen]
            images.index_copy_(0, places, change(images.index_select(0, places), values))
    return images


def _moved_once(images: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """By one of its values each. The top left corner stays where it is in a slant, and the middle in a turn."""
    shear_x, shear_y, right, down, turn = values.astype(np.float64).T
    turn, half = -np.radians(turn), images.shape[2] / 2
    a, b = np.cos(turn), np.sin(turn) + shear_x
    c, d = shear_y - np.sin(turn), np.cos(turn)
    return _sampled(images, a, b, c, d, right / half - shear_x, down / half - shear_y)


def _coloured_once(images: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    return _as_colours(images, _coloured, np.pad(1 + values, ((0, 0), (0, 1))))


def _sharpened(images: torch.Tensor, more: np.ndarray) -> torch.Tensor:
    """torchvision's adjust_sharpness of a factor of 1 + more, of colours from 0 to 1; the outermost rows and columns
    stay as they are."""
    inside = images.shape[2] - 2
    centre = images[:, :, 1:-1, 1:-1]
    total = 4 * centre  # one sum after the other: PyTorch's convolutions may round otherwise in another batch
    for row in range(3):
        for column in range(3):
            total = total + images.narrow(2, row, inside).narrow(3, column, inside)
    return (images + _of(more, images) * functional.pad(centre - total / 13, (1, 1, 1, 1))).clamp(0, 1)


def _on_levels(images: torch.Tensor, change: Callable[..., torch.Tensor], *values: np.ndarray) -> torch.Tensor:
    """Normalised images, changed as whole numbers from 0 to 255, of floats."""
    return _as_colours(images, lambda colours: change((255 * colours).round().clamp(0, 255), *values) / 255)


def _posterized(levels: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    step = _of(np.exp2(8 - bits), levels)
    return (levels / step).floor() * step


def _solarized(levels: torch.Tensor, thresholds: np.ndarray) -> torch.Tensor:
    return torch.where(levels >= _of(thresholds, levels), 255 - levels, levels)


def _with_full_contrast(levels: torch.Tensor) -> torch.Tensor:
    least, most = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    is_flat = most == least
    scale = torch.where(is_flat, 1, (most - least) * (1 / 255))
    return ((levels - torch.where(is_flat, 0, least)) / scale).clamp(0, 255).floor()


def _equalized(levels: torch.Tensor) -> torch.Tensor:
    """By sorting, as PyTorch refuses to count into a histogram on CUDA where it is to be deterministic."""
    flat = levels.flatten(2).contiguous()
    ordered = flat.sort(dim=2).values
    whole = torch.arange(256.0, device=levels.device).expand(*flat.shape[:2], 256).contiguous()
    below = torch.searchsorted(ordered, whole)
    step = below.gather(2, ordered[:, :, -1:].long()) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255).to(levels.dtype)
    return torch.where(step > 0, table.gather(2, flat.long()), flat).view_as(levels)


_CHANGES: dict[tuple[str, ...], Callable[[torch.Tensor, np.ndarray], torch.Tensor]] = {
    ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"): _moved_once,
    ("Brightness", "Contrast", "Color"): _coloured_once,
    ("Sharpness",): lambda images, values: _as_colours(images, _sharpened, values[:, 0]),
    ("Posterize",): lambda images, values: _on_levels(images, _posterized, values[:, 0]),
    ("Solarize",): lambda images, values: _on_levels(images, _solarized, values[:, 0]),
    ("AutoContrast",): lambda images, _: _on_levels(images, _with_full_contrast),
    ("Equalize",): lambda images, _: _on_levels(images, _equalized),
}
