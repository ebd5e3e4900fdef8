"""What a step saw, told afterwards by the plan: the photos and pixels that a training was really given."""

from pathlib import Path

import train
from pipelines import replay
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.data.plan import OPERATIONS
from pipelines.run.folder import RunFolder
from pipelines.run_files import read_run_config, what_auto_came_to
from tests.helpers.runs import SMALL, succeeded

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image


@pytest.fixture
def flags(photos, tmp_path) -> list[object]:
    epochs = ["--epochs", "2", "--batch-size", "4", "--loader", "pillow", "--seed", "3"]
    return [*SMALL, *epochs, "--data", photos, "--runs", tmp_path, "--run", "r"]


@pytest.mark.parametrize(
    "more",
    [
        ["--views-per-photo", "2"],
        ["--quarter-turns", "true", "--hue", "0.1", "--erase-probability", "0.5", "--augment", "strong"],
        ["--mixup-alpha", "0.9", "--max-batch-per-device", "3"],
    ],
)
def test_a_step_is_what_the_training_was_given(more, flags, run_here, tmp_path, monkeypatch):
    """Step 7 of 10, the second of the second epoch; and on three processes each has its share of it."""
    seen, update = [], train.update

    def listen(model, features, optimizer, step, *rest):
        sums, batch = update(model, features, optimizer, step, *rest)
        seen.append(batch)
        return sums, batch

    monkeypatch.setattr(train, "update", listen)
    succeeded(run_here(train, *flags, *more))
    run = RunFolder(tmp_path / "r")
    said = succeeded(run_here(replay, run.folder, "--step", "7", "--processes", "3"))
    assert "step 7 of" in said
    assert "in epoch 2, on 3 processes" in said
    lines = said.partition("done to it\n")[2].partition("\n\n")[0].splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 0, 1, 2]

    config, batch = what_auto_came_to(run.folder, read_run_config(run.folder)), seen[6]
    split = load_dataset(scan_dataset(Path(config.data), tmp_path / "index", 0.2)).splits["train"]
    step = replay.step_of(config, split, 7, 3)
    assert step.views.indices[: len(batch)].tolist() == batch.indices.tolist()
    assert all(split.path(index) in line for line, index in zip(lines, step.views.indices.tolist(), strict=True))
    images, names, are_seen = replay.images_of(config, split, PartialState(), step, ())
    assert are_seen.all()
    np.testing.assert_array_equal(images[: len(batch)], batch.images.numpy())
    assert names[: len(batch)] == batch.names(split.classes)
    assert ("mixed in" in said) == ("--mixup-alpha" in more)
    assert ("hue" in said) == ("--hue" in more)
    assert any(f", {name} " in said for name in OPERATIONS) == ("--augment" in more)
    with Image.open(run.figures / "step_7.png") as picture:
        assert picture.width > 200
    assert len(run_here(replay, run.folder, "--step", "5").stdout.splitlines()) == 2 + 3 + 2, "a short last batch"


def test_what_cannot_be_replayed_is_one_line(flags, run_here, tmp_path, photos):
    succeeded(run_here(train, *flags, "--max-steps", "2"))
    run = tmp_path / "r"
    assert "the run stands at step 2: this is what that step would see" in run_here(replay, run, "--step", "8").stdout
    (tmp_path / "other").mkdir()
    for arguments, told in {
        (run, "--step", "0"): "--step and --processes are 1 or more",
        (tmp_path / "other", "--step", "1"): "config.yaml",
        (run, "--step", "1", "--data", photos / "val"): "was trained on other photos",
    }.items():
        done = run_here(replay, *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert told in done.stderr


def test_photos_that_the_run_has_found_from_another_folder(flags, photos, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    flags[flags.index("--data") + 1] = photos.name
    succeeded(run_here(train, *flags, "--max-steps", "2"))
    assert read_run_config(tmp_path / "r").data == photos.name
    monkeypatch.chdir(tmp_path / "r")
    assert succeeded(run_here(replay, tmp_path / "r", "--step", "1"))
