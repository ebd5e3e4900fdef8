"""What the plan draws besides crop and flip is torchvision's, for each photo by itself, and the same wherever it is."""

from dataclasses import replace

from pipelines.config import LIGHT, Config
from pipelines.data.augment import altered
from pipelines.data.plan import (
    OPERATIONS,
    Alterations,
    Augmentation,
    TrainPlan,
    ViewsInOrder,
    one_operation,
    train_plan,
)
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.engines import ENGINES, make_loader

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
ALL = Augmentation(
    vertical_flip_probability=0.5,
    quarter_turns=True,
    brightness=0.4,
    contrast=0.3,
    saturation=0.9,
    hue=0.2,
    erase_probability=0.5,
)
MORE = replace(ALL, rotation=30, shear=10, translation=0.2, grey_probability=0.3, blur_probability=0.4)
STRONG = Augmentation(augment="strong")


def plan_of(augmentation: Augmentation, photos: int = 400, **settings) -> TrainPlan:
    settings = {"seed": 3, "image_size": 32, "crop_scale_min": 0.5, "flip_probability": 0.5} | settings
    return TrainPlan(np.tile([60, 80], (photos, 1)), **settings, augmentation=augmentation)


def of(count: int, **changed) -> Alterations:
    """No alteration but the ones given."""
    none, geometry = np.zeros(count, bool), np.zeros((count, 4), np.float32)
    colours = np.tile(np.float32([1, 1, 1, 0]), (count, 1))
    blurs, erased = np.zeros(count, np.float32), np.zeros((count, 4), np.int32)
    nothing = (none, none, np.zeros(count, np.int8), np.zeros(count, np.float32), geometry, colours, blurs, erased)
    return replace(Alterations(*nothing), **changed)


