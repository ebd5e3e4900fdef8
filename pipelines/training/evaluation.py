"""Exact evaluation: every photo counts once, on any number of processes."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from pipelines.data.loader import Loader, share_bad_photos
from pipelines.distributed.copies import to_device
from pipelines.errors import StopAgreed
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TransferModel
from pipelines.run.figures import CALIBRATION_BINS
from pipelines.run.predictions import MOST_ANSWERS

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn import functional
from tqdm import tqdm

# Chebyshev's points, between which what depends on a temperature is interpolated (Trefethen 2013, chapter 5). So many,
# as confidence over 22,000 classes that are nearly equal rivals would be 0.003 off between 24, and is 0.00002.
LARGEST_TEMPERATURE, _POINTS = 4.0, 40
TEMPERATURES = LARGEST_TEMPERATURE ** np.cos((np.arange(_POINTS) + 0.5) * np.pi / _POINTS)
_AT_ONCE = 1 << 20  # logits

# One record per photo: what every score is computed from. Aligned, as PyTorch takes columns of no other.
RECORD = np.dtype(
    [
        ("index", np.int64),  # position in the split
        ("label", np.int64),
        ("predicted", np.int64),
        ("rank", np.int64),  # how many classes scored above the true one
        ("confidence", np.float32),  # softmax probability of the predicted class
        ("loss", np.float32),  # cross-entropy, without label smoothing
        ("answers", np.int32, MOST_ANSWERS),  # the most probable classes, `predicted` first; of fewer classes 0
        ("probabilities", np.float32, MOST_ANSWERS),  # theirs
        ("margin", np.float32),  # the true class's logit minus the largest, at most 0
        ("normalisers", np.float32, _POINTS),  # log of the sum of exp((logit - largest) / each of TEMPERATURES)
    ],
    align=True,
)


# The setting best_by, and the value of a validation row that it means.
BEST_BY = {"top1": "val/top1", "balanced": "val/balanced_top1"}


@dataclass(frozen=True)
class Scores:
    """What an evaluation says, in memory that grows with photos and classes, not with their square.

    top1, topk[k], precision, recall and f1 are fractions. balanced_top1: the mean recall of the classes that have
    photos. majority_top1: what always answering the commonest class would reach. interval: 95 % Wilson interval of
    top1. ece: expected calibration error in 15 bins (Guo et al. 2017). confusion_pairs: see the function of this name.
    per_class: one dict per class with precision, recall, f1, count; all but the count None where it has no photo.
    """

    loss: float
    top1: float
    balanced_top1: float
    majority_top1: float
    correct: int
    count: int
    interval: tuple[float, float]
    topk: dict[int, float]
    ece: float
    confusion_pairs: np.ndarray
    per_class: list[dict[str, float | None]]


def predict(
    model: TransferModel,
    loader: Loader,
    accelerator: Accelerator,
    features: FrozenFeatures | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Records (see RECORD) of every readable photo of the loader's split, by index; the same array on all processes.

    model: unwrapped; it is left in eval mode. With its `test_flips` a record is of the mean of a photo's two views.
    features: of the same model and loader, `mirrored` with test_flips; computed on the first call.
    stop: asked before each batch. Where it says yes on any process, StopAgreed is raised on all.
    """
    model.eval()
    if features is not None:
        features.prepare(0, stop)
    model = model.for_evaluation()
    columns: list[tuple[torch.Tensor, ...]] = []
    stopped = False
    with torch.inference_mode():
        for hidden, labels, indices in _hidden(model, loader, accelerator, features):
            if stopped := stop():
                break
            with accelerator.autocast():
                logits = model.mean_logits(hidden)
            columns.append((indices, labels, *_outcomes(logits, labels)))
    parts = gather_object([(_records(columns), stopped)])
    if any(stopped for _, stopped in parts):
        raise StopAgreed
    gathered = np.concatenate([records for records, _ in parts])
    gathered = gathered[np.argsort(gathered["index"], kind="stable")]
    share_bad_photos(loader)
    expected = np.setdiff1d(np.flatnonzero(loader.split.faults == 0), sorted(loader.bad))
    if not np.array_equal(gathered["index"], expected):
        raise AssertionError(f"evaluated {len(gathered)} photos, not the {len(expected)} that there are, each once")
    return gathered


