"""A run's head, fitted before its training: what it leaves, and that nothing changes it."""

import json
import math
import shutil
from pathlib import Path

import train
from pipelines.config import Config
from pipelines.errors import StopAgreed
from pipelines.model import logistic_regression
from pipelines.model.logistic_regression import PENALTIES
from pipelines.model.network import build_model
from pipelines.model.weights import Weights
from pipelines.training.fitted_head import chosen_start, why_not_fitted
from tests.helpers.runs import (
    FROZEN,
    newest,
    one_error_line,
    rows,
    run_script,
    same_bits,
    status,
    succeeded,
    train_rows,
    val_rows,
)

import pytest
import torch


@pytest.fixture(scope="module")
def command(photos, random_weights, tmp_path_factory) -> list[object]:
    settings = ["--data", photos, "--weights", random_weights, *with_other(FROZEN, head_init="fitted")]
    settings += ["--batch-size", "6"]
    return [*settings, "--log-every", "1", "--cache-gb", "0", "--runs", tmp_path_factory.mktemp("runs"), "--run"]


def with_other(command: list[object], **values: object) -> list[object]:
    """The command with other values of settings that it has."""
    changed = list(command)
    for key, value in values.items():
        changed[changed.index(f"--{key.replace('_', '-')}") + 1] = value
    return changed


def head_of(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "best.pt", weights_only=True)
    return {name: state[name] for name in ("fc.weight", "fc.bias")}


@pytest.fixture
def whole(command, run_here) -> Path:
    """A run of the fit alone."""
    run = command[-2] / "whole"
    if not run.exists():
        succeeded(run_here(train, *command, run.name, "--epochs", "0"))
    return run


@pytest.mark.slow
def test_without_an_epoch_the_fit_is_the_whole_training(command, tmp_path, run_here):
    command = [*command[:-2], tmp_path, "--run"]
    said = succeeded(run_here(train, *command, "r", "--epochs", "0", "--class-weights", "balanced"))
    run = tmp_path / "r"
    assert "head: fitted to 19 photos and the mirror images in" in said
    assert "of 5 folds that are held out in turn top1" in said
    assert "  0/0         -" in said
    assert "at epoch 0:" in said
    fit, evaluation = rows(run)
    assert {(row["epoch"], row["global_step"]) for row in (fit, evaluation)} == {(0, 0)}
    assert fit["head/penalty"] in PENALTIES
    folds = [fit[f"head/top1_fold_{number}"] for number in range(1, 6)]
    assert fit["head/top1"] == pytest.approx(sum(folds) / 5)
    assert evaluation["best/val_top1"] == evaluation["val/top1"]
    drawn = {"train_batch", "head_penalty", "curves", "calibration", "confusion_matrix", "per_class"}
    assert {path.stem for path in (run / "figures").iterdir()} == drawn
    assert json.loads((run / "model.json").read_text())["scores"]["val/top1"] == evaluation["val/top1"]
    assert (status(run)["state"], status(run)["epoch"]) == ("finished", 0)
    again = [*command, "r", "--class-weights", "balanced"]
    assert "is finished: nothing to do" in succeeded(run_here(train, *again, "--epochs", "0"))

    fitted = head_of(run)
    said = succeeded(run_here(train, *again, "--epochs", "1"))
    assert "resumed at step 0, from epoch-0000-step-00000000" in said
    assert "head: fitted" not in said
    assert [row["epoch"] for row in val_rows(run)] == [0, 1]
    assert rows(run)[:2] == [fit, evaluation]
    state = torch.load(newest(run) / "state.pt", weights_only=True)["model"]
    assert not torch.equal(state["network.fc.weight"], fitted["fc.weight"])


@pytest.mark.slow
def test_the_fitted_head_does_not_depend_on_seed_batch_or_training(command, whole, run_here):
    other = with_other(command, batch_size=4, lr=0.1)
    settings = ["--seed", "7", "--mode", "feature_extract", "--crop-scale-min", "0.5"]
    succeeded(run_here(train, *other, "other", "--epochs", "0", *settings))
    assert same_bits(command[-2] / "other/best.pt", whole / "best.pt")


@pytest.mark.slow
def test_training_begins_with_the_fitted_head(command, whole, run_here):
    settings = ["--epochs", "1", "--mode", "feature_extract"]
    succeeded(run_here(train, *with_other(command, lr="1e-30"), "still", *settings))  # nothing moves
    run = command[-2] / "still"
    before, after = val_rows(run)
    assert (before["epoch"], after["epoch"]) == (0, 1)
    assert before["val/loss"] == after["val/loss"]
    assert after["best/val_top1"] == before["val/top1"]
    assert same_bits(run / "best.pt", whole / "best.pt"), "a tie keeps the earlier"


