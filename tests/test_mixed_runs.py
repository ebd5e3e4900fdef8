"""Trainings with mixed and altered photos and dropout: the same on any processes and micro-batches, after any stop."""

import train
from tests.helpers.runs import (
    FROZEN,
    ask_at,
    newest,
    rows,
    run_script,
    same_bits,
    succeeded,
    train_rows,
    val_rows,
)

import pytest

# 19 photos in steps of 5: pairs are parted by steps, and the last photo has no partner.
MIXED = ["--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--label-smoothing", "0.1", "--dropout", "0.3"]
MIXED += ["--augment", "strong", "--sampler", "balanced", "--epochs", "2", "--batch-size", "5", "--log-every", "1"]


@pytest.mark.slow
def test_a_stop_processes_and_micro_batches_change_nothing(photos, random_weights, tmp_path, run_here, monkeypatch):
    command = [*FROZEN, *MIXED, "--weights", random_weights, "--data", photos, "--runs", tmp_path]
    said = succeeded(run_here(train, *command, "--run", "whole"))
    assert "train top1: photos are mixed, and an answer counts by the share that its class has in one" in said
    with monkeypatch.context() as patch:
        ask_at(patch, "update", 6)
        assert run_here(train, *command, "--run", "stopped").returncode == 75
    succeeded(run_here(train, *command, "--run", "stopped"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert same_bits(newest(tmp_path / "stopped") / "state.pt", newest(tmp_path / "whole") / "state.pt")

    # Stopped on two processes in the middle of the second epoch, it goes on on one, in other micro-batches.
    succeeded(run_script("train.py", *command, "--run", "two", "--max-steps", 6, processes=2))
    said = succeeded(run_here(train, *command, "--run", "two", "--max-batch-per-device", "2"))
    assert "the checkpoint is of 2 processes" in said
    for name in ("train/loss", "train/top1", "global_step"):
        found, expected = ([row[name] for row in train_rows(tmp_path / each)] for each in ("two", "whole"))
        assert found == pytest.approx(expected, rel=1e-3), name
    found, expected = (val_rows(tmp_path / each)[-1]["val/loss"] for each in ("two", "whole"))
    assert found == pytest.approx(expected, rel=1e-3)
