"""Runs whose stages learn at rates of their own: a stop changes nothing, and another decay is refused."""

import train
from tests.helpers.runs import SMALL, ask_at, newest, one_error_line, rows, same_bits, succeeded, train_rows

import pytest
import torch

STEPS = ["--epochs", "1", "--batch-size", "4", "--log-every", "2", "--schedule", "one_cycle"]  # 5
RATES = ["--lr", "0.02", "--lr-body", "0.01", "--weight-decay", "0.01", "--weight-decay-on", "matrices"]


@pytest.mark.slow
def test_a_stop_changes_nothing_and_another_decay_is_refused(photos, tmp_path, run_here, monkeypatch):
    command = [*SMALL, *STEPS, *RATES, "--data", photos, "--runs", tmp_path]
    decayed = [*command, "--layer-decay", 0.5]
    succeeded(run_here(train, *decayed, "--run", "whole"))
    whole = tmp_path / "whole"
    for row in train_rows(whole):
        for halvings, stage in enumerate(("body", "layer3", "layer2", "layer1", "stem")):
            assert row[f"lr/{stage}"] == pytest.approx(row["lr/head"] / 2 ** (1 + halvings))
    groups = torch.load(newest(whole) / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["name"] for group in groups[::2]] == ["head", "body", "layer3", "layer2", "layer1", "stem"]

    with monkeypatch.context() as patch:
        ask_at(patch, "update", 3)
        assert run_here(train, *decayed, "--run", "stopped").returncode == 75
    refused = run_here(train, *command, "--layer-decay", 0.7, "--run", "stopped")
    assert refused.returncode == 2
    assert "other settings (layer_decay): it goes on with layer_decay 0.5" in one_error_line(refused)
    succeeded(run_here(train, *command, "--run", "stopped"))  # as it began, where it is not named
    assert rows(tmp_path / "stopped") == rows(whole)
    for file in ("best.pt", f"checkpoints/{newest(whole).name}/state.pt"):
        assert same_bits(tmp_path / "stopped" / file, whole / file)
