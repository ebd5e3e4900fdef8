"""The plan is pure, the same on any number of processes, and does what torchvision's transforms do."""

from collections import Counter
from itertools import permutations

from pipelines.data.plan import (
    Augmentation,
    EvalPlan,
    TrainPlan,
    Views,
    ViewsInOrder,
    dropout_mask,
    grown_size,
    path_mask,
    permute,
    random_bits,
    random_resized_crop,
    share,
    uniform,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

FIELDS = ("indices", "windows", "resized", "anchors", "flips")
sizes_of_photos = st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=40)

GOLDEN_INDICES = [4, 2, 5, 3, 6, 1, 0]
GOLDEN_WINDOWS = [
    [25, 9, 196, 192],
    [0, 546, 80, 107],
    [838, 385, 1015, 1159],
    [0, 0, 1, 1],
    [15, 13, 34, 35],
    [168, 77, 231, 209],
    [21, 101, 351, 352],
]
GOLDEN_FLIPS = [False, False, False, False, False, True, False]
GOLDEN_VIEWS = [
    [[9, 30, 354, 398], [23, 3, 382, 308], [0, 546, 80, 107]],
    [[67, 126, 151, 157], [188, 171, 135, 159], [0, 546, 80, 107]],
]
GOLDEN_VIEW_FLIPS = [[False, False, False], [True, True, False]]
GOLDEN_OF_MANY = [12134852, 9985261, 1848716]
GOLDEN_BITS = 17824878756907967


GOLDEN_BALANCED = [[3, 6, 5, 5, 0, 1, 4], [3, 2, 0, 5, 0, 2, 5], [2, 0, 0, 0, 5, 6, 3]]


def train_plan(sizes, seed=0, scale_min=0.08, views_per_photo=None, balanced_labels=None, ratio_max=4 / 3) -> TrainPlan:
    return TrainPlan(
        np.array(sizes, np.int32),
        seed=seed,
        image_size=224,
        crop_scale_min=scale_min,
        crop_ratio_max=ratio_max,
        flip_probability=0.5,
        views_per_photo=views_per_photo,
        balanced_labels=balanced_labels,
    )


def assert_same(one: Views, other: Views) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_keys_are_of_epoch_and_position_and_dropout_keeps_as_many_as_it_should():
    plan = train_plan([(60, 80)] * 400, seed=7)
    keys = plan.views(3, np.arange(400)).keys
    np.testing.assert_array_equal(plan.views(3, np.array([9, 4])).keys, keys[[9, 4]])
    assert len({*keys.tolist(), *plan.views(4, np.arange(400)).keys.tolist()}) == 800
    kept = dropout_mask(keys, 510, 0.3)
    np.testing.assert_array_equal(dropout_mask(keys[[9, 4]], 510, 0.3), kept[[9, 4]])
    assert kept.mean() == pytest.approx(0.7, abs=0.005)
    assert np.abs(kept.mean(axis=0) - 0.7).max() < 0.1, "no feature is dropped more often"
    assert np.abs(np.corrcoef(kept[:40]) - np.eye(40)).max() < 0.25, "nor do two photos go together"
    assert dropout_mask(keys, 510, 0.0).all()
    assert dropout_mask(keys[:0], 510, 0.3).shape == (0, 510)
    pinned = [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1]]
    assert dropout_mask(keys[:2], 6, 0.5).astype(int).tolist() == pinned, "for good"


