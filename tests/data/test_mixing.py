"""Mixed photos are the papers', drawn by the plan, and the same on any number of processes, in any micro-batches."""

from dataclasses import replace
from math import asin, pi, sqrt

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.loader import Batch, Loader, Partners
from pipelines.data.mixing import MOST_OTHERS, mixed, mixed_views
from pipelines.data.plan import Augmentation, Mixing, TrainPlan, symmetric_beta
from pipelines.training.step import number_correct, sum_of_losses
from tests.helpers.engines import ENGINES, make_loader, write_photo

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional


def plan_of(photos: int, seed: int = 3, image_size: int = 32, **alphas: float) -> TrainPlan:
    sizes = np.tile([60, 80], (photos, 1))
    return TrainPlan(sizes, seed=seed, image_size=image_size, crop_scale_min=0.5, flip_probability=0.5, **alphas)


def mixing_of(plan: TrainPlan, epoch: int = 0) -> Mixing:
    mixing = plan.mixing(epoch, np.arange(plan.length))
    assert mixing
    return mixing


# The plan


@pytest.mark.parametrize(
    ("alpha", "cumulative"),
    [
        (0.5, lambda x: 2 / pi * asin(sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_shares_are_distributed_as_beta(alpha, cumulative):
    """Beside the distributions whose share of values below x can be written down; of 20,000 values within 1.5 %."""
    values = symmetric_beta(np.full(20_000, alpha), np.random.default_rng(0).random((20_000, 3)))
    for x in np.linspace(0.02, 0.98, 25):
        assert (values <= x).mean() == pytest.approx(cumulative(x), abs=0.015)


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 0.1, 0.2, 0.8, 32.0, 1e9])
def test_any_alpha_has_shares_with_its_spread(alpha):
    draws = np.concatenate([np.random.default_rng(1).random((20_000, 3)), [[0, 0, 0], [1 - 2**-53] * 3]])
    values = symmetric_beta(np.full(len(draws), alpha), draws)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 40))
def test_it_depends_on_seed_epoch_and_position_alone_and_changes_no_view(seed, epoch, photos):
    plan = plan_of(photos, seed, mixup_alpha=0.4, cutmix_alpha=1.0)
    whole, chosen = mixing_of(plan, epoch), np.array([photos - 1, 0])
    some = plan.mixing(epoch, chosen)
    assert some
    for name in Mixing.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[chosen])
    plain = plan_of(photos, seed)
    assert plain.mixing(epoch, chosen) is None
    np.testing.assert_array_equal(plain.views(epoch, chosen).windows, plan.views(epoch, chosen).windows)


@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([(0.4, 0), (0, 1.0), (0.4, 1.0)]))
def test_partners_have_each_other_and_the_last_of_an_odd_number_stays(seed, photos, alphas):
    mixing = mixing_of(plan_of(photos, seed, mixup_alpha=alphas[0], cutmix_alpha=alphas[1]))
    positions = np.arange(photos)
    np.testing.assert_array_equal(mixing.partners[mixing.partners], positions)
    alone = mixing.partners == positions
    assert alone.tolist() == [False] * (photos - photos % 2) + [True] * (photos % 2)
    assert (mixing.shares[alone] == 1).all()
    assert not mixing.boxes[alone].any()
    assert ((mixing.shares >= 0) & (mixing.shares <= 1)).all()


def test_boxes_are_cutmixs_and_shares_are_what_they_leave():
    """As in the authors' code: the side is the root of what is covered, and what is beyond the square is cut off."""
    mixing = mixing_of(plan_of(4000, image_size=20, cutmix_alpha=1.0))
    top, left, height, width = mixing.boxes.T.astype(np.int64)
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 20
    np.testing.assert_allclose(mixing.shares, 1 - height * width / 400, rtol=1e-6)
    inside = (top > 0) & (left > 0) & (top + height < 20) & (left + width < 20)
    assert inside.sum() > 500
    assert (height == width)[inside].all()
    # Beta(1, 1): half of the sides, before they are cut, below the root of a half.
    assert (np.maximum(height, width) <= 14).mean() > 0.5


def test_with_both_half_of_the_photos_are_blended():
    mixing = mixing_of(plan_of(4000, mixup_alpha=1.0, cutmix_alpha=1.0))
    assert (mixing.boxes[:, 2] > 0).mean() == pytest.approx(0.49, abs=0.03)
    blended = mixing_of(plan_of(4000, mixup_alpha=1.0))
    assert not blended.boxes.any()
    assert blended.shares.mean() == pytest.approx(0.5, abs=0.02)


