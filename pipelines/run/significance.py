"""Whether two models differ, by what they answer to the same photos, and two recipes, by runs with several seeds.

Counts are of photos: `only_first` are answered right by the first model alone, `only_second` by the second alone.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance

import numpy as np

LEVEL = 0.95
_MOST_FLIPPED = 2000  # photos whose signs are flipped in all ways
POWER = 0.8  # how often the photos that `photos_needed` asks for would show the difference


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p of McNemar's exact test (1947): were both equally good, each photo that one alone has right would
    be either's with probability 1/2."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    log_all = math.lgamma(count + 1) - count * math.log(2)
    log_ways = (log_all - math.lgamma(each + 1) - math.lgamma(count - each + 1) for each in range(fewer + 1))
    return min(1.0, 2 * math.fsum(map(math.exp, log_ways)))


def difference_interval(only_first: int, only_second: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The confidence interval of the second model's accuracy minus the first's on `count` photos, at least 1.

    Tango's score interval (1998), which holds for few photos too, widened to 0 where `mcnemar` finds no difference.
    """
    low = -_upper_end(only_second, only_first, count, level)
    high = _upper_end(only_first, only_second, count, level)
    if mcnemar(only_first, only_second) >= 1 - level:
        return min(low, 0.0), max(high, 0.0)
    return low, high


def _upper_end(only_first: int, only_second: int, count: int, level: float) -> float:
    """By bisection: the largest difference whose score is within the normal quantile."""
    z, low, high = NormalDist().inv_cdf((1 + level) / 2), (only_second - only_first) / count, 1.0
    for _ in range(60):
        difference = (low + high) / 2
        # The probability of `only_first` that is likeliest with this difference, Tango's (9).
        b = (2 * count - only_second + only_first) * difference - only_first - only_second
        q = (math.sqrt(b * b + 8 * count * only_first * difference * (1 - difference)) - b) / (4 * count)
        spread = math.sqrt(max(0.0, count * (2 * q + difference * (1 - difference))))
        is_within = abs(only_second - only_first - count * difference) < z * spread
        low, high = (difference, high) if is_within else (low, difference)
    return low


def photos_needed(disagreement: float, difference: float, level: float = LEVEL) -> int:
    """How many photos would show a difference of accuracies 4 times out of 5 (Connor 1987).

    disagreement: the share of photos that one of the models alone has right.
    """
    disagreement = max(disagreement, difference)
    chance, power = NormalDist().inv_cdf((1 + level) / 2), NormalDist().inv_cdf(POWER)
    root = chance * math.sqrt(disagreement) + power * math.sqrt(disagreement - difference**2)
    return math.ceil((root / difference) ** 2)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's t interval of the mean; two values or more."""
    half = t_quantile(len(values) - 1, level) * math.sqrt(variance(values) / len(values))
    return fmean(values) - half, fmean(values) + half


def means_interval(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Welch's interval (1947) of the second mean minus the first, with whole degrees of freedom; each of two values or
    more. None where the values of both are alike: nothing is known of their spread."""
    parts = [(variance(values) / len(values), len(values) - 1) for values in (first, second)]
    whole = sum(part for part, _ in parts)
    difference = fmean(second) - fmean(first)
    if not whole:
        return None
    freedom = int(whole**2 / sum(part**2 / rest for part, rest in parts))
    half = t_quantile(max(1, freedom), level) * math.sqrt(whole)
    return difference - half, difference + half


def photos_interval(differences: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The interval of the mean over photos, whole numbers or shares, float [N] from -1 to 1.

    By the normal distribution, with a photo more for either side (Bonett and Price 2012, for two models), which holds
    where few photos differ, too; widened to 0 where `sign_test` finds no difference.
    """
    more = np.append(differences, (1.0, -1.0))
    mean = float(more.mean())
    half = NormalDist().inv_cdf((1 + level) / 2) * float(more.std()) / math.sqrt(len(more))
    if sign_test(differences) >= 1 - level:
        return min(mean - half, 0.0), max(mean + half, 0.0)
    return mean - half, mean + half


def sign_test(differences: np.ndarray) -> float:
    """The two-sided p of Fisher's sign-flip test (1935): were both equally good, each photo's difference would be as
    likely with the other sign. Exact; of differences of 1 it is `mcnemar`'s.

    differences: float [N], of which not zero are multiples of one share. Beyond some thousand photos that differ, by
    the normal distribution.
    """
    sizes = np.abs(differences[differences != 0])
    if not len(sizes):
        return 1.0
    total = abs(float(differences.sum()))
    if len(sizes) > _MOST_FLIPPED:
        return 2 * NormalDist().cdf(-total / math.sqrt(float((sizes**2).sum())))
    # Shares of n and of m runs are multiples of 1 / (n m).
    parts = next(parts for parts in range(1, 10_001) if np.allclose(sizes * parts, np.rint(sizes * parts), atol=1e-6))
    values, counts = np.unique(np.rint(sizes * parts).astype(np.int64), return_counts=True)
    length = 2 * int((values * counts).sum()) + 1
    angles = 2 * np.pi / length * np.arange(length)
    # The characteristic function of the sum, and from it how likely each sum is.
    of_sum = np.prod([np.cos(value * angles) ** count for value, count in zip(values, counts, strict=True)], axis=0)
    chances = np.fft.ifft(of_sum).real
    reached = round(total * parts)
    return min(1.0, float(chances[reached : length - reached + 1].sum() if reached else 1.0))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Within plus and minus which Student's t is with probability `level`. freedom: at least 1.

    By bisection of the series in Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    is_odd = freedom % 2
    term, total = (math.cos(angle) if is_odd else 1.0), 0.0
    for number in range(2 + is_odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (number - 1) / number
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
