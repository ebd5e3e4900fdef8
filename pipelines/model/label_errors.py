"""Which labels are likely wrong, by confident learning (Northcutt, Jiang and Chuang 2021), and which photos are far
from all others. Pure functions of arrays, without a random number.
"""

from dataclasses import dataclass

import numpy as np

_NEIGHBOURS = 5  # whose distance is a photo's
_MOST_REFERENCES = 20_000  # photos among which neighbours are looked for
_BLOCK = 1024
_FEWEST = 30  # photos whose distances have a spread
_FENCE = 3.0  # interquartile ranges above the upper quartile: Tukey's "far out"


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """Of N photos: int64 [N], the label that a photo may rather have, -1 where its own is not in doubt; float64 [N],
    the margin, -1 to 1: the probability of the label less that of the likeliest other one; NaN where it is not known.
    """

    suggested: np.ndarray
    margins: np.ndarray

    def ranked(self) -> np.ndarray:
        """int64, the positions of labels in doubt, the likeliest error first."""
        found = np.flatnonzero(self.suggested >= 0)
        return found[np.argsort(self.margins[found], kind="stable")]


def label_errors(labels: np.ndarray, probabilities: np.ndarray, self_confidence: np.ndarray) -> LabelErrors:
    """labels: int [N]. probabilities: float [N, C], of a model that has not seen the photo's label; a row of NaN where
    there is none. self_confidence: float [N], of the label.

    A class has a threshold, the mean self-confidence of the photos that are labelled so. A photo counts for the
    likeliest class among those whose thresholds it reaches; where that is another than its label, it is off the
    diagonal of the confident joint, and its label in doubt. A class without such photos has no threshold, and no photo
    counts for it.
    """
    count, classes = probabilities.shape
    known = ~np.isnan(self_confidence)
    photos = np.bincount(labels[known], minlength=classes)
    sums = np.bincount(labels[known], self_confidence[known], minlength=classes)
    thresholds = np.where(photos > 0, sums / np.maximum(photos, 1), np.inf)
    rows = np.arange(count)
    reached = np.where(probabilities >= thresholds, probabilities, -np.inf)  # NaN reaches none
    counted_for = reached.argmax(axis=1)
    is_counted = np.isfinite(reached[rows, counted_for])
    others = np.where(np.isnan(probabilities), -np.inf, probabilities)
    others[rows, labels] = -np.inf
    margins = np.where(known, self_confidence - others.max(axis=1, initial=-np.inf), np.nan)
    in_doubt = known & is_counted & (counted_for != labels)
    return LabelErrors(np.where(in_doubt, counted_for, -1), margins)


def outlier_distances(features: np.ndarray, order: np.ndarray) -> np.ndarray:
    """float32 [N], the mean cosine distance, 0 to 2, to the five nearest others (Kuan and Mueller 2022).

    features: float [N, D]. order: int [N], the photos in an order of chance; of very many only the first are looked at
    as neighbours.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    references = np.sort(order[:_MOST_REFERENCES])
    near, nearest = min(_NEIGHBOURS, len(references) - 1), np.zeros(len(features), np.float32)
    if near < 1:
        return nearest
    for first in range(0, len(features), _BLOCK):
        block = slice(first, first + _BLOCK)
        products = directions[block] @ directions[references].T
        rows = np.arange(first, min(first + _BLOCK, len(features)))
        products[rows[:, None] == references] = -np.inf  # itself
        nearest[block] = 1 - np.partition(products, -near, axis=1)[:, -near:].mean(axis=1)
    return nearest


def far_out(distances: np.ndarray) -> np.ndarray:
    """int64, the positions of those beyond Tukey's outer fence, the farthest first; none of few photos."""
    if len(distances) < _FEWEST:
        return np.zeros(0, np.int64)
    low, high = np.quantile(distances, (0.25, 0.75))
    found = np.flatnonzero(distances > high + _FENCE * (high - low))
    return found[np.argsort(-distances[found], kind="stable")]