def test_paths_are_kept_by_the_photo_alone_as_often_as_they_should():
    keys = train_plan([(60, 80)] * 4000, seed=7).views(3, np.arange(4000)).keys
    chances = np.array([0.0, 0.25, 0.5])
    kept = path_mask(keys, chances)
    np.testing.assert_array_equal(path_mask(keys[[9, 4]], chances), kept[[9, 4]])
    assert kept[:, 0].all()
    assert kept.mean(axis=0) == pytest.approx(1 - np.stack([chances, chances], axis=1), abs=0.03)
    columns = [*kept[:, 1:].reshape(-1, 4).T, *dropout_mask(keys, 6, 0.5).T]
    assert np.abs(np.corrcoef(columns) - np.eye(10)).max() < 0.08, "each is drawn by itself, and apart from dropout"
    assert path_mask(keys[:0], chances).shape == (0, 3, 2)
    pinned = [[0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert path_mask(keys[:2], np.full(3, 0.5)).reshape(2, -1).astype(int).tolist() == pinned, "for good"


def test_golden_stream():
    """Pinned for good: a change here changes every training that anybody has run with a seed."""
    plan = train_plan([(375, 500), (500, 333), (80, 1200), (1, 1), (224, 224), (3000, 2000), (97, 61)], seed=7)
    views = plan.views(3, np.arange(7))
    assert views.indices.tolist() == GOLDEN_INDICES
    assert views.windows.tolist() == GOLDEN_WINDOWS
    assert views.flips.tolist() == GOLDEN_FLIPS
    of_many = train_plan(np.zeros((14_000_000, 2)), seed=7).indices(3, np.array([0, 1, 13_999_999]))
    assert of_many.tolist() == GOLDEN_OF_MANY
    assert random_bits(1, 2, 3).item() == GOLDEN_BITS
    assert views.windows.dtype == views.resized.dtype == views.anchors.dtype == np.int32
    assert views.indices.dtype == np.int64


@given(sizes_of_photos, st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=60)
def test_a_photo_with_few_views_shows_them_in_turn(sizes, epoch, views_per_photo):
    plan = train_plan(sizes, views_per_photo=views_per_photo)
    everywhere = np.arange(len(sizes))

    def of_photos(number: int) -> Views:
        views = plan.views(number, everywhere)
        return views.select(np.argsort(views.indices))

    assert_same(of_photos(epoch), of_photos(epoch + views_per_photo))
    assert_same(of_photos(epoch), ViewsInOrder(plan).views(epoch, everywhere))


def test_golden_views():
    """Pinned for good, as the stream is."""
    plan = train_plan([(375, 500), (500, 333), (80, 1200)], seed=7, views_per_photo=3)
    views = [ViewsInOrder(plan).views(epoch, np.arange(3)) for epoch in (0, 2)]
    assert [each.windows.tolist() for each in views] == GOLDEN_VIEWS
    assert [each.flips.tolist() for each in views] == GOLDEN_VIEW_FLIPS
    assert plan.indices(2, np.arange(3)).tolist() == plan.views(2, np.arange(3)).indices.tolist()


def test_golden_balanced():
    """Pinned for good, as the stream is."""
    plan = train_plan([(10, 10)] * 7, seed=7, balanced_labels=np.array([2, 0, 0, 0, 0, 2, 0]))
    assert [plan.indices(epoch, np.arange(7)).tolist() for epoch in (0, 1, 5)] == GOLDEN_BALANCED


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.sampled_from([None, 3]),
)
def test_balanced_epochs_show_classes_and_the_photos_of_each_equally_often(labels, seed, epochs, views_per_photo):
    labels = np.array(labels)
    settings = {"seed": seed, "views_per_photo": views_per_photo}
    plan = train_plan([(10 + n, 10) for n in range(len(labels))], **settings, balanced_labels=labels)
    everything, several = np.arange(len(labels)), np.arange(len(labels))[::-2]
    shown = np.concatenate([plan.indices(epoch, everything) for epoch in range(epochs)])
    per_class = np.bincount(labels[shown])[np.unique(labels)]
    assert per_class.max() - per_class.min() <= 1
    per_photo = np.bincount(shown, minlength=len(labels))
    for label in np.unique(labels):
        assert np.ptp(per_photo[labels == label]) <= 1
    assert_same(plan.views(epochs, several), plan.views(epochs, everything).select(several))
    if views_per_photo:
        views = plan.views(epochs, everything)
        assert_same(views, plan.views_in_order(epochs, views.indices))


def test_few_views_are_spread_evenly_and_each_is_as_any_other():
    photos, turns = 4000, 6
    plan = train_plan([(300, 400)] * photos, views_per_photo=turns)
    views = [ViewsInOrder(plan).views(turn, np.arange(photos)) for turn in range(turns)]
    by_chance = train_plan([(300, 400)] * photos).views(0, np.arange(photos))

    def area(each: Views) -> np.ndarray:
        return each.windows[:, 2] * each.windows[:, 3] / 120_000

    for each in views:
        assert each.flips.mean() == pytest.approx(0.5, abs=0.04)
        for value in (area, lambda each: each.windows[:, 0], lambda each: each.windows[:, 1]):
            assert value(each).mean() == pytest.approx(value(by_chance).mean(), rel=0.07)
            assert np.quantile(value(each), [0.1, 0.9]) == pytest.approx(
                np.quantile(value(by_chance), [0.1, 0.9]), rel=0.1, abs=3
            )
    flips = sum(each.flips.astype(int) for each in views)
    assert set(flips.tolist()) == {3}, "of six; by chance a photo in 32 is never flipped, or always"
    spread = np.std(np.mean([area(each) for each in views], axis=0))
    assert spread < 0.8 * np.std(area(by_chance)) / turns**0.5, "a photo's mean crop is near the mean of all"
    orders = [plan.indices(epoch, np.arange(photos)).tolist() for epoch in range(7)]
    assert len({tuple(order) for order in orders}) == 7, "the order is a new one every epoch"


@given(sizes_of_photos, st.integers(0, 2**32), st.integers(0, 1000), st.data())
@settings(max_examples=60)
def test_views_depend_on_nothing_but_seed_epoch_and_position(sizes, seed, epoch, data):
    whole = train_plan(sizes, seed).views(epoch, np.arange(len(sizes)))
    positions = np.array(data.draw(st.permutations(range(len(sizes)))))[: data.draw(st.integers(1, len(sizes)))]
    np.random.seed(data.draw(st.integers(0, 99)))  # noqa: NPY002 - global state must not matter
    other = train_plan(sizes, seed)
    other.views(epoch + 1, positions)  # nor what was asked before
    assert_same(other.views(epoch, positions), whole.select(positions))


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**31))
@settings(max_examples=100)
def test_the_ranks_together_read_the_one_process_stream(photos, batch_size, world_size, epoch, seed):
    plan = train_plan([(50 + n, 400 - n) for n in range(photos)], seed)
    alone = plan.views(epoch, np.arange(photos))
    assert sorted(alone.indices.tolist()) == list(range(photos)), "every photo once"
    read = []
    for first in range(0, photos, batch_size):
        positions = min(batch_size, photos - first)
        shares = [share(positions, rank, world_size) for rank in range(world_size)]
        assert max(stop - start for start, stop in shares) - min(stop - start for start, stop in shares) <= 1
        read += [np.arange(first + start, first + stop) for start, stop in shares]
    assert_same(plan.views(epoch, np.concatenate(read)), alone)


