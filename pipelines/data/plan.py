"""The plan: which photo stands at which position of an epoch, and what is done to it.

Everything here is a pure function of `(seed, epoch, position)` and of the photos' number and sizes, and of the classes
where epochs are balanced. No global random state, no rank, no batch size, no history: any process can ask for any
positions, in any order, after any restart, and gets the same answer. Engines execute what the plan says and draw
nothing themselves.

The random bits come from a counter-based hash (the SplitMix64 finaliser, Steele et al. 2014, absorbed coordinate by
coordinate) because numpy does not promise that its generators give the same stream in the next version. Beyond it only
`+ - * / % sqrt` and comparisons are used, which IEEE 754 rounds the same way on every machine; `np.exp` is not one.
The order of an epoch is computed position by position and never stored: the first batch of 14 million photos costs
what any other does, no process keeps a copy, and a resume in mid-epoch has nothing to replay.
"""

from dataclasses import dataclass, fields, replace
from typing import Protocol

from pipelines.config import LIGHT, Config

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 24  # of the permutation: all orders of 6 photos then come equally often to 0.05 % (counted exactly)
_GROWS_BY = 32  # pixels of a growing square: networks halve its sides five times
_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after ten as well
_RATIO_MAX = 4 / 3  # torchvision's, whose smallest is 3/4
_LOG_RATIO_MAX = 0.28768207245178090  # log(4/3); log(3/4) is its negative

_LOG_ERASE_RATIO = 1.2039728043259361  # log(10/3)
BLUR_LEAST, BLUR_MOST = 0.1 / 224, 2 / 224  # of a square's side: SimCLR's 0.1 to 2 pixels of 224
_LOG_2 = 0.6931471805599453
_LARGEST_EXPONENT = 700.0  # e to minus that is still above 0

# What a draw is for. Streams of different purpose never share a bit.
_SHUFFLE, _FLIP, _CROP, HEAD_WEIGHTS, _PART, FOLDS, _CLASS_ORDER = 1, 2, 3, 4, 5, 6, 7
_TURN, _COLOUR, _ERASE, _MIX, _GEOMETRY, _GREY, _BLUR = 8, 9, 10, 11, 12, 13, 14
_DROPOUT, _OPERATION = 15, 16

# TrivialAugment's operations, as torchvision's TrivialAugmentWide names them: the first and the last of their
# magnitudes, and whether its sign is drawn. Shifts are in pixels of a square of 224.
_MAGNITUDES = {
    "Identity": (0, 0, False),
    "ShearX": (0, 0.99, True),
    "ShearY": (0, 0.99, True),
    "TranslateX": (0, 32, True),
    "TranslateY": (0, 32, True),
    "Rotate": (0, 135, True),
    "Brightness": (0, 0.99, True),
    "Color": (0, 0.99, True),
    "Contrast": (0, 0.99, True),
    "Sharpness": (0, 0.99, True),
    "Posterize": (8, 2, False),
    "Solarize": (255, 0, False),
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
}
OPERATIONS = tuple(_MAGNITUDES)
_BINS = 31  # from an operation's first magnitude to its last


@dataclass(frozen=True)
class Augmentation:
    """What else is drawn for a training photo, by the settings of these names; by default nothing. Of `augment` only
    strong is drawn; light stands for some of the others."""

    vertical_flip_probability: float = 0.0
    quarter_turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase_probability: float = 0.0
    rotation: float = 0.0
    shear: float = 0.0
    translation: float = 0.0
    grey_probability: float = 0.0
    blur_probability: float = 0.0
    augment: str = "none"


