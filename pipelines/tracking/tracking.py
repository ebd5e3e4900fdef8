"""Tracking: rows, pictures and the end of a run go to a tracker, on the main process, and never in training's way.

metrics.jsonl has every row; a tracker gets each `global_step` once, whatever happens to the run or to the tracker.
"""

import math
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines.config import Config
from pipelines.data.dataset import Dataset
from pipelines.files import ROOT
from pipelines.model.network import TransferModel, parameter_counts
from pipelines.run.folder import RunFolder, versions
from pipelines.text import printable
from pipelines.tracking.base import Tracker, first_line, say
from pipelines.tracking.settings import tracker_names
from pipelines.tracking.wandb import WandbTracker

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class Tracking:
    """Sends rows, pictures, weights and the summary of a run to the tracker that `config` names.

    A row that metrics.jsonl has already, as in a resumed run, and that no earlier attempt delivered, is sent at the
    start; one that was delivered is not sent again. facts: what `describe_run` says. A tracker that fails is left
    behind in one line.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, run: RunFolder, dataset: Dataset, facts: Mapping[str, Any]
    ) -> None:
        self._config, self._run = config, run
        self._tracker: Tracker | None = None  # while there is one
        self._sent: set[int] = set()
        self._held: dict[str, Any] = {}
        self._pictures: dict[str, Path] = {}
        self._may_restart = True
        if config.tracker != "none" and accelerator.is_main_process:
            names, settings = tracker_names(config), _with_printable_texts(asdict(config) | dict(facts))
            if config.tracker != "wandb" and (config.tags or config.group):
                say(f"tags and group are W&B's: {config.tracker} does not get them")
            self._tracker = (
                WandbTracker(accelerator, run, names, settings, config, dataset)
                if config.tracker == "wandb"
                else Tracker(config.tracker, accelerator, run, names, settings)
            )
        self._attempt(self._start)

    def log(self, row: Mapping[str, Any], records: np.ndarray | None = None, *, hold: bool = False) -> None:
        """One row of metrics.jsonl, after it was written there.

        records: those of `evaluation.predict`, for the table of validation photos. hold: keep the row until one of the
        same `global_step`, which is merged with it, or of another, or `finish` comes.
        """
        self._attempt(lambda tracker: self._log(tracker, row, records, hold))

    def show(self, path: Path) -> None:
        """A PNG that goes out with the next row, under its file's name."""
        if path.exists():  # a picture that could not be saved was told already
            self._pictures[path.stem] = path

    def log_best(self, global_step: int) -> None:
        """best.pt and model.json have improved at `global_step`."""
        if self._config.log_model == "best":
            self._attempt(lambda tracker: tracker.log_best() if global_step not in tracker.delivered else None)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is done; summary: what a table of runs shows of it as a whole."""
        self._attempt(lambda tracker: self._finish(tracker, summary))

    def stopped(self, reason: str = "") -> None:
        """The run stops on request and will go on: W&B shows it as preempted, not as crashed."""
        self._may_restart = False  # it would only take time
        self._announce("stopped", reason, "WARN")
        self._attempt(lambda tracker: tracker.preempt())
        self._attempt(lambda tracker: self._end(tracker, exit_code=75))

    def abandon(self, exit_code: int = 1, reason: str = "") -> None:
        """The run ends without being done."""
        self._may_restart = False
        self._announce("failed", reason, "ERROR")
        self._attempt(lambda tracker: self._end(tracker, exit_code))

    def _announce(self, what: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        if self._config.alerts:
            title = f"{self._run.folder.name}: {what}"
            self._attempt(lambda tracker: tracker.announce(title, printable(text) or title, level))

    def _attempt(self, task: Callable[[Tracker], object]) -> None:
        """Whatever a tracker raises, the training goes on."""
        if (tracker := self._tracker) is None:
            return
        try:
            task(tracker)
        except Exception as error:
            if tracker.has_lost_its_process(error) and self._may_restart:
                self._may_restart = False
                self._attempt(partial(self._restart, why=first_line(error)))
                self._attempt(task)
            else:
                self._tracker = None
                tracker.abort(error)
                say(
                    f"tracking has stopped ({first_line(error)}); the training goes on, and metrics.jsonl has every row"
                )

    def _start(self, tracker: Tracker) -> None:
        tracker.start()
        self._send_what_metrics_have(tracker)

    def _restart(self, tracker: Tracker, why: str) -> None:
        self._sent = set()
        tracker.restart(why)
        self._send_what_metrics_have(tracker)

    def _send_what_metrics_have(self, tracker: Tracker) -> None:
        rows = dict[int, dict[str, Any]]()
        for row in self._run.read_metrics():
            values = {key: math.nan if value is None else value for key, value in row.items()}
            rows[row["global_step"]] = rows.get(row["global_step"], {}) | values
        # The newest may wait for its other half.
        self._held = rows.pop(max(rows)) if rows else {}
        for row in rows.values():
            self._send(tracker, row)

    def _log(self, tracker: Tracker, row: Mapping[str, Any], records: np.ndarray | None, hold: bool) -> None:
        if self._held and self._held["global_step"] != row["global_step"]:
            self._send(tracker, self._take_held())
        self._held = self._held | dict(row)
        if records is not None and row["global_step"] not in tracker.delivered:
            self._held |= tracker.predictions(records)
        if not hold:
            self._send(tracker, self._take_held())

    def _take_held(self) -> dict[str, Any]:
        row, self._held = self._held, {}
        return row

    def _send(self, tracker: Tracker, row: dict[str, Any]) -> None:
        step = row["global_step"]
        if step in tracker.delivered or step in self._sent:
            return
        tracker.send(row, self._pictures)
        self._pictures = {}
        self._sent.add(step)

    def _finish(self, tracker: Tracker, summary: Mapping[str, Any]) -> None:
        if self._held:
            self._send(tracker, self._take_held())
        tracker.finish(summary)
        if self._config.alerts:
            told = {key: value if isinstance(value, str) else f"{value:.4g}" for key, value in summary.items()}
            scores = ", ".join(f"{key} {value}" for key, value in told.items())
            tracker.announce(f"{self._run.folder.name}: finished", scores or "finished", "INFO")
        self._end(tracker, exit_code=0)

    def _end(self, tracker: Tracker, exit_code: int) -> None:
        tracker.end(exit_code, self._sent)
        # Only now: W&B may have lost its process without anybody's notice, and another one has to take everything.
        self._tracker = None


def describe_run(
    accelerator: Accelerator, dataset: Dataset, network: TransferModel, engine: str
) -> dict[str, str | int | bool | None]:
    """What explains a difference between runs besides their settings, flat. All processes must call it."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    all_parameters, trained_parameters = parameter_counts(network)
    facts: dict[str, str | int | bool | None] = {
        "world_size": accelerator.num_processes,
        "devices": ", ".join(sorted(set(gather_object([name])))),
        "precision": accelerator.mixed_precision,
        "engine": engine,
        "parameters": all_parameters,
        "trained_parameters": trained_parameters,
        "dataset_fingerprint": dataset.fingerprint,
        "classes": len(dataset.splits["train"].classes),
    }
    facts |= {f"{split.name}_photos": sum(split.class_counts().values()) for split in dataset.splits.values()}
    if accelerator.is_main_process:
        facts["git_commit"], facts["git_dirty"] = _git_state(ROOT)
    facts["version_python"] = platform.python_version()
    return facts | {f"version_{library}": number for library, number in versions().items()}


def _with_printable_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not Unicode, as in a folder's name, no tracker takes."""
    return {printable(key): printable(value) if isinstance(value, str) else value for key, value in values.items()}


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the code and whether a file of it has been changed since; None where it is no repository."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(folder), *words]
        return subprocess.run(
            call, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if not git("rev-parse", "--show-prefix"):  # not a folder inside another repository
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    return None, None
