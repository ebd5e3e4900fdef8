"""Starting the scripts, and reading what a run left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import train
from benchmarks import kills
from pipelines.run_files import checkpoint_folders
from tests.helpers.paths import ROOT

import pytest
import torch

SMALL = ["--image-size", "64", "--resize", "72", "--weights", "none", "--freeze", "none", "--batchnorm", "train"]
SMALL += ["--head-init", "zeros", "--tracker", "none"]
# BatchNorm as the weights have it: then neither the number of processes nor of micro-batches makes a difference.
FROZEN = ["--image-size", "64", "--resize", "72", "--freeze", "none", "--batchnorm", "frozen", "--tracker", "none"]
FROZEN += ["--head-init", "zeros", "--lr", "0.005"]


def launched(processes: int = 1, precision: str = "no") -> list[str]:
    """The beginning of a command that starts a script in so many processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--mixed_precision", precision, "--num_processes", str(processes)]
    # With --cpu the launcher would silently start a single process.
    return [*command, *(["--multi_gpu", "--main_process_port", "0"] if processes > 1 else [])]


def environment(**variables: str) -> dict[str, str]:
    """That of a user without a GPU and without a key for any tracker."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SLURM_", "ACCELERATE_"))}
    return {**kept, "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE", **variables}


def run_script(
    name: str, *arguments: object, processes: int = 1, precision: str = "no", launcher: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """A script of the suite under `accelerate launch`, on the CPU, without a key for any tracker."""
    command = launched(processes, precision) if launcher else [sys.executable]
    return subprocess.run(
        [*command, str(ROOT / name), *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
    )


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_rows(run: Path) -> list[dict]:
    return [row for row in rows_of(run) if "train/loss" in row]


def val_rows(run: Path) -> list[dict]:
    return [row for row in rows_of(run) if "val/loss" in row]


def one_error_line(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def same_bits(one: Path, other: Path) -> bool:
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    return kills.equal(*states)


def rows(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows_of(run)]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def newest(run: Path) -> Path:
    return checkpoint_folders(run / "checkpoints")[-1]


def ask_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal within the given call of one of train.py's functions."""
    calls, function = iter(range(1, 1000)), getattr(train, name)

    def asked(*arguments: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    monkeypatch.setattr(train, name, asked)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "best.pt", weights_only=True)


def assert_same_weights(one: Path, other: Path) -> None:
    states = state_of(one), state_of(other)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [row["val/loss"] for row in val_rows(one)] == [row["val/loss"] for row in val_rows(other)]
