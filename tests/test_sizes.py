"""Training and evaluation at different sizes."""

import json

import evaluate
import train
from pipelines.run_files import read_description
from pipelines.training.evaluation import predict
from tests.helpers.runs import SMALL, succeeded, val_rows

import pytest


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


def test_evaluations_see_their_own_size_and_whoever_uses_the_weights_does(photos, run_here, tmp_path, monkeypatch):
    trained, evaluated = listen(monkeypatch)
    flags = [*SMALL, "--data", photos, "--runs", tmp_path, "--run", "r", "--loader", "pillow"]
    succeeded(run_here(train, *flags, "--epochs", "1", "--eval-size", "72"))
    run = tmp_path / "r"
    assert read_description(run, "run")["image_size"] == 72
    succeeded(run_here(evaluate, run, "--json", tmp_path / "scores.json"))
    assert (set(trained), evaluated) == ({64}, [72, 72])
    scores, (row,) = json.loads((tmp_path / "scores.json").read_text()), val_rows(run)
    assert scores["top1"] == row["val/top1"]
    assert scores["without_temperature"]["loss"] == pytest.approx(row["val/loss"], rel=1e-4)
