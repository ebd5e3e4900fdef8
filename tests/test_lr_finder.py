"""The learning-rate finder suggests a rate and leaves nothing else behind."""

import os
import re
from getpass import getuser

from pipelines import lr_finder
from pipelines.lr_finder import Curve
from tests.helpers.runs import SMALL, one_error_line, succeeded

import numpy as np
import pytest
from PIL import Image


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    assert Curve(np.array([0.001, 0.01, 0.1]), np.array([2.0, 1.0, 3.0])).suggestion == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--steps", "3"], "--steps at least 10"),
        (["--highest", "0"], "--highest must be above 0"),
        (["--config", "configs/feature_extract.yaml"], "nothing is trained by a learning rate"),
        (["--nothing", "1"], "--nothing"),
        (["--picture", "gone/x.png"], "--picture: gone is no folder that can be written to"),
    ],
)
def test_what_cannot_be_searched_is_one_line(flags, line, run_here, tmp_path, monkeypatch):
    flags = [os.path.abspath(flag) if flag.startswith("configs/") else flag for flag in flags]
    monkeypatch.chdir(tmp_path)
    done = run_here(lr_finder, *flags)
    assert done.returncode == 2
    assert line in one_error_line(done)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_search_leaves_a_picture_and_nothing_else(photos, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    settings = [*SMALL, "--data", photos, "--batch-size", 4, "--lr", "0.1", "--lr-body", "0.05", "--epochs", 1]
    said = succeeded(run_here(lr_finder, *settings, "--steps", 12))
    found = re.search(r"at a rate of (\S+); a tenth of that:\n--lr (\S+) --lr_body (\S+)\n", said)
    assert found, said
    assert said.endswith("picture: lr_finder.png\n")
    lowest, lr, body = map(float, found.groups())
    assert (lr, body) == (pytest.approx(lowest / 10, rel=0.05), pytest.approx(lr / 2, rel=0.05))
    assert sorted(os.listdir(tmp_path)) == ["lr_finder.png", "temporary"]
    assert set(os.listdir(tmp_path / "temporary")) <= {f"torchinductor_{getuser()}"}, "PyTorch's own cache"
    Image.open(tmp_path / "lr_finder.png").verify()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "told"),
    [([3.0, 2, 1], "the loss still fell at the last step"), ([1.0, 2, 3], "this suggests nothing"), ([2.0, 1, 3], "")],
)
def test_a_lowest_loss_at_an_end_of_the_rise_is_said(losses, told, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve = lr_finder.Curve(np.array([1e-4, 1e-3, 1e-2]), np.array(losses))
    monkeypatch.setattr(lr_finder, "search", lambda *_: curve)
    said = succeeded(run_here(lr_finder, *SMALL))
    assert told in said
    assert ("at the last step" in said or "at the first step" in said) == bool(told)
