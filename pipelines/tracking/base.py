"""What a tracker is told, and any of Accelerate's trackers as one."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipelines.run.folder import RunFolder
from pipelines.tracking.settings import TrackerNames

import numpy as np
from accelerate import Accelerator

# How a tracker is told the run's name, or where to write. MLflow and TensorBoard were tried, the others read only.
_OPTIONS: dict[str, Callable[[RunFolder], dict[str, Any]]] = {
    "clearml": lambda run: {"task_name": run.folder.name},
    "dvclive": lambda run: {"dir": str(run.folder / "dvclive"), "save_dvc_exp": False, "dvcyaml": False},
    "mlflow": lambda run: {"run_name": run.folder.name},
    # Everything is sent anew, so what an earlier attempt wrote does not count.
    "tensorboard": lambda run: {"purge_step": 0},
    "trackio": lambda run: {"name": run.folder.name},
}


class Tracker:
    """One of Accelerate's trackers, by its name there. It gets numbers, a run of its own for each attempt of ours.

    What it raises is for the caller to keep from the training. What some trackers can do besides does nothing here.
    """

    delivered: Collection[int] = ()  # the steps that earlier attempts at the run have sent

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        run: RunFolder,
        names: TrackerNames,
        settings: Mapping[str, Any],
    ) -> None:
        self._name, self._accelerator, self._run, self._names, self._settings = name, accelerator, run, names, settings

    def start(self) -> None:
        """Opens the tracker's run, with the settings."""
        project = self._name if self._name == "tensorboard" else self._names.project  # there it is a folder's name
        self._accelerator.project_configuration.logging_dir = str(self._run.folder)
        options = _OPTIONS.get(self._name, lambda run: {})(self._run)
        with _nobody_to_ask():
            self._accelerator.init_trackers(project, dict(self._settings), {self._name: options})

    def send(self, row: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """One row, each `global_step` once. pictures: PNG files by name."""
        for tracker in self._accelerator.trackers:
            tracker.log(dict(row), step=row["global_step"])

    def predictions(self, records: np.ndarray) -> dict[str, Any]:
        """What is added to the row of the evaluation that gave these records."""
        return {}

    def log_best(self) -> None:
        """best.pt and model.json have improved."""

    def announce(self, title: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        """Tells the person, by mail or as the tracker does."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is done; `end` follows."""

    def preempt(self) -> None:
        """The run will go on in another attempt; `end` follows."""

    def end(self, exit_code: int, sent: set[int]) -> None:
        """Closes the tracker's run. sent: all steps that it was given."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def abort(self, error: Exception) -> None:
        """The tracker has failed and is asked nothing more."""

    def has_lost_its_process(self, error: Exception) -> bool:
        """Whether the error comes of a process of the tracker's own that has ended; `restart` starts another one."""
        return False

    def restart(self, why: str) -> None:
        raise NotImplementedError


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Some trackers ask for a key where there is a terminal; the training would wait for the answer."""
    terminal, sys.stdin = sys.stdin, None  # `input` raises then
    try:
        yield
    finally:
        sys.stdin = terminal


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """What an error says, or else its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
