"""What may go on, goes on: with changed settings, with photos that have moved, gone or been mended, without weights."""

import re
import shutil
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

from pipelines.config import SCHEMA, Config, dump_yaml, not_named
from pipelines.errors import UserError
from pipelines.model.optimizer import lr_factor, rate_jump
from pipelines.run import resume
from pipelines.run.folder import RunFolder, versions
from pipelines.run_files import read_run_config, to_json
from pipelines.training.report import resume_report
from tests.helpers.run_files import PROGRESS, without

import pytest
import torch

TABLES = (resume.REFUSED, resume.REPORTED, resume.CHECKED_ELSEWHERE, resume.IGNORED)

# Settings


def test_each_setting_is_in_one_table_of_what_a_change_does():
    """A new one decides the result, unless pipelines/run/resume.py says otherwise."""
    assert sorted(key for table in TABLES for key in table) == sorted(field.name for field in fields(Config))


OTHER = {
    "seed": 1, "image_size": 192, "first_image_size": 160, "grow_epochs": 3, "eval_size": 256, "resize": 300,
    "shrink": 512, "crop_mode": "squash",
    "transparency": "black", "crop_scale_min": 0.5, "crop_ratio_max": 1.0, "flip_probability": 0.1,
    "vertical_flip_probability": 0.5, "quarter_turns": True, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2,
    "hue": 0.1, "erase_probability": 0.5, "rotation": 10.0, "shear": 5.0, "translation": 0.1, "grey_probability": 0.2,
    "blur_probability": 0.2, "augment": "strong", "mixup_alpha": 0.2, "cutmix_alpha": 1.0,
    "sampler": "balanced", "views_per_photo": 3,
    "arch": "resnet34", "mode": "feature_extract", "freeze": "layer1", "freeze_epochs": 2, "unfreeze": "gradual",
    "batchnorm": "train", "head_init": "zeros",
    "batch_size": 16, "label_smoothing": 0.1, "dropout": 0.2, "drop_path": 0.2, "clip_grad_norm": 1.0, "ema_decay": 0.9,
    "teacher": "runs/big", "teacher_weight": 0.5, "teacher_temperature": 4.0,
    "optimizer": "adamw", "lr": 0.5, "lr_body": 0.001, "layer_decay": 0.7,
    "momentum": 0.5,
    "nesterov": True, "weight_decay": 0.1, "weight_decay_on": "matrices", "min_lr": 0.001,
    "schedule": "step", "step_epochs": 2, "step_gamma": 0.5, "warmup_epochs": 1.0,
    "best_by": "balanced", "test_flips": True, "class_weights": "balanced",
    "epochs": 20, "max_steps": 50, "patience": 3, "max_batch_per_device": 4, "eval_batch_per_device": 8, "log_every": 5,
    "skip_bad_files": True, "loader": "pillow", "deterministic": True, "channels_last": False, "compile": True,
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


def saved_run(run: RunFolder, config: Config, state: str = "stopped", global_step: int = 0) -> RunFolder:
    run.create(config)
    run.write_status(state, global_step=global_step)
    (checkpoint := run.folder / "checkpoints" / "epoch-0001-step-00000005").mkdir(parents=True)
    (checkpoint / "progress.json").write_text(to_json(PROGRESS | {"settings": asdict(config)}))
    if state == "finished":
        run.best.touch()
    run.close()
    return run


@pytest.mark.parametrize("key", sorted(OTHER))
def test_only_a_change_that_decides_the_result_is_refused(run, key):
    assert set(OTHER) == resume.REFUSED | resume.REPORTED
    # Values that matter: with them none of the settings stands idle.
    before = {"schedule": "step"} if key.startswith("step_") else {}
    before |= {"weight_decay": 0.1} if key == "weight_decay_on" else {}
    before |= {"first_image_size": 128, "grow_epochs": 2} if key in ("first_image_size", "grow_epochs") else {}
    before |= {"teacher": "runs/big"} if key.startswith("teacher_") else {}
    before |= {"freeze_epochs": 1} if key == "unfreeze" else {}
    before |= {"arch": "swin_t"} if key == "drop_path" else {}
    saved_run(run, Config(**before))
    other = Config(**before | {key: OTHER[key]})
    if key in resume.REPORTED:
        assert run.beginning(other) == "resumed"
        assert resume.changed_settings(Config(), other).startswith(f"{key} {resume.spelled(OTHER[key])} (was ")
    else:
        was = resume.spelled(getattr(Config(**before), key))
        with pytest.raises(UserError, match=rf"other settings \({key}\): it goes on with {key} {re.escape(was)}"):
            run.beginning(other)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"schedule": "cosine"}, {"step_epochs": 2, "step_gamma": 0.5}),
        ({"optimizer": "adamw"}, {"momentum": 0.1}),
        ({"mode": "feature_extract"}, {"freeze": "layer3", "lr_body": 0.5}),
        ({"lr": 0.02}, {"lr_body": 0.02}),
        ({"freeze": "layer3"}, {"layer_decay": 0.5}),
        ({}, {"teacher_weight": 0.5, "teacher_temperature": 4.0}),
        ({"teacher": "runs/big"}, {"teacher": "/elsewhere/big"}),
        ({"teacher": "runs/big", "teacher_weight": 1.0}, {"label_smoothing": 0.1, "class_weights": "balanced"}),
        ({"freeze_epochs": 0}, {"unfreeze": "gradual"}),
        ({"mode": "feature_extract"}, {"layer_decay": 0.5}),
        ({"crop_mode": "squash"}, {"resize": 300}),
        ({}, {"eval_size": 224}),
        ({"crop_mode": "squash"}, {"crop_mode": "auto"}),
        ({"crop_mode": "center"}, {"crop_mode": "auto"}),
        ({"batchnorm": "auto"}, {"batchnorm": "frozen"}),
        ({"weights": "none"}, {"batchnorm": "train"}),
        ({"weights": None}, {"weights": "imagenet"}),
        ({"data": "photos"}, {"data": "/elsewhere/photos", "val_fraction": 0.3, "runs": "others", "tracker": "none"}),
    ],
)
def test_a_setting_decides_by_what_it_does(run, before, now):
    saved_run(run, Config(**before))
    assert run.beginning(Config(**before | now)) == "resumed"