def test_golden_mixing():
    """Pinned for good, as the stream is."""
    mixing = plan_of(5, 7, mixup_alpha=0.2, cutmix_alpha=1.0).mixing(2, np.arange(5))
    assert mixing
    assert mixing.partners.tolist() == [1, 0, 3, 2, 4]
    assert mixing.shares.tolist() == [0.578125, 0.984375, 0.6015625, 0.999147891998291, 1.0]
    assert mixing.boxes.tolist() == [[0, 8, 18, 24], [16, 13, 4, 4], [0, 0, 24, 17], [0, 0, 0, 0], [0, 0, 0, 0]]


# What a batch is made of


@given(st.integers(0, 30), st.integers(1, 12), st.integers(30, 45))
def test_a_batch_asks_for_two_partners_of_others_at_most(first, count, photos):
    plan = plan_of(photos, mixup_alpha=0.4)
    positions = np.arange(first, min(first + count, photos))
    asked, whole = mixed_views(plan, 1, positions), mixing_of(plan, 1)
    assert len(asked) == len(positions)
    assert len(asked.views) - len(asked) <= MOST_OTHERS
    assert asked.mixing
    partners = asked.views.indices[asked.mixing.partners]
    np.testing.assert_array_equal(partners, plan.indices(1, whole.partners[positions]))
    np.testing.assert_array_equal(asked.indices, plan.indices(1, positions))
    if len(positions) % 2 == 0 and first % 2 == 0:
        assert len(asked.views) == len(asked)


@given(st.lists(st.booleans(), min_size=7, max_size=7))
def test_who_loses_a_partner_stays_as_it_is(kept):
    """Positions 3 to 7, with 2 and none behind them: the others keep partner, share and box."""
    plan = plan_of(9, mixup_alpha=0.4, cutmix_alpha=1.0)
    asked = mixed_views(plan, 0, np.arange(3, 9))
    kept = np.array(kept)
    chosen = asked.select(kept)
    assert asked.mixing
    assert chosen.mixing
    assert chosen.indices.tolist() == asked.indices[kept[:6]].tolist()
    assert chosen.views.indices.tolist() == asked.views.indices[kept].tolist()
    for place, before in enumerate(np.flatnonzero(kept[:6])):
        partner = asked.mixing.partners[before]
        if kept[partner]:
            assert chosen.views.indices[chosen.mixing.partners[place]] == asked.views.indices[partner]
            assert chosen.mixing.shares[place] == asked.mixing.shares[before]
            assert chosen.mixing.boxes[place].tolist() == asked.mixing.boxes[before].tolist()
        else:
            assert chosen.mixing.partners[place] == place
            assert chosen.mixing.shares[place] == 1
            assert not chosen.mixing.boxes[place].any()


def test_without_mixing_the_views_are_the_plans():
    asked = mixed_views(plan_of(9), 0, np.arange(2, 5))
    assert asked.mixing is None
    assert asked.select(np.array([True, False, True])).indices.tolist() == asked.indices[[0, 2]].tolist()


# Pixels and losses


def test_pixels_are_the_papers():
    """Of Zhang et al. share * x + (1 - share) * x[partner]; of Yun et al. x with a box of x[partner]."""
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    partners, shares = np.array([1, 0, 3, 2]), np.float32([0.3, 0.75, 1 - 6 / 64, 1])
    boxes = np.int32([[0, 0, 0, 0], [0, 0, 0, 0], [1, 5, 2, 3], [0, 0, 0, 0]])
    expected = x.clone()
    for place in (0, 1):
        share = float(shares[place])
        expected[place] = share * x[place] + (1 - share) * x[partners[place]]
    expected[2, :, 1:3, 5:8] = x[3, :, 1:3, 5:8]
    found = mixed(x, Mixing(partners, shares, boxes))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[2:], expected[2:])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert len(mixed(x, Mixing(partners[:3], shares[:3], boxes[:3]))) == 3


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_soft_targets(weights, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    labels, others = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])
    shares = torch.tensor([0.25, 0.5, 1.0, 0.0])
    batch = Batch(torch.empty(0), labels, torch.arange(4), Partners(others, shares))
    targets = shares[:, None] * functional.one_hot(labels, 3) + (1 - shares[:, None]) * functional.one_hot(others, 3)
    expected = functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(sum_of_losses(logits, batch, weights, smoothing), expected)