@pytest.mark.slow
def test_two_processes_have_the_head_and_loss_of_one(command, run_here):
    settings = ["--epochs", "1", "--class-weights", "balanced", "--label-smoothing", "0.1"]
    succeeded(run_here(train, *command, "one", *settings))
    said = succeeded(run_script("train.py", *command, "two", *settings, processes=2))
    assert said.count("head: fitted to") == 1
    one, two = command[-2] / "one", command[-2] / "two"
    for select, names in ((train_rows, ("train/loss",)), (val_rows, ("val/loss", "val/top1"))):
        for name in names:
            assert [row[name] for row in select(two)] == pytest.approx([row[name] for row in select(one)], rel=1e-3)
    assert rows(one)[0] == rows(two)[0]


def interrupted(*_: object, **__: object) -> None:
    raise StopAgreed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "is_saved"),
    [("pipelines.training.fitted_head.FrozenFeatures.prepare", False), ("train.predict", True)],
)
def test_stopped_before_its_first_epoch_a_run_goes_on(command, whole, where, is_saved, run_here, monkeypatch):
    run = command[-2] / where
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        stopped = run_here(train, *command, run.name, "--epochs", "0")
    assert stopped.returncode == 75
    assert stopped.stderr.startswith("stopped at step 0 by")
    assert any((run / "checkpoints").glob("epoch-*")) == is_saved
    said = succeeded(run_here(train, *command, run.name, "--epochs", "0"))
    assert ("head: fitted to" in said) != is_saved, "once is enough"
    assert rows(run) == rows(whole)
    assert same_bits(run / "best.pt", whole / "best.pt")
    assert status(run)["state"] == "finished"