def operations(size: int, bins: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n] and float32 [n]: each operation at these of its 31 magnitudes, of either sign."""
    draws = [
        ((place + 0.5) / len(OPERATIONS), (each + 0.5) / 31, sign)
        for place in range(len(OPERATIONS))
        for each in bins
        for sign in (0.2, 0.8)
    ]
    return one_operation(np.array(draws), size)


@pytest.fixture
def photos() -> torch.Tensor:
    """float32 [5, 3, 8, 8] in [0, 1], the last one grey."""
    photos = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    photos[4] = photos[4, :1]
    return photos


def test_colours_are_torchvisions(photos):
    colours = np.float32([[1.3, 1, 1, 0], [1, 0.6, 1, 0], [1, 1, 0.2, 0], [1, 1, 1, -0.4], [0.7, 1.2, 1.4, 0.1]])
    expected = []
    for photo, (brightness, contrast, saturation, hue) in zip(photos, colours.tolist(), strict=True):
        photo = F.adjust_contrast(F.adjust_brightness(photo, brightness), contrast)
        expected.append(F.adjust_hue(F.adjust_saturation(photo, saturation), hue))
    found = altered((photos - MEAN) / STD, of(5, colours=colours)) * STD + MEAN
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-3)


def test_geometry_is_torchvisions():
    """Its affine map, of one photo at a time; the turn is clockwise, and what comes in is 0."""
    photos = torch.randn(6, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    geometry = np.float32(
        [
            [0, 0, 0, 0],
            [0, 30, 0, 0],
            [20, 0, 0, 0],
            [0, 0, 3 / 17, -2 / 17],
            [-15, -140, 1 / 17, 4 / 17],
            [0, 90, 0, 0],
        ]
    )
    expected = [
        F.affine(
            photo[None],
            angle=turn,
            translate=[round(17 * right), round(17 * down)],
            scale=1,
            shear=[shear, 0],
            interpolation=F.InterpolationMode.BILINEAR,
        )[0]
        for photo, (shear, turn, right, down) in zip(photos, geometry.tolist(), strict=True)
    ]
    found = altered(photos, of(6, geometry=geometry))
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)
    assert torch.equal(found[0], photos[0])
    torch.testing.assert_close(found[5], photos[5].rot90(-1, (1, 2)), rtol=0, atol=1e-4)


def test_blur_is_torchvisions():
    photos = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = altered(photos, of(3, blurs=np.float32([0.4, 0, 1.9])))
    assert torch.equal(found[1], photos[1])
    for place, sigma in ((0, 0.4), (2, 1.9)):
        expected = F.gaussian_blur(photos[place], [13, 13], [sigma, sigma])
        torch.testing.assert_close(found[place], expected, rtol=0, atol=1e-4)


ON_LEVELS = ("Posterize", "Solarize", "AutoContrast", "Equalize")
GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def test_operations_are_trivial_augments():
    """torchvision's TrivialAugmentWide itself: bit for bit what it makes of uint8 where grey levels are counted, else
    what it makes of floats; and a flat photo, and one of few levels, have nothing to stretch."""
    own = TrivialAugmentWide()
    places, magnitudes = operations(size=26, bins=[0, 1, 7, 15, 24, 30])
    photos = torch.randint(0, 256, (len(places), 3, 26, 26), generator=torch.Generator().manual_seed(0)).byte()
    photos = (photos // 4 + 96).where(torch.arange(len(places)).view(-1, 1, 1, 1) % 2 == 0, photos)
    photos[-1], photos[-2, :, 3] = 7, 200
    normalised = (photos / 255 - MEAN) / STD
    found = altered(normalised, of(len(places), operations=places, magnitudes=magnitudes))
    for photo, plain, image, place, magnitude in zip(photos, normalised, found, places, magnitudes, strict=True):
        name, value = OPERATIONS[place], float(magnitude)
        if name in ON_LEVELS:
            value = value / 255 if name == "Solarize" else value
            expected = own._apply_image_or_video_transform(photo, name, value, InterpolationMode.BILINEAR, own._fill)
            levels = (image * STD[0] + MEAN[0]) * 255
            assert torch.equal(levels.round().byte(), expected), (name, value)
            torch.testing.assert_close(levels, expected.float(), rtol=0, atol=1e-3)
            continue
        before = plain if name in GEOMETRY else photo / 255
        expected = own._apply_image_or_video_transform(before, name, value, InterpolationMode.BILINEAR, own._fill)
        expected = expected if name in GEOMETRY else (expected - MEAN[0]) / STD[0]
        assert (image - expected).abs().max() < 2e-4, (name, value)


def test_magnitudes_are_trivial_augments():
    """All 31 of each operation, of both signs where it has any; a shift is scaled with the square."""
    for place, (table, is_signed) in enumerate(TrivialAugmentWide._AUGMENTATION_SPACE.values()):
        name = OPERATIONS[place]
        chosen, found = operations(224, list(range(31)))
        found = found[chosen == place].reshape(31, 2)
        expected = np.zeros(31) if (magnitudes := table(31, 224, 224)) is None else magnitudes.numpy()
        # Half of 32 is 15.999999 in torchvision's table, which it cuts off to 15.
        expected = np.trunc(expected + 1e-5) if name.startswith("Translate") else expected
        expected = 255 * expected if name == "Solarize" else expected
        np.testing.assert_allclose(found[:, 1], expected, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found[:, 0], -found[:, 1] if is_signed else found[:, 1])
    assert list(TrivialAugmentWide._AUGMENTATION_SPACE) == list(OPERATIONS)
    for size, largest in ((64, 9), (224, 32), (448, 64)):
        chosen, found = operations(size, [30])
        assert found[chosen == OPERATIONS.index("TranslateY")].tolist() == [-largest, largest]


def test_each_operation_magnitude_and_sign_is_drawn_as_often():
    views = plan_of(STRONG, 56_000).views(4, np.arange(56_000))
    assert views.alterations
    places, magnitudes = views.alterations.operations, views.alterations.magnitudes
    np.testing.assert_allclose(np.bincount(places, minlength=14), 4000, atol=300)
    turns = magnitudes[places == OPERATIONS.index("Rotate")]
    steps, counts = np.unique(np.rint(turns / 4.5), return_counts=True)
    assert steps.tolist() == list(range(-30, 31))
    np.testing.assert_allclose(np.delete(counts, 30), 4000 / 62, atol=35)
    assert counts[30] == pytest.approx(4000 / 31, abs=50), "0 has no sign"
    nothing, others = of(56_000), views.alterations
    for name in Alterations.__dataclass_fields__.keys() - {"operations", "magnitudes"}:
        np.testing.assert_array_equal(getattr(others, name), getattr(nothing, name))


@pytest.mark.parametrize("asked", [MORE, Augmentation(hue=0.3)])
def test_an_operation_is_drawn_where_it_is_asked_for_and_changes_nothing_else(asked):
    without, both = (plan_of(each, 40).views(0, np.arange(40)) for each in (asked, replace(asked, augment="strong")))
    assert without.alterations
    assert both.alterations
    assert not without.alterations.operations.any()
    assert both.alterations.operations.any()
    for name in Alterations.__dataclass_fields__.keys() - {"operations", "magnitudes"}:
        np.testing.assert_array_equal(getattr(without.alterations, name), getattr(both.alterations, name))
    np.testing.assert_array_equal(without.flips, both.flips)


def test_light_is_the_settings_that_it_stands_for():
    sizes, labels = np.tile([60, 80], (9, 1)), np.zeros(9, np.int64)
    by_hand, light = (
        train_plan(Config(**values), sizes, labels).views(0, np.arange(9)).alterations
        for values in (LIGHT, {"augment": "light"})
    )
    assert by_hand
    assert light
    for name in Alterations.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(light, name), getattr(by_hand, name))


@pytest.mark.parametrize("size", [33, 224])
def test_an_operation_sees_one_photo(size):
    """So that the bits are the same in any micro-batch."""
    count = len(OPERATIONS)
    places, magnitudes = operations(size, [23])
    photos = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    photos = photos.contiguous(memory_format=torch.channels_last)
    drawn = of(2 * count, operations=places, magnitudes=magnitudes).select(np.arange(0, 2 * count, 2))
    whole = altered(photos, drawn)
    for place in range(count):
        alone = altered(photos[place : place + 1], drawn.select(np.array([place])))
        assert torch.equal(alone[0], whole[place]), OPERATIONS[place]
        assert torch.equal(whole[place], photos[place]) == (place == 0)
    order = np.roll(np.arange(count), 5)
    assert torch.equal(altered(photos[order], drawn.select(order)), whole[order])


@pytest.mark.parametrize(("size", "asked"), [(33, MORE), (33, Augmentation(grey_probability=0.5)), (224, ALL)])
def test_what_becomes_of_a_photo_depends_on_no_other(size, asked):
    """So that the bits are the same in any micro-batch."""
    photos = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))
    plan = plan_of(asked, 7, image_size=size)
    alterations = plan.views(0, np.arange(7)).alterations
    assert alterations
    whole = altered(photos, alterations)
    for first, last in (*((at, at + 1) for at in range(7)), (1, 4), (4, 7)):
        some = altered(photos[first:last], alterations.select(np.arange(first, last)))
        assert torch.equal(some, whole[first:last])


def test_boxes_are_filled_with_the_mean_and_nothing_else_is(photos):
    boxes = np.int32([[0, 0, 8, 8], [2, 3, 4, 1], [0, 0, 0, 0], [7, 7, 1, 1], [0, 5, 8, 3]])
    found = altered(photos - 2, of(5, erased=boxes))
    for photo, original, (top, left, height, width) in zip(found, photos - 2, boxes.tolist(), strict=True):
        expected = original.clone()
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(photo, expected)


@pytest.mark.parametrize("vertical", [0.0, 1.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_quarter_turns_are_those_of_the_flipped_photo(flip, vertical):
    """The engine flips left to right, and the rest comes behind it: together a turn, each of the four as often."""
    photo = torch.arange(3 * 32 * 32.0).view(3, 32, 32)
    asked = Augmentation(vertical_flip_probability=vertical, quarter_turns=True)
    views = plan_of(asked, flip_probability=flip).views(0, np.arange(400))
    assert views.alterations
    squares = torch.stack([photo.flip(2) if flipped else photo for flipped in views.flips])
    flipped = photo.flip(2) if flip else photo
    flipped = flipped.flip(1) if vertical else flipped
    turned = [torch.rot90(flipped, quarters, (1, 2)) for quarters in range(4)]
    found = altered(squares, views.alterations)
    counts = [sum(torch.equal(each, one) for each in found) for one in turned]
    assert sum(counts) == 400
    assert min(counts) > 70


def test_what_is_drawn_is_within_its_range_and_fills_it():
    views = plan_of(ALL, 4000).views(0, np.arange(4000))
    assert views.alterations
    colours, erased = views.alterations.colours, views.alterations.erased
    for column, middle, strength in zip(colours.T, (1, 1, 1, 0), (0.4, 0.3, 0.9, 0.2), strict=True):
        assert np.abs(column - middle).max() == pytest.approx(strength, rel=0.01)
        assert column.mean() == pytest.approx(middle, abs=0.05 * strength)
    more = plan_of(MORE, 4000).views(0, np.arange(4000)).alterations
    assert more
    for column, strength in zip(more.geometry.T, (10, 30, 0.2, 0.2), strict=True):
        assert np.abs(column).max() == pytest.approx(strength, rel=0.01)
        assert column.mean() == pytest.approx(0, abs=0.05 * strength)
    is_grey, is_blurred = more.colours[:, 2] == 0, more.blurs > 0
    assert is_grey.mean() == pytest.approx(0.3, abs=0.03)
    assert is_blurred.mean() == pytest.approx(0.4, abs=0.03)
    np.testing.assert_array_equal(more.colours[~is_grey], colours[~is_grey])
    assert more.blurs[is_blurred].min() == pytest.approx(0.1 * 32 / 224, rel=0.1)
    assert more.blurs.max() == pytest.approx(2 * 32 / 224, rel=0.1)
    boxes = erased[erased.any(axis=1)]
    assert len(boxes) == pytest.approx(2000, rel=0.1)
    top, left, height, width = boxes.T
    assert (top + height).max() <= 32
    assert (left + width).max() <= 32
    assert (boxes[:, :2] >= 0).all()
    share = height * width / 32**2
    assert 0.01 < share.min() < 0.03
    assert 0.3 < share.max() < 0.36


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.sampled_from([None, 3]))
def test_it_depends_on_seed_epoch_and_position_alone_and_changes_no_crop(seed, epoch, views_per_photo):
    settings = {"seed": seed, "views_per_photo": views_per_photo}
    whole = plan_of(MORE, 40, **settings).views(epoch, np.arange(40))
    some = plan_of(MORE, 40, **settings).views(epoch, np.array([31, 7]))
    plain = plan_of(Augmentation(), 40, **settings).views(epoch, np.arange(40))
    assert plain.alterations is None
    np.testing.assert_array_equal(whole.windows, plain.windows)
    assert whole.alterations
    assert some.alterations
    chosen = whole.alterations.select(np.array([31, 7]))
    for name in Alterations.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(some.alterations, name))
    if views_per_photo:
        in_order = ViewsInOrder(plan_of(MORE, 40, **settings)).views(epoch, whole.indices).alterations
        assert in_order
        np.testing.assert_array_equal(in_order.colours, whole.alterations.colours)


def test_golden_alterations():
    """Pinned for good, as the stream is."""
    alterations = plan_of(ALL, 3, seed=7).views(2, np.arange(3)).alterations
    assert alterations
    assert alterations.vertical_flips.tolist() == [True, True, False]
    assert alterations.transposed.tolist() == [True, True, True]
    assert alterations.colours.tolist() == [
        [1.3113270998001099, 0.9224354028701782, 0.4041377305984497, 0.036883603781461716],
        [1.0705381631851196, 1.1153706312179565, 0.10206287354230881, 0.14652368426322937],
        [1.1296454668045044, 1.2632396221160889, 0.5344452261924744, -0.07224519550800323],
    ]
    assert alterations.erased.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [16, 14, 4, 8]]
    more = plan_of(MORE, 3, seed=7).views(2, np.arange(3)).alterations
    assert more
    assert more.geometry.tolist() == [
        [-9.416296005249023, -19.787534713745117, -0.12693166732788086, 0.18016117811203003],
        [4.078553199768066, -3.0078251361846924, -0.14259929955005646, -0.08011450618505478],
        [-8.932478904724121, 5.9374165534973145, 0.0298891831189394, -0.01833779737353325],
    ]
    assert more.blurs.tolist() == [0.04993228614330292, 0.0, 0.02004721574485302]
    assert (more.colours[:, 2] == 0).tolist() == [True, False, True]
    strong = plan_of(STRONG, 9, seed=7).views(2, np.arange(9)).alterations
    assert strong
    drawn = ["Sharpness", "Brightness", "Equalize", "AutoContrast", "Equalize", "Solarize", "TranslateY"]
    assert [OPERATIONS[place] for place in strong.operations] == [*drawn, "ShearX", "ShearX"]
    expected = np.float32([-0.594, 0.99, 0, 0, 0, 59.5, 0, 0, 0.429])
    np.testing.assert_array_equal(strong.magnitudes, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_comes_behind_every_engine(engine, split):
    """Each image is what `altered` makes of the plain one."""
    plain = TrainPlan(split.sizes, seed=3, image_size=64, crop_scale_min=0.08, flip_probability=0.5)
    plan = TrainPlan(
        split.sizes,
        seed=3,
        image_size=64,
        crop_scale_min=0.08,
        flip_probability=0.5,
        augmentation=Augmentation(1, hue=0.3),
    )
    found = []
    for each in (plain, plan):
        loader = make_loader(split, engine, each, batch_size=4, micro_batch=4)
        found.append(torch.cat([batch.images for step in loader.epoch(1) for batch in step.batches]))
        loader.close()
    alterations = plan.views(1, np.arange(len(split))).alterations
    assert alterations
    torch.testing.assert_close(found[1], altered(found[0], alterations))
    assert not torch.equal(found[0], found[1])
