"""Whole runs: the real commands under the launcher, on one and on two processes; further runs in this process."""

import json
import os
import re
import shutil
import subprocess
import sys

import evaluate
import train
from pipelines.config import parse_config
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.data.loader import train_loader
from pipelines.model.network import build_model
from pipelines.model.weights import read_weights
from pipelines.run.predictions import read_predictions
from tests.helpers.paths import ROOT
from tests.helpers.runs import FROZEN, SMALL, run_script, succeeded, train_rows, val_rows

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torchvision.models import resnet18

METRICS = {"train/loss", "train/top1", "lr/head", "perf/images_per_s", "perf/data_wait", "epoch", "global_step"}


def real(name: str) -> str:
    if not os.environ.get(name):
        pytest.skip(f"needs {name}: the ants-and-bees photos and ResNet-18 weights of a user")
    return os.environ[name]


@pytest.mark.slow
def test_quickstart_learns_and_says_what_it_left(tmp_path):
    """The README's first command: over 90 %, and a next command that works."""
    settings = ["--config", ROOT / "configs/quickstart.yaml", "--runs", tmp_path, "--run", "quick"]
    said = succeeded(run_script("train.py", *settings, DALITUNE_CACHE=str(tmp_path / "cache"), HOME=str(tmp_path)))
    run = tmp_path / "quick"
    best = max(row["val/top1"] for row in val_rows(run))
    assert best > 0.9
    assert f"best val top1 {best:.4f}" in said
    assert re.search(r"[0-9.]+ s in all", said)
    assert f"best weights: {run / 'best.pt'}" in said
    assert re.search(rf"next: +accelerate launch evaluate.py {re.escape(str(run))}", said)
    left = {"config.yaml", "status.json", "metrics.jsonl", "best.pt", "model.json", "figures"}
    assert left <= {path.name for path in run.iterdir()}
    drawn = {"train_batch.png", "curves.png", "calibration.png", "confusion_matrix.png", "per_class.png"}
    assert {path.name for path in (run / "figures").iterdir()} == drawn
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert all(set(row) >= METRICS for row in train_rows(run))

    said = succeeded(run_script("evaluate.py", run, "--json", tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["top1"] == best
    assert scores["correct"] / scores["count"] == best
    assert sum(map(sum, scores["confusion_matrix"])) == scores["count"]
    assert scores["interval"][0] < best <= scores["interval"][1]
    assert {"confusion_matrix_val.png", "predictions_val.png"} < {path.name for path in (run / "figures").iterdir()}


@pytest.mark.slow
def test_the_rows_and_the_tutorials_three_lines(photos, tmp_path, run_here):
    settings = ["--data", photos, "--epochs", "2", "--batch-size", "4", "--log-every", "2", "--run", "rows"]
    said = succeeded(run_script("train.py", *SMALL, *settings, "--runs", tmp_path))
    run = tmp_path / "rows"
    assert [row["global_step"] for row in train_rows(run)] == [2, 4, 5, 6, 8, 10]  # every second, and an epoch's last
    assert [(row["epoch"], row["global_step"]) for row in val_rows(run)] == [(1, 5), (2, 10)]
    table = [line for line in said.splitlines() if re.match(r" +[12]/2 ", line)]
    header = next(line for line in said.splitlines() if line.startswith("epoch "))
    assert [len(line) for line in table] == [len(header)] * 2

    m = resnet18()
    m.fc = nn.Linear(512, 3)
    m.load_state_dict(torch.load(run / "best.pt", map_location="cpu"))
    model = json.loads((run / "model.json").read_text())
    assert model["classes"] == ["ant", "bee", "wasp"]
    assert (model["arch"], model["image_size"], model["resize"]) == ("resnet18", 64, 72)

    again = run_here(train, *SMALL, *settings, "--runs", tmp_path)
    assert "is finished: nothing to do" in succeeded(again)
    refused = run_here(train, *SMALL, *settings, "--runs", tmp_path, "--lr", "0.5")
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "--overwrite" in refused.stderr
    succeeded(run_here(train, *SMALL, *settings, "--runs", tmp_path, "--overwrite", "--max-steps", "3"))
    assert [row["global_step"] for row in train_rows(run)] == [2, 3]
    assert [row["global_step"] for row in val_rows(run)] == [3]


@pytest.mark.slow
def test_two_and_four_processes_train_as_one(photos, photo_folder, random_weights, tmp_path, run_here):
    """The same losses to float tolerance, BatchNorm frozen. The last step has one photo, other processes none."""
    settings = ["--data", photos, "--weights", random_weights, "--epochs", "2", "--batch-size", 6]
    settings += [*FROZEN, "--runs", tmp_path, "--log-every", "1"]
    assert "processes: 1 on cpu" in succeeded(run_here(train, *settings, "--run", "p1"))
    alone = tmp_path / "p1"
    assert len(train_rows(alone)) == 2 * 4
    for count in (2, 4):
        said = succeeded(run_script("train.py", *settings, "--run", f"p{count}", processes=count))
        assert f"processes: {count} on cpu" in said
        for select, names in ((train_rows, ("train/loss", "train/top1", "lr/head")), (val_rows, ("val/loss",))):
            for name in (*names, "epoch", "global_step"):
                found, expected = ([row[name] for row in select(run)] for run in (tmp_path / f"p{count}", alone))
                assert found == pytest.approx(expected, rel=1e-3), (count, name)
        found, expected = (read_predictions(tmp_path / f"p{each}" / "predictions.csv") for each in (count, 1))
        assert found.paths == expected.paths
        assert len(found) == 11

    few = photo_folder({"val": {"ant": 1, "bee": 2}})  # fewer than processes
    for data, photo_count in ((photos, 11), (few, 3)):
        scores = {}
        for count in (1, 2, 4) if data == photos else (1, 4):
            file = tmp_path / f"{photo_count}-{count}.json"
            arguments = [alone, "--data", data, "--json", file, "--figures", tmp_path / "figures"]
            done = (
                run_here(evaluate, *arguments) if count == 1 else run_script("evaluate.py", *arguments, processes=count)
            )
            succeeded(done)
            scores[count] = json.loads(file.read_text())
            assert scores[count]["world_size"] == count
            assert scores[count]["count"] == photo_count
            assert scores[count]["confusion_matrix"] == scores[1]["confusion_matrix"]
            assert scores[count]["correct"] == scores[1]["correct"]


@pytest.mark.slow
def test_the_loop_is_the_tutorials_loop(photos, random_weights, tmp_path, run_here):
    """The same batches through nine plain lines of PyTorch: the same losses, step by step, and the same weights."""
    settings = ["--data", photos, "--weights", random_weights, "--image-size", "64", "--resize", "72", "--epochs", "1"]
    settings += [
        "--config",
        ROOT / "configs/tutorial_finetune.yaml",
        "--tracker",
        "none",
        "--log-every",
        "1",
        "--loader",
        "pillow",
    ]
    succeeded(run_here(train, *settings, "--runs", tmp_path, "--run", "r"))
    config, _ = parse_config([*map(str, settings)])
    split = load_dataset(scan_dataset(photos, tmp_path / "cache", 0.2)).splits["train"]
    loader = train_loader(config, split, split.labels, PartialState(cpu=True), "pillow", config.batch_size)
    network = build_model(config, read_weights(config), split.classes).network
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    network.train()
    for step in loader.epoch(0):
        for batch in step.batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(batch.images), batch.labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 5
    assert [row["train/loss"] for row in train_rows(tmp_path / "r")] == pytest.approx(losses, rel=1e-4)
    best = torch.load(tmp_path / "r" / "best.pt", weights_only=True)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(best[name], value.contiguous(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_engines_and_micro_batches_train_alike_and_a_seed_repeats(photos, random_weights, tmp_path, run_here):
    settings = ["--data", photos, "--weights", random_weights, "--epochs", "1", "--batch-size", "8", *FROZEN]
    settings += ["--runs", tmp_path, "--log-every", "1"]
    variants = {"torch": [], "again": [], "micro": ["--max-batch-per-device", "3"], "other": ["--seed", "1"]}
    try:
        import nvidia.dali  # noqa: F401

        variants["dali"] = ["--loader", "dali"]
    except ImportError:
        pass
    losses = {}
    for name, extra in variants.items():
        succeeded(run_here(train, *settings, *extra, "--run", name))
        losses[name] = [row["train/loss"] for row in train_rows(tmp_path / name)]
    assert losses["again"] == losses["torch"]
    states = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("torch", "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses["micro"] == pytest.approx(losses["torch"], rel=1e-3)
    assert losses["other"] != pytest.approx(losses["torch"], rel=1e-3)
    if "dali" in losses:
        assert losses["dali"] == pytest.approx(losses["torch"], rel=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ code on a CPU: install g++")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_compiled_model_trains_alike_and_saves_the_same_names(processes, photos, random_weights, tmp_path):
    settings = ["--data", photos, "--weights", random_weights, "--epochs", "1", "--batch-size", "8", *FROZEN]
    settings += ["--runs", tmp_path, "--log-every", "1"]
    for name, extra in {"eager": [], "compiled": ["--compile"]}.items():
        done = run_script("train.py", *settings, *extra, "--run", name, processes=processes)
        assert f"processes: {processes} on cpu" in succeeded(done)
    eager, compiled = ([row["train/loss"] for row in train_rows(tmp_path / name)] for name in ("eager", "compiled"))
    assert len(eager) == 3
    assert compiled == pytest.approx(eager, rel=1e-3)
    first, other = (torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("eager", "compiled"))
    assert list(first) == list(other)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tutorial_finetune", "tutorial_features", "finetune", "feature_extract"])
def test_each_recipe_starts_on_the_real_photos(recipe, tmp_path, run_here):
    data, weights = real("DALITUNE_DATA"), real("DALITUNE_WEIGHTS")
    settings = ["--config", ROOT / f"configs/{recipe}.yaml", "--tracker", "none", "--max-steps", "2"]
    said = succeeded(run_here(train, *settings, "--runs", tmp_path, "--run", "r"))
    assert f"weights: {weights}" in said
    assert "train: 244 photos" in said
    assert data in said
    steps = {"finetune": [0, 2], "feature_extract": [0]}  # evaluated, too, is a head that was fitted
    assert [row["global_step"] for row in val_rows(tmp_path / "r")] == steps.get(recipe, [2])
    assert (tmp_path / "r" / "best.pt").exists()


@pytest.mark.slow
def test_bf16_and_the_launchers_config_file(photos, tmp_path):
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_config.yaml",
        "--mixed_precision",
        "bf16",
    ]
    settings = ["--data", photos, *SMALL, "--epochs", "1", "--runs", tmp_path, "--run", "bf16"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, [*launch, ROOT / "train.py", *settings])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert re.search(r"processes: 1 on \w+, precision bf16", succeeded(done))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(photos, tmp_path, run_here):
    settings = ["--data", photos, *SMALL, "--lr", "1e30", "--batch-size", "2", "--runs", tmp_path, "--run", "nan"]
    done = run_here(train, *settings)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(r"not finite.*step \d+, lr [0-9.]+e\+29.*\.jpg.*--lr", lines[0])
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "nan" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "not finite" in status["reason"]


@pytest.mark.slow
def test_a_mistake_is_said_once_however_many_processes_run(photos, tmp_path, run_here, monkeypatch):
    done = run_script("train.py", "--data", tmp_path / "nowhere", *SMALL, "--runs", tmp_path / "runs", processes=2)
    assert done.returncode != 0
    assert {f"local_rank: {rank}" for rank in (0, 1)} & set(re.findall(r"local_rank: \d", done.stderr))
    assert done.stderr.count("error: ") == 1
    assert "nowhere" in done.stderr
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("RANK", "1")
    done = run_here(train, "--batchsize", "3")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning-rate", "1"], "unknown flag"),
        (["--lr", "nan"], "--lr"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--weights", "no/such/file", "--data", "PHOTOS"], "no/such/file"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, named, photos, tmp_path, run_here):
    arguments = [str(photos) if argument == "PHOTOS" else argument for argument in arguments]
    done = run_here(train, *arguments, "--tracker", "none", "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing is left of a run that never started"


@pytest.mark.slow
def test_fp16_on_a_cpu_is_refused_in_one_line(photos, tmp_path):
    done = run_script(
        "train.py", "--data", photos, *SMALL, "--runs", tmp_path, launcher=False, ACCELERATE_MIXED_PRECISION="fp16"
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "fp16" in done.stderr


@pytest.mark.slow
def test_grad_norm_is_that_of_the_gradient_before_it_is_clipped(photos, tmp_path, random_weights, run_here):
    settings = [*FROZEN, "--data", photos, "--weights", random_weights, "--runs", tmp_path, "--max-steps", "1"]
    settings += ["--lr-body", "0.005", "--momentum", "0", "--weight-decay", "0", "--warmup-epochs", "0"]
    succeeded(run_here(train, *settings, "--run", "whole"))
    succeeded(run_here(train, *settings, "--run", "clipped", "--clip-grad-norm", "0.01"))
    config, _ = parse_config([str(setting) for setting in settings])
    before = build_model(config, read_weights(config), ("ant", "bee", "wasp")).network.state_dict()
    norms = [train_rows(tmp_path / run)[0]["grad_norm"] for run in ("whole", "clipped")]
    assert norms[0] == norms[1] > 0.1
    for run, expected in (("whole", norms[0]), ("clipped", 0.01)):
        after = torch.load(tmp_path / run / "best.pt", weights_only=True)
        step = sum(float((after[name] - before[name]).double().square().sum()) for name in before) ** 0.5
        assert step / 0.005 == pytest.approx(expected, rel=1e-3)
