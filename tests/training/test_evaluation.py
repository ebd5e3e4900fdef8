"""Every photo counts once, and every score is what a person computes by hand."""

import tracemalloc
from pathlib import Path

from pipelines.config import Config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import make_engine
from pipelines.data.loader import Loader, eval_loader
from pipelines.data.plan import EvalPlan, Views
from pipelines.errors import UserError
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TransferModel
from pipelines.training.evaluation import (
    RECORD,
    _outcomes,
    confusion_matrix,
    confusion_pairs,
    loss_and_top1,
    predict,
    score,
    validation_row,
    wilson_interval,
)

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional
from torchmetrics.functional import classification as tm
from torchvision.models import resnet18

CONFIG = Config(image_size=64, resize=72, eval_batch_per_device=4, loader="pillow", loader_threads=2)
CLASSES = ("ant", "bee", "wasp")
COUNTS = {"ant": 4, "bee": 3, "wasp": 4}


def test_a_confidence_of_one_belongs_to_the_last_bin():
    records = np.zeros(4, RECORD)
    records["confidence"], records["predicted"] = [1.0, 1.0, 0.95, 0.95], [0, 0, 1, 1]
    # All four in the bin from 14/15 to 1: half of them are right, with a mean confidence of 0.975.
    assert validation_row(records, 3)["val/ece"] == pytest.approx(0.475, abs=1e-6)


def test_no_accuracy_is_made_of_answers_that_are_no_numbers():
    records = np.zeros(4, RECORD)
    records["confidence"] = [0.5, 0.5, np.nan, 0.5]
    row = validation_row(records, 9)
    assert all(np.isnan(row[key]) for key in ("val/top1", "val/balanced_top1", "val/top5", "val/ece"))


@pytest.fixture
def photos(photo_folder) -> Path:
    return photo_folder({"train": dict.fromkeys(CLASSES, 1), "val": COUNTS})


@pytest.fixture(scope="module")
def network() -> TransferModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransferModel(resnet18(num_classes=3), frozen_stages=5, batchnorm="frozen")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def open_split(photos: Path) -> Split:
    return load_dataset(scan_dataset(photos, photos / "cache", 0.2)).splits["val"]


def open_loader(split: Split, **settings) -> Loader:
    config = Config(**{**CONFIG.__dict__, **settings})
    return eval_loader(config, split, split.labels.astype(np.int64), PartialState(cpu=True), "pillow")


# Records


@pytest.mark.parametrize("test_flips", [False, True])
def test_each_photo_has_one_record_and_it_is_the_networks_answer(photos, network, accelerator, test_flips):
    network = TransferModel(network.network, frozen_stages=4, batchnorm="frozen", test_flips=test_flips)
    split = open_split(photos)
    loader = open_loader(split)
    network.train()
    records = predict(network, loader, accelerator)
    assert not network.training
    assert records.dtype == RECORD
    assert records["index"].tolist() == list(range(11))
    assert records["label"].tolist() == [0] * 4 + [1] * 3 + [2] * 4

    batches = [batch for step in loader.epoch(0) for batch in step.batches]
    assert [len(batch) for batch in batches] == [4, 4, 3]
    with torch.no_grad():
        logits = torch.cat([network.network(batch.images) for batch in batches])
        if test_flips:
            logits = (logits + torch.cat([network.network(batch.images.flip(3)) for batch in batches])) / 2
    labels = torch.from_numpy(records["label"])
    probabilities = logits.softmax(1)
    np.testing.assert_array_equal(records["predicted"], logits.argmax(1))
    np.testing.assert_array_equal(
        records["rank"], (logits.argsort(1, descending=True) == labels[:, None]).nonzero()[:, 1]
    )
    np.testing.assert_allclose(records["confidence"], probabilities.max(1).values, rtol=1e-4)
    np.testing.assert_array_equal(records["answers"][:, :3], probabilities.argsort(1, descending=True))
    np.testing.assert_allclose(records["probabilities"][:, :3], probabilities.sort(1, descending=True)[0], rtol=1e-4)
    np.testing.assert_allclose(records["loss"], functional.cross_entropy(logits, labels, reduction="none"), rtol=1e-4)


