"""A larger run's answers, learned beside the labels: the loss, what is kept of them, which folders are refused."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import train
from pipelines.config import Config, dump_yaml
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.data.loader import Batch, Step, train_loader
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import UserError
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TrainedPart, TransferModel
from pipelines.model.optimizer import make_optimizer
from pipelines.model.teacher import Teacher, read_teacher, sum_of_divergences
from pipelines.model.weights import Weights
from pipelines.run import figures
from pipelines.training.step import sum_of_losses, update
from tests.helpers.run_files import DESCRIPTION
from tests.helpers.runs import FROZEN, ask_at, newest, one_error_line, rows, same_bits, succeeded

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from torchvision.models import resnet18

CLASSES = ("ant", "bee", "wasp")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return resnet18(num_classes=3).state_dict()


@pytest.fixture
def run(tmp_path, state) -> Path:
    """A run's folder with what is read of a teacher."""
    (folder := tmp_path / "big").mkdir()
    torch.save(state, folder / "best.pt")
    describe(folder)
    return folder


def describe(run: Path, **other: Any) -> None:
    of_imagenet = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    (run / "model.json").write_text(json.dumps({**DESCRIPTION, **of_imagenet, "classes": [*CLASSES], **other}))


def settings(run: Path, **others: Any) -> Config:
    return Config(**{"image_size": 64, "resize": 72, "teacher": str(run), "run": "small", **others})


def teacher_of(state: dict[str, torch.Tensor], order: tuple[int, ...] = (0, 1, 2)) -> Teacher:
    return Teacher("resnet18", Weights(state, "runs/big", CLASSES), order)


def trained_like(state: dict[str, torch.Tensor]) -> TransferModel:
    network = resnet18(num_classes=3)
    network.load_state_dict(state)
    return TransferModel(network, frozen_stages=0, batchnorm="frozen").train()


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_the_papers(temperature):
    torch.manual_seed(0)
    logits, answers = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    q, p = (torch.softmax(each / temperature, dim=1) for each in (logits, answers))
    expected = temperature**2 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(sum_of_divergences(logits, answers, temperature), expected)