@dataclass(frozen=True)
class Alterations:
    """What is done to the squares of n photos behind the engine, in this order.

    vertical_flips: bool [n], mirrored top to bottom. transposed: bool [n], rows become columns.
    operations: int8 [n], places in `OPERATIONS`, 0 for none. magnitudes: float32 [n], as `one_operation` returns them.
    geometry: float32 [n, 4], degrees of a shear of the rows and of a turn clockwise about the middle, and a shift to
    the right and down in sides of the square; together one affine map.
    colours: float32 [n, 4], what brightness, contrast and saturation are multiplied by, 1 for as they are, and what is
    added to the hue, of a circle of 1. blurs: float32 [n], a Gaussian's standard deviation in pixels, 0 for none.
    erased: int32 [n, 4], top, left, height, width of a box in the square.
    """

    vertical_flips: np.ndarray
    transposed: np.ndarray
    operations: np.ndarray
    magnitudes: np.ndarray
    geometry: np.ndarray
    colours: np.ndarray
    blurs: np.ndarray
    erased: np.ndarray

    def select(self, chosen: np.ndarray) -> "Alterations":
        """Those that `chosen` (bool [n] or positions) names, in the same order."""
        return Alterations(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Mixing:
    """With what the squares of n photos are mixed, once they are altered (Zhang et al. 2018, Yun et al. 2019).

    partners: int64 [n], the place of each one's partner; its own for none. shares: float32 [n], what is left of each,
    and what its label counts; the rest is the partner's. boxes: int32 [n, 4], top, left, height, width of what the
    partner covers; of no height where the two squares are blended.
    """

    partners: np.ndarray
    shares: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Views:
    """What to do with n photos, in order: decode `windows`, resize to `resized`, cut at `anchors`, flip, alter.

    indices: int64 [n], positions in the dataset's split.
    windows: int32 [n, 4], top, left, height, width in the upright photo (after EXIF rotation), in pixels.
    resized: int32 [n, 2], height, width that the window is resized to.
    anchors: int32 [n, 2], top, left of the image_size x image_size square that is kept of the resized window.
    flips: bool [n], whether the square is mirrored left to right.
    image_size: its side in pixels.
    alterations: None for none.
    keys: uint64 [n], random bits for what is drawn beyond the photo (`dropout_mask`, `path_mask`); None where nothing
    may be.
    """

    indices: np.ndarray
    windows: np.ndarray
    resized: np.ndarray
    anchors: np.ndarray
    flips: np.ndarray
    image_size: int
    alterations: Alterations | None = None
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, chosen: np.ndarray) -> "Views":
        """The views that `chosen` (bool [n] or positions) names, in the same order."""
        kept = (self.indices, self.windows, self.resized, self.anchors, self.flips)
        indices, windows, resized, anchors, flips = (each[chosen] for each in kept)
        alterations = self.alterations and self.alterations.select(chosen)
        keys = None if self.keys is None else self.keys[chosen]
        return Views(indices, windows, resized, anchors, flips, self.image_size, alterations, keys)


class Plan(Protocol):
    """`length` positions an epoch; `views` says what stands at some of them."""

    length: int
    image_size: int
    crop_mode: str

    def views(self, epoch: int, positions: np.ndarray) -> Views:
        """The views at `positions` (int64 [n], each in 0..length-1) of `epoch` (0 is the first)."""
        ...


