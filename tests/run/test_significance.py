"""The statistics of comparisons, against values that are published, closed forms, and every outcome that there is."""

import itertools
import math

from pipelines.run.significance import (
    difference_interval,
    mcnemar,
    mean_interval,
    means_interval,
    photos_interval,
    photos_needed,
    sign_test,
    t_quantile,
)

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (150, 86, 3.7e-05),  # Agresti 2013, table 11.1: z is 4.17 with both approximations
    ],
)
def test_mcnemars_exact_test(only_first, only_second, p):
    exact = sum(math.comb(only_first + only_second, each) for each in range(min(only_first, only_second) + 1))
    assert mcnemar(only_first, only_second) == pytest.approx(min(1, 2 * exact / 2 ** (only_first + only_second)))
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=0.05)
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first)


def test_of_a_million_photos_too():
    assert mcnemar(50_000, 50_500) == pytest.approx(math.erfc(499 / math.sqrt(100_500) / math.sqrt(2)), rel=1e-3)


def test_the_interval_of_a_difference():
    z = 1.959964
    assert difference_interval(0, 0, 153) == pytest.approx((-(z**2) / (153 + z**2), z**2 / (153 + z**2)), abs=1e-7)
    # Agresti 2013, section 11.1.1: (944 - 880) / 1600 = 0.04, by Wald's formula 0.021 to 0.059.
    assert difference_interval(86, 150, 1600) == pytest.approx((0.021, 0.059), abs=5e-4)
    assert difference_interval(150, 86, 1600) == pytest.approx((-0.059, -0.021), abs=5e-4)
    assert difference_interval(0, 9, 9)[1] == pytest.approx(1)
    assert difference_interval(0, 5, 100) == (0, pytest.approx(0.1118, abs=1e-3))  # p is 0.06


@pytest.mark.parametrize("truth", [(0.02, 0.02), (0.02, 0.06), (0.1, 0.05), (0.0, 0.03)])
def test_it_covers_the_truth_95_times_in_100(truth):
    """Over every outcome of 60 photos, by its probability."""
    count, (first, second), covered = 60, truth, 0.0
    for b, c in itertools.product(range(21), repeat=2):
        low, high = difference_interval(b, c, count)
        if low - 1e-9 <= second - first <= high + 1e-9:
            ways = math.factorial(count) / math.factorial(b) / math.factorial(c) / math.factorial(count - b - c)
            covered += ways * first**b * second**c * (1 - first - second) ** (count - b - c)
    assert 0.94 < covered <= 1


def test_test_and_interval_say_the_same():
    for b, c in itertools.product(range(25), repeat=2):
        low, high = difference_interval(b, c, 100)
        assert (low > 0 or high < 0) == (mcnemar(b, c) < 0.05), (b, c)


def test_how_many_photos_are_needed():
    # Connor 1987, a disagreement of 4 / 155, 1 point: (1.960 x 0.16064 + 0.8416 x 0.16033)^2 / 0.0001
    assert photos_needed(4 / 155, 0.01) == pytest.approx(2023, abs=3)
    assert photos_needed(0.0, 0.01) == photos_needed(0.01, 0.01) > 500  # no fewer than a disagreement of 1 % needs


@pytest.mark.parametrize(
    ("freedom", "level", "t"),
    [
        *((1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (9, 0.95, 2.262), (30, 0.95, 2.042)),
        *((1, 0.99, 63.657), (7, 0.99, 3.499), (120, 0.95, 1.980)),
    ],
)
def test_students_quantiles_are_those_of_the_tables(freedom, level, t):
    assert t_quantile(freedom, level) == pytest.approx(t, abs=6e-4)


def test_the_mean_over_photos():
    # Bonett and Price: (c - b) / (n + 2) -+ 1.96 sqrt((b' + c' - (c' - b')^2) / (n + 2)), b' = (b + 1) / (n + 2)
    b, c, n = 4, 14, 98
    half = 1.959964 * math.sqrt((0.05 + 0.15 - 0.1**2) / 100)
    assert photos_interval(np.repeat([-1.0, 1.0, 0.0], [b, c, n - b - c])) == pytest.approx((0.1 - half, 0.1 + half))


@pytest.mark.parametrize("truth", [(0.0, 0.005), (0.0, 0.02), (0.03, 0.05)])
def test_the_interval_over_photos_covers_the_truth(truth):
    """Also where few of them differ, where the normal distribution alone does so in half of all cases."""
    drawn = np.random.default_rng(0).random((1000, 153))
    differences = np.where(drawn < truth[1], 1.0, np.where(drawn < sum(truth), -1.0, 0.0))
    intervals = np.array([photos_interval(each) for each in differences])
    covered = ((intervals[:, 0] <= truth[1] - truth[0]) & (truth[1] - truth[0] <= intervals[:, 1])).mean()
    assert covered > 0.94


def test_signs_are_flipped_in_all_ways():
    for b, c in itertools.product(range(8), repeat=2):
        assert sign_test(np.repeat([-1.0, 1.0, 0.0], [b, c, 5])) == pytest.approx(mcnemar(b, c)), (b, c)
    differences = np.random.default_rng(0).integers(-6, 7, 9) / 6
    flips = np.array(list(itertools.product((1, -1), repeat=9)))
    assert sign_test(differences) == pytest.approx((abs(flips @ differences) >= abs(differences.sum()) - 1e-9).mean())
    assert sign_test(np.zeros(3)) == 1
    many = np.repeat([-1.0, 1.0], [1000, 1090])
    assert sign_test(many) == pytest.approx(mcnemar(1000, 1090), abs=0.005), "by the normal distribution"


def test_means_of_seeds():
    assert mean_interval([0.95, 0.96, 0.97]) == pytest.approx((0.96 - 0.024842, 0.96 + 0.024842), abs=1e-5)
    # Equal spreads: Student's test of two groups, four degrees of freedom.
    half = 2.776445 * 0.01 * math.sqrt(2 / 3)
    found = means_interval([0.94, 0.95, 0.96], [0.95, 0.96, 0.97])
    assert found == pytest.approx((0.01 - half, 0.01 + half), abs=1e-5)
    assert means_interval([0.5, 0.5], [0.6, 0.6]) is None, "seeds that answer alike tell of no spread"