def test_settings_not_named_are_those_that_the_run_began_with(run, capsys):
    """As where the default recipe is another one since, or was not the one that the run began with."""
    saved_run(run, Config(lr=0.5, freeze="layer3"))
    not_named = {"lr", "freeze", "max_steps"}
    goes_on = RunFolder(run.folder, not_named=not_named)
    now = Config(lr=0.1, freeze="none", max_steps=7)
    assert goes_on.beginning(now) == "resumed"
    assert goes_on.meant_before(now) == {"lr": 0.5, "freeze": "layer3"}
    assert "goes on as it began, with " in (said := capsys.readouterr().err)
    assert "lr 0.5" in said
    goes_on.close()
    with pytest.raises(UserError, match=r"other settings \(batch_size\)"):
        RunFolder(run.folder, not_named=not_named).beginning(Config(batch_size=8))
    # With a flag that does not go with what the run has, all is told.
    of_another_kind = Config(lr=0.1, freeze="none", arch="mobilenet_v2")
    with pytest.raises(UserError, match=r"other settings \(arch, freeze, lr\)"):
        RunFolder(run.folder, not_named=not_named).beginning(of_another_kind)


def test_what_crop_mode_auto_has_come_to_stays(run, capsys):
    """Photos that have gone since might lead it elsewhere. It is no change that anybody has to be told."""
    saved_run(run, Config(crop_mode="squash"))
    assert run.beginning(Config(crop_mode="auto")) == "resumed"
    assert run.meant_before(Config(crop_mode="auto")) == {"crop_mode": "squash"}
    assert capsys.readouterr().err == ""