class TrainPlan:
    """A new order every epoch, a random resized crop and a random flip for every position.

    With `views_per_photo`, K, a photo has K crops and flips, of its own, which the epochs show in turn. Each is
    distributed as any other; together they are a Latin hypercube (McKay et al. 1979): of area, ratio, top, left and
    flip each K-th part of the range is drawn from once. So few are enough.

    The crop follows torchvision's RandomResizedCrop (Szegedy et al. 2014): an area share uniform in [crop_scale_min,
    1], an aspect ratio log-uniform in [1 / crop_ratio_max, crop_ratio_max], ten attempts, then the largest central
    window. With `crop_mode` "squash" it is drawn from the photo squeezed into a square, as validation sees it: the
    ratio times the photo's own.

    sizes: int32 [N, 2], height and width of each upright photo in pixels; (0, 0) for a photo that cannot be read,
    which keeps its place. augmentation: what else is drawn, the same for a photo's view as for a position.
    balanced_labels: int [N], the photos' classes, for epochs that show as many of each; None for each photo once.
    mixup_alpha, cutmix_alpha: of the Beta distributions that the shares of mixed photos are drawn from; 0 for neither.
    first_image_size, grow_epochs: as `grown_size` has them, not with `views_per_photo`; None for one size.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        seed: int,
        image_size: int,
        crop_scale_min: float,
        crop_ratio_max: float = _RATIO_MAX,
        flip_probability: float,
        views_per_photo: int | None = None,
        crop_mode: str = "center",
        balanced_labels: np.ndarray | None = None,
        augmentation: Augmentation = Augmentation(),
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        first_image_size: int | None = None,
        grow_epochs: int | None = None,
    ) -> None:
        self.length = len(sizes)
        self.image_size = image_size
        self._first_image_size, self._grow_epochs = first_image_size, grow_epochs
        self.crop_mode = crop_mode
        self._sizes = sizes
        self._seed = seed
        self._crop_scale_min, self._crop_ratio_max = crop_scale_min, crop_ratio_max
        self._flip_probability = flip_probability
        self._views_per_photo = views_per_photo
        self._augmentation = augmentation
        self._mixup_alpha, self._cutmix_alpha = mixup_alpha, cutmix_alpha
        if balanced_labels is not None:
            self._by_class = np.argsort(balanced_labels, kind="stable").astype(np.int32)
            _, self._first, self._count = np.unique(
                balanced_labels[self._by_class], return_index=True, return_counts=True
            )
        self._is_balanced = balanced_labels is not None

    def size_at(self, epoch: int) -> int:
        """Side of the square in `epoch`, in pixels."""
        if self._first_image_size is None or self._grow_epochs is None:
            return self.image_size
        return grown_size(self._first_image_size, self.image_size, self._grow_epochs, epoch)

    def indices(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the photos at `positions` of `epoch`. Over all of them each photo comes once, in random order.

        Balanced, the epochs' places together go round the classes, and of a class round its photos, each time in
        another order: in any number of epochs the classes come equally often to 1, and so do the photos of a class.
        """
        places = permute(positions, self.length, random_bits(self._seed, _SHUFFLE, epoch, np.arange(_ROUNDS)))
        if not self._is_balanced:
            return places
        turn, chosen = np.divmod(epoch * self.length + places, len(self._count))
        count = self._count[chosen]
        round_, turn = np.divmod(turn, count)
        keys = random_bits(self._seed, _CLASS_ORDER, chosen, round_, np.arange(_ROUNDS)[:, None])
        return self._by_class[self._first[chosen] + permute(turn, count, keys)].astype(np.int64)

    def views(self, epoch: int, positions: np.ndarray) -> Views:
        positions = np.asarray(positions, np.int64)
        views = self._views_of(self.indices(epoch, positions), epoch, positions)
        return replace(views, keys=random_bits(self._seed, _DROPOUT, epoch, positions))

    def mixing(self, epoch: int, positions: np.ndarray) -> Mixing | None:
        """With what the photos at `positions` are mixed, where any are; partners are positions of the epoch.

        Neighbours of the epoch's order are partners, 0 and 1, 2 and 3 and so on, each with a share of its own: they are
        as random as any others, and nearly always in the same batch. The last one of an odd number stays as it is.
        """
        if not self._mixup_alpha and not self._cutmix_alpha:
            return None
        positions = np.asarray(positions, np.int64)
        draws = uniform(random_bits(self._seed, _MIX, epoch, positions[:, None], np.arange(6)))
        is_cut = draws[:, 0] < (0.5 if self._mixup_alpha else 1.0) * (self._cutmix_alpha > 0)
        shares = symmetric_beta(np.where(is_cut, self._cutmix_alpha, self._mixup_alpha), draws[:, 1:4])
        has_partner = (positions ^ 1) < self.length
        size = self.size_at(epoch)
        boxes = cutmix_box(shares, draws[:, 4:], size) * (is_cut & has_partner)[:, None]
        shares = np.where(is_cut, 1 - boxes[:, 2] * boxes[:, 3] / size**2, shares)
        return Mixing(
            partners=np.where(has_partner, positions ^ 1, positions),
            shares=np.where(has_partner, shares, 1).astype(np.float32),
            boxes=boxes.astype(np.int32),
        )

    def views_in_order(self, epoch: int, indices: np.ndarray) -> Views:
        """What `epoch` shows of the photos `indices`, wherever it shows them. Only with `views_per_photo`."""
        assert self._views_per_photo, "a view that belongs to its place has no photo of its own"
        return self._views_of(indices, epoch, indices)

    def _views_of(self, indices: np.ndarray, epoch: int, positions: np.ndarray) -> Views:
        size = self.size_at(epoch)
        epoch, owner = (epoch % self._views_per_photo, indices) if self._views_per_photo else (epoch, positions)
        coordinates = np.arange(_ATTEMPTS * 4)
        crops = uniform(random_bits(self._seed, _CROP, epoch, owner[:, None], coordinates[None, :]))
        crops = crops.reshape(-1, _ATTEMPTS, 4)
        flips = uniform(random_bits(self._seed, _FLIP, epoch, owner))
        if self._views_per_photo:
            parts = self._parts(indices, epoch)
            # Of the attempts only the first: one that does not fit is drawn again from all of the range, as it must be.
            crops[:, 0] = (parts[:, :4] + crops[:, 0]) / self._views_per_photo
            flips = (parts[:, 4] + flips) / self._views_per_photo
        windows = random_resized_crop(
            self._sizes[indices],
            crops,
            scale_min=self._crop_scale_min,
            ratio_max=self._crop_ratio_max,
            squash=self.crop_mode == "squash",
        )
        flips = flips < self._flip_probability
        resized = np.full((len(indices), 2), size, np.int32)
        anchors = np.zeros((len(indices), 2), np.int32)
        if self._augmentation == Augmentation():
            return Views(indices, windows, resized, anchors, flips, size)
        flips, alterations = self._altered(flips, epoch, owner, size)
        return Views(indices, windows, resized, anchors, flips, size, alterations)

    def _altered(self, flips: np.ndarray, epoch: int, owner: np.ndarray, size: int) -> tuple[np.ndarray, Alterations]:
        """What is drawn besides crop and flip, and the flips that it leaves to the engine. size: of the square."""
        asked = self._augmentation
        turn, geometry, colour, blur, erase = (
            uniform(random_bits(self._seed, purpose, epoch, owner[:, None], np.arange(count)))
            for purpose, count in ((_TURN, 2), (_GEOMETRY, 4), (_COLOUR, 4), (_BLUR, 2), (_ERASE, 5))
        )
        grey = uniform(random_bits(self._seed, _GREY, epoch, owner))
        vertical = turn[:, 0] < asked.vertical_flip_probability
        quarters = np.floor(4 * turn[:, 1]).astype(np.int64) if asked.quarter_turns else np.zeros(len(owner), np.int64)
        # A quarter turn is a flip left to right and then a transposition, which swaps the two flips if moved past them.
        flips, vertical = flips ^ np.isin(quarters, (1, 2)), vertical ^ np.isin(quarters, (2, 3))
        strengths = np.array([asked.brightness, asked.contrast, asked.saturation, asked.hue])
        colours = (np.array([1, 1, 1, 0]) + (2 * colour - 1) * strengths).astype(np.float32)
        erased = random_box(erase[:, 1:], size) * (erase[:, :1] < asked.erase_probability)
        geometry = (2 * geometry - 1) * np.array([asked.shear, asked.rotation, asked.translation, asked.translation])
        colours[grey < asked.grey_probability, 2] = 0
        sigmas = (BLUR_LEAST + (BLUR_MOST - BLUR_LEAST) * blur[:, 1]) * size
        blurs = np.where(blur[:, 0] < asked.blur_probability, sigmas, 0)
        operations, magnitudes = np.zeros(len(owner), np.int8), np.zeros(len(owner), np.float32)
        if asked.augment == "strong":
            operation = uniform(random_bits(self._seed, _OPERATION, epoch, owner[:, None], np.arange(3)))
            operations, magnitudes = one_operation(operation, size)
        return flips, Alterations(
            vertical_flips=vertical,
            transposed=quarters % 2 == 1,
            operations=operations,
            magnitudes=magnitudes,
            geometry=geometry.astype(np.float32),
            colours=colours,
            blurs=blurs.astype(np.float32),
            erased=erased.astype(np.int32),
        )

    def _parts(self, indices: np.ndarray, turn: int) -> np.ndarray:
        """int64 [n, 5]: from which K-th part of its range a photo draws each value in its view `turn` of K."""
        values, turns = np.arange(5), np.arange(self._views_per_photo or 0)
        bits = random_bits(self._seed, _PART, indices[:, None, None], values[:, None], turns)
        return np.argsort(bits, axis=2, kind="stable")[:, :, turn]


