"""What the frozen part made of a view is what it would make of it again, and is computed once."""

from pathlib import Path

import train
from pipelines.config import Config
from pipelines.dataset import Split, load_dataset, scan_dataset
from pipelines.errors import PassStopped, UserError
from pipelines.features import TrainingFeatures
from pipelines.loader import Loader, train_loader
from pipelines.model import TransferModel

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from test_bad_photos import assert_same_weights, break_openly, break_unseen, dirty  # noqa: F401 (a fixture)
from test_resume import ask_at, newest, rows, same_bits
from test_train import run_script, succeeded, train_rows, val_rows
from torchvision.models import resnet18

CONFIG = Config(image_size=64, resize=72, batch_size=4, views_per_photo=2, loader="torch", loader_threads=2)
VIEWS = ["--image-size", "64", "--resize", "72", "--freeze", "layer3", "--views-per-photo", "2", "--tracker", "none"]
MAPS = 256 * 4 * 4 * 4  # bytes of a photo of 64 pixels behind layer3


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return resnet18(num_classes=3)


@pytest.fixture
def split(photos) -> Split:
    return load_dataset(scan_dataset(photos, photos / "cache", 0.2)).splits["train"]


def open_loader(split: Split, **settings) -> Loader:
    config = Config(**{**CONFIG.__dict__, **settings})
    return train_loader(config, split, split.labels.astype(np.int64), PartialState(cpu=True), "torch", 4)


def open_features(network: TransferModel, training: Loader, views: int | None = 2, **settings) -> TrainingFeatures:
    settings = {"epochs": 3, **settings}
    return TrainingFeatures(network, training, Accelerator(cpu=True), views_per_photo=views, **settings)


def never() -> bool:
    return False


@pytest.mark.parametrize("frozen_stages", [1, 4, 5])
def test_features_are_looked_up_where_the_view_was_seen(resnet, split, frozen_stages):
    network = TransferModel(resnet, frozen_stages=frozen_stages, batchnorm="frozen").train()
    training = open_loader(split)
    features = open_features(network, training)
    assert features.are_kept
    for epoch in (1, 0, 2, 5):
        if epoch == 2:
            training.engine.close()  # no photo can be decoded any more
        features.prepare(epoch, never)
        other = open_loader(split)
        for step, with_images in zip(training.epoch(epoch, images=False), other.epoch(epoch), strict=True):
            for batch, images in zip(step.batches, with_images.batches, strict=True):
                assert batch.images.shape == (0, 3, 64, 64)
                assert (batch.indices.tolist(), batch.labels.tolist()) == (
                    images.indices.tolist(),
                    images.labels.tolist(),
                )
                expected = network.frozen_part(images.images)
                torch.testing.assert_close(features.of(batch), expected, rtol=1e-4, atol=1e-5)
                assert features.of(batch).stride() == expected.stride(), "the layout that the trained part is fast with"
        other.close()
    assert features.of(training.empty_batch()).shape[0] == 0


def test_views_that_would_fill_the_memory_or_change_are_computed_each_time(resnet, split):
    training = open_loader(split)
    fixed = TransferModel(resnet, frozen_stages=4, batchnorm="frozen")
    for network, views, limit, kept in (
        (fixed, 2, 2 * 19 * MAPS, True),
        (fixed, 2, 2 * 19 * MAPS - 1, False),
        (fixed, None, 2**30, False),
        (TransferModel(resnet, frozen_stages=4, batchnorm="train"), 2, 2**30, False),
        (TransferModel(resnet, frozen_stages=0, batchnorm="frozen"), 2, 2**30, False),
    ):
        features = open_features(network.eval(), training, views, limit=limit)
        assert features.are_kept == kept
        features.prepare(0, never)
        batch = next(next(training.epoch(0)).batches)
        torch.testing.assert_close(features.of(batch), network.frozen_part(batch.images), rtol=1e-4, atol=1e-5)
    assert not open_features(fixed, training, epochs=2).are_kept, "no epoch shows a view again"
    assert open_features(fixed, training, None).report() == []
    assert "once for each of 2 views" in open_features(fixed, training).report()[0]
    assert "every time" in open_features(fixed, training, limit=1).report()[0]
    training.close()


