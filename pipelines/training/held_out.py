"""What a head says of photos whose labels it has not seen, fitted to features of a body that need not have, either."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import Config
from pipelines.data.dataset import Split
from pipelines.data.loader import eval_loader
from pipelines.data.plan import FOLDS, random_bits
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import MEMORY_LIMIT, FrozenFeatures
from pipelines.model.logistic_regression import choose_and_fit, class_weights_of, why_too_large
from pipelines.model.network import STAGES, TransferModel

import numpy as np
import torch
from accelerate import Accelerator, PartialState

_FEWEST_OF_A_CLASS = 4  # in the mean; a head that has seen fewer tells little


@dataclass(frozen=True, eq=False)
class Features:
    """Of some photos of a split, those at `positions`, int [n], in its order: float32 [V, n, D] of V views, the photo
    as an evaluation sees it and, of two, its mirror image. All of them could be decoded."""

    positions: np.ndarray
    rows: torch.Tensor


def most_photos(features: int, views: int) -> int:
    """Of how many photos the features may be kept in memory."""
    return MEMORY_LIMIT // (4 * features * views)


def in_order_of_chance(count: int) -> np.ndarray:
    """int64 [count]: 0 to count - 1, the same every time."""
    return np.argsort(random_bits(FOLDS, np.arange(count)), kind="stable")


def features_of(
    network: TransferModel,
    split: Split,
    chosen: np.ndarray,
    engine: str,
    accelerator: Accelerator,
    config: Config,
    store: FeatureStore | None,
    *,
    views: int,
) -> Features:
    """What the whole body makes of the photos at `chosen`, int [n], found in `store` where a run has left it there."""
    frozen: Any = {"frozen_stages": len(STAGES), "batchnorm": "frozen", "test_flips": views > 1}
    whole = TransferModel(network.network, **frozen).eval()
    part = split if len(chosen) == len(split) else split.only(chosen)
    config = replace(config, skip_bad_files=True)
    with closing(eval_loader(config, part, part.labels, PartialState(), engine)) as photos:
        found = FrozenFeatures(
            *(whole, photos, accelerator),
            views_per_photo=1,
            epochs=1,
            micro_batch=config.eval_batch_per_device,
            mirrored=views > 1,
            store=store,
        )
        found.prepare(0, lambda: False)
        can_be_read = part.faults == 0
        can_be_read[list(photos.bad)] = False
    rows = found.rows.unflatten(0, (views, -1)).cpu()
    can_be_read &= rows.isfinite().all(dim=2).all(dim=0).numpy()
    return Features(chosen[can_be_read], rows[:, torch.from_numpy(can_be_read)])


def fitted_to(labels: np.ndarray, classes: int, features: int, views: int) -> tuple[np.ndarray, int]:
    """int64, the positions of the photos that a head is fitted to, as many of each class as there is time for, in
    order, and how many views of each; none where a class would have too few.

    labels: int [N].
    """
    order = in_order_of_chance(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=classes)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    preferred = by_class[np.argsort(rank, kind="stable")]
    most = len(labels)
    while most and why_too_large(most, views, features, classes):
        views, most = 1, most if views > 1 else most * 7 // 8
    if most < len(labels) and most < _FEWEST_OF_A_CLASS * np.count_nonzero(counts):
        most = 0
    return np.sort(preferred[:most]), views


def held_out_probabilities(
    features: Features,
    labels: np.ndarray,
    classes: int,
    class_weights: str,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | str:
    """float64 [n, C], of each photo of `features` by a head that was fitted without it: of five folds held out in turn,
    or, of very many photos, by the one that was fitted to others. NaN of the only photo of a class. Else why there
    is no such head, for a line.

    labels: int [n]. class_weights: the setting.
    """
    views, count, numbers = features.rows.shape
    seen, views = fitted_to(labels, classes, numbers, views)
    if not len(seen):
        return "a head for so many classes would take too long"
    weights = class_weights_of(class_weights, labels[seen], classes)
    found = choose_and_fit(features.rows[:views, torch.from_numpy(seen)], labels[seen], weights, stop)
    if found is None or not found.accuracies.size:
        return "too few of a class for folds"
    logits = torch.full((count, classes), torch.nan).double()
    unseen = np.setdiff1d(np.arange(count), seen)
    logits[torch.from_numpy(seen)] = found.held_out
    logits[torch.from_numpy(unseen)] = found.head.logits(features.rows[0, torch.from_numpy(unseen)].double())
    return logits.softmax(dim=1).numpy()