@pytest.mark.parametrize("frozen_stages", [0, 4, 5])
def test_a_photo_and_its_mirror_image_have_one_answer(network, frozen_stages):
    model = TransferModel(network.network, frozen_stages=frozen_stages, batchnorm="frozen", test_flips=True).eval()
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits, mirrored = (model.mean_logits(model.view_features(each)) for each in (images, images.flip(3)))
        assert torch.equal(logits, mirrored)
        model.test_flips = False
        alone, other = (model.mean_logits(model.view_features(each)) for each in (images, images.flip(3)))
    torch.testing.assert_close(logits, (alone + other) / 2)
    assert not torch.allclose(alone, other, rtol=1e-3)
    assert model.mean_logits(model.view_features(images[:0])).shape == (0, 3)


def test_one_photo_and_batches_larger_than_the_split(photos, network, accelerator):
    split = open_split(photos)
    whole = predict(network, open_loader(split, eval_batch_per_device=64), accelerator)
    single = predict(network, open_loader(split, eval_batch_per_device=1), accelerator)
    np.testing.assert_array_equal(whole["predicted"], single["predicted"])
    np.testing.assert_allclose(whole["loss"], single["loss"], rtol=1e-4)


def test_photos_that_cannot_be_read_have_no_record(photos, network, accelerator):
    broken = photos / "val" / "bee" / "01.jpg"  # photo 5: the scan finds it
    broken.write_bytes(broken.read_bytes()[:300])
    split = open_split(photos)
    assert np.flatnonzero(split.faults).tolist() == [5]
    (photos / "val" / "ant" / "02.jpg").unlink()  # photo 2: the decoder finds it
    records = predict(network, open_loader(split, skip_bad_files=True), accelerator)
    assert records["index"].tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    with pytest.raises(UserError, match=r"ant/02.jpg: cannot be decoded"):
        predict(network, open_loader(split), accelerator)


class TwiceTheSecond(EvalPlan):
    """Shows photo 1 at position 0 too, and photo 0 nowhere."""

    def views(self, epoch: int, positions: np.ndarray) -> Views:
        return super().views(epoch, np.maximum(positions, 1))


@pytest.mark.parametrize("fault", ["twice", "half"])
def test_a_photo_that_is_missing_or_counted_twice_is_an_error(photos, network, accelerator, fault):
    split = open_split(photos)
    plan = TwiceTheSecond if fault == "twice" else EvalPlan
    loader = Loader(
        plan(split.sizes, image_size=64, resize=72),
        split,
        split.labels.astype(np.int64),
        make_engine("pillow", split, micro_batch=4, device=torch.device("cpu"), threads=2),
        batch_size=8,
        micro_batch=4,
        prefetch=2,
        device=torch.device("cpu"),
        world_size=2 if fault == "half" else 1,  # the other process is not there
    )
    with pytest.raises(AssertionError, match="each once"):
        predict(network, loader, accelerator)


# The cache of what a fixed frozen part makes of the photos


def features_of(network: TransferModel, loader: Loader, accelerator: Accelerator, **settings) -> FrozenFeatures:
    settings |= {"mirrored": network.test_flips}
    return FrozenFeatures(network, loader, accelerator, views_per_photo=1, epochs=2, micro_batch=4, **settings)


@pytest.mark.parametrize(("frozen_stages", "test_flips"), [(1, False), (4, True), (5, False), (5, True)])
def test_the_frozen_part_sees_each_photo_once_a_run(photos, network, accelerator, frozen_stages, test_flips):
    network = TransferModel(network.network, frozen_stages=frozen_stages, batchnorm="frozen", test_flips=test_flips)
    loader = open_loader(open_split(photos))
    cache = features_of(network, loader, accelerator)
    without = predict(network, loader, accelerator)
    first = predict(network, loader, accelerator, cache)
    loader.close()  # no photo can be decoded any more
    again = predict(network, loader, accelerator, cache)
    assert (first == without).all()
    assert (again == without).all()

    head = network.network.fc
    with torch.no_grad():
        kept = head.bias.clone()
        head.bias += torch.tensor([0.0, 100.0, 0.0])
        moved = predict(network, loader, accelerator, cache)
        head.bias.copy_(kept)
    assert set(moved["predicted"]) == {1}