def test_a_pass_that_broke_off_is_begun_again(resnet, split):
    network, training = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), open_loader(split)
    features = open_features(network, training)
    answers = iter([False, False, True, True])  # a batch later it is known on all processes
    with pytest.raises(PassStopped):
        features.prepare(0, lambda: next(answers))
    photo = Path(split.path(18))
    content = photo.read_bytes()
    photo.unlink()
    with pytest.raises(UserError, match="cannot be decoded"):
        features.prepare(0, never)
    photo.write_bytes(content)
    features.prepare(0, never)
    batch = next(next(training.epoch(0)).batches)
    torch.testing.assert_close(features.of(batch), network.frozen_part(batch.images), rtol=1e-4, atol=1e-5)
    training.close()


# Whole runs


@pytest.mark.slow
def test_few_views_stopped_anywhere_and_on_two_processes(photos, random_weights, tmp_path, run_here, monkeypatch):
    command = ["--data", photos, "--weights", random_weights, *VIEWS, "--epochs", "5", "--batch-size", "4"]
    command += ["--lr", "0.01", "--log-every", "1", "--runs", tmp_path]
    said = succeeded(run_here(train, *command, "--run", "whole"))
    assert "frozen part: computed once for each of 2 views of a photo, 1 MiB in memory" in said
    assert (tmp_path / "whole/figures/train_batch.png").stat().st_size > 10_000
    for function, call, step in (("update", 1, 2), ("update", 12, 13), ("predict", 2, 10)):
        run = tmp_path / f"{function}-{call}"
        with monkeypatch.context() as patch:
            ask_at(patch, function, call)
            assert run_here(train, *command, "--run", run.name).returncode == 75
        assert f"resumed at step {step}" in succeeded(run_here(train, *command, "--run", run.name))
        assert rows(run) == rows(tmp_path / "whole")
        assert same_bits(run / "best.pt", tmp_path / "whole/best.pt")
        assert same_bits(newest(run) / "state.pt", newest(tmp_path / "whole") / "state.pt")

    with monkeypatch.context() as patch:  # within the pass before the second epoch
        patch.setattr("pipelines.features.TrainingFeatures.prepare", stop_in_the_second(train.TrainingFeatures.prepare))
        stopped = run_here(train, *command, "--run", "pass")
    assert stopped.returncode == 75
    assert "stopped at step 5" in stopped.stderr
    succeeded(run_here(train, *command, "--run", "pass"))
    assert rows(tmp_path / "pass") == rows(tmp_path / "whole")
    assert same_bits(newest(tmp_path / "pass") / "state.pt", newest(tmp_path / "whole") / "state.pt")

    assert "processes: 2 on cpu" in succeeded(run_script("train.py", *command, "--run", "two", processes=2))
    for select, names in ((train_rows, ("train/loss", "train/top1")), (val_rows, ("val/loss",))):
        for name in names:
            found, expected = ([row[name] for row in select(tmp_path / run)] for run in ("two", "whole"))
            assert found == pytest.approx(expected, rel=1e-3), name


def stop_in_the_second(prepare):
    def asked(self, epoch, stop):
        prepare(self, epoch, (lambda: True) if epoch == 1 else stop)

    return asked


@pytest.mark.slow
def test_a_bad_photo_met_in_a_pass_leaves_its_places_empty(dirty, tmp_path, random_weights, run_here):  # noqa: F811
    command = ["--data", dirty, "--weights", random_weights, *VIEWS, "--epochs", "3", "--batch-size", "5"]
    command += ["--skip-bad-files", "--runs", tmp_path / "runs"]
    succeeded(run_here(train, *command, "--run", "sound", "--max-steps", 1))
    bad = dirty / "train/b/05.jpg"
    break_unseen(bad)
    met = run_here(train, *command, "--run", "met")
    assert "1 met in the run" in succeeded(met)
    assert met.stderr.count("05.jpg") == 1
    break_openly(bad)
    assert "1 of them found by the scan" in succeeded(run_here(train, *command, "--run", "known"))
    assert_same_weights(tmp_path / "runs/met", tmp_path / "runs/known")