def test_named_settings_are_those_of_flags_and_of_a_given_recipe(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("lr: 0.5\n")
    assert not_named([]) == set(SCHEMA)
    assert not_named(["--batch-size", "5"]) == set(SCHEMA) - {"batch_size"}
    assert not_named(["--batch-size", "5", "--config", str(recipe)]) == set()


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda text: text.replace("lr: 0.5", "lr: 0.25"), "has been changed: the run was trained with lr 0.5,"),
        (lambda text: text.replace("lr: 0.5\n", ""), "has been changed: the run was trained with lr 0.5,"),
        (lambda text: text.replace("lr: 0.5", "lr: much"), "lr cannot be 'much'"),
        (lambda text: text + "lrr: 1\n", "unknown key 'lrr'"),
        (lambda text: "{", "not a recipe"),
        (lambda text: text.replace("epochs: 10", "epochs: 20"), ""),
        (None, "No such file"),
    ],
)
def test_a_run_goes_on_as_trained_whatever_its_recipe_says_now(run, edit, line, capsys):
    saved_run(run, Config(lr=0.5))
    file = run.folder / "config.yaml"
    file.write_text(edit(file.read_text())) if edit else file.unlink()
    assert run.beginning(Config(lr=0.5)) == "resumed"
    said = capsys.readouterr().err
    assert said.count("\n") == bool(line)
    assert line in said
    with pytest.raises(UserError, match=r"other settings \(lr\): it goes on with lr 0\.5"):
        run.beginning(Config(lr=0.25))


def test_checkpoints_without_settings_leave_it_to_the_recipe(run):
    saved_run(run, Config(lr=0.5))
    for content, lr in (({}, 0.25), ({"settings": None}, 0.25), ({"settings": asdict(Config(lr=0.125))}, 0.125)):
        (run.folder / "config.yaml").write_text(dump_yaml(Config(lr=0.25)))
        progress = run.folder / "checkpoints" / "epoch-0001-step-00000005" / "progress.json"
        progress.write_text(to_json(without(PROGRESS, "settings") | content))
        assert run.settings_before().lr == lr
    progress.write_text(to_json(PROGRESS | {"settings": {"mixup": 1}}))
    with pytest.raises(UserError, match=r"progress\.json: unknown key 'mixup'"):
        run.beginning(Config())


def test_a_finished_run_goes_on_for_more_epochs_in_its_recipe(run):
    saved_run(run, Config(run="one"), "finished", 50)
    file = run.folder / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 10", "epochs: 20"))
    assert run.beginning(read_run_config(run.folder)) == "resumed"


def test_random_first_weights_are_others_than_pretrained_ones(run):
    saved_run(run, Config(weights="none"))
    with pytest.raises(UserError, match=r"other settings \(weights\)"):
        run.beginning(Config())


def test_before_anything_is_saved_every_setting_may_be_put_right(run):
    """As --batch-size where the memory was full, or --lr where the loss was never finite."""
    run.create(Config(lr=10.0))
    run.write_status("failed")
    assert run.beginning(Config(batch_size=4, lr=0.1)) == "resumed"
    run.save_best(torch.nn.Linear(1, 1), {})
    with pytest.raises(UserError, match=r"\(batch_size, lr\).*--max-batch-per-device"):
        run.beginning(Config(batch_size=4, lr=0.1))


@pytest.mark.parametrize(
    ("before", "at", "now", "beginning"),
    [
        ({}, 50, {}, "finished"),
        ({}, 50, {"epochs": 5}, "finished"),
        ({}, 50, {"epochs": 20}, "resumed"),
        ({}, 50, {"max_steps": 80}, "finished"),
        ({}, 50, {"epochs": 20, "max_steps": 50}, "finished"),
        ({"max_steps": 7}, 7, {"max_steps": 7}, "finished"),
        ({"max_steps": 7}, 7, {"max_steps": 5}, "finished"),
        ({"max_steps": 7}, 7, {"max_steps": 8}, "resumed"),
        ({"max_steps": 7}, 7, {"max_steps": None}, "resumed"),
        ({"max_steps": 80}, 50, {"max_steps": None}, "finished"),
    ],
)
def test_a_finished_run_goes_on_for_more_epochs_or_steps(run, before, at, now, beginning):
    saved_run(run, Config(**before), "finished", at)
    assert run.beginning(Config(**before | now)) == beginning


def test_a_finished_run_without_checkpoints_keeps_its_weights(run):
    saved_run(run, Config(), "finished").save_best(torch.nn.Linear(1, 1), {})
    shutil.rmtree(run.folder / "checkpoints")
    assert run.beginning(Config()) == "finished"
    with pytest.raises(UserError, match="its checkpoints are gone"):
        run.beginning(Config(epochs=20))