@pytest.mark.parametrize("test_flips", [False, True])
def test_features_that_would_fill_the_memory_are_not_kept(photos, network, accelerator, test_flips):
    network = TransferModel(network.network, frozen_stages=5, batchnorm="frozen", test_flips=test_flips)
    loader = open_loader(open_split(photos))
    without = predict(network, loader, accelerator)
    bytes_of_all = 11 * 512 * 4 * (1 + test_flips)
    for limit, kept in ((bytes_of_all - 1, False), (bytes_of_all, True)):
        cache = features_of(network, loader, accelerator, limit=limit)
        for _ in range(2):
            assert (predict(network, loader, accelerator, cache) == without).all()
            assert cache.are_kept == kept


def test_an_interrupted_evaluation_caches_nothing(photos, network, accelerator):
    loader = open_loader(open_split(photos))
    cache = features_of(network, loader, accelerator)
    last = photos / "val" / "wasp" / "03.jpg"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match="cannot be decoded"):
        predict(network, loader, accelerator, cache)
    last.write_bytes(content)
    whole = predict(network, loader, accelerator, cache)
    assert whole["index"].tolist() == list(range(11))
    assert (predict(network, loader, accelerator, cache) == whole).all()


# Scores


def example() -> np.ndarray:
    records = np.zeros(6, RECORD)
    records["index"] = range(6)
    records["label"] = [0, 0, 0, 1, 1, 2]
    records["predicted"] = [0, 0, 1, 1, 2, 1]
    records["rank"] = [0, 0, 1, 0, 2, 1]
    records["confidence"] = [0.90, 0.62, 0.50, 0.82, 0.84, 0.69]
    records["loss"] = [0.1, 0.5, 1.5, 0.2, 2.0, 1.1]
    return records


