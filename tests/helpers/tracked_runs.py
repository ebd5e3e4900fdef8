"""Attempts at a run's tracking, and what W&B's own files have of them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.data.dataset import Dataset
from pipelines.run.folder import RunFolder
from pipelines.tracking.tracking import Tracking
from pipelines.tracking.wandb_files import attempt_folders, history_row, read_records

import psutil
from accelerate import Accelerator

SECONDS = 40  # within which nothing may be waited for any longer; on an idle machine it is a few


class Attempt:
    """One attempt at a run's tracking, with the calls of the training loop in the loop's order."""

    def __init__(self, folder: Path, dataset: Dataset, checkpoint: int = 0, **settings: Any) -> None:
        """checkpoint: the step that the run is resumed at; later rows are taken back, as in the loop."""
        config = Config(**{"tracker": "wandb", "runs": str(folder.parent), **settings})
        self.run = RunFolder(folder)
        rows = [row for row in self.run.read_metrics() if row["global_step"] <= checkpoint]
        self.run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        log_with = None if config.tracker == "none" else config.tracker
        accelerator = Accelerator(cpu=True, log_with=log_with, project_dir=config.runs)
        self.tracking = Tracking(accelerator, config, self.run, dataset, {"world_size": 1})
        self.at = checkpoint

    def steps(self, last: int) -> "Attempt":
        """Up to step `last`: a training row every 2 steps, and every 4 a validation row, which belongs to it."""
        for step in range(self.at + 2, last + 1, 2):
            self._row({"global_step": step, "train/loss": 1 / step}, hold=step % 4 == 0)
            if step % 4 == 0:
                self._row({"global_step": step, "val/top1": step / 100})
        self.at = last
        return self

    def _row(self, row: dict[str, Any], hold: bool = False) -> None:
        self.run.append_metrics(row)
        self.tracking.log(row, hold=hold)

    def finish(self) -> None:
        self.tracking.finish({"best/val_top1": 0.75})

    @property
    def run_id(self) -> str:
        return (self.run.folder / "wandb_id").read_text()


def rows_until(last: int) -> list[dict[str, Any]]:
    """What W&B must have of such a run, whatever happened to it: each step once, in order."""
    rows = [{"global_step": step, "train/loss": 1 / step} for step in range(2, last + 1, 2)]
    return [row | ({"val/top1": row["global_step"] / 100} if row["global_step"] % 4 == 0 else {}) for row in rows]


def without_own(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def attempts(folder: Path) -> list[Path]:
    return attempt_folders(folder, (folder / "wandb_id").read_text())


def records_of(attempt: Path) -> list[Any]:
    (file,) = attempt.glob("run-*.wandb")
    for _ in range(50):  # it is closed a moment after `finish`
        records = list(read_records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    return records


def history_of(folder: Path) -> list[dict[str, Any]]:
    rows = [row for attempt in attempts(folder) for record in records_of(attempt) if (row := history_row(record))]
    assert all(row["_step"] == row["global_step"] for row in rows)
    return [without_own(row) for row in rows]


def killed(attempt: Callable[[], Any]) -> None:
    """Runs `attempt` in a process of its own, which is then killed, together with W&B's, as Slurm kills a job."""
    if not (child := os.fork()):
        try:
            attempt()
            for process in psutil.Process().children(recursive=True):
                process.kill()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def wait_until(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def one_line(capfd) -> str:
    output = capfd.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    return output.err.rstrip("\n")