def loss_and_top1(records: np.ndarray) -> tuple[float, float, int]:
    """Mean loss, top-1 accuracy as a fraction, and the number of correct photos.

    The accuracy is NaN for a network that has diverged, as is every other.
    """
    correct = int((records["predicted"] == records["label"]).sum())
    count = max(1, len(records))
    top1 = correct / count if answers_are_finite(records) else math.nan
    return float(records["loss"].sum(dtype=np.float64) / count), top1, correct


def answers_are_finite(records: np.ndarray) -> bool:
    """Whether the network has answered with numbers: the largest of anything else is no prediction."""
    return bool(np.isfinite(records["confidence"]).all())


def balanced_top1(records: np.ndarray, classes: int) -> float:
    """Balanced accuracy: the mean recall of the classes that have photos, as a fraction (Brodersen et al. 2010).
    NaN for a network that has diverged."""
    if not answers_are_finite(records):
        return math.nan
    photos, right, _ = _class_counts(records["predicted"], records["label"], classes)
    has_photos = photos > 0
    return float((right[has_photos] / photos[has_photos]).mean()) if has_photos.any() else 0.0


def validation_row(records: np.ndarray, classes: int) -> dict[str, float]:
    """`val/loss`, `val/top1`, `val/balanced_top1`, `val/ece` and, of more than five classes, `val/top5`, as
    metrics.jsonl has them."""
    loss, top1, _ = loss_and_top1(records)
    top5 = {"val/top5": top_k(records, 5)} if classes > 5 else {}
    balanced = balanced_top1(records, classes)
    return {
        "val/loss": loss,
        "val/top1": top1,
        "val/balanced_top1": balanced,
        **top5,
        "val/ece": calibration_error(records),
    }


def best_scores(best: Mapping[str, Any]) -> dict[str, float]:
    """The accuracies of the best validation row so far, as rows and summaries have them: `best/val_top1`, ..."""
    return {f"best/{key.replace('/', '_')}": best[key] for key in BEST_BY.values() if key in best}


def top_k(records: np.ndarray, k: int) -> float:
    """The share of photos whose true class is among the k best-scored ones."""
    return int((records["rank"] < k).sum()) / max(1, len(records)) if answers_are_finite(records) else math.nan


def calibration_error(records: np.ndarray) -> float:
    """The expected calibration error in 15 bins: how far confidence is from accuracy (Guo et al. 2017).

    NaN for a network that has diverged, 0 without photos.
    """
    if not len(records) or not answers_are_finite(records):
        return math.nan if len(records) else 0.0
    from torchmetrics.functional.classification import binary_calibration_error  # seconds to import

    # The multi-class error is the binary one of "the prediction is right" against its confidence.
    right = torch.from_numpy((records["predicted"] == records["label"]).astype(np.int64))
    # torchmetrics (1.9) gives a confidence of exactly 1 a bin of its own; it belongs to the last one.
    confidence = torch.from_numpy(records["confidence"]).clamp(max=np.nextafter(np.float32(1), np.float32(0)).item())
    return float(binary_calibration_error(confidence, right, CALIBRATION_BINS))


