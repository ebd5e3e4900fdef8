"""Short trainings go as they went when their losses were written down: a change of the code changed no result."""

import json

from benchmarks import same
from tests.helpers.paths import FIXTURES, ROOT

import pytest

# Made by `python benchmarks/same.py . --write tests/fixtures/trajectory.json`; made anew only where a change of results
# is meant, and said in CHANGELOG.md.
PINNED = json.loads((FIXTURES / "trajectory.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", same.TRAININGS)
def test_the_losses_are_those_that_were_written_down(name, tmp_path):
    rows = same.train(ROOT, name, same.draw_weights(tmp_path), tmp_path / "runs")["losses"]
    assert [row.keys() for row in rows] == [row.keys() for row in PINNED[name]]
    for row, pinned in zip(rows, PINNED[name], strict=True):
        losses = {key: value for key, value in row.items() if key.endswith("/loss")}
        expected = {key: pinned[key] for key in losses}
        assert losses == pytest.approx(expected, rel=2e-3, abs=2e-3)  # processors round otherwise, and that grows


def test_what_differs_is_told():
    rows = [{"global_step": 1, "train/loss": 2.0}, {"global_step": 2, "train/loss": 1.0}]
    one = {"losses": rows, "weights": "a"}
    assert same.difference(one, {"losses": rows, "weights": "a"}) == "identical"
    assert same.difference(one, {"losses": rows, "weights": "b"}) == "the same losses, other weights"
    assert same.difference(one, {"losses": rows[:1], "weights": "a"}) == "other rows: 2 and 1"
    other = {"losses": [rows[0], {"global_step": 2, "train/loss": 1.5}], "weights": "b"}
    assert same.difference(one, other) == "losses differ, by 0.5 of their value at most (train/loss at step 2)"