@pytest.mark.slow
def test_a_stop_within_the_fit_is_answered(command, whole, run_here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.training.fitted_head.choose_and_fit", lambda *_: None)
        assert run_here(train, *command, "within", "--epochs", "0").returncode == 75
    succeeded(run_here(train, *command, "within", "--epochs", "0"))
    assert rows(command[-2] / "within") == rows(whole)


@pytest.mark.slow
def test_too_many_photos_are_said_and_trained_or_refused(command, run_here, monkeypatch):
    monkeypatch.setattr(logistic_regression, "_MOST_BYTES", 1000)
    refused = run_here(train, *command, "large", "--epochs", "0")
    assert refused.returncode == 2
    assert "no head is fitted, as 19 photos' features would take" in one_error_line(refused)
    assert not (command[-2] / "large").exists()
    said = succeeded(run_here(train, *command, "large", "--epochs", "1"))
    assert "head: not fitted, as 19 photos' features would take 0 MiB: it is zeros" in said
    assert [row["epoch"] for row in val_rows(command[-2] / "large")] == [1]


@pytest.mark.slow
def test_a_head_of_the_weights_is_replaced_and_that_is_said(command, whole, run_here):
    weights = shutil.copytree(whole, whole.with_name("given"))
    settings = ["--epochs", "0", "--class-weights", "balanced"]
    said = succeeded(run_here(train, *with_other(command, weights=weights), "on", *settings))
    assert f"head: fitted anew, in place of the one of {weights}" in said
    assert not same_bits(whole.with_name("on") / "best.pt", whole / "best.pt")


@pytest.mark.parametrize(
    ("settings", "row", "unfitted", "freeze", "why"),
    [
        ({}, {"head/top1": 0.95}, "", "layer3", "right on 95.0% of what its folds hold out"),
        ({}, {"head/top1": 0.949}, "", "none", "right on 94.9% of what its folds hold out: all of the body"),
        ({}, {"head/penalty": 0.01}, "", "layer3", "too few for folds"),
        ({}, {}, "9 photos", "none", "no head is fitted (9 photos)"),
        ({"arch": "mobilenet_v3_small"}, {"head/top1": 1.0}, "", "none", "the stages of mobilenet_v3_small cannot"),
        ({"mode": "feature_extract"}, {"head/top1": 0.5}, "", "auto", None),
        ({"freeze": "layer1"}, {"head/top1": 0.5}, "", "layer1", None),
    ],
)
def test_freeze_auto_goes_by_the_folds(settings, row, unfitted, freeze, why):
    fitted, auto = (
        chosen_start(Config(**{"head_init": head_init, "freeze": "auto"} | settings), row, unfitted)
        for head_init in ("fitted", "auto")
    )
    assert fitted.freeze == auto.freeze == freeze
    assert (why in fitted.reason and fitted.reason.startswith(f"freeze: {freeze}, ")) if why else not fitted.reason
    assert auto.reason.endswith("starts again at zeros") == auto.head_restarts
    assert not fitted.head_restarts
    stays = "right on 95.0%" in auto.reason
    assert auto.head_restarts == bool(row and settings.get("mode") != "feature_extract" and not stays)
    assert ("the head stays as it is fitted, and rates are 0.1 times lr and 0.3 times lr_" in auto.reason) == stays
    assert (fitted.refines_head, auto.refines_head) == (False, stays)


@pytest.mark.parametrize(
    ("settings", "has_own_head", "why"),
    [
        ({"head_init": "zeros"}, False, "head_init is zeros"),
        ({"head_init": "auto", "weights": "none"}, False, "the weights are random"),
        ({"head_init": "auto"}, True, "the weights have one for these classes"),
        ({"head_init": "auto"}, False, ""),
        ({"head_init": "fitted"}, True, ""),
    ],
)
def test_why_no_head_is_fitted(settings, has_own_head, why):
    network = build_model(Config(), Weights(None, "random"), ("ant", "bee"))
    assert why_not_fitted(Config(**settings), network, 20, has_own_head=has_own_head) == why


@pytest.mark.slow
def test_head_init_auto_evaluates_the_fit_and_starts_at_zeros(command, whole, run_here, monkeypatch):
    command = with_other(command, head_init="auto", lr="1e-30")  # nothing moves
    said = succeeded(run_here(train, *command, "auto", "--epochs", "1"))
    assert "head: fitted to 19 photos" in said
    run = command[-2] / "auto"
    fitted, started = val_rows(run)
    assert fitted["val/loss"] == val_rows(whole)[0]["val/loss"]
    assert started["val/loss"] == pytest.approx(math.log(3)), "of zeros all classes are alike"

    with monkeypatch.context() as patch:
        patch.setattr("train.predict", interrupted)
        assert run_here(train, *command, "stopped", "--epochs", "1").returncode == 75
    succeeded(run_here(train, *command, "stopped", "--epochs", "1"))
    succeeded(run_here(train, *command, "longer", "--epochs", "0"))
    succeeded(run_here(train, *command, "longer", "--epochs", "1"))
    for other in ("stopped", "longer"):
        assert rows(run.with_name(other)) == rows(run), other


@pytest.mark.slow
def test_the_default_recipe_takes_random_weights_or_a_run(photos, whole, run_here, tmp_path):
    settings = ["--data", photos, "--image-size", "64", "--resize", "72", "--tracker", "none", "--max-steps", "1"]
    settings += ["--runs", tmp_path, "--run"]
    said = succeeded(run_here(train, *settings, "random", "--weights", "none"))
    assert "freeze: none, as no head is fitted (the weights are random): all of the body is trained" in said
    said = succeeded(run_here(train, *settings, "again", "--weights", whole))
    assert "head: not fitted, as the weights have one for these classes: it is the one of the weights" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threshold", "other", "frozen", "trained"),
    [(1.1, 0.0, "none", {"conv1", "layer1", "layer4"}), (0.0, 1.1, "layer3", {"layer4"})],
)
def test_freeze_auto_trains_what_it_says_also_after_a_resume(
    threshold, other, frozen, trained, command, run_here, monkeypatch
):
    """threshold: from where on the folds are right on nearly all, so that both outcomes are met."""
    monkeypatch.setattr("pipelines.training.fitted_head._RIGHT_ON_NEARLY_ALL", threshold)
    run = command[-2] / f"auto-{frozen}"
    command = [*with_other(command, freeze="auto", lr="0.01", head_init="auto"), run.name]
    said = succeeded(run_here(train, *command, "--epochs", "1"))
    assert said.count(f"\nfreeze: {frozen}, as the fitted head is right on ") == 1
    assert "freeze: auto" in said, "config.yaml keeps what was asked for"
    state = torch.load(newest(run) / "state.pt", weights_only=True)["model"]
    first = torch.load(command[command.index("--weights") + 1], weights_only=True)
    moved = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, state[f"network.{name}"])}
    assert {"conv1", "layer1", "layer4"} & moved == trained
    monkeypatch.setattr("pipelines.training.fitted_head._RIGHT_ON_NEARLY_ALL", other)  # it would choose the other now
    before = {name: value.clone() for name, value in state.items()}
    said = succeeded(run_here(train, *command, "--epochs", "2"))
    assert "resumed at step" in said
    after = torch.load(newest(run) / "state.pt", weights_only=True)["model"]
    moved = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"conv1", "layer1", "layer4"} & moved == trained
    fitted, *_, last = val_rows(run)
    rates = [row["lr/head"] for row in train_rows(run)]
    if frozen == "layer3":  # the head stays, and what is trained moves slowly
        assert max(rates) <= 0.001
        assert last["val/loss"] == pytest.approx(fitted["val/loss"], rel=0.2)
    else:
        assert max(rates) > 0.005