def test_scores_are_those_computed_by_hand():
    scores = score(example(), 3, ks=(1, 2, 5))
    assert scores.loss == pytest.approx(5.4 / 6)
    assert (scores.top1, scores.correct, scores.count) == (0.5, 3, 6)
    assert scores.interval == wilson_interval(3, 6)
    assert scores.topk == {1: 3 / 6, 2: 5 / 6, 3: 1.0}  # of 3 classes there are no 5 best
    assert confusion_matrix(scores.confusion_pairs, 3).tolist() == [[2, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert scores.balanced_top1 == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scores.majority_top1 == 3 / 6
    expected = [(1, 2 / 3, 0.8, 3), (1 / 3, 1 / 2, 0.4, 2), (0, 0, 0, 1)]
    for row, (precision, recall, f1, count) in zip(scores.per_class, expected, strict=True):
        assert row == pytest.approx({"precision": precision, "recall": recall, "f1": f1, "count": count})
    # Bins of 1/15: 0.82 (right) and 0.84 (wrong) share one, with a gap of 0.33; each other photo has its own.
    assert scores.ece == pytest.approx((0.10 + 0.38 + 0.50 + 0.69 + 2 * 0.33) / 6, abs=1e-6)


def test_a_class_without_photos_has_no_score_and_does_not_count():
    scores = score(example()[:3], 3)
    nothing = {"precision": None, "recall": None, "f1": None, "count": 0}
    assert scores.per_class[1:] == [nothing, nothing]
    assert scores.per_class[0]["count"] == 3
    assert scores.balanced_top1 == scores.top1 == 2 / 3
    assert confusion_matrix(scores.confusion_pairs, 3).shape == (3, 3)
    empty = score(example()[:0], 3)
    assert (empty.balanced_top1, empty.majority_top1, len(empty.confusion_pairs)) == (0, 0, 0)


def test_scores_are_torchmetrics():
    rng = np.random.default_rng(0)
    records = np.zeros(500, RECORD)
    records["label"], records["predicted"] = rng.integers(0, 9, 500) ** 2 // 8, rng.integers(0, 9, 500)
    labels, predicted = (torch.from_numpy(records[name].copy()) for name in ("label", "predicted"))
    scores = score(records, 9)
    for name, metric in (("precision", tm.multiclass_precision), ("recall", tm.multiclass_recall)):
        expected = metric(predicted, labels, num_classes=9, average="none").tolist()
        for value, row in zip(expected, scores.per_class, strict=True):
            assert row[name] == (pytest.approx(value) if row["count"] else None)
    f1 = tm.multiclass_f1_score(predicted, labels, num_classes=9, average="none").tolist()
    assert [row["f1"] or 0 for row in scores.per_class] == pytest.approx(f1)
    matrix = tm.multiclass_confusion_matrix(predicted, labels, num_classes=9)
    np.testing.assert_array_equal(confusion_matrix(scores.confusion_pairs, 9), matrix)
    assert scores.balanced_top1 == pytest.approx(np.mean([row["recall"] for row in scores.per_class if row["count"]]))


def test_memory_grows_with_photos_and_not_with_classes_squared():
    records = np.zeros(20_000, RECORD)
    records["label"] = np.arange(20_000) % 8_000
    records["predicted"] = (records["label"] + np.arange(20_000) % 3) % 8_000
    score(records[:1], 8_000)  # what the first call loads
    tracemalloc.start()
    scores = score(records, 8_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # the matrix alone would be 512 MB
    assert scores.confusion_pairs[:, 2].sum() == 20_000
    assert scores.confusion_pairs.tolist() == sorted(scores.confusion_pairs.tolist())
    assert confusion_pairs(records["predicted"][:2], records["label"][:2], 8_000).tolist() == [[0, 0, 1], [1, 2, 1]]


def test_loss_and_top1_agree_with_score():
    assert loss_and_top1(example()) == (pytest.approx(0.9), 0.5, 3)
    assert loss_and_top1(example()[:0]) == (0.0, 0.0, 0)


@given(arrays(np.float32, (4, 7), elements=st.integers(-2, 2)), st.lists(st.integers(0, 6), min_size=4, max_size=4))
def test_rank_0_is_a_right_prediction_also_where_logits_tie(logits, labels):
    predicted, rank, confidence, _, answers, probabilities, margin, _ = (
        value.numpy() for value in _outcomes(torch.from_numpy(logits), torch.tensor(labels))
    )
    np.testing.assert_array_equal(rank == 0, predicted == labels)
    np.testing.assert_array_equal(logits[np.arange(4), predicted], logits.max(axis=1))
    np.testing.assert_array_equal(margin, logits[np.arange(4), labels] - logits.max(axis=1))
    higher = (logits > logits[np.arange(4), labels][:, None]).sum(axis=1)
    np.testing.assert_array_equal(rank[rank != 0], np.maximum(higher, 1)[rank != 0])
    assert ((confidence >= 1 / 7 - 1e-6) & (confidence <= 1)).all()
    np.testing.assert_array_equal(answers[:, 0], predicted)
    assert all(len(set(row)) == 5 for row in answers.tolist())
    every = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_array_equal(probabilities, np.take_along_axis(every, answers, axis=1))
    np.testing.assert_array_equal(probabilities, -np.sort(-every, axis=1)[:, :5])


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_gives_newcombes_published_values(correct, count, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(count - correct, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_row_of_metrics_has_top5_only_where_it_says_something():
    row = validation_row(example(), classes=3)
    assert row == {
        "val/loss": pytest.approx(0.9),
        "val/top1": 0.5,
        "val/balanced_top1": pytest.approx(7 / 18),
        "val/ece": pytest.approx(score(example(), 3).ece),
    }
    many = example()
    many["rank"] = [0, 5, 1, 0, 4, 9]
    assert validation_row(many, classes=6)["val/top5"] == 4 / 6


def test_a_row_of_a_diverged_network_or_of_no_photo_is_no_error():
    records = example()
    records["confidence"] = records["loss"] = np.nan
    row = validation_row(records, classes=6)
    assert np.isnan(row["val/loss"])
    assert np.isnan(row["val/ece"])
    assert set(validation_row(example()[:0], classes=6).values()) == {0}
