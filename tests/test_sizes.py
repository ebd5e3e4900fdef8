"""Squares that grow from epoch to epoch, and evaluations at another size than the training."""

import json

import evaluate
import train
from pipelines import replay
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.run_files import read_description, read_run_config, what_auto_came_to
from pipelines.training.evaluation import predict
from pipelines.training.report import growth_line
from tests.helpers.runs import SMALL, succeeded, val_rows

import pytest
from accelerate import PartialState


def listen(monkeypatch) -> tuple[list[int], list[int]]:
    """The sides of the squares that the coming updates and evaluations see."""
    trained, evaluated = list[int](), list[int]()
    update = train.update

    def updated(*arguments):
        sums, batch = update(*arguments)
        trained.append(batch.images.shape[2])
        return sums, batch

    def predicted(model, loader, *rest):
        evaluated.append(next(next(loader.epoch(0)).batches).images.shape[2])
        return predict(model, loader, *rest)

    monkeypatch.setattr(train, "update", updated)
    for script in (train, evaluate):
        monkeypatch.setattr(script, "predict", predicted)
    return trained, evaluated


def test_squares_grow_and_evaluations_have_a_size_of_their_own(photos, run_here, tmp_path, monkeypatch):
    trained, evaluated = listen(monkeypatch)
    flags = ["--image-size", "96", "--first-image-size", "72", "--grow-epochs", "1", "--eval-size", "64"]
    flags += ["--epochs", "2", "--data", photos, "--runs", tmp_path, "--run", "r", "--loader", "pillow", *SMALL[2:]]
    said = succeeded(run_here(train, *flags))
    assert "\nimage_size: 72 from epoch 1, 96 from epoch 2 on\n" in said
    assert trained == [72, 72, 96, 96], "two steps an epoch"
    run = tmp_path / "r"

    # Whoever uses the weights sees the size of the evaluations.
    assert read_description(run, "run")["image_size"] == 64
    succeeded(run_here(evaluate, run, "--json", tmp_path / "scores.json"))
    assert evaluated == [64, 64, 64]
    scores = json.loads((tmp_path / "scores.json").read_text())
    best = max(val_rows(run), key=lambda row: row["val/top1"])
    assert scores["top1"] == best["val/top1"]
    assert scores["without_temperature"]["loss"] == pytest.approx(best["val/loss"], rel=1e-4)

    config = what_auto_came_to(run, read_run_config(run))
    split = load_dataset(scan_dataset(photos, tmp_path / "index", 0.2)).splits["train"]
    for number, side in ((1, 72), (4, 96)):
        step = replay.step_of(config, split, number, 1)
        assert replay.images_of(config, split, PartialState(), step, ())[0].shape[1:] == (3, side, side)


def test_the_line_on_sizes_counts_epochs_from_one():
    assert growth_line(160, 192, 71) == "image_size: 160 from epoch 1, 192 from epoch 72 on"
    sizes = "64 from epoch 1, 128 from epoch 2, 224 from epoch 3 on"
    assert growth_line(64, 224, 2) == f"image_size: {sizes}", "some are left out"
