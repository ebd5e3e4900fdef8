"""The mean of trained weights: of runs, or of one run's checkpoints, as a run folder of which nothing was measured."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deploy import predict
from pipelines import compare, report, soup
from pipelines.config import Config
from pipelines.model.average import mean_of
from pipelines.model.network import TransferModel
from pipelines.model.weights import Weights, read_weights
from pipelines.run.checkpoint import Checkpoints, Progress
from pipelines.run.folder import RunFolder
from pipelines.run_files import read_description, read_run_config, read_status
from tests.helpers.run_files import DESCRIPTION, PROGRESS
from tests.helpers.runs import one_error_line, same_bits, succeeded

import pytest
import torch
from accelerate import Accelerator
from torchvision.models import shufflenet_v2_x0_5

TINY = "shufflenet_v2_x0_5"
HEADER = "path,split,label,answer,probability,loss,answer_2,probability_2\n"


def network(seed: int) -> torch.nn.Module:
    """Statistics and counts, too, go by the seed."""
    torch.manual_seed(seed)
    made = shufflenet_v2_x0_5(num_classes=2)
    for name, buffer in made.named_buffers():
        buffer.fill_(10 * seed) if name.endswith("tracked") else buffer.uniform_(0.5, 1.5)
    return made


@pytest.fixture
def made(tmp_path) -> Callable[..., Path]:
    """Makes runs/NAME with a network of a seed."""

    def make(name: str, seed: int, **described: Any) -> Path:
        run = RunFolder(tmp_path / "runs" / name)
        run.create(Config(run=name, seed=seed, arch=TINY, tracker="wandb"))
        run.save_best(network(seed), DESCRIPTION | {"arch": TINY} | described)
        run.close()
        return run.folder

    return make


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "best.pt", weights_only=True)


def test_the_mean_is_the_one_by_hand():
    one, other = (
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(7)},
        {"w": torch.tensor([2.0, 5.0]), "n": torch.tensor(3)},
    )
    mean = mean_of([one, other, other])
    torch.testing.assert_close(mean["w"], torch.tensor([5 / 3, 4.0]))
    assert (mean["w"].dtype, mean["n"], mean["n"].dtype) == (torch.float32, 7, torch.int64)
    assert torch.equal(one["w"], torch.tensor([1.0, 2.0])), "what is averaged stays as it is"
    values = torch.rand(1000)
    assert torch.equal(mean_of([{"w": values}] * 3)["w"], values)
    doubles = {"w": values.double()}
    mean_of([doubles, doubles])
    assert torch.equal(doubles["w"], values.double())


def test_runs_are_averaged_into_a_run_folder(made, tmp_path, run_here):
    runs = [made(name, seed) for seed, name in enumerate("abc", start=1)]
    out = tmp_path / "runs" / "of all"
    said = succeeded(run_here(soup, *runs, "--out", out))
    assert f"{out}: the mean of 3 networks: a, b, c" in said
    assert "BatchNorm's statistics were trained and differ: they are averaged too" in said
    assert "began with" not in said, "no checkpoint tells"
    states, mean = [state_of(run) for run in runs], state_of(out)
    assert mean.keys() == states[0].keys()
    for name, value in mean.items():
        values = torch.stack([state[name] for state in states])
        expected = values.amax(0) if name.endswith("tracked") else values.double().mean(0).float()
        assert value.dtype == states[0][name].dtype
        assert torch.equal(value, expected), name
    described = read_description(out, "run")
    unknown: dict[str, Any] = {"scores": {}, "temperature": 1.0, "calibration": None, "unsure": []}
    assert described == {**DESCRIPTION, "arch": TINY, **unknown, "average_of": ["a", "b", "c"]} | {
        "versions": described["versions"]
    }
    config, status = read_run_config(out), read_status(out)
    assert (config.run, config.tracker, config.arch) == (None, "none", TINY)
    assert status is not None
    assert status["state"] == "finished"
    assert sorted(os.listdir(tmp_path / "runs")) == ["a", "b", "c", "of all"], "nothing else is left"
    assert not (out / "predictions.csv").exists()
    weights = read_weights(Config(arch=TINY, weights=str(out)))
    assert weights.classes == ("ant", "bee")
    succeeded(run_here(report, out))
    assert "the mean of a, b, c" in (out / "report.html").read_text()


def test_equal_runs_give_the_same_bits_and_no_word_of_statistics(made, tmp_path, run_here):
    run = made("a", 1)
    (run / "config.yaml").unlink()  # weights and model.json are enough
    shutil.copytree(run, tmp_path / "b")
    said = succeeded(run_here(soup, run, tmp_path / "b", "--out", tmp_path / "s"))
    assert same_bits(tmp_path / "s" / "best.pt", run / "best.pt")
    assert "BatchNorm" not in said
    assert read_description(tmp_path / "s", "run")["average_of"] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "line"), [("aa", "a is given twice"), ("aba", "a is given twice"), ("ac", "a and c are one run")]
)
def test_a_run_that_is_named_twice_is_refused(names, line, made, tmp_path, run_here, monkeypatch):
    made("a", 1), made("b", 2)
    monkeypatch.chdir(tmp_path / "runs")
    Path("c").symlink_to("a")
    done = run_here(soup, *names, "--out", "s")
    assert done.returncode == 2
    assert f"soup: {line}: give each once" in one_error_line(done)
    assert sorted(os.listdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("described", "line"),
    [
        ({"classes": ["ant", "wasp"]}, "of the classes 'bee' is in one alone"),
        ({"classes": ["bee", "ant"]}, "the classes' order differs"),
        ({"image_size": 72}, "image_size is 64 and 72"),
        ({"crop_mode": "squash", "resize": 80}, "resize is 72 and 80; crop_mode is center and squash"),
        ({"transparency": "black"}, "transparency is white and black"),
        ({"test_flips": True}, "test_flips is False and True"),
        ({"dataset_fingerprint": "abd"}, "they are of other photos, or another split of them"),
        ({"arch": "resnet18"}, f"arch is {TINY} and resnet18"),
    ],
)
def test_what_is_not_alike_is_refused_in_one_line(described, line, made, tmp_path, run_here):
    done = run_here(soup, made("a", 1), made("b", 2, **described), "--out", tmp_path / "s")
    assert done.returncode == 2
    assert line in one_error_line(done)
    assert os.listdir(tmp_path) == ["runs"]


def damaged(run: Path, how: str) -> None:
    state = state_of(run)
    if how == "NaN":
        state["fc.bias"][0] = float("nan")
    elif how == "shape":
        state["conv1.0.weight"] = state["conv1.0.weight"][:3]
    elif how == "a class less":
        state |= {name: state[name][:1] for name in ("fc.weight", "fc.bias")}
    torch.save(state, run / "best.pt")
    if how == "cut":
        os.truncate(run / "best.pt", 1000)
    elif how == "foreign":
        (run / "model.json").write_text("[]")
    elif how == "none":
        (run / "model.json").unlink()


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("NaN", "holds fc.bias with values that are not finite"),
        ("shape", f"is not a {TINY} in torchvision's layout (first difference: conv1.0.weight)"),
        ("a class less", "best.pt has 1 classes and"),
        ("cut", "is cut off, or not a file that holds tensors"),
        ("foreign", "model.json is damaged"),
        ("none", "give the folder of a run"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(how, line, made, tmp_path, run_here):
    runs = [made("a", 1), made("b", 2)]
    damaged(runs[1], how)
    done = run_here(soup, *runs, "--out", tmp_path / "s")
    assert done.returncode == 2
    assert line in one_error_line(done)
    assert os.listdir(tmp_path) == ["runs"]


def test_a_folder_that_is_there_is_left_alone(made, tmp_path, run_here):
    runs = [made("a", 1), made("b", 2)]
    before = (runs[1] / "best.pt").read_bytes()
    done = run_here(soup, *runs, "--out", runs[1])
    assert done.returncode == 2
    assert "b is there already, and is not overwritten" in one_error_line(done)
    assert (runs[1] / "best.pt").read_bytes() == before
    (tmp_path / "file").write_text("")
    told = one_error_line(run_here(soup, *runs, "--out", tmp_path / "file" / "s"))
    assert f"{tmp_path / 'file'} is no folder that can be written to: give another --out" in told


def test_a_stop_in_the_middle_leaves_nothing(made, tmp_path, run_here, monkeypatch):
    runs = [made("a", 1), made("b", 2)]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_best", stop)
    assert run_here(soup, *runs, "--out", tmp_path / "runs" / "s").returncode == 130
    assert sorted(os.listdir(tmp_path / "runs")) == ["a", "b"]


def test_runs_of_other_first_weights_are_told(made, tmp_path, run_here):
    runs = [made("a", 1), made("b", 2)]
    random = Weights(None, "").digest()
    for number, (digests, is_told) in enumerate(((["0a", "0a"], False), (["0a", "0b"], True), ([random] * 2, True))):
        for run, digest in zip(runs, digests, strict=True):
            folder = run / "checkpoints" / "epoch-0001-step-00000005"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "progress.json").write_text(json.dumps(PROGRESS | {"first_weights": digest}))
        said = succeeded(run_here(soup, *runs, "--out", tmp_path / str(number)))
        assert ("began with different or random weights" in said) == is_told


@pytest.fixture
def trained(made) -> Path:
    """A run with the three last of its checkpoints, of networks 2, 3 and 4; best.pt is of network 9."""
    run = RunFolder(made("a", 9))
    model, progress = TransferModel(network(0), frozen_stages=0, batchnorm="train"), Progress()
    decided = ("interval", "whole_epoch", "bad", "not_finite_in_a_row", "engine", "device", "first_weights", "settings")
    parts: dict[str, Any] = {"model": model, "average": TransferModel(network(7), frozen_stages=0, batchnorm="train")}
    dataset: Any = SimpleNamespace(fingerprint="abc")
    decisions = {key: PROGRESS[key] for key in decided}
    checkpoints = Checkpoints(run, dataset, Accelerator(cpu=True), parts | {"progress": progress}, decisions, kept=3)
    for epoch in range(5):
        model.network.load_state_dict(network(epoch).state_dict())
        progress.epoch, progress.global_step = epoch, 5 * epoch
        checkpoints.save()
    return run.folder


def test_the_last_checkpoints_are_averaged_as_trained(trained, tmp_path, run_here):
    names = [f"epoch-000{epoch}-step-{5 * epoch:08}" for epoch in (2, 3, 4)]
    assert sorted(os.listdir(trained / "checkpoints")) == names
    for last, epochs in ((2, (3, 4)), (5, (2, 3, 4))):
        said = succeeded(run_here(soup, trained, "--last", last, "--out", tmp_path / f"s{last}"))
        few = "has 3 checkpoints, not 5: train with --keep_checkpoints for more"
        assert (few in said) == (last == 5)
        expected = mean_of(network(epoch).state_dict() for epoch in epochs)
        found = state_of(tmp_path / f"s{last}")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        described = read_description(tmp_path / f"s{last}", "run")
        assert described["average_of"] == [f"a/{names[epoch - 2]}" for epoch in epochs]


def test_what_is_before_the_first_update_is_not_averaged(trained, tmp_path, run_here):
    start, *_, last = sorted((trained / "checkpoints").iterdir())
    for folder, step in ((start, 0), (last, 0)):
        file = folder / "progress.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": step}))
    done = run_here(soup, trained, "--last", 3, "--out", tmp_path / "s")
    assert "has 1 checkpoint of a training: train with --keep_checkpoints" in one_error_line(done)
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize("file", ["state.pt", "progress.json"])
def test_a_damaged_checkpoint_is_refused_in_one_line(file, trained, tmp_path, run_here):
    path = sorted((trained / "checkpoints").iterdir())[-1] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    done = run_here(soup, trained, "--last", 2, "--out", tmp_path / "s")
    assert done.returncode == 2
    assert "damaged" in one_error_line(done)
    assert os.listdir(tmp_path) == ["runs"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["a"], "give several runs, or --last N"),
        (["a", "b", "--last", "2"], "--last is for the checkpoints of one run"),
        (["a", "--last", "1"], "and 2 or more"),
        (["a", "--last", "2"], "has 0 checkpoints of a training"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(flags, line, made, tmp_path, run_here, monkeypatch):
    made("a", 1), made("b", 2)
    monkeypatch.chdir(tmp_path / "runs")
    done = run_here(soup, *flags, "--out", "s")
    assert done.returncode == 2
    assert line in one_error_line(done)
    assert sorted(os.listdir()) == ["a", "b"]


def test_an_average_is_no_other_seed_of_its_runs(made, tmp_path, run_here):
    runs = [made("a", 1), made("b", 2)]
    runs.append(tmp_path / "runs" / "s")
    succeeded(run_here(soup, *runs[:2], "--out", runs[2]))
    for run in runs:
        file = run / "figures" / "predictions_val.csv"
        file.write_text(HEADER + "val/ant/0.jpg,val,ant,ant,0.9,0.105361,bee,0.1\n")
    sides, _ = compare.read_sides([compare.read_run(run) for run in reversed(runs)], None)
    assert [[run.name for run in side.runs] for side in sides] == [["s"], ["b", "a"]]
    assert "average_of" in succeeded(run_here(compare, *runs))


@pytest.mark.slow
def test_an_average_of_one_run_answers_as_it_does(trained_run, answers_of_evaluate, tmp_path, run_here, monkeypatch):
    out = tmp_path / "s"
    shutil.copytree(trained_run.folder, tmp_path / "again")
    succeeded(run_here(soup, trained_run.folder, tmp_path / "again", "--out", out))
    assert same_bits(out / "best.pt", trained_run.folder / "best.pt")
    described = json.loads((out / "model.json").read_text())
    # Its own temperature is not known, and confidences are only the same with the run's.
    temperature = read_description(trained_run.folder, "run")["temperature"]
    (out / "model.json").write_text(json.dumps(described | {"temperature": temperature}))
    assert answers_of_evaluate(out) == trained_run.evaluated
    photo = next(iter(trained_run.evaluated))
    assert trained_run.evaluated[photo][0] in succeeded(run_here(predict, out, photo))
