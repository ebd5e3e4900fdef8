"""How long a training is, where the settings leave that open."""

import json
from dataclasses import replace
from types import SimpleNamespace

import train
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.model.optimizer import Schedule
from pipelines.run.folder import RunFolder
from pipelines.training.fitted_head import Start, resolved
from pipelines.training.report import unfreezing_report

import pytest


@pytest.mark.parametrize(
    ("photos", "batch_size", "frozen", "epochs"),
    [
        (244, 16, True, 8),
        (340, 16, False, 16),
        (1_000_000, 256, False, 16),
        (60, 16, True, 32),  # 4 steps an epoch
        (60, 16, False, 32),
        (3, 16, False, 128),
    ],
)
def test_few_photos_are_seen_more_often(photos, batch_size, frozen, epochs):
    network = SimpleNamespace(frozen_part_is_fixed=frozen)
    config = Config(epochs="auto", batch_size=batch_size)
    assert resolved(config, Start("none"), network, photos).epochs == epochs
    assert resolved(Config(epochs=3), Start("none"), network, photos).epochs == 3


def test_what_auto_came_to_stays():
    """Also where another version, or other settings of the run, would come to another number."""
    config, network = Config(epochs="auto", views_per_photo="auto"), SimpleNamespace(frozen_part_is_fixed=True)
    saved = {"epochs": 5, "views_per_photo": 6}
    chosen = resolved(config, Start("layer3"), network, 244, saved)
    assert (chosen.epochs, chosen.views_per_photo) == (5, 6)
    chosen = resolved(Config(epochs=7, views_per_photo=2), Start("layer3"), network, 244, saved)
    assert (chosen.epochs, chosen.views_per_photo) == (7, 2)
    assert resolved(config, Start("layer3"), network, 244, {}).views_per_photo == 4
    mixed = replace(config, cutmix_alpha=1.0)  # whose features cannot be kept
    assert resolved(mixed, Start("layer3"), network, 244, {}).views_per_photo is None


def test_a_warm_up_fits_into_what_auto_comes_to():
    network = SimpleNamespace(frozen_part_is_fixed=True)
    config = Config(epochs="auto", warmup_epochs=9.5)
    assert resolved(config, Start("layer3"), network, 1000).epochs == 10


def test_a_square_that_grows_has_its_full_size_in_an_epoch_at_least():
    network = SimpleNamespace(frozen_part_is_fixed=True)
    config = Config(epochs="auto", views_per_photo="auto", first_image_size=128, grow_epochs=9)
    chosen = resolved(config, Start("layer3"), network, 1000)
    assert (chosen.epochs, chosen.views_per_photo) == (10, None)


@pytest.mark.parametrize(("unfreeze", "epochs"), [("together", 10), ("gradual", 19)])
def test_all_joins_in_what_auto_comes_to(unfreeze, epochs):
    network = SimpleNamespace(frozen_part_is_fixed=True)
    config = Config(epochs="auto", freeze_epochs=9, unfreeze=unfreeze, freeze="auto", head_init="auto")
    assert resolved(config, Start("layer2"), network, 1000).epochs == epochs


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, None),
        ({"freeze_epochs": 3}, "epochs 1 to 3 train the head alone, all of the body joins in 4"),
        ({"freeze_epochs": 1, "freeze": "layer2"}, "epoch 1 trains the head alone, layer4, layer3 join in 2"),
        (
            {"freeze_epochs": 4, "unfreeze": "gradual", "freeze": "stem"},
            "epochs 1 to 4 train the head alone, layer4 joins in 5, layer3 joins in 9, layer2 joins after the end, "
            "layer1 joins after the end",
        ),
        (
            {"freeze_epochs": 4, "max_steps": 15},
            "epochs 1 to 2 train the head alone, all of the body joins after the end",
        ),
        ({"freeze_epochs": 4, "mode": "feature_extract"}, None),
        ({"freeze_epochs": 4, "epochs": 0, "head_init": "fitted"}, None),
    ],
)
def test_when_the_body_joins_is_said(settings, line):
    assert unfreezing_report(Schedule(Config(**settings), 10)) == ([f"freeze_epochs: {line}"] if line else [])


def finished(folder, **settings):
    run = RunFolder(folder / "run")
    run.create(Config(**settings))
    run.write_status("finished", epoch=8, global_step=80)
    run.best.touch()
    run.close()
    return run


@pytest.mark.parametrize(
    ("before", "now", "beginning"),
    [
        ("auto", "auto", "finished"),
        ("auto", 8, "finished"),
        (8, "auto", "finished"),  # the default recipe had a number once
    ],
)
def test_a_finished_run_is_not_longer_by_auto(tmp_path, before, now, beginning):
    run = finished(tmp_path, epochs=before)
    assert run.beginning(Config(epochs=now)) == beginning
    assert run.meant_before(Config(epochs=now)).get("epochs", now) == (before if now == "auto" else now)


def test_a_warm_up_longer_than_the_run_has_epochs_is_one_line(tmp_path):
    run = finished(tmp_path, epochs=10)
    with pytest.raises(UserError, match=r"other settings \(warmup_epochs\)"):
        run.beginning(Config(epochs="auto", warmup_epochs=12))


@pytest.mark.slow
def test_a_stopped_run_ends_where_auto_has_it(photo_folder, random_weights, run_here, tmp_path):
    """Of 20 photos in steps of 4, an epoch has 5 steps, and 128 steps need 26 epochs."""
    photos = photo_folder({"train": {"ant": 10, "bee": 10}, "val": {"ant": 2, "bee": 2}})
    command = [
        "--data",
        photos,
        "--weights",
        random_weights,
        "--image-size",
        "64",
        "--resize",
        "72",
        "--runs",
        tmp_path,
    ]
    command += ["--config", "configs/finetune.yaml", "--freeze", "layer3", "--batch-size", "4", "--tracker", "none"]
    done = run_here(train, *command, "--run", "one", "--max-steps", "7")
    assert done.returncode == 0, done.stderr
    done = run_here(train, *command, "--run", "one")
    assert "resumed at step 7" in done.stdout
    assert "5 steps an epoch, 130 in all" in done.stdout
    status = json.loads((tmp_path / "one" / "status.json").read_text())
    assert (status["state"], status["epoch"], status["global_step"]) == ("finished", 26, 130)
    assert "is finished: nothing to do" in run_here(train, *command, "--run", "one").stdout
    done = run_here(train, *command, "--run", "one", "--epochs", "27")
    assert "settings changed: epochs 27 (was auto)" in done.stdout
    assert json.loads((tmp_path / "one" / "status.json").read_text())["global_step"] == 135
