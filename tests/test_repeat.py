"""Folds and seeds: each photo is held out once, what is finished is not repeated, and a stop ends all in one line."""

import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import train
from pipelines import repeat
from pipelines.config import Config
from pipelines.data.dataset import load_dataset, scan_dataset
from pipelines.distributed.exits import run_script
from pipelines.errors import MachineError, Stopped, UserError
from pipelines.repeat import Result, Training, _group, _without, table
from pipelines.run.folder import RunFolder
from pipelines.run_files import read_run_config
from pipelines.text import stdout_for_programs
from tests.helpers.run_files import DESCRIPTION
from tests.helpers.runs import SMALL

import pytest


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """The flags of each training, which is done in this process."""
    commands: list[list[str]] = []

    def in_this_process(command: list[str], training: Training) -> None:
        assert command[0] == sys.executable
        commands.append(command[2:])
        assert run_script(train.main, command[2:]) == 0

    monkeypatch.setattr(repeat, "_train", in_this_process)
    return commands


@pytest.mark.slow
def test_every_training_photo_is_held_out_once_and_what_is_finished_is_not_repeated(
    trained, photos, tmp_path, run_here
):
    before = sorted(photos.rglob("*"))
    # Validation photos have no part.
    flags = [*SMALL, "--epochs=1", "--batch-size", "4", "--data", photos, "--runs", tmp_path, "--run", "cv"]
    command = ["--folds=2", "--seeds", "2", "--seed=5", *flags, "--json", tmp_path / "found.json"]
    done = run_here(repeat, *command)
    assert done.returncode == 0, done.stderr
    names = [f"cv-fold{fold}-seed{seed}" for fold in (1, 2) for seed in (5, 6)]
    assert [f"--run={name}" in each for name, each in zip(names, trained, strict=True)] == [True] * 4
    assert sorted(photos.rglob("*")) == before

    own = load_dataset(scan_dataset(photos, tmp_path / "index", 0.2)).splits["train"]
    held_out = []
    for fold in (1, 2):
        file = tmp_path / "cv-folds" / f"fold{fold}.csv"
        with open(file, newline="", encoding="utf-8") as opened:
            of_fold = [row["path"] for row in csv.DictReader(opened) if row["split"] == "val"]
        splits = load_dataset(scan_dataset(file, tmp_path / "index", 0.2)).splits
        assert (len(splits["val"]), len(splits["train"])) == (len(of_fold), len(own) - len(of_fold))
        held_out += of_fold
    assert sorted(held_out) == sorted(f"photos/{own.path_below_root(at).decode()}" for at in range(len(own)))

    found = json.loads((tmp_path / "found.json").read_text())
    assert [each["run"] for each in found["runs"]] == [str(tmp_path / name) for name in names]
    assert (found["folds"], found["seeds"]) == (2, 2)
    for each in found["runs"]:
        scores = json.loads((Path(each["run"]) / "model.json").read_text())["scores"]
        assert (each["best"], each["photos"]) == (scores["val/top1"], scores["count"])
        assert read_run_config(Path(each["run"])).seed == each["seed"]

    trained.clear()
    (tmp_path / "cv-fold2-seed5" / "status.json").unlink()  # as if it had been cut off
    again = run_here(repeat, *command)
    assert again.returncode == 0, again.stderr
    assert [next(flag for flag in each if flag.startswith("--run=")) for each in trained] == ["--run=cv-fold2-seed5"]
    assert json.loads((tmp_path / "found.json").read_text()) == found
    table_of = done.stdout.rpartition("run ")[2]
    assert again.stdout.rpartition("run ")[2] == table_of
    refused = run_here(repeat, *command, "--momentum=0.5")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "was started with other settings (momentum)" in refused.stderr
    (tmp_path / "cv-folds" / "fold1.csv").write_text("path,label,split\n")
    refused = run_here(repeat, *command)
    assert "fold1.csv has other photos in its fold: give another --run name" in refused.stderr
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--folds=1"], "one run repeats nothing"),
        (["--folds=0", "--seeds=4"], "--folds and --seeds are 1 or more"),
        (["--folds=two"], "invalid int value"),
        (["--data=x"], "give the runs a name with --run"),
        (["--run=r", "--overwrite"], "--overwrite is not for several runs: give another --run name"),
        (["--run=r", "--prepare"], "--prepare is not for several runs"),
        (["--run=r", "--lr=fast"], "lr"),
        (["--run=r", "--folds=9", "--data=shapes.csv"], "shapes.csv"),
        (["--run=r", "--data=x", "--json=nowhere/found.json"], "--json: nowhere is no folder that can be written to"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(flags, told, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    done = run_here(repeat, *flags, f"--runs={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def test_more_folds_than_photos_are_refused(photos, tmp_path, run_here):
    done = run_here(repeat, "--folds=50", "--run=r", "--data", photos, f"--runs={tmp_path / 'runs'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be in 50 folds: give fewer --folds" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_no_fold_is_empty_where_classes_have_one_photo(photo_folder, tmp_path, capsys):
    photos = photo_folder({"train": {f"class{at}": 1 + (at == 9) for at in range(10)}})
    dataset = load_dataset(scan_dataset(photos, tmp_path / "index", 0.2))
    files = [tmp_path / "runs" / "cv-folds" / f"fold{fold}.csv" for fold in range(1, 6)]
    with pytest.raises(UserError, match="11 photos cannot be in 5 folds; 9 of them, each the only one of a class"):
        repeat._write_folds(dataset, 5, files)
    assert not (tmp_path / "runs").exists()
    repeat._write_folds(dataset, 2, files[:2])
    assert "of 11 photos 1, 1 are held out in turn; 9 train in all, each the only" in capsys.readouterr().out


def test_folds_are_of_all_training_photos_where_there_is_a_test_split_and_no_val(photo_folder, tmp_path):
    photos = photo_folder({"train": {"ant": 10, "bee": 10}, "test": {"ant": 2, "bee": 2}})
    dataset = load_dataset(scan_dataset(photos, tmp_path / "index", 0.2))
    files = [tmp_path / "cv-folds" / f"fold{fold}.csv" for fold in range(1, 5)]
    repeat._write_folds(dataset, 4, files)
    found = load_dataset(scan_dataset(files[0], tmp_path / "index", 0.2)).splits
    assert {name: len(split) for name, split in found.items()} == {"train": 15, "val": 5}


def test_a_carriage_return_in_a_name_is_read_back(photo_folder, tmp_path):
    photos = photo_folder({"train": {"ant": 3, "bee": 3}})
    (photos / "train" / "ant" / "00.jpg").rename(photos / "train" / "ant" / "a\rb.jpg")
    dataset = load_dataset(scan_dataset(photos, tmp_path / "index", 0.2))
    files = [tmp_path / "cv-folds" / f"fold{fold}.csv" for fold in (1, 2)]
    for _ in range(2):  # the second time they are there
        repeat._write_folds(dataset, 2, files)
    found = load_dataset(scan_dataset(files[0], tmp_path / "index", 0.2)).splits.values()
    paths = [split.path_below_root(at) for split in found for at in range(len(split))]
    assert len(paths) == 6
    assert b"photos/train/ant/a\rb.jpg" in paths
    assert '"photos/train/ant/a\rb.jpg","ant","' in files[0].read_bytes().decode()


def test_a_full_disk_is_the_machines(photo_folder, tmp_path, monkeypatch):
    dataset = load_dataset(scan_dataset(photo_folder({"train": {"ant": 3}}), tmp_path / "index", 0.2))
    for number, kind in ((28, MachineError), (13, UserError)):

        def fail(path: Path, _: bytes, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "write_bytes", fail)
        with pytest.raises(kind, match="cannot be written to"):
            repeat._write_folds(dataset, 3, [tmp_path / "cv-folds" / "fold1.csv"])


def test_each_run_has_its_own_flags_and_all_one_group(monkeypatch):
    flags = ["--seed", "3", "--lr=0.1", "--run=x", "--compile", "--data", "a.csv", "--config", "c.yaml"]
    assert _without(flags, ["--seed", "--run", "--data"]) == ["--lr=0.1", "--compile", "--config", "c.yaml"]
    assert _without(flags, ["--seed", "--run"])[2:4] == ["--data", "a.csv"]
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert _group(Config(run="cv")) == ["--group=cv"]
    assert _group(Config(run="cv", group="mine")) == _group(Config(run="cv", tracker="none")) == []
    monkeypatch.setenv("WANDB_RUN_GROUP", "another")
    assert _group(Config(run="cv")) == []


def test_the_interval_is_over_folds_and_of_one_fold_over_seeds():
    def results(values: list[list[float]]) -> list[Result]:
        return [
            Result(Training(fold, seed, Path(f"runs/r-{fold}-{seed}"), None), value, value / 2, 10)
            for fold, of_fold in enumerate(values, start=1)
            for seed, value in enumerate(of_fold)
        ]

    lines, found = table(results([[0.8, 0.9], [0.9, 1.0], [0.7, 0.8]]), "val/top1")
    assert found["best"]["mean"] == pytest.approx(0.85)
    assert found["best"]["spread"] == pytest.approx(0.1)  # of 0.85, 0.95 and 0.75
    assert found["best"]["interval"] == pytest.approx([0.85 - 4.30265 * 0.1 / 3**0.5, 0.85 + 4.30265 * 0.1 / 3**0.5])
    assert found["best"]["spread_of_seeds"] == pytest.approx(0.1 / 2**0.5)
    assert found["last"]["mean"] == pytest.approx(0.425)
    assert "over 3 folds, 95 % interval of the mean" in lines[-2]
    lines, found = table(results([[0.8, 0.9]]), "val/top1")
    assert found["best"]["spread_of_seeds"] is not None
    assert "over 2 seeds" in lines[-2]


def test_the_last_epoch_is_the_last_one_and_whose_the_best_is_is_told(tmp_path):
    trainings = [Training(1, seed, tmp_path / f"r-seed{seed}", None) for seed in range(2)]
    for training, last in zip(trainings, (None, 0.5), strict=True):
        training.folder.mkdir()
        scores = DESCRIPTION["scores"] | {"averaged": training.seed}
        (training.folder / "model.json").write_text(json.dumps(DESCRIPTION | {"scores": scores}))
        rows = [{"epoch": at, "global_step": at, "val/top1": value} for at, value in ((1, 0.75), (2, last))]
        rows.append({"epoch": 3, "global_step": 3, "train/loss": 1.0})
        (training.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [repeat._result(training, "val/top1") for training in trainings]
    assert [result.averaged for result in results] == [False, True]
    assert results[1].last == 0.5
    lines, found = table(results, "val/top1")
    assert lines[2].split() == ["r-seed0", "4", "0.7500", "nan"]
    assert lines[3].endswith("  0.5000  best of averaged weights")
    assert lines[-1] == "last val/top1: no mean, as 1 run had diverged by then (nan)"
    assert found["last"] is None
    assert found["best"]["mean"] == 0.75


def child(tmp_path: Path, text: str) -> list[str]:
    script = tmp_path / "child.py"
    script.write_text(text)
    return [sys.executable, str(script)]


def test_what_runs_print_is_for_people_where_stdout_is_for_programs(tmp_path, capfd):
    finished = Training(1, 0, tmp_path / "run", None)
    RunFolder(finished.folder).create(Config())
    RunFolder(finished.folder).write_status("finished", exit_code=0)
    with stdout_for_programs(True) as stdout:
        repeat._train(child(tmp_path, "print('an epoch')"), finished)
        print("a table")
        stdout.write("{}")
    assert capfd.readouterr() == ("{}", "an epoch\na table\n")


TRAINING = Training(1, 0, Path("runs/cv-fold1-seed0"), None)


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (3, MachineError), (75, Stopped), (-9, MachineError)])
def test_a_run_that_fails_ends_all(code, error, tmp_path):
    text = f"import os, signal, sys; sys.exit({code}) if {code} > 0 else os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(error, match="the same command goes on"):
        repeat._train(child(tmp_path, text), TRAINING)
    with pytest.raises(Stopped, match="the same command goes on"):  # a launcher of several ends with 0 then
        repeat._train(child(tmp_path, ""), TRAINING)
    finished = Training(1, 0, tmp_path / "run", None)
    RunFolder(finished.folder).create(Config())
    RunFolder(finished.folder).write_status("finished", exit_code=0)
    repeat._train(child(tmp_path, ""), finished)
    with pytest.raises(UserError, match="--launch no-such-program: cannot be started"):
        repeat._train(["no-such-program"], TRAINING)


@pytest.mark.parametrize(
    ("number", "handler"), [(signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)]
)
def test_a_stop_reaches_the_run_once_and_is_waited_for(number, handler, tmp_path):
    before = signal.signal(number, handler)  # a shell's background job has SIGINT ignored, nohup's SIGHUP
    asked = tmp_path / "asked"
    text = f"""
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
pathlib.Path({str(asked)!r}).write_text("ready")
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
pathlib.Path({str(asked)!r}).write_text(str(len(asked)))
sys.exit(75)
"""

    def ask() -> None:
        while not asked.exists() or not asked.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    try:
        with pytest.raises(Stopped, match="stopped in runs/cv-fold1-seed0: the same command goes on"):
            repeat._train(child(tmp_path, text), TRAINING)
    finally:
        assert signal.getsignal(number) == handler
        signal.signal(number, before)
    assert asked.read_text() == "1"
