"""What the frozen part made of a view is what it would make of it again, and is computed once."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import train
from pipelines.config import Config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.loader import Loader, eval_loader, train_loader
from pipelines.errors import PassStopped, UserError
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TransferModel

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from test_bad_photos import assert_same_weights, break_openly, break_unseen, dirty  # noqa: F401 (a fixture)
from test_resume import ask_at, newest, rows, same_bits
from test_train import run_script, succeeded, train_rows, val_rows
from torchvision.models import resnet18

CONFIG = Config(image_size=64, resize=72, batch_size=4, views_per_photo=2, loader="pillow", loader_threads=2)
VIEWS = ["--image-size", "64", "--resize", "72", "--freeze", "layer3", "--views-per-photo", "2", "--tracker", "none"]
VIEWS += ["--head-init", "zeros"]
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
    return train_loader(config, split, split.labels.astype(np.int64), PartialState(cpu=True), "pillow", 4)


def open_features(network: TransferModel, training: Loader, views: int | None = 2, **settings) -> FrozenFeatures:
    settings = {"epochs": 3, "micro_batch": 4, **settings}
    return FrozenFeatures(network, training, Accelerator(cpu=True), views_per_photo=views, **settings)


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
    assert open_features(fixed, training, epochs=1, limit=19 * MAPS).are_kept, "no more than one view is shown"
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


# Across runs


def counted(network: TransferModel, monkeypatch) -> list[int]:
    """Photos of each batch that the frozen part computes from here on."""
    seen, compute = list[int](), network.frozen_part
    monkeypatch.setattr(network, "frozen_part", lambda images: seen.append(len(images)) or compute(images))
    return seen


def a_view(split: Split, network: TransferModel, store: FeatureStore, **settings) -> tuple[torch.Tensor, str]:
    """The features of the second of two views, and what is said of the store before."""
    training = open_loader(split, **settings)
    features = open_features(network, training, store=store)
    said = features.in_store()
    features.prepare(1, never)
    training.close()
    return features.rows, said


def test_a_later_run_finds_the_same_bits_whatever_its_head_and_batch(resnet, split, tmp_path, monkeypatch):
    network, store = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), FeatureStore(tmp_path, 10**9)
    rows, said = a_view(split, network, store)
    assert said == ""
    other = copy.deepcopy(resnet)
    other.fc = torch.nn.Linear(512, 7)
    network = TransferModel(other, frozen_stages=5, batchnorm="frozen")
    seen = counted(network, monkeypatch)
    again, said = a_view(split, network, store, batch_size=7, seed=0)
    assert said == "1 view of 19 train photos"
    assert torch.equal(rows, again)
    assert set(seen) == {0}


@pytest.mark.parametrize("change", ["weights", "seed", "image_size", "transparency", "stages", "layout", "photo"])
def test_what_the_features_depend_on_tells_them_apart(resnet, split, photos, tmp_path, change):
    network, store = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), FeatureStore(tmp_path, 10**9)
    a_view(split, network, store)
    settings = {"seed": {"seed": 1}, "image_size": {"image_size": 72}}.get(change, {})
    if change in ("weights", "layout"):
        network = copy.deepcopy(network)
        network.network.layer1[0].bn1.bias.data[0] += 1e-3 * (change == "weights")
        network.to(memory_format=torch.channels_last if change == "layout" else torch.contiguous_format)
    if change == "stages":
        network = TransferModel(resnet, frozen_stages=4, batchnorm="frozen")
    if change == "transparency":
        split = replace(split, transparency="black")
    if change == "photo":  # as long as before, with the same edges
        photo = Path(split.path(3))
        content = photo.read_bytes()
        photo.write_bytes(content[:-1] + bytes([content[-1]]))
        os.utime(photo, ns=(0, int(split.mtimes[3]) + 1))
        split = load_dataset(scan_dataset(photos, photos / "cache", 0.2)).splits["train"]
    assert a_view(split, network, store, **settings)[1] == ""


def test_a_photo_that_is_bad_or_not_what_was_scanned_is_met_by_each_run(resnet, split, tmp_path, capfd):
    network, store = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), FeatureStore(tmp_path, 10**9)
    photo = Path(split.path(3))
    content, state = photo.read_bytes(), photo.stat()
    photo.write_bytes(content[: len(content) // 2])
    os.utime(photo, ns=(state.st_atime_ns, state.st_mtime_ns))
    for _ in range(2):
        assert a_view(split, network, store, skip_bad_files=True)[1] == ""
        assert "left out" in capfd.readouterr().err
    with pytest.raises(UserError, match="cannot be decoded"):
        a_view(split, network, store)
    photo.write_bytes(content)  # sound, but of another time than the scan has seen
    for _ in range(2):
        assert a_view(split, network, store)[1] == ""
    os.utime(photo, ns=(state.st_atime_ns, state.st_mtime_ns))
    a_view(split, network, store)
    assert a_view(split, network, store)[1] != ""


def test_a_fold_finds_its_photos_among_those_of_other_splits(resnet, photos, tmp_path):
    network, store = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), FeatureStore(tmp_path, 10**9)
    file = photos / "fold.csv"
    paths = sorted(str(path.relative_to(photos)) for path in photos.glob("train/*/*.jpg"))
    found, first = [], torch.empty(0)
    for fold in range(3):
        lines = [
            f"{path},{Path(path).parent.name},{'val' if i % 3 == fold else 'train'}" for i, path in enumerate(paths)
        ]
        file.write_text("\n".join(["path,label,split", *lines]))
        rows = {}
        for split in load_dataset(scan_dataset(file, photos / "cache", 0.2)).splits.values():
            loader = eval_loader(CONFIG, split, split.labels.astype(np.int64), PartialState(cpu=True), "pillow")
            features = open_features(network, loader, 1, store=store)
            found.append(features.in_store() != "")
            features.prepare(0, never)
            rows |= {split.path(index): row for index, row in enumerate(features.rows)}
            loader.close()
        table = torch.stack([rows[path] for path in sorted(rows)])
        first = first if fold else table
        torch.testing.assert_close(table, first, rtol=1e-4, atol=1e-5)
    assert found == [False, False, True, True, True, True]


# Whole runs


@pytest.mark.slow
def test_a_second_run_with_another_head_starts_at_the_head(photos, random_weights, tmp_path, run_here, monkeypatch):
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    command = ["--data", photos, "--weights", random_weights, *VIEWS, "--epochs", "3", "--runs", tmp_path]
    command = [*command, "--mode", "feature_extract"]
    first = succeeded(run_here(train, *command, "--run", "first"))
    assert "from the cache" not in first
    second = succeeded(run_here(train, *command, "--run", "second"))
    assert "frozen part: 2 views of 19 train photos and 1 view of 11 val photos from the cache" in second
    assert rows(tmp_path / "first") == rows(tmp_path / "second")
    assert same_bits(tmp_path / "first/best.pt", tmp_path / "second/best.pt")
    assert "from the cache" in succeeded(run_here(train, *command, "--run", "rate", "--lr", "0.1", "--batch-size", "6"))
    none = succeeded(run_here(train, *command, "--run", "without", "--cache-gb", "0"))
    assert "from the cache" not in none
    assert same_bits(tmp_path / "first/best.pt", tmp_path / "without/best.pt")

    for run, found in (("two", False), ("two-again", True)):
        said = succeeded(run_script("train.py", *command, "--run", run, processes=2))
        assert ("from the cache" in said) == found
    assert same_bits(tmp_path / "two/best.pt", tmp_path / "two-again/best.pt")


@pytest.mark.slow
def test_few_views_stopped_anywhere_and_on_two_processes(photos, random_weights, tmp_path, run_here, monkeypatch):
    command = ["--data", photos, "--weights", random_weights, *VIEWS, "--epochs", "5", "--batch-size", "4"]
    command += ["--cache-gb", "0", "--eval-batch-per-device", "4"]
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
        patch.setattr(
            "pipelines.model.features.FrozenFeatures.prepare", stop_in_the_second(train.FrozenFeatures.prepare)
        )
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
    command = [
        "--data",
        dirty,
        "--weights",
        random_weights,
        *VIEWS,
        "--cache-gb",
        "0",
        "--epochs",
        "3",
        "--batch-size",
        "5",
    ]
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