def score(records: np.ndarray, classes: int, ks: Sequence[int] = (5,)) -> Scores:
    """All scores of `records`. k of top-k is clamped to the number of classes."""
    loss, top1, correct = loss_and_top1(records)
    labels, predicted = records["label"], records["predicted"]
    return Scores(
        loss=loss,
        top1=top1,
        balanced_top1=balanced_top1(records, classes),
        majority_top1=int(np.bincount(labels).max(initial=0)) / max(1, len(records)),
        correct=correct,
        count=len(records),
        interval=wilson_interval(correct, len(records)),
        topk={k: top_k(records, k) for k in {min(k, classes) for k in ks}},
        ece=calibration_error(records),
        confusion_pairs=confusion_pairs(predicted, labels, classes),
        per_class=class_scores(predicted, labels, classes),
    )


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[dict[str, float | None]]:
    """`Scores.per_class`. predicted, labels: int [photos], 0 <= each < classes."""
    photos, right, answers = _class_counts(predicted, labels, classes)
    precision, recall = right / np.maximum(answers, 1), right / np.maximum(photos, 1)
    f1 = 2 * right / np.maximum(photos + answers, 1)
    columns = (column.tolist() for column in (precision, recall, f1, photos))
    return [
        {"precision": p, "recall": r, "f1": f, "count": n}
        if n
        else {"precision": None, "recall": None, "f1": None, "count": 0}
        for p, r, f, n in zip(*columns, strict=True)
    ]


def confusion_pairs(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix's entries that are not 0: int64 [pairs, 3], true class, predicted class, photos, in order.

    predicted, labels: int [photos], 0 <= each < classes. Of 8,000 classes the whole matrix would take half a gigabyte.
    """
    pairs, photos = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    return np.stack([pairs // classes, pairs % classes, photos], axis=1)


def confusion_matrix(pairs: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C], rows truth, columns prediction, from `confusion_pairs`."""
    matrix = np.zeros((classes, classes), np.int64)
    matrix[pairs[:, 0], pairs[:, 1]] = pairs[:, 2]
    return matrix


def _class_counts(predicted: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [C] each: photos of a class, those of them that are answered right, answers that name the class."""
    return (
        np.bincount(labels, minlength=classes),
        np.bincount(labels[labels == predicted], minlength=classes),
        np.bincount(predicted, minlength=classes),
    )


def wilson_interval(correct: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of a proportion (Wilson 1927): honest near 0 and 1 and for few photos, within [0, 1]."""
    if not count:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + level) / 2), correct / count
    centre = p + z * z / (2 * count)
    half = z * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _hidden(
    model: TransferModel, loader: Loader, accelerator: Accelerator, features: FrozenFeatures | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    are_known = features is not None and features.are_kept
    steps = tqdm(
        loader.epoch(0, images=not are_known),
        total=loader.steps_per_epoch,
        desc="evaluation",
        leave=False,
        disable=are_known or not accelerator.is_main_process or not sys.stderr.isatty(),
    )
    for step in steps:
        for batch in step.batches:
            if len(batch):
                with accelerator.autocast():
                    hidden = features.of(batch) if features else model.view_features(batch.images)
                yield hidden, batch.labels, batch.indices


def _outcomes(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Prediction, rank of the truth, confidence, loss, the most probable classes of each photo with their
    probabilities, margin and normalisers, left on the device: no wait per batch."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    # Of equal logits the prediction comes first, so that rank 0 and a right prediction are one and the same.
    rank = torch.where(predicted == labels, 0, rank.clamp(min=1))
    highest, answers = probabilities.topk(min(MOST_ANSWERS, logits.shape[1]), dim=1)
    answers = torch.where(answers == predicted[:, None], answers[:, :1], answers)  # so of equals, too
    answers[:, 0] = predicted
    loss = functional.cross_entropy(logits, labels, reduction="none")
    relative = logits - logits.amax(dim=1, keepdim=True)
    margin = relative.gather(1, labels[:, None])[:, 0]
    inverse = to_device(torch.from_numpy((1 / TEMPERATURES).astype(np.float32)), logits.device)
    rows = relative.split(max(1, _AT_ONCE // logits.shape[1]))
    normalisers = torch.cat([(row[:, None] * inverse[:, None]).logsumexp(dim=2) for row in rows])
    return predicted, rank, confidence, loss, answers, highest, margin, normalisers


def _records(columns: list[tuple[torch.Tensor, ...]]) -> np.ndarray:
    records = np.zeros(sum(len(column[0]) for column in columns), RECORD)
    if columns:
        for name, parts in zip(RECORD.names or (), zip(*columns, strict=True), strict=True):
            values = torch.cat(parts).cpu().numpy()
            records[name][..., : values.shape[-1]] = values
    return records
