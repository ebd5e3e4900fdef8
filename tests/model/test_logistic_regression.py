"""The fit that a fitted head is: the optimum, its folds, its penalty."""

import gc

import pipelines.model.logistic_regression as regression
from pipelines.model.logistic_regression import (
    PENALTIES,
    choose_and_fit,
    class_weights_of,
    fits,
    folds_of,
    why_too_large,
)

import numpy as np
import pytest
import torch
from torch.nn import functional


def photos(count: int = 60, classes: int = 3, features: int = 12, spread: float = 1.0, seed: int = 0):
    """Features float32 [2, N, D] of two views that are close to one another, and labels; the classes overlap."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, count))
    centres = rng.normal(size=(classes, features))
    seen = 5 + centres[labels] + spread * rng.normal(size=(count, features))
    return torch.from_numpy(np.stack([seen, seen + 0.1 * rng.normal(size=seen.shape)])).float(), labels


@pytest.mark.parametrize(("count", "features"), [(60, 12), (20, 50)])  # more photos than features, and fewer
@pytest.mark.parametrize("setting", ["none", "balanced"])
def test_each_fit_is_where_the_gradient_is_zero(count, features, setting):
    seen, labels = photos(count, features=features)
    weights = class_weights_of(setting, labels, 3)
    assert weights[labels].mean() == pytest.approx(1)
    rows, truth = seen.flatten(0, 1).double(), torch.from_numpy(np.tile(labels, 2))
    objectives = []
    for penalty, head in zip(PENALTIES, fits(seen, labels, weights), strict=True):
        weight, bias = head.weight.requires_grad_(), head.bias.requires_grad_()
        errors = functional.cross_entropy(head.logits(rows), truth, reduction="none")
        objective = (torch.from_numpy(weights)[truth] * errors).mean() + penalty / 2 * (weight**2).sum()
        for gradient in torch.autograd.grad(objective, (weight, bias)):
            assert gradient.abs().max() < 3e-5
        objectives.append(objective.item())
    assert objectives == sorted(objectives, reverse=True)


def test_a_class_weight_is_so_many_copies_of_its_photos():
    seen, labels = photos(40, classes=2)
    again = np.concatenate([np.arange(40), np.flatnonzero(labels == 1), np.flatnonzero(labels == 1)])
    one = list(fits(seen, labels, np.array([1.0, 3.0])))
    other = list(fits(seen[:, again], labels[again], np.ones(2)))
    for weighted, copied in zip(one, other, strict=True):
        torch.testing.assert_close(
            weighted.logits(seen[0].double()), copied.logits(seen[0].double()), atol=1e-3, rtol=0
        )


def test_empty_classes_and_constant_features_do_no_harm():
    seen, labels = photos(30, classes=2)
    for features in (seen, torch.ones_like(seen)):
        found = choose_and_fit(features, labels, class_weights_of("balanced", labels, 4))
        logits = found.head.logits(features[0].double())
        assert logits.isfinite().all()
        assert set(logits.argmax(dim=1).tolist()) <= {0, 1}
    assert class_weights_of("balanced", labels, 4)[2:].tolist() == [0, 0]


def test_folds_are_stratified():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 4], [40, 13, 7, 2, 1]))
    folds = folds_of(labels)
    assert folds[labels == 4].tolist() == [-1]
    assert max(np.bincount(folds[folds >= 0])) - min(np.bincount(folds[folds >= 0])) <= 1
    for name, count in enumerate((40, 13, 7, 2)):
        of_class = np.bincount(folds[labels == name], minlength=5)
        assert of_class.max() - of_class.min() <= 1
        assert of_class.max() < count
    assert folds.tolist() == folds_of(labels).tolist()
    assert set(folds_of(np.zeros(50, np.int64))[:10]) != {0}, "not one block after another"


def test_folds_of_very_few_photos():
    assert folds_of(np.array([0, 1])).tolist() == [-1, -1]
    assert sorted(folds_of(np.array([0, 0, 1]))) == [-1, 0, 1]
    seen, labels = photos(2, classes=2)
    labels[:] = [0, 1]
    found = choose_and_fit(seen, labels, np.ones(2))
    assert found.accuracies.size == 0
    assert found.penalty == 0.01
    assert found.head.logits(seen[0].double()).argmax(dim=1).tolist() == [0, 1]


def test_the_views_of_a_photo_are_in_one_fold(monkeypatch):
    """Photos that say nothing of their class: whoever had seen another view of one would know it."""
    rng = np.random.default_rng(0)
    seen, labels = torch.from_numpy(rng.normal(size=(1, 100, 200))).float().repeat(2, 1, 1), np.arange(100) % 2
    found = choose_and_fit(seen, labels, np.ones(2))
    assert 0.3 < found.accuracies.mean() < 0.7


@pytest.mark.parametrize(("spread", "low", "high"), [(0.2, 1e-5, 1e-2), (6.0, 1e-2, 10.0)])
def test_the_clearer_the_classes_the_weaker_the_penalty(spread, low, high):
    seen, labels = photos(60, features=40, spread=spread)
    found = choose_and_fit(seen, labels, np.ones(3))
    assert low <= found.penalty <= high
    means = found.losses.mean(axis=1)
    assert PENALTIES[means.argmin()] == found.penalty
    assert found.accuracies.shape == found.losses.shape == (len(means), 5)
    assert len(means) in (means.argmin() + 3, len(PENALTIES)), "the search ends behind the least"
    *_, head = fits(seen, labels, np.ones(3), penalties=PENALTIES[: means.argmin() + 1])
    torch.testing.assert_close(found.head.weight, head.weight)


def test_a_fit_can_be_stopped_and_leaves_the_threads_as_they_were():
    seen, labels = photos()
    threads = torch.get_num_threads()
    for after in (0, 7):
        asked = iter([False] * after + [True])
        assert choose_and_fit(seen, labels, np.ones(3), lambda asked=asked: next(asked)) is None
        assert torch.get_num_threads() == threads


def test_accuracies_count_photos_whatever_the_losses_weigh():
    seen, labels = photos(210, features=4, spread=3.0)
    labels[:] = (np.arange(210) % 10 == 0) & (labels == 0)  # of one class nine of ten photos, and more
    found = choose_and_fit(seen, labels, class_weights_of("balanced", labels, 2))
    chosen = PENALTIES.index(found.penalty)
    right = found.held_out.argmax(dim=1).numpy() == labels
    of_folds = [right[folds_of(labels) == fold].mean() for fold in range(5)]
    np.testing.assert_allclose(found.accuracies[chosen], of_folds)
    recall = [right[labels == label].mean() for label in (0, 1)]
    assert abs(np.mean(recall) - right.mean()) > 0.01, "the two would be told apart"


def bytes_of_tensors() -> int:
    gc.collect()
    found = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def test_folds_that_wait_hold_no_features_of_their_own(monkeypatch):
    seen, labels = photos(400, features=64)
    monkeypatch.setattr(regression, "_MOST_KEPT_BYTES", 0)
    calls, held = iter(range(100)), []

    def score(*arguments):
        gc.collect()
        if next(calls) == 7:  # the third fold of the second penalty
            held.append(bytes_of_tensors())
        return score_of(*arguments)

    before = bytes_of_tensors()
    score_of = regression._score
    monkeypatch.setattr(regression, "_score", score)
    choose_and_fit(seen, labels, np.ones(3), lambda: bool(held))
    assert held[0] - before < 0.7 * 2 * seen.nbytes, "of the features in float64"


def test_what_would_take_too_much_is_said(monkeypatch):
    assert why_too_large(50_000, 2, 512, 4) == ""
    assert "MiB" in why_too_large(10_000_000, 2, 512, 4)
    assert "classes" in why_too_large(10_000, 2, 512, 1000)
    monkeypatch.setattr(regression, "_MOST_BYTES", 8 * 100)
    assert why_too_large(10, 2, 5, 2) == ""
    assert why_too_large(10, 2, 6, 2)