def test_an_answer_counts_by_the_share_of_its_class():
    answers = torch.tensor([0, 1, 2, 2])
    batch = Batch(torch.empty(0), torch.tensor([0, 2, 2, 1]), torch.arange(4))
    logits = functional.one_hot(answers, 3).float()
    assert number_correct(logits, batch) == 2
    partners = Partners(torch.tensor([1, 1, 2, 0]), torch.tensor([0.75, 0.875, 0.5, 0.5]))
    assert number_correct(logits, replace(batch, partners=partners)) == 0.75 + 0.125 + 1 + 0
    assert replace(batch, partners=partners).names(["ant", "bee", "wasp"])[0] == "0.75 ant\n0.25 bee"


# Loaders


def plan_for(split: Split, alpha: float = 1.0) -> TrainPlan:
    asked = {"augmentation": Augmentation(hue=0.3), "mixup_alpha": alpha, "cutmix_alpha": alpha}
    return TrainPlan(split.sizes, seed=3, image_size=64, crop_scale_min=0.08, flip_probability=0.5, **asked)


def columns_of(loader: Loader) -> list[list[torch.Tensor]]:
    """Indices, images, labels and, where photos are mixed, partners' labels and shares of each step."""
    steps = []
    for step in loader.epoch(1):
        batches = [(each.indices, each.images, each.labels, *(each.partners or ())) for each in step.batches]
        steps.append([torch.cat(column) for column in zip(*batches, strict=True)])
    loader.close()
    return steps


def together(ranks: list[list[list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
    """Of each step the processes' columns, one behind the other; without a share there are none."""
    return [
        [torch.cat(column) for column in zip(*(columns for columns in steps if columns), strict=True)]
        for steps in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 3), (2, 7), (5, 3)])
def test_processes_and_micro_batches_see_the_same_mixed_photos(split, engine, world_size, micro_batch):
    """23 photos in steps of 7: pairs are parted by steps, processes and micro-batches, and the last photo is alone."""
    plain = make_loader(split, engine, plan_for(split, 0), batch_size=23, micro_batch=23)
    ((_, images, labels),) = columns_of(plain)
    mixing = mixing_of(plan_for(split), 1)
    alone = columns_of(make_loader(split, engine, plan_for(split), batch_size=7, micro_batch=7))
    torch.testing.assert_close(torch.cat([step[1] for step in alone]), mixed(images, mixing))
    assert torch.equal(torch.cat([step[3] for step in alone]), labels[mixing.partners])
    options = {"batch_size": 7, "micro_batch": micro_batch, "world_size": world_size}
    loaders = [make_loader(split, engine, plan_for(split), rank=rank, **options) for rank in range(world_size)]
    for found, expected in zip(together([columns_of(each) for each in loaders]), alone, strict=True):
        assert len(found) == 5
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_photo_that_fails_leaves_its_partner_as_it_is_met_or_known(tmp_path, engine, capsys):
    """On one process and on three, in batches that part every second pair; it is said once, by its own process."""
    for number in range(14):
        write_photo(tmp_path / "train" / "ab"[number % 2] / f"{number:02}.jpg", 90, 120, number)
    write_photo(tmp_path / "val" / "a" / "0.jpg", 90, 120, 99)
    write_photo(tmp_path / "val" / "b" / "0.jpg", 90, 120, 98)
    split = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.2)).splits["train"]
    broken = tmp_path / "train" / "b" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    known = replace(split, faults=np.array([split.path(index).endswith("07.jpg") for index in range(14)], np.uint8))
    found = []
    for photos, world_size in ((split, 1), (known, 1), (split, 3), (known, 3)):
        options = {"batch_size": 9, "micro_batch": 2, "world_size": world_size, "skip_bad_files": True}
        loaders = [make_loader(photos, engine, plan_for(split), rank=rank, **options) for rank in range(world_size)]
        found.append(together([columns_of(each) for each in loaders]))
        assert capsys.readouterr().err.count("07.jpg") == (photos is split)
    bad = int(np.flatnonzero(known.faults)[0])
    order, mixing = plan_for(split).indices(1, np.arange(14)), mixing_of(plan_for(split), 1)
    widow = int(order[mixing.partners[order.tolist().index(bad)]])
    indices, shares = (torch.cat([step[column] for step in found[0]]).tolist() for column in (0, 4))
    assert sorted(indices) == [index for index in range(14) if index != bad]
    assert shares[indices.index(widow)] == 1
    for other in found[1:]:
        for steps in zip(other, found[0], strict=True):
            assert all(torch.equal(one, another) for one, another in zip(*steps, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_goes_on_in_the_middle(split, engine):
    loader = make_loader(split, engine, plan_for(split), batch_size=5, micro_batch=2)
    whole = [torch.cat([batch.images for batch in step.batches]) for step in loader.epoch(4)]
    rest = [torch.cat([batch.images for batch in step.batches]) for step in loader.epoch(4, start_step=3)]
    loader.close()
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], rest, strict=True))