def test_seven_photos_on_four_ranks_and_one_photo():
    assert [share(7, rank, 4) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert [share(1, rank, 4) for rank in range(4)] == [(0, 1), (1, 1), (1, 1), (1, 1)]
    assert [share(3, rank, 4) for rank in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_epochs_and_seeds_give_other_orders():
    plan, positions = train_plan([(10, 10)] * 100, seed=1), np.arange(100)
    orders = [plan.indices(epoch, positions).tolist() for epoch in range(3)]
    orders.append(train_plan([(10, 10)] * 100, 2).indices(0, positions).tolist())
    assert len({tuple(order) for order in orders}) == 4


@given(st.integers(1, 5000), st.integers(0, 2**32), st.integers(0, 10**6))
@settings(max_examples=100)
def test_every_photo_comes_once(length, seed, epoch):
    order = permute(np.arange(length), length, random_bits(seed, epoch, np.arange(24)))
    assert (np.bincount(order, minlength=length) == 1).all()


def orders_of(length: int, epochs: int) -> np.ndarray:
    """int64 [epochs, length]: the orders of a training's epochs, at once."""
    plan = train_plan([(10, 10)] * length, seed=5)
    return np.stack([plan.indices(epoch, np.arange(length)) for epoch in range(epochs)])


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_few_photos_is_equally_likely(length):
    orders, epochs = list(permutations(range(length))), 6000
    found = Counter(map(tuple, orders_of(length, epochs).tolist()))
    expected = epochs / len(orders)
    chi_square = sum((found[order] - expected) ** 2 / expected for order in orders)
    degrees = len(orders) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 5, "five standard deviations and more"


@pytest.mark.slow
@pytest.mark.parametrize("length", [10, 97, 244])
def test_photos_stand_anywhere_and_neighbours_are_strangers(length):
    """Two chi-squares: where a photo stands, and how far in front of it its neighbour in the folder stands."""
    epochs = 3000
    positions = np.argsort(orders_of(length, epochs), axis=1)
    for values, kinds in ((positions, length), ((positions[:, 1:] - positions[:, :-1]) % length - 1, length - 1)):
        for column in (0, values.shape[1] // 2, values.shape[1] - 1):
            counts = np.bincount(values[:, column], minlength=kinds)
            chi_square = ((counts - epochs / kinds) ** 2).sum() / (epochs / kinds)
            assert abs(chi_square - (kinds - 1)) < 5 * (2 * (kinds - 1)) ** 0.5


def test_a_batch_of_a_million_photos_is_a_random_sample():
    """The share of one class in a batch varies as in drawing without replacement; no drift along the epoch."""
    length, batch = 1_000_003, 256
    order = train_plan(np.full((length, 2), 9), seed=3).indices(2, np.arange(length))
    assert (np.bincount(order, minlength=length) == 1).all()
    batches = order[: length // batch * batch].reshape(-1, batch)
    for of_class in (batches < length // 4, batches % 4 == 0):  # sorted by class, as a folder is; and in turn
        counts = of_class.sum(axis=1)
        variance, n = batch * 0.25 * 0.75, len(counts)
        assert abs(counts.mean() - batch / 4) < 5 * (variance / n) ** 0.5
        assert abs(counts.var() / variance - 1) < 5 * (2 / n) ** 0.5
    for lag in (1, 2, 256, 1000, 1002):  # 1000 and 1002: about the sides of the table behind the permutation
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / length**0.5


def test_uniform_draws_are_uniform_and_uncorrelated():
    draws = uniform(random_bits(0, np.arange(200)[:, None], np.arange(200)[None, :]))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / draws.size) ** 0.5
    for one, other in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / draws.size**0.5


@given(sizes_of_photos, st.integers(0, 50), st.sampled_from([0.08, 0.5, 1.0]))
@settings(max_examples=60)
def test_a_crop_lies_within_its_photo(sizes, epoch, scale_min):
    views = train_plan(sizes, scale_min=scale_min).views(epoch, np.arange(len(sizes)))
    top, left, height, width = views.windows.T
    full = np.array(sizes)[views.indices]
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= full[:, 0]).all()
    assert (left + width <= full[:, 1]).all()


def test_an_unreadable_photo_moves_no_other():
    sizes = [(300, 400), (200, 500), (640, 480)]
    sound, with_bad = train_plan(sizes), train_plan([sizes[0], (0, 0), sizes[2]])
    one, other = sound.views(0, np.arange(3)), with_bad.views(0, np.arange(3))
    others = one.indices != 1
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.windows[others], other.windows[others])


@pytest.mark.parametrize("ratio_max", [4 / 3, 1.0, 3.0])
def test_crops_are_distributed_as_torchvisions(ratio_max):
    torchvisions = RandomResizedCrop(224, scale=(0.08, 1.0), ratio=(1 / ratio_max, ratio_max))
    photo = Image.new("L", (500, 375))
    theirs = np.array([torchvisions.get_params(photo, torchvisions.scale, torchvisions.ratio) for _ in range(6000)])
    ours = train_plan([(375, 500)] * 6000, ratio_max=ratio_max).views(0, np.arange(6000)).windows
    error = np.hypot(theirs.std(0), ours.std(0)) / 6000**0.5
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(theirs.std(0), ours.std(0), rtol=0.05)


@pytest.mark.parametrize(
    ("size", "ratio_max", "expected"),
    [
        ((100, 1000), 4 / 3, (0, 433, 100, 133)),
        ((1000, 90), 4 / 3, (440, 0, 120, 90)),
        ((100, 1000), 1.0, (0, 450, 100, 100)),
        ((1000, 90), 10.0, (50, 0, 900, 90)),
    ],
)
def test_without_a_fitting_attempt_the_crop_is_central(size, ratio_max, expected):
    draws = np.full((1, 10, 4), 0.999)  # too large for so long a photo, each time
    found = random_resized_crop(np.array([size]), draws, scale_min=0.08 if ratio_max < 10 else 1.0, ratio_max=ratio_max)
    assert found[0].tolist() == list(expected)


def test_a_wide_range_of_crops_goes_to_its_ends():
    draws = np.zeros((2, 10, 4))
    draws[1, :, 1] = 1 - 2.0**-53
    crops = random_resized_crop(np.array([(5000, 5000)] * 2), draws, scale_min=0.09, ratio_max=9.0)
    assert crops[:, 2:].tolist() == [[4500, 500], [500, 4500]]


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(256, 224), (72, 64), (224, 224), (300, 299)]))
@settings(max_examples=200)
def test_the_central_view_has_torchvisions_integers(height, width, setting):
    resize, image_size = setting
    views = EvalPlan(np.array([(height, width)], np.int32), image_size=image_size, resize=resize).views(0, np.arange(1))
    if max(height, width) * resize // min(height, width) < 20_000:  # larger ones only cost torchvision's memory
        photo = F.resize(Image.new("1", (width, height)), resize)
        assert views.resized[0].tolist() == [photo.height, photo.width]
        expected = [round((photo.height - image_size) / 2.0), round((photo.width - image_size) / 2.0)]
        assert views.anchors[0].tolist() == expected
    assert views.windows[0].tolist() == [0, 0, height, width]
    assert not views.flips.any()


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_squashed_the_whole_photo_fills_the_square(height, width):
    sizes = np.array([(height, width)], np.int32)
    views = EvalPlan(sizes, image_size=64, resize=72, crop_mode="squash").views(0, np.arange(1))
    assert views.windows.tolist() == [[0, 0, height, width]]
    assert (views.resized.tolist(), views.anchors.tolist()) == ([[64, 64]], [[0, 0]])