def train_plan(config: Config, sizes: np.ndarray, labels: np.ndarray) -> TrainPlan:
    """The plan that the settings ask for, with what auto has come to in them. sizes: as `TrainPlan` has them. labels:
    int [N]."""
    assert config.views_per_photo != "auto"
    assert config.crop_mode != "auto"
    asked = {field.name: getattr(config, field.name) for field in fields(Augmentation)}
    asked |= LIGHT if config.augment == "light" else {}
    return TrainPlan(
        sizes,
        seed=config.seed,
        image_size=config.image_size,
        crop_scale_min=config.crop_scale_min,
        crop_ratio_max=config.crop_ratio_max,
        flip_probability=config.flip_probability,
        views_per_photo=config.views_per_photo,
        crop_mode=config.crop_mode,
        balanced_labels=labels if config.sampler == "balanced" else None,
        augmentation=Augmentation(**asked),
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        first_image_size=config.first_image_size,
        grow_epochs=config.grow_epochs,
    )


class ViewsInOrder:
    """The photos of a `TrainPlan` with `views_per_photo`, in the dataset's order, as each epoch shows them."""

    def __init__(self, plan: TrainPlan) -> None:
        self.length = plan.length
        self.image_size = plan.image_size
        self.crop_mode = plan.crop_mode
        self._plan = plan

    def views(self, epoch: int, positions: np.ndarray) -> Views:
        return self._plan.views_in_order(epoch, np.asarray(positions, np.int64))


