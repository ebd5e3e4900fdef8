"""Multinomial logistic regression, its penalty chosen by folds: no random number, no seed.

As Kornblith et al. (2019) compare networks by it: an L2 penalty on the weights and not on the bias, features as they
are, the penalty by cross-validation. Pure functions of arrays, in float64 on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.data.plan import FOLDS, random_bits

import numpy as np
import torch
from torch.nn import functional

PENALTIES = tuple(10 ** (-exponent / 2) for exponent in range(-2, 11))  # 10 to 0.00001, beside the mean loss
_PENALTY_WITHOUT_FOLDS = PENALTIES[6]  # 0.01, in the middle of what data sets have chosen
_MOST_FOLDS = 5
_MOST_BYTES = 2**29  # of the features in float64; a fit takes some three times as much
_MOST_KEPT_BYTES = 2**25  # of a fit's own copy while it waits for those of other folds: more is computed again
_MOST_PRODUCTS = 2**28  # photos x views x features x classes: some minutes
_TOLERANCE = 1e-6  # the largest entry of the gradient at the end of a fit
_MOST_STEPS, _MOST_PRODUCTS_OF_A_STEP = 50, 250  # three to five steps of some dozens are usual
_DECREASE = 1e-4  # Nocedal and Wright 2006, section 3.1


@dataclass(frozen=True)
class Head:
    """weight: float64 [C, D]. bias: float64 [C]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """float64 [n, D] -> float64 [n, C]."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Fit:
    """The head that was fitted to all photos with `penalty`.

    accuracies, losses: float64 [penalties, folds], of the photos that a fold's fit has not seen, for the first ones of
    PENALTIES; no columns where there were too few photos for folds. held_out: float64 [N, C], with `penalty` the logits
    of each photo by the fit of the folds that it is not in; NaN of the only photo of a class.
    """

    head: Head
    penalty: float
    accuracies: np.ndarray
    losses: np.ndarray
    held_out: torch.Tensor


def why_too_large(photos: int, views: int, features: int, classes: int) -> str:
    """Why a fit to so many would take too much memory or time; "" where it does not."""
    numbers = photos * views * features
    if 8 * numbers > _MOST_BYTES:
        return f"{photos:,} photos' features would take {8 * numbers / 2**20:,.0f} MiB"
    if numbers * classes > _MOST_PRODUCTS:
        return f"{photos:,} photos of {classes:,} classes would take long"
    return ""


def class_weights_of(setting: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """float64 [C], of mean 1 over the photos. "none": ones; "balanced": each class that has photos counts the same.

    labels: int [N].
    """
    if setting == "none":
        return np.ones(classes)
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)


def folds_of(labels: np.ndarray, folds: int = _MOST_FOLDS) -> np.ndarray:
    """int64 [N]: the fold, from 0 on, in which each photo is held out; -1 for the only photo of its class.

    A fold has of each class an equal part, to one photo. Of a class with two or more photos some are always left to
    learn from, so that a rare class does not make the folds fewer for all. Which photos, the plan's bits decide, by a
    key of its own: the head is the same for every seed.
    """
    found = np.full(len(labels), -1)
    order = np.lexsort((random_bits(FOLDS, np.arange(len(labels))), labels))
    held_out = order[np.bincount(labels)[labels[order]] > 1]
    # A class goes on where the one before has ended, so that the folds are of one size.
    found[held_out] = np.arange(len(held_out)) % folds
    return found


def choose_and_fit(
    features: torch.Tensor, labels: np.ndarray, class_weights: np.ndarray, stop: Callable[[], bool] = lambda: False
) -> Fit | None:
    """The penalty by folds, then the fit to all photos; None where `stop`, asked before each fit, says yes.

    features: float [V, N, D], V views of each photo, all of them in the photo's fold; accuracies and losses are of the
    first. labels: int [N]. class_weights: float64 [C], of the photos in fits and losses.

    Chosen is the penalty of the least mean loss on what is held out. Of a few hundred photos, accuracies are equal for
    many penalties, and the largest is luck. The search goes from strong to weak and ends behind the least: the weaker,
    the longer a fit takes.
    """
    with _one_thread():
        return _choose_and_fit(features, labels, class_weights, stop)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: threads wait for one another longer than they work, and sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_and_fit(
    features: torch.Tensor, labels: np.ndarray, class_weights: np.ndarray, stop: Callable[[], bool]
) -> Fit | None:
    folds = folds_of(labels)
    names = range(int(folds.max(initial=-1)) + 1)
    whole = fits(features, labels, class_weights)
    ahead = [fits(features, labels, class_weights, folds != fold) for fold in names]
    scores: list[list[tuple[float, float]]] = []
    best = torch.full((len(labels), len(class_weights)), torch.nan).double()
    for _ in PENALTIES if names else ():
        scores.append([])
        found = torch.full_like(best, torch.nan)
        for fold in names:
            if stop():
                return None
            held = torch.from_numpy(folds == fold)
            found[held] = next(ahead[fold]).logits(features[0, held].double())
            scores[-1].append(_score(found[held], labels[folds == fold], class_weights))
        losses = np.array(scores)[..., 1].mean(axis=1)
        if losses.argmin() == len(losses) - 1:
            best = found
        if len(losses) - losses.argmin() > 2:
            break
    accuracies, losses = np.array(scores).reshape(len(scores), len(names), 2).transpose(2, 0, 1)
    chosen = int(losses.mean(axis=1).argmin()) if names else PENALTIES.index(_PENALTY_WITHOUT_FOLDS)
    for _ in range(chosen):
        if stop():
            return None
        next(whole)
    return Fit(next(whole), PENALTIES[chosen], accuracies, losses, best)


def fits(
    features: torch.Tensor,
    labels: np.ndarray,
    class_weights: np.ndarray,
    chosen: np.ndarray | None = None,
    penalties: tuple[float, ...] = PENALTIES,
) -> Iterator[Head]:
    """For each penalty, the head of the least (mean cross-entropy + penalty / 2 x the sum of the squared weights).

    features: float [V, N, D]; labels: int [N]; class_weights: float64 [C], of a class's photos in the mean; chosen:
    bool [N], the photos that are fitted to, or None, all. Each fit starts where the one before has ended. Newton's
    method (Nocedal and Wright 2006, algorithm 7.1); a step comes of conjugate gradients, in the features' principal
    axes, where a diagonal comes near the Hessian.
    """
    chosen = np.ones(len(labels), bool) if chosen is None else chosen
    views, classes = len(features), len(class_weights)
    y = torch.from_numpy(np.tile(labels[chosen], views).astype(np.int64))
    share = torch.from_numpy(class_weights)[y, None]
    share = share / share.sum()
    x = features[:, chosen].flatten(0, 1).double()
    centre = (share * x).sum(dim=0)  # the bias, which is free, takes it up
    x -= centre
    variances, axes = torch.linalg.eigh((share * x).T @ x)
    has_any = variances > variances[-1] * 1e-12  # along other axes the weights are 0
    variances, axes = variances[has_any], axes[:, has_any]
    variances = torch.cat([variances, torch.ones(1).double()])[:, None]
    is_penalised = torch.ones_like(variances)
    is_penalised[-1] = 0
    point = torch.zeros(len(variances), classes).double()
    del x
    turned: torch.Tensor | None = None
    for penalty in penalties:
        if turned is None:
            x = features[:, chosen].flatten(0, 1).double().sub_(centre)
            turned = torch.cat([x @ axes, torch.ones_like(share)], dim=1)
            del x
        point = _least(turned, y, share, variances, penalty * is_penalised, point)
        turned = turned if turned.nbytes <= _MOST_KEPT_BYTES else None
        weight = axes @ point[:-1]
        yield Head(weight.T, point[-1] - centre @ weight)


def _least(
    x: torch.Tensor,
    y: torch.Tensor,
    share: torch.Tensor,
    variances: torch.Tensor,
    drawn: torch.Tensor,
    point: torch.Tensor,
) -> torch.Tensor:
    """Where `fits` has its least, from `point` on: float64 [D, C].

    x: float64 [n, D]; y: int64 [n]; share: float64 [n, 1], of sum 1; variances, drawn: float64 [D, 1], x's and what
    draws each weight to 0.
    """
    truth = functional.one_hot(y, point.shape[1]).double()

    def loss(at: torch.Tensor) -> float:
        errors = functional.cross_entropy(x @ at, y, reduction="none")
        return float((share[:, 0] * errors).sum() + (drawn * at * at).sum() / 2)

    now = loss(point)
    for _ in range(_MOST_STEPS):
        p = (x @ point).softmax(dim=1)
        gradient = x.T @ (share * (p - truth)) + drawn * point
        if (size := float(gradient.abs().max())) < _TOLERANCE:
            break

        def curvature(along: torch.Tensor, p: torch.Tensor = p) -> torch.Tensor:
            moved = x @ along
            return x.T @ (share * p * (moved - (p * moved).sum(dim=1, keepdim=True))) + drawn * along

        diagonal = variances * (share * p * (1 - p)).sum(dim=0) + drawn
        step = _solve(curvature, gradient, diagonal.clamp(min=1e-12), tolerance=min(0.1, size**0.5))
        slope, length = float((gradient * step).sum()), 1.0
        while (ahead := loss(point + length * step)) > now + _DECREASE * length * slope and length > 1e-6:
            length /= 2
        point, now = point + length * step, ahead
    return point


def _solve(
    curvature: Callable[[torch.Tensor], torch.Tensor], gradient: torch.Tensor, diagonal: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """The step at whose end the gradient would be 0, by preconditioned conjugate gradients, to a relative error."""
    step, residual = torch.zeros_like(gradient), -gradient
    direction = residual / diagonal
    size = first = (residual * direction).sum()
    for _ in range(_MOST_PRODUCTS_OF_A_STEP):
        curved = curvature(direction)
        length = size / (direction * curved).sum()
        step, residual = step + length * direction, residual - length * curved
        following = (residual * residual / diagonal).sum()
        if following <= tolerance**2 * first:
            break
        direction, size = residual / diagonal + following / size * direction, following
    return step


def _score(logits: torch.Tensor, labels: np.ndarray, class_weights: np.ndarray) -> tuple[float, float]:
    """Accuracy, in which all photos count the same, and mean loss, weighted as a fit is. logits: float64 [n, C]."""
    truth = torch.from_numpy(labels.astype(np.int64))
    share = torch.from_numpy(class_weights)[truth]
    errors = functional.cross_entropy(logits, truth, reduction="none")
    right = (logits.argmax(dim=1) == truth).double()
    return float(right.mean()), float((errors * share).sum() / share.sum())