def test_squashed_crops_are_those_of_a_square_photo_stretched():
    settings = {"seed": 3, "image_size": 64, "crop_scale_min": 0.25, "flip_probability": 0.5}
    square = TrainPlan(np.tile([1000, 1000], (500, 1)), **settings).views(0, np.arange(500))
    wide = TrainPlan(np.tile([1000, 2500], (500, 1)), **settings, crop_mode="squash").views(0, np.arange(500))
    np.testing.assert_allclose(wide.windows / [1, 2.5, 1, 2.5], square.windows, atol=1.5)
    np.testing.assert_array_equal(wide.flips, square.flips)
    never_fits = np.full((1, 10, 4), 0.999)
    (crop,) = random_resized_crop(np.array([[90, 1000]]), never_fits, scale_min=1.0, squash=True).tolist()
    assert crop == [0, 0, 90, 1000]


@pytest.mark.parametrize(
    ("first", "last", "epochs", "sizes"),
    [
        (128, 224, 6, [128, 128, 160, 160, 192, 192, 224, 224]),
        (160, 192, 3, [160, 160, 160, 192, 192]),
        (64, 100, 4, [64, 64, 96, 96, 100]),  # the last step is what is left
        (64, 224, 2, [64, 128, 224]),
    ],
)
def test_a_square_grows_by_the_epoch(first, last, epochs, sizes):
    assert [grown_size(first, last, epochs, epoch) for epoch in range(len(sizes))] == sizes