def gradients(network: TransferModel, config: Config, answers: Any, sizes: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """Of an update with micro-batches of these sizes, its learning rate being tiny: the step's loss, and a gradient."""
    torch.manual_seed(2)
    images, labels = torch.randn(sum(sizes), 3, 64, 64), torch.arange(sum(sizes)) % 3
    parts = torch.arange(sum(sizes)).split(list(sizes))
    batches = (Batch(images[at], labels[at], at) for at in parts)
    features: Any = SimpleNamespace(of=lambda batch: batch.images)
    accelerator, loader, weights = Accelerator(cpu=True), None, torch.tensor([0.5, 1.0, 2.0])
    given = (TrainedPart(network), features, make_optimizer(network, config), Step(sum(sizes), len(sizes), batches))
    sums, _ = update(*given, (False, False), loader, accelerator, config, weights, answers)  # type: ignore[arg-type]
    return sums[0], (network.network.fc.weight.grad.clone(), images, labels, weights)


def test_a_step_has_the_losses_of_both_and_micro_batches_change_nothing(state):
    teacher = teacher_of(state)
    answers: Any = SimpleNamespace(of=lambda batch: teacher.forward_frozen(batch.images))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = TransferModel(resnet18(num_classes=3), frozen_stages=0, batchnorm="frozen").train()
    config = Config(lr=1e-9, momentum=0, label_smoothing=0.1, teacher="runs/big", teacher_weight=0.75)
    loss, (gradient, images, labels, weights) = gradients(copy.deepcopy(network), config, answers, (4,))
    logits, its = network(images), teacher.forward_frozen(images)
    of_labels = sum_of_losses(logits, Batch(images, labels, labels), weights, 0.1)
    expected = 0.25 * of_labels + 0.75 * sum_of_divergences(logits, its, 2.0)
    torch.testing.assert_close(loss, expected.detach())
    (of_mean,) = torch.autograd.grad(expected / 4, network.network.fc.weight)
    torch.testing.assert_close(gradient, of_mean, rtol=1e-4, atol=1e-6)
    in_parts, (of_parts, *_) = gradients(copy.deepcopy(network), config, answers, (1, 3))
    torch.testing.assert_close(in_parts, loss)
    torch.testing.assert_close(of_parts, gradient, rtol=1e-4, atol=1e-6)
    without, _ = gradients(copy.deepcopy(network), config, None, (4,))
    torch.testing.assert_close(without, of_labels.detach())


def test_who_answers_as_the_teacher_has_nothing_to_learn_from_it(state):
    teacher = teacher_of(state)
    answers: Any = SimpleNamespace(of=lambda batch: teacher.forward_frozen(batch.images))
    config = Config(teacher="runs/big", teacher_weight=1.0, teacher_temperature=1.0)
    loss, (gradient, *_) = gradients(trained_like(state), config, answers, (4,))
    assert loss.abs() < 1e-5
    assert gradient.abs().max() < 1e-5


# The answers


def test_answers_are_the_runs_in_the_order_of_these_classes(state, run):
    images = torch.randn(2, 3, 64, 64)
    expected = trained_like(state).eval()(images)
    plain = read_teacher(settings(run), CLASSES)
    torch.testing.assert_close(plain.forward_frozen(images), expected, rtol=1e-4, atol=1e-4)
    turned = read_teacher(settings(run), ("wasp", "ant", "bee"))
    torch.testing.assert_close(turned.forward_frozen(images), expected[:, [2, 0, 1]], rtol=1e-4, atol=1e-4)
    assert plain.digest != turned.digest, "what is learned is another"
    assert not turned.forward_frozen(images).requires_grad


def test_answers_are_looked_up_where_the_view_was_seen_and_kept_by_all_that_they_depend_on(state, photos, tmp_path):
    split = load_dataset(scan_dataset(photos, tmp_path / "cache", 0.2)).splits["train"]
    config = Config(image_size=64, resize=72, batch_size=4, views_per_photo=2, loader="pillow", loader_threads=2)
    training = train_loader(config, split, split.labels.astype(np.int64), PartialState(cpu=True), "pillow", 4)
    store, accelerator = FeatureStore(tmp_path / "features", 10**8), Accelerator(cpu=True)
    kept: Any = {"views_per_photo": 2, "epochs": 2, "micro_batch": 4, "store": store, "name": "teacher"}
    answers = FrozenFeatures(teacher_of(state), training, accelerator, **kept)
    assert (answers.are_kept, answers.bytes) == (True, 2 * 19 * 3 * 4)
    answers.prepare(1, lambda: False)
    batch = next(next(training.epoch(1)).batches)
    torch.testing.assert_close(answers.of(batch), teacher_of(state).forward_frozen(batch.images), rtol=1e-4, atol=1e-4)
    assert FrozenFeatures(teacher_of(state), training, accelerator, **kept).in_store() == "1 view of 19 train photos"
    other_head = FrozenFeatures(teacher_of(state, (1, 0, 2)), training, accelerator, **kept)
    assert other_head.in_store() == "", "the head answers"
    training.close()


# The folder


@pytest.mark.parametrize(
    ("other", "classes", "line"),
    [
        ({}, ("ant", "bee", "fly"), "does not know the class 'fly'"),
        ({}, ("ant", "bee"), "has a class 'wasp', and the photos none"),
        ({"image_size": 96, "resize": 128}, CLASSES, "give --image_size 96 (with a --resize"),
        ({"arch": "vit_b_16", "image_size": 96, "resize": 128}, CLASSES, "vision transformer: give --image_size 96,"),
        ({"mean": [0.5, 0.5, 0.5]}, CLASSES, "another mean or std of its input than ImageNet's"),
        ({"arch": "resnet34"}, CLASSES, "is not a resnet34"),
        ({"classes": ["ant", "bee"]}, ("ant", "bee"), "has 3 classes and"),
    ],
)
def test_a_teacher_that_would_not_fit_is_refused_in_a_line(run, other, classes, line):
    describe(run, **other)
    with pytest.raises(UserError, match=rf"^teacher: .*{re.escape(line)}"):
        read_teacher(settings(run), classes)


def test_a_teacher_that_was_evaluated_at_another_size_as_this_run_is_is_taken(run):
    describe(run, image_size=96, resize=128)
    assert read_teacher(settings(run, eval_size=96, resize=128), CLASSES).arch == "resnet18"


def test_of_a_run_with_its_settings_the_training_counts(run):
    """A network that is evaluated at a larger size than it was trained at, as a teacher and as the network."""
    describe(run, image_size=96, resize=128)
    (run / "config.yaml").write_text(dump_yaml(Config(image_size=64, eval_size=96, resize=128)))
    assert read_teacher(settings(run), CLASSES).arch == "resnet18"
    (run / "config.yaml").write_text(dump_yaml(Config(image_size=96, resize=128)))
    with pytest.raises(UserError, match="was trained for 96 pixels, and it sees what this run sees, 64"):
        read_teacher(settings(run, eval_size=96, resize=128), CLASSES)


def test_a_folder_that_is_no_run_or_the_run_itself_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="itself"):
        read_teacher(replace(settings(run), runs=str(tmp_path), run="big"), CLASSES)
    (run / "best.pt").unlink()
    with pytest.raises(UserError, match=r"has no best\.pt"):
        read_teacher(settings(run), CLASSES)
    with pytest.raises(UserError, match=r"teacher: .*model\.json cannot be read"):
        read_teacher(settings(tmp_path / "gone"), CLASSES)


