"""What the frozen part made of a view is what it would make of it again, and is computed once."""

import copy
import os
from dataclasses import replace
from pathlib import Path

from pipelines.config import Config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.loader import Loader, eval_loader, train_loader
from pipelines.errors import StopAgreed, UserError
from pipelines.model import features
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TransferModel
from tests.helpers.engines import ENGINES

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torchvision.models import resnet18

CONFIG = Config(image_size=64, resize=72, batch_size=4, views_per_photo=2, loader="pillow", loader_threads=2)
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
                expected = network.forward_frozen(images.images)
                torch.testing.assert_close(features.of(batch), expected, rtol=1e-4, atol=1e-5)
                assert features.of(batch).stride() == expected.stride(), "the layout that the trained part is fast with"
        other.close()
    assert features.of(training.empty_batch()).shape[0] == 0


def test_too_many_views_are_computed_each_time(resnet, split):
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
        torch.testing.assert_close(features.of(batch), network.forward_frozen(batch.images), rtol=1e-4, atol=1e-5)
    assert open_features(fixed, training, epochs=1, limit=19 * MAPS).are_kept, "no more than one view is shown"
    assert open_features(fixed, training, None).report() == []
    assert "once for each of 2 views" in open_features(fixed, training).report()[0]
    assert "every time" in open_features(fixed, training, limit=1).report()[0]
    training.close()


def test_a_pass_that_broke_off_is_begun_again(resnet, split):
    network, training = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), open_loader(split)
    features = open_features(network, training)
    answers = iter([False, False, True, True])  # a batch later it is known on all processes
    with pytest.raises(StopAgreed):
        features.prepare(0, lambda: next(answers))
    photo = Path(split.path(18))
    content = photo.read_bytes()
    photo.unlink()
    with pytest.raises(UserError, match="cannot be decoded"):
        features.prepare(0, never)
    photo.write_bytes(content)
    features.prepare(0, never)
    batch = next(next(training.epoch(0)).batches)
    torch.testing.assert_close(features.of(batch), network.forward_frozen(batch.images), rtol=1e-4, atol=1e-5)
    training.close()


# Across runs


def counted(network: TransferModel, monkeypatch) -> list[int]:
    """Photos of each batch that the frozen part computes from here on."""
    seen, compute = list[int](), network.forward_frozen
    monkeypatch.setattr(network, "forward_frozen", lambda images: seen.append(len(images)) or compute(images))
    return seen


def a_view(split: Split, network: TransferModel, store: FeatureStore, **settings) -> tuple[torch.Tensor, str]:
    """The features of the second of two views, and what is said of the store before."""
    training = open_loader(split, **settings)
    features = open_features(network, training, store=store)
    said = features.in_store()
    features.prepare(1, never)
    training.close()
    return features.rows, said


def test_a_later_run_finds_the_same_features(resnet, split, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("engine", ENGINES)
def test_features_depend_on_the_code_that_decodes(resnet, split, monkeypatch, engine):
    """Pillow decodes some photos of every engine."""
    labels, asked = split.labels.astype(np.int64), []
    training = train_loader(CONFIG, split, labels, PartialState(cpu=True), engine, 4)
    monkeypatch.setattr(features.inspect, "getsource", lambda module: asked.append(module.__name__) or "")
    network = TransferModel(resnet, frozen_stages=5, batchnorm="frozen")
    assert open_features(network, training)._maker
    training.close()
    assert {"pipelines.data.decode", "pipelines.data.engines.pillow", f"pipelines.data.engines.{engine}"} <= set(asked)


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


def test_an_operation_of_a_view_tells_its_features_apart(resnet, split):
    network, keys = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), []
    for augment in ("none", "strong"):
        training = open_loader(split, hue=0.1, augment=augment)
        keys.append(open_features(network, training)._photos(0)[: len(split)])
        drawn = training.in_order(1).plan.views(0, np.arange(len(split))).alterations
        training.close()
    np.testing.assert_array_equal(keys[0] != keys[1], drawn.operations > 0)


def test_drawings_without_compression_keep_their_own_features(resnet, tmp_path):
    """Of one size, with the same margins, and of one second, as they come out of an archive."""
    for number in range(8):
        photo = tmp_path / "train" / "ab"[number % 2] / f"{number}.bmp"
        photo.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((96, 96, 3), np.uint8)
        pixels[40:56, 40:56] = 30 * number
        Image.fromarray(pixels).save(photo)
        os.utime(photo, ns=(10**18, 10**18))
    split = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.0001)).splits["train"]
    assert len({*split.signatures.tolist()}) == len({*split.mtimes.tolist()}) == 1
    network, store = TransferModel(resnet, frozen_stages=5, batchnorm="frozen"), FeatureStore(tmp_path / "store", 10**9)
    settings = {"crop_scale_min": 1, "flip_probability": 0}
    rows, _ = a_view(split, network, store, **settings)
    again, said = a_view(split, network, store, **settings)
    assert said == "2 views of 6 train photos", "which are one, the whole photo"
    assert len({*map(tuple, rows.tolist())}) == 6
    assert torch.equal(rows, again)


def test_each_run_finds_bad_and_changed_photos_itself(resnet, split, tmp_path, capfd):
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