@pytest.mark.parametrize(("epoch", "is_refused"), [(0, False), (1, False), (2, True)])
def test_best_weights_outlive_the_checkpoints_of_a_stopped_run(run, epoch, is_refused):
    saved_run(run, Config()).save_best(torch.nn.Linear(1, 1), {})
    run.write_status("stopped", epoch=epoch)
    shutil.rmtree(run.folder / "checkpoints")
    if is_refused:
        with pytest.raises(UserError, match="its checkpoints are gone"):
            run.beginning(Config())
    else:
        assert run.beginning(Config()) == "resumed"


def test_removed_best_weights_are_restored_from_the_checkpoint(run):
    saved_run(run, Config(), "finished").best.unlink()
    assert run.beginning(Config()) == "resumed"


# The learning rate


def test_a_rate_that_is_off_its_course_is_said_with_both_values():
    ten, twenty = Config(), Config(epochs=20)

    def last(config: Config, step: int) -> dict[str, float]:
        return {"lr/head": config.lr * lr_factor(config, 5, step - 1)}

    assert rate_jump(ten, 5, 0, {}) == []
    assert rate_jump(ten, 5, 23, last(ten, 23)) == []
    assert rate_jump(twenty, 5, 50, last(ten, 50)) == [
        "lr: the last step was at 9.87e-06 and the next is at 0.005, as the cosine schedule is over 20 epochs now"
    ]
    assert "last step was at 0.00594 and the next is at 0.00875" in rate_jump(twenty, 5, 23, last(ten, 23))[0]
    cycle, longer = Config(schedule="one_cycle"), Config(schedule="one_cycle", epochs=20)
    assert rate_jump(cycle, 5, 23, last(cycle, 23)) == []
    assert "as the one_cycle schedule is over 20 epochs now" in rate_jump(longer, 5, 23, last(cycle, 23))[0]
    for schedule in ("constant", "step"):
        old, new = Config(schedule=schedule), Config(schedule=schedule, epochs=20)
        assert rate_jump(new, 5, 50, last(old, 50)) == [], schedule


@pytest.mark.parametrize(
    ("batchnorm", "world_size", "micro_batch", "line"),
    [
        ("frozen", 2, None, "of 2 processes: the same photos, sums in another order"),
        ("sync", 2, None, "of 2 processes: the same photos, sums in another order"),
        (
            "sync",
            2,
            4,
            "of 2 processes: the same photos, in other shares, and BatchNorm (sync) normalises each by itself",
        ),
        ("sync", 1, 4, "max_batch_per_device: other micro-batches, and BatchNorm (sync) normalises each by itself"),
        (
            "train",
            2,
            None,
            "of 2 processes: the same photos, in other shares, and BatchNorm (train) normalises each by",
        ),
        ("train", 1, 4, "max_batch_per_device: other micro-batches, and BatchNorm (train) normalises each by itself"),
        ("frozen", 1, 4, ""),
        ("train", 1, None, ""),
    ],
)
def test_another_number_of_processes_is_reported_with_batchnorm(batchnorm, world_size, micro_batch, line):
    saved = PROGRESS | {"world_size": world_size, "checkpoint": "c", "versions": versions(), "micro_batch": 16}
    now, one = Config(max_batch_per_device=micro_batch), SimpleNamespace(num_processes=1, mixed_precision="no")
    checked: Any = SimpleNamespace(config=now, previous_config=Config(), saved=saved, accelerator=one)
    schedule, network = SimpleNamespace(total_steps=50), SimpleNamespace(batchnorm=batchnorm)
    parts: Any = SimpleNamespace(resolved_config=Config(epochs=5), network=network, schedule=schedule)
    parts.micro_batch = micro_batch or 16
    older = {key: value for key, value in saved.items() if key != "micro_batch"}  # as before it was noted
    for checked.saved in (saved, older):
        lines = resume_report(checked, parts)
        lines = [each for each in lines if "resumed at" not in each and "settings changed" not in each]
        assert len(lines) == bool(line)
        assert line in "".join(lines)
