"""What can be told of a photo without a network: how light and how sharp it is, and whether another one looks the same.

Each photo is decoded once, and judged at the size at which networks see it, 256 pixels of the shorter side; a smaller
one as it is. Of each some 800 bytes are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.data.dataset import Split, in_threads
from pipelines.data.decode import decoding_error, window_of
from pipelines.data.plan import EvalPlan
from pipelines.data.shrink import ShrunkCopies
from pipelines.distributed.hardware import cpu_cores

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 256  # pixels of the shorter side
_GRID = 32  # a photo is squeezed to so many grey pixels a side, whatever its shape
_WAVES = 14  # of the cosine transform of these, along each side
_BLOCK = 2048  # photos that are compared with others at once
_MOST_LINKS = 32  # of a photo with those of another block, in the mean
DIMENSIONS = _WAVES * _WAVES - 1


@dataclass(frozen=True, eq=False)
class Appearance:
    """Of N photos, in order; NaN and zeros where one cannot be decoded.

    lightest, darkest: float32 [N], the grey level, 0 to 1, that 5 % of the pixels are above, and below.
    sharpness: float32 [N], variance of the Laplacian of grey levels 0 to 255 (Pech-Pacheco et al. 2000); NaN of a
    picture of fewer than three pixels a side. prints: float32 [N, DIMENSIONS], of length 1, whose products tell how
    much photos look alike (`alike`); zeros of a picture of one colour. errors: why a photo cannot be decoded.
    """

    lightest: np.ndarray
    darkest: np.ndarray
    sharpness: np.ndarray
    prints: np.ndarray
    errors: dict[int, str]


def look_at(split: Split, title: str) -> Appearance:
    """All photos of a split, in threads, with a progress bar. Faulty ones are not opened."""
    count = len(split)
    small = split if split.copies else split.shrunk(ShrunkCopies(SIDE))
    whole = EvalPlan(small.sizes, image_size=SIDE, resize=SIDE)
    numbers = np.full((3, count), np.nan, np.float32)
    prints, errors = np.zeros((count, DIMENSIONS), np.float32), dict[int, str]()

    def look(index: int) -> None:
        if split.faults[index]:
            return
        try:
            grey = window_of(small, whole.views(0, np.array([index])), 0).convert("L")
        except Exception as error:  # Pillow's parsers raise many kinds of error on broken data
            errors[index] = decoding_error(error)
            return
        if (shorter := min(grey.size)) > SIDE:
            width, height = (max(1, round(side * SIDE / shorter)) for side in grey.size)
            grey = grey.resize((width, height), Image.Resampling.BILINEAR)
        levels = np.asarray(grey)
        numbers[:, index] = (*np.percentile(levels, (95, 5)) / 255, _sharpness(levels))
        prints[index] = _print_of(np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BOX), np.float32))

    in_threads(look, count, title, cpu_cores())
    lightest, darkest, sharpness = numbers
    return Appearance(lightest, darkest, sharpness, prints, errors)


def _sharpness(levels: np.ndarray) -> float:
    if min(levels.shape) < 3:
        return np.nan
    grey = levels.astype(np.float32)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())


_COSINES = np.cos(np.pi * np.outer(np.arange(_WAVES), 2 * np.arange(_GRID) + 1) / (2 * _GRID)).astype(np.float32)
_COSINES[0] /= np.sqrt(2)
# Of the waves without the mean: those that run from left to right an odd number of half times. In a mirror image they
# have the other sign.
_IS_ODD = np.arange(1, _WAVES * _WAVES) % _WAVES % 2 == 1


def _print_of(grey: np.ndarray) -> np.ndarray:
    """float32 [_GRID, _GRID] -> [DIMENSIONS]."""
    waves = (_COSINES @ grey @ _COSINES.T).flatten()[1:]
    length = float(np.linalg.norm(waves))
    return waves / length if length > _GRID else np.zeros_like(waves)


def likeness(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float32 [N, M], how much photos look like others, or like their mirror images, to 1 (prints: [N] and [M])."""
    even, odd = ones[:, ~_IS_ODD] @ others[:, ~_IS_ODD].T, ones[:, _IS_ODD] @ others[:, _IS_ODD].T
    # As it is the odd waves add to the likeness, and of a mirror image they take away.
    return even + np.abs(odd)


def alike(prints: np.ndarray, least: float) -> np.ndarray:
    """int64 [P, 2], the pairs of photos whose `likeness` is `least` or more, the first of a pair being smaller.

    prints: as `Appearance` has them. All pairs are compared. Where very many are alike, as the frames of a film, only
    some are told, by which each is still linked to another one.
    """
    pairs = [np.empty((0, 2), np.int64)]
    starts = range(0, len(prints), _BLOCK)
    with tqdm(total=len(starts) * (len(starts) + 1) // 2, desc="duplicates", leave=False, disable=None) as progress:
        for top in starts:
            for left in range(top, len(prints), _BLOCK):
                is_alike = likeness(prints[top : top + _BLOCK], prints[left : left + _BLOCK]) >= least
                if top == left:
                    is_alike = np.triu(is_alike, 1)
                if np.count_nonzero(is_alike) > _MOST_LINKS * _BLOCK:
                    second = np.flatnonzero(is_alike.any(axis=0))
                    first = is_alike[:, second].argmax(axis=0)
                else:
                    first, second = np.nonzero(is_alike)
                pairs.append(np.stack([first + top, second + left], axis=1))
                progress.update()
    return np.concatenate(pairs)


def copies(pairs: np.ndarray, priorities: Sequence[int]) -> dict[int, int]:
    """Which photos are copies, and the one of their group that is not: of those that look alike, directly or by others
    in between, the one of the smallest priority, of equals the first. pairs: int [P, 2]; priorities: of each photo."""
    leader: dict[int, int] = {}

    def of(photo: int) -> int:
        while (above := leader.get(photo, photo)) != photo:
            leader[photo] = leader.get(above, above)
            photo = above
        return photo

    for first, second in pairs.tolist():
        one, other = sorted((of(first), of(second)), key=lambda photo: (priorities[photo], photo))
        leader[other] = one
    return {photo: of(photo) for photo in sorted(leader) if of(photo) != photo}


def thumbnail(split: Split, index: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the whole photo in the middle of a white square; grey where it cannot be decoded."""
    small = split if split.copies else split.shrunk(ShrunkCopies(side))
    square = Image.new("RGB", (side, side), "white")
    try:
        views = EvalPlan(small.sizes, image_size=side, resize=side).views(0, np.array([index]))
        photo = window_of(small, views, 0)
        photo.thumbnail((side, side))
        square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    except Exception:  # Pillow's parsers raise many kinds of error on broken data
        return np.full((side, side, 3), 200, np.uint8)
    return np.asarray(square)
