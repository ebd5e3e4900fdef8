"""A heat map laid over the photo that it is of."""

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_BESIDE = 0.35  # of its brightness is left of what the box leaves out
_COLD, _HOT = 0.55, 0.5  # of its brightness is left where it is cold; of its own colours where it is hot
_RAMP = np.array([[0, 20, 60], [0, 70, 130], [190, 60, 60], [255, 130, 0], [255, 230, 60]])  # dark to light, too


def laid_over(photo: np.ndarray, heat: np.ndarray, box: Box | None = None) -> np.ndarray:
    """photo: uint8 [H, W, 3]. heat: float [h, w], 0 to 1, whose h x w places cover `box`, by default all of the photo;
    beside the box the photo is darkened. Returns uint8 [H, W, 3].
    """
    height, width = photo.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    scale_x, scale_y = heat.shape[1] / (right - left), heat.shape[0] / (bottom - top)
    placed = (scale_x, 0, -left * scale_x, 0, scale_y, -top * scale_y)  # from a pixel's middle to the map's places
    source = Image.fromarray(heat.astype(np.float32))
    grown = source.transform((width, height), Image.Transform.AFFINE, placed, Image.Resampling.BILINEAR)
    shares = np.asarray(grown)[..., None]
    colours = np.stack([np.interp(shares[..., 0], np.linspace(0, 1, len(_RAMP)), each) for each in _RAMP.T], axis=2)
    heated = photo * (_COLD + (_HOT - _COLD) * shares) + colours * (1 - _COLD + (_COLD - _HOT) * shares)
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    inside = ((x >= left) & (x < right) & (y >= top) & (y < bottom))[..., None]
    return np.where(inside, heated, _BESIDE * photo).round().astype(np.uint8)
