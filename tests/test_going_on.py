"""Whole runs go on: with other settings, under other names of their photos, without their first weights."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import train
from pipelines.run_files import checkpoint_folders
from tests.helpers.runs import FROZEN, one_error_line, same_bits, succeeded, val_rows

import pytest
import torch


@pytest.fixture
def start(photos, random_weights, tmp_path, run_here) -> Callable[..., subprocess.CompletedProcess]:
    """Trains the run "r" on `photos`, 5 steps an epoch, with other or more flags."""
    settings = {"--data": photos, "--weights": random_weights, "--batch-size": 4, "--epochs": 1, "--log-every": 2}
    settings |= {"--schedule": "constant", "--runs": tmp_path / "runs", "--run": "r"}

    def begin(*flags: object, **others: object) -> subprocess.CompletedProcess:
        named = settings | {f"--{key}": value for key, value in others.items()}
        pairs = [word for flag, value in named.items() if value is not None for word in (flag, value)]
        return run_here(train, *FROZEN, *pairs, *flags)

    return begin


@pytest.mark.slow
def test_the_photos_decide_and_not_what_they_are_called(photos, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    moved = tmp_path / "elsewhere" / "moved"
    succeeded(start(data="photos"))
    for epochs, data in enumerate(["photos/", tmp_path / "photos", moved, "../photos", None], start=2):
        if data == moved:
            moved.parent.mkdir()
            (tmp_path / "photos").rename(moved)
        elif data == "../photos":
            moved.rename(tmp_path / "photos")
            monkeypatch.chdir(moved.parent)
        elif data is None:
            monkeypatch.setenv("DALITUNE_DATA", str(tmp_path / "photos"))
        said = succeeded(start(data=data, epochs=epochs, runs=tmp_path / "runs"))
        assert f"resumed at step {5 * epochs - 5}" in said, data
    assert "is finished: nothing to do" in succeeded(start(data="../photos", epochs=epochs))
    photo = tmp_path / "photos" / "train" / "ant" / "00.jpg"
    photo.with_name("99.jpg").write_bytes(photo.read_bytes())
    line = one_error_line(start(data="../photos", epochs=epochs + 1))
    assert "was trained on other photos" in line


@pytest.mark.slow
def test_our_own_advice_is_followed_in_the_same_run(start):
    succeeded(start())
    advice = ["--max-batch-per-device", 2, "--eval-batch-per-device", 5, "--skip-bad-files", "--loader", "pillow"]
    said = succeeded(start(*advice, "--channels-last", "false", "--max-steps", 7, epochs=2))
    assert "resumed at step 5" in said
    line = next(line for line in said.splitlines() if line.startswith("settings changed: "))
    for change in ("max_batch_per_device 2 (was null)", "skip_bad_files true (was false)", "epochs 2 (was 1)"):
        assert change in line
    assert "resumed at step 7" in succeeded(start(*advice, "--channels-last", "false", epochs=2))
    assert "loader: pillow (as before); " in succeeded(start(*advice[:-2], "--channels-last", "false", epochs=3))


@pytest.mark.slow
def test_more_steps_after_an_early_end_lead_to_the_same_weights(start, tmp_path):
    runs = tmp_path / "runs"
    succeeded(start(epochs=2, run="whole"))
    for steps in (3, 6, 100):
        succeeded(start("--max-steps", steps, epochs=2))
    newest = [checkpoint_folders(runs / name / "checkpoints")[-1] for name in ("r", "whole")]
    assert newest[0].name == newest[1].name == "epoch-0002-step-00000010"
    assert same_bits(newest[0] / "state.pt", newest[1] / "state.pt")
    assert [row["global_step"] for row in val_rows(runs / "r")] == [3, 5, 6, 10]


@pytest.mark.slow
def test_a_resume_needs_no_first_weights_and_a_finished_run_no_photos(start, random_weights, tmp_path, monkeypatch):
    monkeypatch.delenv("DALITUNE_WEIGHTS", raising=False)
    first = Path(shutil.copy(random_weights, tmp_path / "w.pth"))
    cosine = {"schedule": "cosine", "weights": first}
    succeeded(start(**cosine))
    other = torch.load(first, weights_only=True)
    other["conv1.weight"] += 1
    torch.save(other, tmp_path / "other.pth")
    first.rename(tmp_path / "moved.pth")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.training.check.open_dataset", None)
        assert "is finished: nothing to do" in succeeded(start(**cosine))
    said = succeeded(start(**cosine, epochs=2))
    assert "weights: of the checkpoint; " in said
    assert re.search(r"lr: the last step was at 0\.000477 and the next is at 0\.0025, as the cosine schedule", said)
    for epochs, weights in ((3, tmp_path / "moved.pth"), (4, None)):
        assert "resumed" in succeeded(start(**cosine | {"weights": weights}, epochs=epochs))
    gone = start(**cosine | {"weights": tmp_path / "gone.pth"}, epochs=5)
    assert "resumed" in succeeded(gone)
    assert "gone.pth does not exist" in gone.stderr
    assert "not needed" in gone.stderr
    line = one_error_line(start(**cosine | {"weights": tmp_path / "other.pth"}, epochs=6))
    assert "other settings (weights)" in line


@pytest.mark.slow
def test_a_runs_own_recipe_goes_on_with_it_whoever_gave_the_name(start, tmp_path, run_here):
    succeeded(start(run=None))
    (folder,) = (tmp_path / "runs").iterdir()
    recipe = folder / "config.yaml"
    assert "resumed at step 5" in succeeded(run_here(train, "--config", recipe, "--epochs", 2))
    told = f"a new run with the settings of {folder}: --runs {folder.parent} --run {folder.name} goes on with that one"
    others = {
        "other": ["--run", "other"],
        folder.name: ["--runs", tmp_path / "elsewhere"],
        "": ["--run", "null", "--overwrite"],
    }
    for name, flags in others.items():
        said = succeeded(run_here(train, "--config", recipe, *flags, "--max-steps", 1))
        assert told in said, name
        assert ("overwrite: plays no part without --run" in said) == ("--overwrite" in flags)
    said = succeeded(run_here(train, "--config", recipe, "--run", "other"))
    assert told.replace("a new run", str(folder.parent / "other")) in said


@pytest.mark.slow
def test_fewer_epochs_than_are_trained_end_the_run(start, tmp_path):
    succeeded(start("--max-steps", 7, epochs=4, schedule="cosine"))
    status = tmp_path / "runs" / "r" / "status.json"
    of_classes = {status.parent / "figures" / f"{name}.png" for name in ("confusion_matrix", "per_class")}
    for flags, line in (({}, "with epochs 1 the run ends at step 5"), ({"max-steps": 7}, "with max_steps 7 the")):
        status.write_text(status.read_text().replace("finished", "stopped"))
        for picture in of_classes:
            picture.unlink()
        said = succeeded(start(epochs=1 if not flags else 4, schedule="cosine", **flags))
        assert f"nothing is left to train: {line}" in said
        assert "lr: the last step" not in said
        assert json.loads(status.read_text())["state"] == "finished"
        assert all(picture.exists() for picture in of_classes)
    said = succeeded(start(epochs=2, schedule="cosine"))
    assert "resumed at step 7" in said
    assert "nothing is left" not in said


@pytest.mark.slow
def test_patience_ends_a_run_and_more_of_it_goes_on(start, tmp_path):
    settings = {"epochs": 9, "clip-grad-norm": 1e-9}  # no epoch after the first is better
    run = tmp_path / "runs" / "r"
    for patience, said in (
        (2, "patience 2: ended after epoch 3 of 9, as none was better since epoch 1"),
        (4, "epoch 5"),
    ):
        assert said in succeeded(start(**settings, patience=patience))
        assert [row["epoch"] for row in val_rows(run)] == list(range(1, patience + 2))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    for patience in (4, 3, None):
        assert "is finished: nothing to do" in succeeded(start(**settings, patience=patience))
    succeeded(start(**settings, patience="null"))
    assert len(val_rows(run)) == 9
