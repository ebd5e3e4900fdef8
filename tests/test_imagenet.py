"""The ImageNet recipes: torchvision's settings and FFCV's, and some steps on a made-up folder in ImageNet's layout."""

import json
from pathlib import Path

import evaluate
import train
from pipelines.config import parse_config
from pipelines.data.plan import grown_size
from pipelines.model.network import build_model
from pipelines.model.optimizer import lr_factor, make_optimizer
from pipelines.model.weights import Weights
from tests.helpers.paths import ROOT

import numpy as np
import pytest
from PIL import Image

RECIPE = ROOT / "configs" / "imagenet.yaml"
FFCV = ROOT / "configs" / "imagenet_ffcv.yaml"
CLASSES = 1000


def test_the_optimizer_is_that_of_torchvisions_reference():
    config, _ = parse_config([f"--config={RECIPE}"])
    model = build_model(config, Weights(None, "random"), [f"n{number:08}" for number in range(CLASSES)])
    groups = make_optimizer(model, config).param_groups
    # One setting for all 62 tensors: --norm-weight-decay and --bias-weight-decay are not given there.
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == 62
    for group in groups:
        facts = [group[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening")]
        assert facts == [0.1, 0.9, 1e-4, False, 0]
    factors = [lr_factor(config, 5005, epoch * 5005) for epoch in (0, 29, 30, 59, 60, 89)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert (config.epochs, config.batch_size, config.label_smoothing, config.clip_grad_norm) == (90, 256, 0, None)


def test_the_other_recipe_is_ffcvs():
    config, _ = parse_config([f"--config={FFCV}"])
    model = build_model(config, Weights(None, "random"), [f"n{number:08}" for number in range(CLASSES)])
    for group in make_optimizer(model, config).param_groups:
        decays = {value.ndim > 1 for value in group["params"]} == {True}
        assert (group["base_lr"], group["weight_decay"]) == (0.5, 5e-5 if decays else 0)
    # Its get_resolution: from 160 at epoch 65 to 192 at 76 along a line, rounded to the nearest multiple of 32.
    theirs = [int(np.round(np.interp(epoch, [65, 76], [160, 192]) / 32)) * 32 for epoch in range(88)]
    assert config.first_image_size is not None
    assert config.grow_epochs is not None
    sizes = (config.first_image_size, config.image_size, config.grow_epochs)
    assert [grown_size(*sizes, epoch) for epoch in range(88)] == theirs
    assert round(config.evaluation_size / (224 / 256)) == config.resize


@pytest.fixture(scope="module")
def made_up_imagenet(tmp_path_factory) -> Path:
    """1000 classes named as WordNet's, one small noisy JPEG each in train and in val."""
    root, rng = tmp_path_factory.mktemp("made_up_imagenet"), np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(CLASSES):
            folder = root / split / f"n{1_440_764 + 7 * number:08}"
            folder.mkdir(parents=True)
            noise = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{folder.name}_{number}.JPEG")
    return root


@pytest.mark.slow
def test_some_steps_on_a_folder_in_imagenets_layout(made_up_imagenet, tmp_path, run_here):
    small = ["--image_size=64", "--resize=72", "--tracker=none"]
    flags = [f"--config={RECIPE}", f"--data={made_up_imagenet}", f"--runs={tmp_path}", "--run=few", "--max_steps=6"]
    done = run_here(train, *flags, *small)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()]
    # 1000 photos are 4 steps of 256: one whole epoch and half of the next.
    assert [(row["epoch"], row["global_step"]) for row in rows if "val/top1" in row] == [(1, 4), (2, 6)]
    assert all(row["lr/body"] == row["lr/head"] == 0.1 for row in rows if "lr/head" in row)

    scores = tmp_path / "scores.json"
    done = run_here(evaluate, tmp_path / "few", "--json", scores)
    assert done.returncode == 0, done.stderr
    assert "top-5 " in done.stdout
    found = json.loads(scores.read_text())
    assert found["count"] == CLASSES
    assert len(found["classes"]) == CLASSES
    assert found["classes"][0] == "n01440764"
    # A network that knows nothing: about 1 and 5 of 1000.
    assert found["top1"] <= found["topk"]["5"] < 0.05


@pytest.mark.slow
def test_some_steps_of_the_other_recipe(photos, tmp_path, run_here):
    small = ["--first_image_size=64", "--image_size=96", "--eval_size=128", "--resize=146", "--grow_epochs=1"]
    flags = [f"--config={FFCV}", f"--data={photos}", f"--runs={tmp_path}", "--run=few", "--tracker=none", *small]
    done = run_here(train, *flags, "--max_steps=2")  # of one an epoch
    assert done.returncode == 0, done.stderr
    description = json.loads((tmp_path / "few" / "model.json").read_text())
    assert (description["image_size"], description["resize"], description["test_flips"]) == (128, 146, True)
    rows = [json.loads(line) for line in (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([row["train/loss"] for row in rows if "train/loss" in row]).sum() == 2