class EvalPlan:
    """Every photo once, in the dataset's order: shorter side to `resize`, then the central square.

    Integer for integer what torchvision's `Resize(resize)` and `CenterCrop(image_size)` compute. With `crop_mode`
    "squash" all of the photo is squeezed into the square, torchvision's `Resize((image_size, image_size))`; `resize`
    plays no part.
    """

    def __init__(self, sizes: np.ndarray, *, image_size: int, resize: int, crop_mode: str = "center") -> None:
        self.length = len(sizes)
        self.image_size = image_size
        self._sizes = sizes
        self._resize = resize
        self.crop_mode = crop_mode

    def views(self, epoch: int, positions: np.ndarray) -> Views:
        indices = np.asarray(positions, np.int64)
        sizes = np.maximum(self._sizes[indices], 1).astype(np.int64)
        if self.crop_mode == "squash":
            resized = np.full_like(sizes, self.image_size)
        else:
            # torchvision: int(resize * long / short), a float division cut off; exact here as all fits a double.
            resized = np.floor(self._resize * sizes / sizes.min(axis=1, keepdims=True)).astype(np.int64)
        anchors = np.rint((resized - self.image_size) / 2.0).astype(np.int32)  # round half to even, as Python's round
        windows = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)
        flips = np.zeros(len(indices), bool)
        return Views(indices, windows, resized.astype(np.int32), anchors, flips, self.image_size)


def eval_plan(config: Config, sizes: np.ndarray) -> EvalPlan:
    """What the settings have evaluations see. sizes: as `EvalPlan` has them."""
    assert config.crop_mode != "auto"
    return EvalPlan(sizes, image_size=config.evaluation_size, resize=config.resize, crop_mode=config.crop_mode)


