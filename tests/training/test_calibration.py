"""Temperatures and thresholds, beside what PyTorch says of the logits themselves."""

import json

from deploy import export
from pipelines.config import UNSURE_FOR
from pipelines.errors import UserError
from pipelines.inference import unsure_below
from pipelines.training.calibration import (
    FOLDS,
    at_temperature,
    calibrate,
    calibration_line,
    reliability,
    unsure_line,
    unsure_thresholds,
)
from pipelines.training.evaluation import RECORD, _outcomes, _records, calibration_error
from tests.helpers.run_files import DESCRIPTION

import numpy as np
import pytest
import torch
from torch.nn import functional


def records_of(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return _records([(torch.arange(len(logits)), labels, *_outcomes(logits, labels))])


def drawn(photos: int, classes: int, factor: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `factor` times those by which the labels are drawn."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(photos, classes, generator=draw)
    return logits * factor, torch.multinomial(logits.softmax(dim=1), 1, generator=draw)[:, 0]


def least(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of the least loss, tried one by one."""
    tried = np.exp(np.linspace(-1.3, 1.3, 521))
    return min(tried, key=lambda each: functional.cross_entropy(logits.double() / each, labels).item())


@pytest.mark.parametrize(("classes", "factor"), [(2, 2.0), (7, 0.5), (300, 2.5)])
def test_the_temperature_is_the_one_of_the_least_loss(classes, factor):
    logits, labels = drawn(400, classes, factor)
    found = calibrate(records_of(logits, labels))
    assert found.reason == ""
    assert found.temperature == pytest.approx(least(logits, labels), rel=0.006)
    assert found.temperature == pytest.approx(factor, rel=0.25)


@pytest.mark.parametrize("classes", [2, 7, 300])
def test_records_at_a_temperature_are_those_of_divided_logits(classes):
    logits, labels = drawn(200, classes, 2.0)
    before = records_of(logits, labels)
    for temperature in (0.26, 0.7, 1.0, 1.9, 3.9):
        found, expected = at_temperature(before, temperature), records_of(logits / temperature, labels)
        for key in ("confidence", "probabilities", "loss"):
            np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, atol=2e-6)
        for key in ("index", "label", "predicted", "answers", "rank"):
            np.testing.assert_array_equal(found[key], expected[key])
        back = at_temperature(expected, 1 / temperature)
        np.testing.assert_allclose(back["confidence"], before["confidence"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("classes", "off"), [(1000, 5e-6), (22_000, 5e-5)])
def test_confidence_among_very_many_equal_rivals_is_exact(classes, off):
    """As label smoothing leaves them: the sum over them changes fast with the temperature."""
    logits = torch.full((1, classes), -np.log(0.9 * classes / 0.1))
    logits[0, 0] = 0
    records = records_of(logits, torch.zeros(1, dtype=torch.long))
    for temperature in np.geomspace(0.26, 3.9, 60).tolist():
        expected = (logits.double() / temperature).softmax(dim=1).max().item()
        assert at_temperature(records, temperature)["confidence"][0] == pytest.approx(expected, abs=off, rel=0)
    np.testing.assert_array_equal(at_temperature(records, 1.0), records)


def test_no_photo_is_reported_by_a_temperature_that_it_took_part_in():
    logits, labels = drawn(150, 3, 2.0)
    found = calibrate(records_of(logits, labels))
    of_fold = torch.arange(150) % FOLDS
    losses = torch.zeros(150)
    for fold in range(FOLDS):
        others, own = of_fold != fold, of_fold == fold
        temperature = least(logits[others], labels[others])
        losses[own] = functional.cross_entropy(logits[own] / temperature, labels[own], reduction="none")
    assert found.after is not None
    assert found.after.loss == pytest.approx(losses.mean().item(), rel=1e-3)
    assert found.after.loss < found.before.loss
    told = calibration_line(found.described() | {"folds": 7}, found.temperature)  # type: ignore[arg-type]
    assert "(150 validation photos, each by the others of 7 folds)" in told
    assert told.startswith(f"confidence: logits / {found.temperature:g}; calibration error {found.before.ece:.4f} ")


def test_where_the_photos_tell_no_temperature_none_is_used():
    logits, labels = drawn(40, 4, 1.0, seed=1)
    one_wrong = logits.argmax(dim=1)
    one_wrong[3] = (one_wrong[3] + 1) % 4
    told = {
        "the 40 photos are all answered right": (logits, logits.argmax(dim=1)),
        "the 1 photo is all answered right": (logits[:1], logits.argmax(dim=1)[:1]),
        "as far as temperatures are tried, to 4": (100 * logits, one_wrong.roll(1)),
        "as far as temperatures are tried, to 0.25": (logits / 20, one_wrong),
        "photos that it was not fitted to have a loss of": (logits, labels),
    }
    for reason, given in told.items():
        found = calibrate(records_of(*given))
        assert reason in found.reason
        assert (found.temperature, found.after) == (1.0, None)
        assert "no temperature: " in calibration_line(found.described(), 1.0)  # type: ignore[arg-type]
    nothing = calibrate(np.zeros(0, RECORD))
    assert (nothing.temperature, nothing.before.bins) == (1.0, [])
    assert nothing.reason == "there are no photos to fit one to"


def test_a_class_without_photos_changes_nothing():
    logits, labels = drawn(300, 5, 2.0)
    there = labels != 4
    assert calibrate(records_of(logits[there], labels[there])).temperature > 1.3


def test_bins_have_every_photo_once_and_make_the_calibration_error():
    logits, labels = drawn(500, 3, 2.0)
    records = records_of(logits, labels)
    records["confidence"][:2] = 1, 1 / 3
    found = reliability(records)
    assert sum(count for count, *_ in found.bins) == 500
    gaps = [count * abs(accuracy - confidence) for count, confidence, accuracy in found.bins]
    assert sum(gaps) / 500 == pytest.approx(found.ece, abs=1e-6)
    assert found.ece == calibration_error(records)


def test_a_calibration_is_of_the_runs_own_views_alone(tmp_path):
    """Which --test-flips, or a graph that was exported with it, may differ in."""
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION))
    assert unsure_below(tmp_path, 0.99, test_flips=False) == DESCRIPTION["unsure"][0]
    with pytest.raises(
        UserError, match="answers with test_flips false, and these are with true: leave --test-flips out"
    ):
        unsure_below(tmp_path, 0.99, test_flips=True)
    assert unsure_below(tmp_path, None, test_flips=True) is None
    on_the_card = [export._confidence(DESCRIPTION, test_flips=each) for each in (False, True)]
    assert on_the_card[1].removeprefix(on_the_card[0]).startswith(" All this is of the run's own `test_flips: false`")


def answered(confidence: list[float], right: list[int]) -> np.ndarray:
    records = np.zeros(len(right), RECORD)
    records["confidence"], records["label"] = confidence, 1 - np.array(right)
    return records


def test_thresholds_are_those_found_by_hand():
    found = unsure_thresholds(answered([0.5, 0.9, 0.6, 0.8, 0.7], [0, 1, 0, 1, 1]))
    assert [each["wanted"] for each in found] == [*UNSURE_FOR]
    assert found[0] == {"wanted": 0.8, "below": pytest.approx(0.65), "photos": 5, "kept": 3, "right": 3}
    assert unsure_line(found[0]).startswith("unsure below a confidence of 0.6500: 2 of 5 validation photos; of the ")  # type: ignore[arg-type]
    all_right = unsure_thresholds(answered([0.5, 0.9], [1, 1]))
    assert all_right[-1] == {"wanted": 0.999, "below": 0.0, "photos": 2, "kept": 2, "right": 2}


def test_photos_of_one_confidence_are_not_parted_and_what_cannot_be_had_is_not_there():
    found = unsure_thresholds(answered([0.9, 0.9, 0.9, 0.9, 0.9, 0.5], [1, 1, 1, 1, 0, 0]))
    assert [(each["wanted"], each["kept"]) for each in found] == [(0.8, 5)]
    assert unsure_thresholds(answered([0.9, 0.8], [0, 1])) == []
    assert unsure_thresholds(np.zeros(0, RECORD)) == []
