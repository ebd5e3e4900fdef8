"""Full disks, read-only folders, two runs in one folder, Ctrl-C: one line, the right exit code, no half files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.run.folder import RunFolder
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL, one_error_line

import pytest


def test_no_space_for_the_first_weights(photos, small_disk, run_here):
    runs = small_disk("size=20m")
    done = run_here(train, *SMALL, "--data", photos, "--runs", runs, "--run", "r", "--max-steps", "2")
    assert done.returncode == 3
    line = one_error_line(done)
    assert "best.pt: cannot be saved" in line
    assert "MiB free" in line
    left = {path.name for path in (runs / "r").iterdir()}
    assert not [name for name in left if name.endswith(".tmp") or name == "best.pt"]
    assert json.loads((runs / "r" / "status.json").read_text())["exit_code"] == 3


def test_no_space_for_better_weights_leaves_the_old_ones_whole(tmp_path, small_disk):
    import torch
    from torchvision.models import resnet18

    disk = small_disk("size=60m")
    run = RunFolder(disk / "r")
    run.create(Config())
    run.save_best(resnet18(), {"epoch": 1})
    before = run.best.read_bytes()
    with pytest.raises(Exception, match="what was saved before is whole"):
        run.save_best(resnet18(), {"epoch": 2})
    assert run.best.read_bytes() == before
    assert json.loads((run.folder / "model.json").read_text()) == {"epoch": 1}
    torch.load(run.best, weights_only=True)
    run.close()


def test_no_space_for_metrics_leaves_no_half_row(small_disk):
    disk = small_disk("size=64k")
    run = RunFolder(disk / "r")
    run.create(Config())
    row = {"epoch": 1, "global_step": 1, "x" * 1000: 0.5}
    with pytest.raises(Exception, match=r"metrics\.jsonl: cannot be saved"):
        [run.append_metrics(row) for _ in range(200)]
    assert set(map(str, run.read_metrics())) == {str(row)}
    run.close()


@pytest.mark.parametrize("call", [1, 5])  # before the first best weights; in the last epoch's last step
def test_a_run_whose_folder_somebody_removes_ends_with_a_line(call, photos, tmp_path, run_here, monkeypatch):
    folder, update, calls = tmp_path / "runs" / "r", train.update, iter(range(1, 100))

    def removed(*arguments: Any) -> Any:
        if next(calls) == call:
            shutil.rmtree(folder)
        return update(*arguments)

    monkeypatch.setattr(train, "update", removed)
    flags = ["--data", photos, "--runs", folder.parent, "--run", "r", "--epochs", "1", "--batch-size", "4"]
    done = run_here(train, *SMALL, *flags)
    assert done.returncode == 3
    assert "cannot be saved, as its folder is no longer there" in one_error_line(done)
    assert not folder.exists()


def test_a_run_goes_on_where_there_is_no_space_for_pictures(photos, tmp_path, run_here, small_disk, monkeypatch):
    full = small_disk("size=4k")
    monkeypatch.setattr(RunFolder, "figures", property(lambda self: full, lambda self, value: None), raising=False)
    monkeypatch.setattr(Path, "mkdir", _mkdir_of_an_existing(Path.mkdir, full))
    done = run_here(train, *SMALL, "--data", photos, "--runs", tmp_path, "--run", "r", "--max-steps", "1")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert ["train_batch.png" in warnings[0], "curves.png" in warnings[1]] == [True, True]


def _mkdir_of_an_existing(mkdir: Callable, folder: Path) -> Callable:
    return lambda self, *args, **options: None if self == folder else mkdir(self, *args, **options)


def test_no_space_for_the_index(photos, tmp_path, small_disk, run_here, monkeypatch):
    disk = small_disk("size=4k")
    (disk / "full").write_bytes(bytes(4096))
    monkeypatch.setenv("DALITUNE_CACHE", str(disk))
    done = run_here(train, *SMALL, "--data", photos, "--runs", tmp_path / "runs", "--max-steps", "1")
    assert done.returncode == 3
    assert "the index cannot be written" in one_error_line(done)
    assert not (tmp_path / "runs").exists()


def test_a_read_only_runs_folder(photos, small_disk, run_here):
    disk = small_disk("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run_here(train, *SMALL, "--data", photos, "--runs", disk / "runs", "--max-steps", "1")
    assert done.returncode == 2
    assert "--runs" in one_error_line(done)


def test_nothing_is_written_to_the_data_folder(tmp_path, photo_folder, small_disk, run_here):
    disk = small_disk("size=8m")
    data = photo_folder({"train": {"a": 3, "b": 3}})  # a val is taken from it
    subprocess.run(["cp", "-r", f"{data}/.", str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run_here(train, *SMALL, "--data", disk, "--runs", tmp_path, "--max-steps", "1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder_and_no_lock_after_a_kill(tmp_path):
    folder = tmp_path / "r"
    holder = "import sys, time; from pathlib import Path; from pipelines.config import Config; "
    holder += "from pipelines.run.folder import RunFolder; r = RunFolder(Path(sys.argv[1])); "
    holder += "r.create(Config()); print('in', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holder, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="another run is writing into"):
        RunFolder(folder).create(Config(overwrite=True))
    assert (folder / "config.yaml").exists(), "the run that has the folder keeps its files"
    other.kill()
    other.wait()
    run = RunFolder(folder)
    run.create(Config(overwrite=True))
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "accelerate"])
def test_ctrl_c_while_the_libraries_are_loaded(library, tmp_path):
    """The script is the real one; an audit hook tells when a library is looked for."""
    code = f"""if True:
        import runpy, sys
        sys.argv = sys.argv[1:]
        tell = lambda event, found: event == "import" and found[0] == "{library}" and print("now", flush=True)
        sys.addaudithook(tell)
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    command = [sys.executable, "-c", code, str(ROOT / "train.py"), "--data", "shapes", "--runs", str(tmp_path / "runs")]
    done = interrupted(command, lambda process: process.stdout.readline())
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["download", "scan"])
def test_ctrl_c_before_the_first_step(where, tmp_path):
    """The script is the real one; the stand-in named SLOW makes the download or the scan wait."""
    module, wait = {
        "download": ("data.samples", "_download = lambda *_: (print('now', flush=True), time.sleep(60))"),
        "scan": (
            "data.dataset",
            "inspect_file = lambda _: (print('now', flush=True), time.sleep(0.05)) and ('', (9, 9), 0)",
        ),
    }[where]
    slow = f"import time, pipelines.{module}\npipelines.{module}.{wait}"
    data = ["--data", "shapes"] if where == "scan" else []
    code = f"{slow}\nimport runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / "train.py"), *data, "--runs", str(tmp_path / "runs")]
    cache = tmp_path / "cache"
    done = interrupted(command, lambda process: process.stdout.readline(), DALITUNE_CACHE=str(cache), DALITUNE_DATA="")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
    left = [path for path in cache.rglob("*") if path.is_file() and "shapes-v1" not in path.parts]
    assert left == []


def interrupted(command: list[str], wait: Callable, **variables: str) -> subprocess.CompletedProcess:
    """SIGINT after `wait`; the process must be gone within seconds: what it would do else takes a minute."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **variables}
    )
    wait(process)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
