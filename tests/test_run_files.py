"""A run folder may come from anywhere: what is in it is checked when it is read, and refused in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import train
from deploy import export, predict, serve
from pipelines import compare, config
from pipelines.config import Config, dump_yaml, parse_config
from pipelines.errors import UserError
from pipelines.files import file_digest
from pipelines.run_files import (
    NewerFormat,
    read_description,
    read_progress,
    read_rows,
    read_run_config,
    read_status,
    to_json,
    what_auto_came_to,
)
from tests.helpers.run_files import DESCRIPTION, PROGRESS, STATUS, without

import pytest
import torch

DEEP = "[" * 100_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def refused(action: Callable[[], Any], *told: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    line = str(caught.value)
    assert len(line) < 400
    assert line.isprintable()
    for each in told:
        assert each in line


def test_whole_files_are_read(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION | {"of a newer version": 1}))
    assert read_description(tmp_path, "run") == DESCRIPTION
    (tmp_path / "status.json").write_text(json.dumps(STATUS))
    assert read_status(tmp_path) == STATUS
    (tmp_path / "progress.json").write_text(json.dumps(PROGRESS))
    assert read_progress(tmp_path) == PROGRESS
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION | {"classes": ["K\udce4fer", "\U0001f41d\r"]}))
    assert read_description(tmp_path, "run")["classes"] == ["K\udce4fer", "\U0001f41d\r"]


def test_what_an_older_version_did_not_write_is_filled_in(tmp_path):
    for key in ("format", "scores", "data", "dataset_fingerprint", "versions", "test_flips", "unsure"):
        (tmp_path / "model.json").write_text(json.dumps(without(DESCRIPTION, key)))
        assert read_description(tmp_path, "run").keys() == DESCRIPTION.keys()
    assert read_description(tmp_path, "run")["unsure"] == []
    for key, meant in (("test_flips", False), ("temperature", 1.0), ("calibration", None)):
        (tmp_path / "model.json").write_text(json.dumps(without(DESCRIPTION, key)))
        assert read_description(tmp_path, "run")[key] == meant  # type: ignore[literal-required]
    (tmp_path / "progress.json").write_text(json.dumps(without(PROGRESS, "format")))
    assert read_progress(tmp_path) == PROGRESS
    (tmp_path / "progress.json").write_text(json.dumps(without(without(PROGRESS, "engine"), "device")))
    assert read_progress(tmp_path) == PROGRESS | {"engine": "pillow", "device": "cpu"}


@pytest.mark.parametrize("key", ["arch", "classes", "image_size", "resize", "mean", "std"])
def test_what_a_reader_of_the_weights_needs_must_be_there(key, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(without(DESCRIPTION, key)))
    refused(lambda: read_description(tmp_path, "run"), "run: ", "model.json is damaged", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arch", "resnet1000000"),
        ("arch", ["resnet18"]),
        ("classes", 3),
        ("classes", ["ant"]),
        ("classes", ["ant", "ant"]),
        ("classes", ["ant", 5]),
        ("test_flips", "yes"),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("calibration", {"photos": 3}),
        ("calibration", DESCRIPTION["calibration"] | {"after": {"loss": 0.5, "ece": 0.5, "bins": [[1, 0.5]]}}),
        ("unsure", [{"wanted": 0.99, "below": 1.5, "photos": 4, "kept": 3, "right": 3}]),
        ("unsure", [{"wanted": 0.99, "below": 0.5, "photos": 4, "kept": 3, "right": 4}]),
        ("unsure", [{"wanted": 0.99, "below": 0.5, "photos": 4, "kept": 5, "right": 3}]),
        ("image_size", 10**9),
        ("image_size", float("inf")),
        ("image_size", float("nan")),
        ("image_size", 64.5),
        ("image_size", True),
        ("image_size", 100),  # more than resize
        ("resize", "72"),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [0.5, [0.5], 0.5]),
        ("scores", [1]),
        ("scores", {"val/top1": [0.5]}),
        ("scores", {"val/loss": "x"}),
        ("scores", {"val/top1": float("inf")}),
        ("scores", {"correct": 5, "count": 4}),
        ("scores", {"correct": 1.5, "count": 4}),
        ("data", {"a": 1}),
        ("dataset_fingerprint", 3),
        ("versions", {"torch": 2}),
        ("format", "1"),
    ],
)
def test_a_foreign_description_is_refused_by_its_key(key, value, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(DESCRIPTION | {key: value}))
    refused(lambda: read_description(tmp_path, "run"), "model.json is damaged", "resize" if value == 100 else key)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", DEEP, '{"a":' * 10_000, "\x1b[2J", "9" * 10_000, "[" + " " * (1 << 24) + "]"]
)
def test_every_reader_refuses_a_file_that_is_no_description(text, tmp_path):
    for name, read in (("model.json", lambda: read_description(tmp_path, "run")), ("status.json", read_status)):
        (tmp_path / name).write_text(text)
        refused(read if name == "model.json" else lambda: read_status(tmp_path), f"{name} is damaged")
    (tmp_path / "progress.json").write_text(text)
    refused(lambda: read_progress(tmp_path), "progress.json is damaged")


@pytest.mark.parametrize("key", ["interval", "files", "bad", "best", "epoch", "metrics_bytes", "dataset_fingerprint"])
@pytest.mark.parametrize("value", [[], "x", -1, {"../../etc/passwd": "0a"}, None])
def test_a_foreign_checkpoint_is_refused_by_its_key(key, value, tmp_path):
    if (key, value) == ("dataset_fingerprint", "x"):
        return
    (tmp_path / "progress.json").write_text(json.dumps(PROGRESS | {key: value}))
    refused(lambda: read_progress(tmp_path), "progress.json is damaged", key)


@pytest.mark.parametrize(
    "row",
    [
        *("[]", "{", "3", '{"epoch": 1}', '{"epoch": 1, "global_step": -1}', '{"epoch": 1, "global_step": "2"}', DEEP),
        *('{"epoch": 1, "global_step": 2, "val/top1": [1]}', '{"epoch": 1, "global_step": 2, "val/top1": Infinity}'),
        *('{"epoch": 1, "global_step": 2, "val/top1": 1e999}', '{"epoch": 1, "global_step": 1' + "0" * 400 + "}"),
    ],
)
def test_a_foreign_row_is_refused_by_its_line(row, tmp_path):
    good = '{"epoch": 1, "global_step": 1, "val/top1": null}\n'
    (tmp_path / "metrics.jsonl").write_text(good + row + "\n" + good)
    refused(lambda: read_rows(tmp_path / "metrics.jsonl"), "metrics.jsonl, line 2 is damaged")


def test_a_row_that_a_kill_has_cut_off_is_not_read(tmp_path):
    row = {"epoch": 1, "global_step": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:9])
    assert read_rows(tmp_path / "metrics.jsonl") == [row]


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    (tmp_path / "config.yaml").symlink_to("/dev/zero")
    for name in ("model.json", "status.json", "progress.json", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    readers: list[Callable[[], Any]] = [lambda: read_description(tmp_path, "run"), lambda: read_status(tmp_path)]
    readers += [lambda: read_progress(tmp_path), lambda: read_rows(tmp_path / "metrics.jsonl")]
    for read in [*readers, lambda: read_run_config(tmp_path)]:
        refused(read, "is no regular file")


def test_a_newer_format_is_named(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"format": 9, "network": "one that nobody knows yet"}))
    refused(lambda: read_description(tmp_path, "run"), "model.json is of format 9", "reads up to 3")
    (tmp_path / "progress.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(NewerFormat, match=r"progress\.json is of format 3"):
        read_progress(tmp_path)
    for number in ("2", "0", "x", "[1]", "99999999999"):
        (tmp_path / "config.yaml").write_text(f"format: {number}\nnew_key: 1\n")
        refused(lambda: read_run_config(tmp_path), "config.yaml: is of format", "reads up to 1")


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, BOMB + "lr: *i\n", BOMB + "format: *i\n", "? *x\n: 1\n", "lr: " + DEEP, "lr: &a [*a]\n"),
        *("a: 1\n" * 20_000, "".join(f"k{number}: 1\n" for number in range(6000)), "title: my site\n"),
        *("run: \x1b[2J\n", "lr: !!python/name:os\n"),
    ],
)
def test_a_foreign_config_is_refused(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    refused(lambda: read_run_config(tmp_path), "config.yaml")


def test_retired_settings_are_read_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "RETIRED", {"learning_rate": "lr", "mixup": None})
    (tmp_path / "config.yaml").write_text("format: 1\nlearning_rate: 0.25\nmixup: 0.1\n")
    assert read_run_config(tmp_path).lr == 0.25
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("config.yaml: ")[2] for line in said] == [
        "learning_rate is called lr now",
        "mixup is no setting any more, and is passed over",
    ]
    with pytest.raises(UserError, match="unknown flag '--mixup'"):
        parse_config(["--mixup", "1"])


def test_json_is_strict():
    content = {"a": [float("nan"), (1.5, float("-inf"))], "b": {"c": float("inf")}, "d": "NaN", "e": True}
    strict = {"a": [None, [1.5, None]], "b": {"c": None}, "d": "NaN", "e": True}
    assert json.loads(to_json(content), parse_constant=pytest.fail) == strict


# Through the scripts


@pytest.mark.parametrize("key", ["arch", "image_size", "classes"])
def test_every_script_refuses_a_foreign_run(key, tmp_path, run_here):
    run = tmp_path / "run"
    run.mkdir()
    torch.save({}, run / "best.pt")
    (run / "config.yaml").write_text("format: 1\n" + dump_yaml(Config()))
    (run / "model.json").write_text(json.dumps(DESCRIPTION | {key: [float("inf")]}))
    calls = [(evaluate, run), (predict, run, "x.jpg"), (export, run), (serve, run), (compare, run)]
    for script, *arguments in [*calls, (evaluate, run / "best.pt")]:
        done = run_here(script, *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "model.json is damaged" in done.stderr
    (run / "model.json").unlink()
    for name, content in (("status.json", "[]"), ("metrics.jsonl", "[]\n"), ("config.yaml", BOMB)):
        (run / name).write_text(content)
        done = run_here(compare, run, "--figure", tmp_path / "plot.png")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert name in done.stderr
        (run / name).unlink()
        (run / "config.yaml").write_text(dump_yaml(Config()))


def test_no_escape_sequence_reaches_the_terminal(tmp_path, run_here):
    run = tmp_path / "\x1b[2J\x9b"
    run.mkdir()
    (run / "model.json").write_text(json.dumps(DESCRIPTION | {"arch": "\x1b]0;mine\x07", "classes": ["\x1b[1m"]}))
    (run / "config.yaml").write_text("\x1b[2J: 1\n")
    for script, *arguments in [(evaluate, run), (predict, run, "x.jpg"), (export, run), (serve, run), (compare, run)]:
        done = run_here(script, *arguments)
        assert done.returncode == 2
        assert (done.stdout + done.stderr.rstrip("\n")).isprintable()


def test_sizes_and_colours_are_those_of_model_json(old_run, run_here):
    known = json.loads(Path("expected.json").read_text())["evaluate"]["loss"]
    (old_run / "config.yaml").unlink()
    for model in (old_run, old_run / "best.pt"):
        done = run_here(evaluate, model, "--data", "photos", "--figures", "figures")
        assert done.returncode == 0, done.stderr
        assert f"{known:.4f}" in done.stdout.split("loss", 1)[1].splitlines()[0]
    description = json.loads((old_run / "model.json").read_text())
    (old_run / "model.json").write_text(json.dumps(description | {"mean": [0.0, 0.0, 0.0]}))
    done = run_here(evaluate, old_run, "--data", "photos", "--figures", "figures")
    assert f"{known:.4f}" not in done.stdout


@pytest.mark.parametrize("name", ["export", "figures"])
def test_nothing_is_written_through_a_link_that_leaves_the_run(name, old_run, run_here):
    away = Path("away")
    away.mkdir()
    (away / "model.onnx").write_text("mine")
    shutil.rmtree(old_run / name, ignore_errors=True)
    (old_run / name).symlink_to(away.resolve())
    script, *arguments = (export, old_run, "--photos", "photos/val") if name == "export" else (evaluate, old_run)
    done = run_here(script, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{name} is a link that leads out of the run" in done.stderr
    assert [path.name for path in away.iterdir()] == ["model.onnx"]


def test_a_foreign_checkpoint_never_ends_in_a_trace(old_run, run_here):
    (checkpoint,) = (old_run / "checkpoints").iterdir()
    progress = json.loads((checkpoint / "progress.json").read_text())
    settings = ["--config", old_run / "config.yaml", "--data", "photos", "--weights", old_run / "best.pt"]
    torch.save({"model": {"x": torch.ones(1)}}, checkpoint / "state.pt")
    progress["files"]["state.pt"] = file_digest(checkpoint / "state.pt")
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    recipe = (old_run / "config.yaml").read_text()
    (old_run / "config.yaml").write_text(recipe.replace("weights.pth", str(old_run / "best.pt")))
    done = run_here(train, *settings)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "state.pt does not hold the state of this network" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kept", "freeze", "epochs"),
    [
        ({"freeze": "layer3", "epochs": 8, "views_per_photo": 4}, "layer3", 8),
        ({}, "auto", "auto"),  # of an older version
        ({"freeze": "layer3", "epochs": -8}, "auto", "auto"),
        ({"freeze": ["layer3"]}, "auto", "auto"),
    ],
)
def test_what_auto_came_to_is_read_from_the_checkpoint(tmp_path, kept, freeze, epochs):
    folder = tmp_path / "checkpoints" / "epoch-0001-step-00000005"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(PROGRESS | kept))
    config = Config(head_init="auto", freeze="auto", epochs="auto", views_per_photo=3)
    found = what_auto_came_to(tmp_path, config)
    assert (found.freeze, found.epochs, found.views_per_photo) == (freeze, epochs, 3)
    assert what_auto_came_to(tmp_path / "none", config) == config