def test_a_run_goes_on_with_the_same_teacher_only(run, state, tmp_path):
    digest = read_teacher(settings(run), CLASSES).digest
    moved = run.rename(tmp_path / "moved")
    assert read_teacher(settings(moved), CLASSES, digest).source == str(moved)
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, moved / "best.pt")
    with pytest.raises(UserError, match="has other weights than the teacher that run small has had so far"):
        read_teacher(settings(moved), CLASSES, digest)


# A training


@pytest.mark.slow
def test_a_stopped_training_with_kept_answers_goes_on_to_the_same_bits(
    run, photos, random_weights, tmp_path, run_here, monkeypatch
):
    command = [*FROZEN[:4], "--freeze", "layer3", "--batchnorm", "frozen", "--tracker", "none", "--head-init", "zeros"]
    command += ["--views-per-photo", "1", "--epochs", "2", "--batch-size", "7", "--log-every", "1", "--teacher", run]
    command += ["--weights", random_weights, "--data", photos, "--runs", tmp_path, "--loader", "pillow"]
    monkeypatch.setattr(figures, "attempt", lambda *_: False)  # pictures are most of the time
    said = succeeded(run_here(train, *command, "--run", "whole"))
    assert f"teacher: {run}, a resnet18 of 11,178,051 parameters, has 0.9 of the loss, at temperature 2" in said
    assert "teacher: it was trained on other photos" in said
    assert "teacher: computed once for the one view of a photo" in said
    with monkeypatch.context() as patch:
        ask_at(patch, "update", 5)  # of 3 an epoch
        assert run_here(train, *command, "--run", "stopped").returncode == 75
    best = (run / "best.pt").read_bytes()
    torch.save({name: value * 2 for name, value in torch.load(run / "best.pt").items()}, run / "best.pt")
    refused = run_here(train, *command, "--run", "stopped")
    assert refused.returncode == 2
    assert "has other weights than the teacher that run stopped has had so far" in one_error_line(refused)
    (run / "best.pt").write_bytes(best)
    said = succeeded(run_here(train, *command, "--run", "stopped"))
    assert "teacher: 1 view of 19 train photos from the cache" in said
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert same_bits(newest(tmp_path / "stopped") / "state.pt", newest(tmp_path / "whole") / "state.pt")
