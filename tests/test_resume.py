"""A run that was stopped, killed or damaged goes on to the same end, bit for bit; a stop is answered by all."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import train
from benchmarks import kills
from pipelines.distributed import exits
from pipelines.run_files import checkpoint_folders
from tests.helpers.paths import ROOT
from tests.helpers.runs import (
    FROZEN,
    SMALL,
    ask_at,
    environment,
    launched,
    newest,
    one_error_line,
    rows,
    rows_of,
    run_script,
    same_bits,
    status,
    succeeded,
    train_rows,
    val_rows,
)

import psutil
import pytest
import torch

EPOCHS = ["--epochs", "3", "--batch-size", "4", "--log-every", "2"]  # of 5 steps, the last one of 3 photos
STOP_WITHIN = 30  # seconds; on an idle machine it is one or two


# Within this process: real signals, at chosen steps


@pytest.fixture(scope="module")
def command(photos, tmp_path_factory) -> list[object]:
    return [*SMALL, *EPOCHS, "--data", photos, "--runs", tmp_path_factory.mktemp("runs")]


@pytest.fixture(scope="module")
def undisturbed(command) -> Path:
    assert exits.run_script(train.main, [*map(str, command), "--run", "undisturbed"]) == 0
    return Path(str(command[-1])) / "undisturbed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "call", "number", "step"),
    [
        # Asked within an update, the next one carries the vote to all; behind an epoch's last, the evaluation does.
        ("update", 1, signal.SIGINT, 2),
        ("update", 7, signal.SIGTERM, 8),
        ("update", 9, signal.SIGUSR1, 10),
        ("update", 15, signal.SIGTERM, 15),
        ("predict", 2, signal.SIGTERM, 10),
    ],
)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(
    function, call, number, step, command, undisturbed, run_here, monkeypatch
):
    run = undisturbed.with_name(f"{function}-{call}")
    with monkeypatch.context() as patch:
        ask_at(patch, function, call, number)
        stopped = run_here(train, *command, "--run", run.name)
    assert stopped.returncode == 75
    name = signal.Signals(number).name
    line = f"stopped at step {step} by {name}: --run {run.name} with the same settings goes on"
    assert stopped.stderr.strip() == line
    assert status(run) == {
        "state": "stopped",
        "reason": line,
        "exit_code": 75,
        "epoch": (step - 1) // 5,
        "global_step": step,
        "job": None,
    }
    again = succeeded(run_here(train, *command, "--run", run.name))
    assert f"resumed at step {step}, from {newest(run).name[:5]}" in again
    assert rows(run) == rows(undisturbed)
    assert same_bits(run / "best.pt", undisturbed / "best.pt")
    assert (run / "predictions.csv").read_bytes() == (undisturbed / "predictions.csv").read_bytes()
    assert newest(run).name == newest(undisturbed).name
    assert same_bits(newest(run) / "state.pt", newest(undisturbed) / "state.pt")
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert status(run)["state"] == "finished"
    assert "is finished: nothing to do" in succeeded(run_here(train, *command, "--run", run.name))


@pytest.fixture(scope="module")
def stopped(command, undisturbed) -> Path:
    """A run with two checkpoints: of epoch 1, and of step 7, where a file has stopped it."""
    run = undisturbed.with_name("stopped")
    with pytest.MonkeyPatch.context() as patch:
        update, calls = train.update, iter(range(1, 100))

        def asked(*arguments: Any) -> Any:
            if next(calls) == 7:
                (run / "STOP").touch()
                time.sleep(1.1)  # it is looked for once a second
            return update(*arguments)

        patch.setattr(train, "update", asked)
        assert exits.run_script(train.main, [*map(str, command), "--run", run.name]) == 75
    assert "the file" in status(run)["reason"]
    assert not (run / "STOP").exists(), "it has been answered"
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "epoch-0001-step-00000005",
        f"epoch-0001-step-{status(run)['global_step']:08}",
    ]
    return run


@pytest.fixture
def copy(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def test_checkpoints_are_in_order_of_any_number_of_steps(tmp_path):
    names = [
        "epoch-9999-step-99990000",
        "epoch-9999-step-100000000",
        "epoch-10000-step-100000000",
        "epoch-10000-step-100000001",
    ]
    for name in (*sorted(names), "epoch-best", "epoch-9999-step-99990000-copy"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint_folders(tmp_path)] == names


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_said(damage, copy, command, undisturbed, run_here):
    state = newest(copy) / "state.pt"
    if damage == "missing":
        state.unlink()
    else:
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    done = run_here(train, *command[:-1], copy.parent, "--run", copy.name)
    assert "resumed at step 5, from epoch-0001-step-00000005" in succeeded(done)
    assert f"{state.parent} is damaged" in done.stderr
    assert "the checkpoint before it is used" in done.stderr
    assert rows(copy) == rows(undisturbed)
    assert same_bits(newest(copy) / "state.pt", newest(undisturbed) / "state.pt")


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    return one_error_line(done)


@pytest.mark.slow
def test_what_cannot_be_resumed_is_refused_and_stays_as_it_is(copy, command, photos, tmp_path, run_here):
    again = [*command[:-1], copy.parent, "--run", copy.name]
    changed = refused(run_here(train, *again, "--lr", "0.5", "--seed", "3"))
    assert "other settings (lr, seed)" in changed or "other settings (seed, lr)" in changed
    for folder in (copy / "checkpoints").iterdir():
        (folder / "progress.json").write_text("{")
    assert "no whole checkpoint among 2" in refused(run_here(train, *again))
    assert "--overwrite" in refused(run_here(train, *again))
    assert status(copy)["state"] == "stopped"


@pytest.mark.slow
def test_other_photos_are_refused_and_more_epochs_go_on(photos, tmp_path, run_here):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    settings = [*SMALL, "--data", data, "--batch-size", "8", "--runs", tmp_path, "--run", "r", "--schedule", "constant"]
    succeeded(run_here(train, *settings, "--epochs", "1"))
    said = succeeded(run_here(train, *settings, "--epochs", "2"))
    assert "resumed at step 3, from epoch-0001-step-00000003" in said
    assert [row["global_step"] for row in val_rows(tmp_path / "r")] == [3, 6]
    shutil.copy(data / "train" / "ant" / "00.jpg", data / "train" / "ant" / "99.jpg")
    line = refused(run_here(train, *settings, "--epochs", "3"))
    assert "was trained on other photos" in line
    assert str(data) in line


@pytest.mark.slow
def test_no_space_for_a_checkpoint_leaves_the_one_before_whole(command, small_disk, run_here):
    """A ResNet-18 with its momentum takes 90 MB, its best weights 45: one checkpoint fits, and two do not."""
    runs = small_disk("size=200m")
    done = run_here(train, *command[:-1], runs, "--run", "r")
    assert done.returncode == 3
    assert "cannot be saved" in one_error_line(done)
    kept = list((runs / "r" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["epoch-0001-step-00000005"]
    progress = json.loads((kept[0] / "progress.json").read_text())
    assert set(progress["files"]) == {"state.pt", "best.pt", "model.json", "predictions.csv"}
    torch.load(kept[0] / "state.pt", weights_only=True)
    assert status(runs / "r")["state"] == "failed"


# Real commands, killed and stopped from outside


class Started:
    """A training under the launcher, long enough to be disturbed."""

    def __init__(self, run: Path, *arguments: object, count: int = 1, launcher: bool = True) -> None:
        command = launched(count) if launcher else [sys.executable]
        self.run, self.count = run, count
        self.log = run.parent / f"{run.name}.log"
        with open(self.log, "a") as file:
            self.launcher = psutil.Popen(
                [*command, str(ROOT / "train.py"), *map(str, arguments), "--runs", str(run.parent), "--run", run.name],
                stdout=file,
                stderr=file,
                env=environment(),
                start_new_session=True,
            )

    def wait_for_rows(self, count: int = 2) -> "Started":
        give_up = time.monotonic() + 300
        while not (self.run / "metrics.jsonl").exists() or len(rows_of(self.run)) < count:
            assert self.launcher.poll() is None, self.said()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert f"processes: {self.count} on cpu" in self.said()
        return self

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.launcher.children(recursive=True) if "train.py" in " ".join(child.cmdline())]

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        if self.launcher.is_running():
            kills.kill_all(self.launcher)


@pytest.fixture
def start(tmp_path, photos) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(name: str, *arguments: object, **options: Any) -> Started:
        settings = [*SMALL, "--data", photos, "--batch-size", "4", "--log-every", "1", "--epochs", "200"]
        started.append(Started(tmp_path / name, *settings, *arguments, **options))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


@pytest.mark.slow
@pytest.mark.kills
def test_a_kill_at_any_call_on_the_run_folder_blocks_no_restart():
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--calls", "23"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("no bit differs") == 2


@pytest.mark.kills
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [1, 2])
def test_killed_five_times_a_training_ends_as_if_it_had_not_been(count, tmp_path):
    outcome = kills.compare(tmp_path, kills=5, processes=count, seed=count)
    assert outcome.differences == []
    assert (outcome.kills, outcome.steps) == (5, 80)
    assert outcome.in_a_checkpoint >= 1


@pytest.mark.slow
@pytest.mark.kills
def test_a_run_stopped_on_two_processes_goes_on_on_one_and_three(start, photos, random_weights, tmp_path, run_here):
    settings = [*FROZEN, "--weights", random_weights, "--data", photos, "--batch-size", "5", "--log-every", "1"]
    settings += ["--epochs", "6"]
    succeeded(run_here(train, *settings, "--runs", tmp_path, "--run", "alone"))
    two = Started(tmp_path / "on-1", *settings, count=2).wait_for_rows(3)
    (two.run / "STOP").touch()
    assert two.launcher.wait(timeout=120) == 0, "a stopped worker of several ends with 0"
    assert "Traceback" not in two.said()
    assert status(two.run)["state"] == "stopped"
    step = status(two.run)["global_step"]
    assert 3 <= step < 24
    shutil.copytree(two.run, tmp_path / "on-3")
    said = succeeded(run_here(train, *settings, "--runs", tmp_path, "--run", "on-1"))
    assert f"resumed at step {step}" in said
    assert "the checkpoint is of 2 processes" in said
    said = succeeded(run_script("train.py", *settings, "--runs", tmp_path, "--run", "on-3", processes=3))
    assert "processes: 3 on cpu" in said
    alone = tmp_path / "alone"
    for run in (tmp_path / "on-1", tmp_path / "on-3"):
        # Each step's loss and correct answers are those of the same photos with the same crops.
        for select, names in ((train_rows, ("train/loss", "train/top1", "lr/head")), (val_rows, ("val/loss",))):
            for name in (*names, "epoch", "global_step"):
                expected = [row[name] for row in select(alone)]
                assert [row[name] for row in select(run)] == pytest.approx(expected, rel=2e-3), (run, name)


@pytest.mark.slow
@pytest.mark.kills
def test_when_one_of_two_processes_dies_the_other_ends(start):
    both = start("r", count=2).wait_for_rows()
    both.workers()[1].kill()
    begun = time.monotonic()
    assert both.launcher.wait(timeout=STOP_WITHIN + 30) != 0
    assert time.monotonic() - begun < STOP_WITHIN
    lines = [line for line in both.said().splitlines() if line.startswith("error: ")]
    assert lines == ["error: another process has ended; its own message says why"]
    assert status(both.run)["state"] == "failed"
    assert status(both.run)["exit_code"] == 3
    assert not (both.run / "checkpoints" / ".unfinished").exists()


@pytest.mark.slow
@pytest.mark.kills
def test_a_signal_to_launcher_or_worker_stops_all_at_one_step(start):
    for name, count, to_launcher, number in (
        ("int", 2, True, signal.SIGINT),
        ("usr1", 2, False, signal.SIGUSR1),
        ("term", 1, True, signal.SIGTERM),  # it kills the launcher, whose death is a stop request
    ):
        started = start(name, count=count).wait_for_rows()
        workers = started.workers()
        (started.launcher if to_launcher else workers[-1]).send_signal(number)
        begun = time.monotonic()
        started.launcher.wait(timeout=STOP_WITHIN)
        psutil.wait_procs(workers, timeout=STOP_WITHIN)
        assert not any(worker.is_running() for worker in workers), name
        assert time.monotonic() - begun < STOP_WITHIN
        ended = status(started.run)
        assert (ended["state"], ended["exit_code"]) == ("stopped", 75), started.said()
        assert newest(started.run).name.endswith(f"{ended['global_step']:08}")
        if name == "usr1":
            assert started.launcher.returncode == 0


@pytest.mark.slow
@pytest.mark.kills
def test_the_second_ctrl_c_leaves_at_once(start, monkeypatch):
    alone = start("r", launcher=False).wait_for_rows()
    alone.launcher.send_signal(signal.SIGSTOP)  # so that both arrive before the first is answered
    alone.launcher.send_signal(signal.SIGINT)
    alone.launcher.send_signal(signal.SIGCONT)
    time.sleep(0.35)
    alone.launcher.send_signal(signal.SIGINT)
    code = alone.launcher.wait(timeout=STOP_WITHIN)
    # Where the first was answered within a third of a second, 75, or the second has met an interpreter that was ending.
    assert code in (75, 130, -signal.SIGINT)
