"""What is done to a photo before a network sees it: one object for training, evaluation, deploy and model.json."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

# ImageNet's channel means and standard deviations of pixels in [0, 1], which torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WIDE = 1.75  # times as long as wide: from here on the central square of 224 in 256 is less than half of the photo


@dataclass(frozen=True)
class Preprocess:
    """What is done to an upright RGB photo: shorter side to `resize`, the central square of `image_size` pixels, both
    as in `EvalPlan`, bilinear with antialiasing; then, on the 0..1 scale, minus `mean`, divided by `std` (R, G, B).
    crop_mode: "center", or "squash" for the whole photo squeezed into the square. shrink: a photo whose shorter side is
    larger is first shrunk to so many pixels of it, and through a JPEG, as `decode.shrunk_jpeg` does; None: none is.
    """

    resize: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    transparency: str = "white"  # what transparent pixels are composed on, as in `Split`
    crop_mode: str = "center"
    shrink: int | None = None


def choose_crop_mode(sizes: np.ndarray) -> tuple[Literal["center", "squash"], str]:
    """What `crop_mode: auto` comes to, and why, in a line. sizes: int [N, 2], height and width of the sound photos."""
    sides = np.sort(np.maximum(sizes, 1), axis=1).astype(np.float64)
    ratio = float(np.median(sides[:, 1] / sides[:, 0])) if len(sides) else 1.0
    if ratio < _WIDE:
        return "center", f"crop_mode: center, as the median photo's sides are {ratio:.2f} to 1"
    return "squash", f"crop_mode: squash, as the median photo's sides are {ratio:.2f} to 1: all of a photo is seen"
