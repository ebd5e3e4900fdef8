"""What is done to a training photo's square behind every engine, on the device: turns, colours, erased boxes.

The plan has drawn all of it (`plan.Alterations`), so it is the same on either engine, on any number of processes and
after a stop. Nothing here waits for the device.
"""

from pipelines.data.plan import Alterations
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.distributed.copies import to_device

import numpy as np
import torch

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
    if (each.colours != (1, 1, 1, 0)).any():
        mean, std = (
            to_device(torch.tensor(values), images.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        images = (_coloured(images * std + mean, each.colours) - mean) / std
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


def _coloured(images: torch.Tensor, colours: np.ndarray) -> torch.Tensor:
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation and adjust_hue, in this order, each image by
    its own values. images: float32 [n, 3, H, W] in [0, 1], or a little beyond by rounding."""
    brightness, contrast, saturation, hue = (_of(column, images) for column in colours.T)
    images = (images * brightness).clamp(0, 1)
    images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrast).clamp(0, 1)
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
