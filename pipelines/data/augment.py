"""What is done to a training photo's square behind every engine, on the device: turns, colours, blur, erased boxes.

The plan has drawn all of it (`plan.Alterations`), so it is the same on either engine, on any number of processes and
after a stop. Nothing here waits for the device, and no sum runs over photos: what becomes of one depends on no other.
"""

import math
from collections.abc import Callable

from pipelines.data.plan import BLUR_MOST, Alterations
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
    if (is_moved := (each.geometry != 0).any(axis=1)).any():
        images = _changed(images, is_moved, lambda some: _moved(some, each.geometry[is_moved]))
    if (is_coloured := (each.colours != (1, 1, 1, 0)).any(axis=1)).any():
        mean, std = (
            to_device(torch.tensor(values), images.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        colours = each.colours[is_coloured]
        images = _changed(images, is_coloured, lambda some: (_coloured(some * std + mean, colours) - mean) / std)
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


def _moved(images: torch.Tensor, geometry: np.ndarray) -> torch.Tensor:
    """torchvision's affine, bilinear, each image by its own values; what comes in from outside is 0."""
    shear, turn = np.radians(geometry[:, :2].astype(np.float64)).T
    right, down = 2 * geometry[:, 2:].astype(np.float64).T  # from -1 to 1 is the square's side
    # The inverse, as it says where a pixel comes from: of the shear and then the turn, whose determinant is 1.
    a, b = -np.sin(turn) * np.tan(shear) + np.cos(turn), np.cos(turn) * np.tan(shear) + np.sin(turn)
    c, d = -np.sin(turn), np.cos(turn)
    a, b, c, d, right, down = (_of(each.astype(np.float32), images)[..., 0] for each in (a, b, c, d, right, down))
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
