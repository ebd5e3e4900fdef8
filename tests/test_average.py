"""Runs that keep an average of the weights: the better of the two is best.pt, and a stop changes neither."""

import json
import shutil

import train
from pipelines.config import Config
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.data.loader import eval_loader
from pipelines.model.network import restore_model
from pipelines.model.weights import Weights
from pipelines.training.evaluation import loss_and_top1, predict
from tests.helpers.runs import SMALL, ask_at, newest, rows, run_script, same_bits, succeeded, val_rows

import pytest
import torch
from accelerate import Accelerator

AVERAGE = ["--ema-decay", "0.9", "--epochs", "3", "--batch-size", "4", "--log-every", "2"]  # of 5 steps


@pytest.mark.slow
def test_the_better_one_is_best_and_a_stop_changes_nothing(photos, tmp_path, run_here, monkeypatch):
    command = [*SMALL, *AVERAGE, "--data", photos, "--runs", tmp_path]
    said = succeeded(run_here(train, *command, "--run", "whole"))
    whole = tmp_path / "whole"
    # Of a tie the weights themselves, and the earlier epoch.
    top1, epoch, averaged = max(
        (row[key], -row["epoch"], key == "ema/top1") for row in val_rows(whole) for key in ("val/top1", "ema/top1")
    )
    averaged &= all(row["val/top1"] < top1 for row in val_rows(whole) if row["epoch"] == -epoch)
    scores = json.loads((whole / "model.json").read_text())["scores"]
    assert (scores["epoch"], scores["val/top1"], scores["averaged"]) == (-epoch, top1, averaged)
    assert ("of the averaged weights" in said) == averaged
    state = torch.load(newest(whole) / "state.pt", weights_only=True)
    assert not torch.equal(state["average"]["network.fc.weight"], state["model"]["network.fc.weight"])

    with monkeypatch.context() as patch:
        ask_at(patch, "update", 7)
        assert run_here(train, *command, "--run", "stopped").returncode == 75
    succeeded(run_here(train, *command, "--run", "stopped"))
    assert rows(tmp_path / "stopped") == rows(whole)
    for file in ("best.pt", f"checkpoints/{newest(whole).name}/state.pt"):
        assert same_bits(tmp_path / "stopped" / file, whole / file)


@pytest.mark.slow
def test_and_on_two_processes(photos, tmp_path):
    """Each of which has BatchNorm statistics of its own, and of their average."""
    command = [*SMALL, *AVERAGE, "--data", photos, "--runs", tmp_path]
    assert "processes: 2 on cpu" in succeeded(run_script("train.py", *command, "--run", "whole", processes=2))
    early = ["--max-steps", 8, "--checkpoint-minutes", 1e-9]
    succeeded(run_script("train.py", *command, "--run", "stopped", *early, processes=2))
    shutil.rmtree(newest(tmp_path / "stopped"))  # of the early end; the one before is of the middle of an epoch
    assert newest(tmp_path / "stopped").name == "epoch-0001-step-00000007"
    succeeded(run_script("train.py", *command, "--run", "stopped", processes=2))
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    assert one.name == other.name
    assert same_bits(one / "state.pt", other / "state.pt")


@pytest.mark.slow
def test_the_average_is_evaluated_with_its_own_statistics(photos, random_weights, tmp_path, run_here):
    """Also in frozen stages, where BatchNorm's are trained."""
    command = ["--image-size", "64", "--resize", "72", "--weights", random_weights, "--freeze", "layer2", *AVERAGE]
    command += ["--batchnorm", "train", "--loader", "pillow", "--tracker", "none", "--data", photos, "--runs", tmp_path]
    succeeded(run_here(train, *command, "--run", "r", "--head-init", "zeros"))
    average = torch.load(newest(tmp_path / "r") / "state.pt", weights_only=True)["average"]
    split = load_dataset(scan_dataset(photos, tmp_path / "cache", 0.2)).splits["val"]
    accelerator = Accelerator(cpu=True)
    settings = Config(image_size=64, resize=72, loader="pillow")
    loader = eval_loader(settings, split, split.labels, accelerator.state, "pillow")
    weights = {name.removeprefix("network."): value for name, value in average.items()}
    network = restore_model("resnet18", Weights(weights, "", split.classes))
    loss, top1, _ = loss_and_top1(predict(network, loader, accelerator))
    loader.close()
    row = val_rows(tmp_path / "r")[-1]
    assert (row["ema/loss"], row["ema/top1"]) == (pytest.approx(loss, rel=1e-5), top1)
