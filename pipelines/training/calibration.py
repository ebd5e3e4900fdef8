"""Confidences that are as often right as they say: a temperature, and below which confidence an answer is unsure.

Logits are divided by one number, which changes no answer (Guo et al. 2017). It is fitted to the photos of an evaluation
by their mean loss, and kept where it lowers the loss of those that it was not fitted to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import UNSURE_FOR
from pipelines.run.figures import CALIBRATION_BINS
from pipelines.run_files import Description, SavedCalibration, Unsure
from pipelines.text import counted
from pipelines.training.evaluation import (
    LARGEST_TEMPERATURE,
    TEMPERATURES,
    calibration_error,
    loss_and_top1,
    wilson_interval,
)

import numpy as np
from numpy.polynomial.chebyshev import chebvander

FOLDS = 10
_TRIED = LARGEST_TEMPERATURE ** np.linspace(-1, 1, 2001)
_AT_POINTS = np.linalg.inv(chebvander(np.log(TEMPERATURES) / np.log(LARGEST_TEMPERATURE), len(TEMPERATURES) - 1))


@dataclass(frozen=True)
class Reliability:
    """How far confidences are from accuracy. loss, ece: see `evaluation.Scores`. bins: of confidence, those that have
    photos: how many, their mean confidence and their accuracy.
    """

    loss: float
    ece: float
    bins: list[tuple[int, float, float]]

    def described(self) -> dict[str, Any]:
        """JSON."""
        return {"loss": self.loss, "ece": self.ece, "bins": [list(each) for each in self.bins]}


@dataclass(frozen=True)
class Calibration:
    """temperature: what logits are to be divided by; 1 where none is used, for a reason.

    before: of the photos as they were answered. after: each at the temperature that was fitted without its fold, so
    that none is reported by one that it took part in; None where none is used.
    """

    temperature: float
    reason: str
    photos: int
    folds: int
    before: Reliability
    after: Reliability | None

    def described(self) -> dict[str, Any]:
        """The key `calibration` of model.json."""
        found = {"photos": self.photos, "folds": self.folds, "reason": self.reason}
        after = self.after.described() if self.after else None
        return found | {"before": self.before.described(), "after": after}


def calibrate(records: np.ndarray) -> Calibration:
    """records: of `evaluation.predict`, finite. Folds are every tenth photo, and so have all classes alike."""
    photos, before = len(records), reliability(records)
    folds = min(FOLDS, photos)

    def unused(reason: str) -> Calibration:
        return Calibration(1.0, reason, photos, folds, before, None)

    if not photos:
        return unused("there are no photos to fit one to")
    right = int((records["predicted"] == records["label"]).sum())
    if right == photos:
        answered = "photo is" if photos == 1 else "photos are"
        return unused(f"the {photos} {answered} all answered right, so that no confidence was too high")
    losses = np.stack([_summed_losses(records[fold::folds]) for fold in range(folds)])
    total = losses.sum(axis=0)
    temperature = _fitted(total)
    if temperature in (_TRIED[0], _TRIED[-1]):
        return unused(f"the loss falls as far as temperatures are tried, to {temperature:g}")
    calibrated = records.copy()
    for fold in range(folds):
        others = _fitted(total - losses[fold])
        calibrated[fold::folds] = at_temperature(records[fold::folds], others)
    after = reliability(calibrated)
    if after.loss >= before.loss:
        with_and_without = f"{after.loss:.4f} with one and {before.loss:.4f} without"
        return unused(f"photos that it was not fitted to have a loss of {with_and_without}")
    return Calibration(float(f"{temperature:.4g}"), "", photos, folds, before, after)


def at_temperature(records: np.ndarray, temperature: float) -> np.ndarray:
    """The records as they would be with all logits divided once more, at 1 as they are. temperature: from 1 /
    LARGEST_TEMPERATURE to it. The answers are the same; margins and normalisers stay those of the undivided logits.
    """
    if temperature == 1:
        return records
    changed = records.copy()
    normaliser = np.maximum(0, records["normalisers"] @ _weights(np.array([temperature]))[0])
    changed["confidence"] = np.exp(-normaliser)
    changed["loss"] = np.maximum(0, normaliser - records["margin"] / temperature)
    highest = np.maximum(records["probabilities"][:, :1], np.finfo(np.float32).tiny)
    ratios = (records["probabilities"] / highest).astype(np.float64) ** (1 / temperature)
    changed["probabilities"] = changed["confidence"][:, None] * ratios
    return changed


def reliability(records: np.ndarray) -> Reliability:
    """Of records at one temperature or at several."""
    confidence, right = records["confidence"].astype(np.float64), records["predicted"] == records["label"]
    at = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(at, minlength=CALIBRATION_BINS)
    has, divisor = count > 0, np.maximum(count, 1)
    means = (np.bincount(at, values, minlength=CALIBRATION_BINS) / divisor for values in (confidence, right))
    columns = (column[has].tolist() for column in (count, *means))
    return Reliability(loss_and_top1(records)[0], calibration_error(records), list(zip(*columns, strict=True)))


def unsure_thresholds(records: np.ndarray) -> list[dict[str, Any]]:
    """The key `unsure` of model.json: for each wanted accuracy of UNSURE_FOR that can be had, the confidence `below`
    which an answer is unsure, and how many of the `photos` are `kept` and of those `right`: the most photos whose
    answers, from the surest one down, are right so often.
    """
    order = np.argsort(-records["confidence"], kind="stable")
    confidence = records["confidence"][order].astype(np.float64)
    right = np.cumsum(records["predicted"][order] == records["label"][order])
    kept = np.arange(1, len(order) + 1)
    can_be_cut = np.append(confidence[1:] < confidence[:-1], True)[: len(order)]
    found = []
    for wanted in UNSURE_FOR:
        enough = kept[can_be_cut & (right >= wanted * kept)]
        if len(enough):
            most = int(enough[-1])
            below = 0.0 if most == len(order) else float(confidence[most - 1 : most + 1].mean())
            counts = {"photos": len(order), "kept": most, "right": int(right[most - 1])}
            found.append({"wanted": wanted, "below": below, **counts})
    return found


def unsure_for(description: Description, wanted: float) -> Unsure | None:
    """What model.json says of a wanted accuracy, of UNSURE_FOR; None where it cannot be had."""
    return next((each for each in description["unsure"] if each["wanted"] == wanted), None)


def unsure_line(found: Unsure) -> str:
    """What model.json says of it, in a line."""
    photos, kept, right = found["photos"], found["kept"], found["right"]
    low, high = wilson_interval(right, kept)
    return (
        f"unsure below a confidence of {found['below']:.4f}: {photos - kept} of {counted(photos, 'validation photo')}; "
        f"of the others {right} of {kept} are right, 95 % interval {low:.3f} to {high:.3f}"
    )


def calibration_line(calibration: SavedCalibration, temperature: float) -> str:
    """What model.json says of it, in a line."""
    photos = counted(calibration["photos"], "validation photo")
    before, after, folds = calibration["before"], calibration["after"], calibration["folds"]
    if after is None:
        reason = calibration["reason"]
        return f"confidence: as the network gives it, no temperature: {reason} (calibration error {before['ece']:.4f})"
    return (
        f"confidence: logits / {temperature:g}; calibration error {before['ece']:.4f} before and {after['ece']:.4f} "
        f"after, loss {before['loss']:.4f} and {after['loss']:.4f} ({photos}, each by the others of {folds} folds)"
    )


def calibration_panels(
    before: Mapping[str, Any], after: Mapping[str, Any] | None, temperature: float
) -> dict[str, Mapping[str, Any]]:
    """What `figures.save_calibration` draws."""
    if after is None:
        return {"confidence as the network gives it": before}
    return {"before": before, f"after: logits / {temperature:g}": after}


def _summed_losses(records: np.ndarray) -> np.ndarray:
    """float64 [points]: the sum of the photos' losses at TEMPERATURES."""
    sums = records["normalisers"].sum(axis=0, dtype=np.float64)
    return sums - records["margin"].sum(dtype=np.float64) / TEMPERATURES


def _fitted(losses: np.ndarray) -> float:
    """The temperature of the least sum of losses; those at TEMPERATURES are given."""
    return float(_TRIED[np.argmin(_weights(_TRIED) @ losses)])


def _weights(temperature: np.ndarray) -> np.ndarray:
    """float64 [n, points]: what is known at TEMPERATURES, times these and summed, is what holds at n temperatures."""
    place = np.log(temperature) / np.log(LARGEST_TEMPERATURE)
    return chebvander(place, len(TEMPERATURES) - 1) @ _AT_POINTS
