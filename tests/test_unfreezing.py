"""A run whose stages join one by one: a stop changes nothing."""

import train
from tests.helpers.runs import ask_at, newest, rows, same_bits, succeeded, train_rows

import pytest
import torch

SETTINGS = ["--image-size", "64", "--resize", "72", "--batchnorm", "frozen", "--tracker", "none"]
SETTINGS += ["--head-init", "zeros"]
# 2 steps an epoch. Decay would move what rests.
GRADUAL = ["--freeze", "layer2", "--freeze-epochs", "1", "--unfreeze", "gradual", "--epochs", "3", "--batch-size", "10"]
GRADUAL += ["--weight-decay", "0.01", "--clip-grad-norm", "5", "--ema-decay", "0.9", "--log-every", "1"]


@pytest.mark.slow
def test_a_stop_changes_nothing(photos, random_weights, tmp_path, run_here, monkeypatch):
    command = [*SETTINGS, *GRADUAL, "--weights", random_weights, "--data", photos, "--runs", tmp_path]
    said = succeeded(run_here(train, *command, "--run", "whole"))
    assert "freeze_epochs: epoch 1 trains the head alone, layer4 joins in 2, layer3 joins in 3\n" in said
    assert ["lr/body" in row for row in train_rows(tmp_path / "whole")] == [False] * 2 + [True] * 4

    with monkeypatch.context() as patch:
        ask_at(patch, "update", 3)
        assert run_here(train, *command, "--run", "stopped").returncode == 75
    state = torch.load(newest(tmp_path / "stopped") / "state.pt", weights_only=True)
    first = torch.load(random_weights, weights_only=True)
    moved = {name for name, value in first.items() if not torch.equal(state["model"][f"network.{name}"], value)}
    assert {name.partition(".")[0] for name in moved} == {"layer4", "fc"}
    succeeded(run_here(train, *command, "--run", "stopped"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert same_bits(newest(tmp_path / "stopped") / "state.pt", newest(tmp_path / "whole") / "state.pt")