def test_a_growing_square_is_planned_as_one_of_its_size():
    """Boxes, blurs and shares go by the epoch's size, and nothing else is drawn otherwise."""
    settings = {"seed": 3, "crop_scale_min": 0.25, "flip_probability": 0.5, "cutmix_alpha": 1.0}
    settings["augmentation"] = Augmentation(erase_probability=0.9, blur_probability=0.9, augment="strong")
    sizes, positions = np.tile([90, 120], (50, 1)), np.arange(50)
    growing = TrainPlan(sizes, image_size=128, first_image_size=64, grow_epochs=4, **settings)
    assert [growing.size_at(epoch) for epoch in range(6)] == [64, 64, 96, 96, 128, 128]
    for epoch in (0, 3, 5):
        fixed = TrainPlan(sizes, image_size=growing.size_at(epoch), **settings)
        found, expected = growing.views(epoch, positions), fixed.views(epoch, positions)
        assert_same(found, expected)
        assert found.image_size == expected.image_size == growing.size_at(epoch)
        assert found.resized.tolist() == [[found.image_size] * 2] * 50
        for one, other in (
            (found.alterations, expected.alterations),
            (growing.mixing(epoch, positions), fixed.mixing(epoch, positions)),
        ):
            for name in one.__dataclass_fields__:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_evaluation_reads_every_photo_once_in_order():
    plan = EvalPlan(np.array([(300, 400)] * 9, np.int32), image_size=224, resize=256)
    assert plan.length == 9
    assert plan.views(0, np.arange(9)).indices.tolist() == list(range(9))