def grown_size(first: int, last: int, epochs: int, epoch: int) -> int:
    """Side of the square in `epoch`, 0 being the first, where it grows from `first` pixels to `last` over so many
    `epochs`, in steps of 32 that take equally long; after them it is `last`."""
    if epoch >= epochs:
        return last
    steps = -(-(last - first) // _GROWS_BY)
    return first + _GROWS_BY * (steps * epoch // epochs)


def share(positions: int, rank: int, world_size: int) -> tuple[int, int]:
    """The slice [start, stop) of a batch of `positions` that process `rank` reads; shares differ by at most 1."""
    each, extra = divmod(positions, world_size)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)


def random_bits(*coordinates: int | np.ndarray) -> np.ndarray:
    """uint64, of the coordinates' broadcast shape: 64 random bits for each combination of integer coordinates >= 0."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            state = _mix((state + _GOLDEN) ^ _mix(np.asarray(coordinate).astype(np.uint64) + _GOLDEN))
    return state


def permute(positions: np.ndarray, length: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """int64, of the shape of `positions`: where a pseudo-random permutation of 0..length-1 sends each of them.

    keys: uint64 [rounds], random bits for an even number of rounds. Each position may have a permutation of its own:
    then length is of the shape of `positions`, and keys [rounds, *positions.shape].
    A generalised Feistel cipher with cycle walking (Black and Rogaway 2002): a position is a cell of a table of a
    little over `length` cells. Each round shifts the row by a hash of the column, or the column by a hash of the row,
    which could be undone; a cell beyond the length goes through all rounds again until it falls inside.
    """
    length = np.asarray(length, np.int64)
    rows = np.floor(np.sqrt(np.maximum(length - 1, 1))).astype(np.int64) + 1  # exact: far below 2**52
    rows += rows % 2  # were both sides odd, every round would be an even permutation, and half of all orders never come
    columns = -(-length // rows)
    sides = rows.astype(np.uint64), columns.astype(np.uint64)

    def shift(line: np.ndarray, across: np.ndarray, key: np.ndarray, side: np.ndarray) -> np.ndarray:
        return (line + (_mix(key + across * _GOLDEN) >> np.uint64(1))) % side  # 63 bits: the sum must not wrap

    def rounds(cells: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cells, sides[1])
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            row = shift(row, column, first, sides[0])
            column = shift(column, row, second, sides[1])
        return row * sides[1] + column

    with np.errstate(over="ignore"):
        cells = rounds(np.asarray(positions).astype(np.uint64))
        while (outside := cells >= length.astype(np.uint64)).any():
            cells = np.where(outside, rounds(cells), cells)
    return cells.astype(np.int64)


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 of 64 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_resized_crop(
    sizes: np.ndarray, draws: np.ndarray, *, scale_min: float, ratio_max: float = _RATIO_MAX, squash: bool = False
) -> np.ndarray:
    """int32 [n, 4]: top, left, height, width of a window in each photo.

    sizes: int [n, 2], height and width in pixels. draws: float64 [n, attempts, 4] in [0, 1), for area, aspect ratio,
    top and left. scale_min: the smallest share of the photo's area. ratio_max: the largest width of a height, 1 to 10,
    and the largest height of a width. squash: aspect ratios are times the photo's own.
    """
    height, width = (np.maximum(sizes[:, axis, None], 1).astype(np.float64) for axis in (0, 1))
    area = height * width * (scale_min + (1 - scale_min) * draws[..., 0])
    own = width / height if squash else 1.0
    exp, log_ratio = _exp, _LOG_RATIO_MAX
    if ratio_max != _RATIO_MAX:
        exp, log_ratio = _exp_of_more, float(_log(np.array(ratio_max)))
    ratio = exp((2 * draws[..., 1] - 1) * log_ratio) * own
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h, u, v = (np.take_along_axis(a, first, axis=1) for a in (w, h, draws[..., 2], draws[..., 3]))
    top, left = np.floor(u * (height - h + 1)), np.floor(v * (width - w + 1))

    wide, narrow = width / height > ratio_max * own, width / height < 1 / ratio_max * own
    central_w = np.where(wide, np.rint(height * ratio_max), width)
    central_h = np.where(narrow, np.rint(width / (1 / ratio_max)), height)
    central = [(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]
    found = fits.any(axis=1, keepdims=True)
    chosen = [np.where(found, *pair) for pair in zip([top, left, h, w], central, strict=True)]
    return np.concatenate(chosen, axis=1).astype(np.int32)


def random_box(draws: np.ndarray, size: int) -> np.ndarray:
    """int64 [n, 4]: top, left, height, width of a box in a square, as in random erasing (Zhong et al. 2020): an area of
    0.02 to 1/3 of it, an aspect ratio log-uniform in [3/10, 10/3], cut to the square.

    draws: float64 [n, 4] in [0, 1), for area, aspect ratio, top and left.
    """
    area = size**2 * (0.02 + (1 / 3 - 0.02) * draws[:, 0])
    ratio = _exp_of_more((2 * draws[:, 1] - 1) * _LOG_ERASE_RATIO)
    height, width = (np.clip(np.rint(np.sqrt(each)), 1, size) for each in (area / ratio, area * ratio))
    top, left = np.floor(draws[:, 2] * (size - height + 1)), np.floor(draws[:, 3] * (size - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def one_operation(draws: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n], places in `OPERATIONS`, each as likely, and float32 [n], their magnitudes, as TrivialAugment draws them
    (Mueller and Hutter 2021), in torchvision's terms and from its 31 of each operation.

    ShearX, ShearY: the slant's tangent. TranslateX, TranslateY: whole pixels of the square, a seventh of it at most, as
    32 are of 224. Rotate: degrees counter-clockwise. Brightness, Color, Contrast, Sharpness: what their factor is above
    1. Posterize: how many of 8 bits stay. Solarize: the level of 255 from which on values are inverted. Others: 0.
    draws: float64 [n, 3] in [0, 1), for operation, magnitude and sign.
    """
    operations = np.floor(len(OPERATIONS) * draws[:, 0]).astype(np.int8)
    first, last, is_signed = np.array(list(_MAGNITUDES.values())).T[:, operations]
    magnitudes = first + (last - first) * np.floor(_BINS * draws[:, 1]) / (_BINS - 1)
    is_shift, is_posterize = (
        np.isin(operations, [OPERATIONS.index(name) for name in names])
        for names in (("TranslateX", "TranslateY"), ("Posterize",))
    )
    magnitudes = np.where(is_shift, np.floor(magnitudes * size / 224), magnitudes)
    magnitudes = np.where(is_posterize, np.rint(magnitudes), magnitudes)
    magnitudes = np.where((is_signed > 0) & (draws[:, 2] < 0.5), 0 - magnitudes, magnitudes)
    return operations, magnitudes.astype(np.float32)


def dropout_mask(keys: np.ndarray, features: int, chance: float) -> np.ndarray:
    """bool [n, features]: which features of n photos are kept, each but for `chance`, to 1 in 65,536.

    keys: uint64 [n], as `Views` has them.
    """
    words = random_bits(keys[:, None], np.arange(-(-features // 4)))
    parts = (words[:, :, None] >> np.array([0, 16, 32, 48], np.uint64)) & np.uint64(0xFFFF)
    return parts.reshape(len(keys), 4 * words.shape[1])[:, :features] >= round(chance * 2**16)


def path_mask(keys: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """bool [n, blocks, 2]: which additions of each block are kept for n photos; a block has at most two of them.

    keys: as `dropout_mask` has them. chances: float64 [blocks], that one is left out.
    """
    # A third coordinate, so that no bits are those of dropout.
    bits = random_bits(keys[:, None, None], np.arange(len(chances))[:, None], np.arange(2))
    return uniform(bits) >= chances[:, None]


def symmetric_beta(alpha: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1], distributed as Beta(alpha, alpha) (Devroye 1996, of Student's t in polar coordinates).

    alpha: float64 [n], above 0. draws: float64 [n, 3] in [0, 1).
    """
    # exp(log(u) / alpha), of a number small enough for the series.
    powers = _exp(-np.clip(-_log(1 - draws[:, 0]) / alpha, 0, _LARGEST_EXPONENT) / 2**12)
    for _ in range(12):
        powers = powers * powers
    spread = (1 - powers) * _cos(draws[:, 1] * (np.pi / 2)) ** 2
    return 0.5 + np.where(draws[:, 2] < 0.5, -0.5, 0.5) * np.sqrt(spread / (powers + spread))


def cutmix_box(shares: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """int64 [n, 4]: top, left, height, width of a box in a square, as in CutMix (Yun et al. 2019): of 1 - share of its
    area, around any of its pixels, cut to the square.

    shares: float64 [n] in [0, 1]. draws: float64 [n, 2] in [0, 1), for the middle's row and column.
    """
    half = (np.floor(size * np.sqrt(1 - shares)).astype(np.int64) // 2)[:, None]
    middle = np.floor(draws * size).astype(np.int64)
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half, size)
    return np.concatenate([first, last - first], axis=1)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _exp(x: np.ndarray) -> np.ndarray:
    """e**x for |x| < 0.3 to double precision by Taylor's series: np.exp differs in the last bit between processors."""
    result = np.ones_like(x)
    for k in range(14, 0, -1):
        result = 1 + result * x / k
    return result


def _exp_of_more(x: np.ndarray) -> np.ndarray:
    """e**x for |x| < 2.4, likewise, as the eighth power of what the series is good for."""
    result = _exp(x / 8)
    for _ in range(3):
        result = result * result
    return result


def _log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of x > 0, likewise, by the series of artanh."""
    mantissa, exponent = np.frexp(x)
    z = (mantissa - 1) / (mantissa + 1)
    result = np.zeros_like(z)
    for k in range(35, 0, -2):
        result = 1 / k + result * z * z
    return 2 * z * result + exponent * _LOG_2


def _cos(x: np.ndarray) -> np.ndarray:
    """The cosine of |x| <= pi / 2, likewise, by Taylor's series."""
    result = np.ones_like(x)
    for k in range(26, 0, -2):
        result = 1 - result * x * x / (k * (k - 1))
    return result
