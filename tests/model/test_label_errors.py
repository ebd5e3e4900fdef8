"""Labels in doubt by confident learning, and photos far from all others, on numbers that are known."""

from pipelines.model.label_errors import far_out, label_errors, outlier_distances

import numpy as np
import pytest


def test_the_confident_joint_of_a_few_photos_by_hand():
    """Thresholds: class 0 (0.9 + 0.8 + 0.1) / 3 = 0.6; class 1 (0.7 + 0.9 + 0.2) / 3 = 0.6; class 2 has no photo."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    p = [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0], [0.3, 0.7, 0], [0.1, 0.9, 0], [0.55, 0.2, 0.25]]
    found = label_errors(labels, np.array(p), np.array(p)[np.arange(6), labels])
    assert found.suggested.tolist() == [-1, -1, 1, -1, -1, -1], "0.55 does not reach 0.6"
    assert found.margins == pytest.approx([0.8, 0.6, -0.8, 0.4, 0.8, -0.35])
    assert found.ranked().tolist() == [2]


def test_a_photo_that_is_not_known_is_in_no_doubt():
    p = np.array([[0.1, 0.9], [np.nan, np.nan], [0.2, 0.8], [0.9, 0.1]])
    found = label_errors(np.array([0, 0, 1, 0]), p, p[np.arange(4), [0, 0, 1, 0]])
    assert found.suggested.tolist() == [1, -1, -1, -1]
    assert np.isnan(found.margins[1])


def test_flipped_labels_of_overlapping_classes_come_first():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 400)
    logits = 3 * np.eye(4)[truth] + rng.normal(size=(400, 4))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, flipped = truth.copy(), rng.choice(400, 20, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 4
    found = label_errors(labels, p, p[np.arange(400), labels])
    assert len(found.ranked()) >= 10
    assert {*found.ranked()} <= {*flipped}, "none that is only unsure"
    assert len({*np.argsort(found.margins)[:20]} & {*flipped}) >= 16


def test_what_is_far_from_all_others_is_found():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 16)) * 0.1 + 1
    features[7] = -features[7]
    features[8] = 0
    distances = outlier_distances(features, np.arange(200))
    assert far_out(distances)[:2].tolist() == [7, 8]
    assert distances[7] > 1.7
    few = outlier_distances(features[:2], np.arange(2))
    assert few.shape == (2,)
    assert not len(far_out(few))
    assert outlier_distances(features[:1], np.arange(1)).tolist() == [0]
