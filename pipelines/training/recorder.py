"""What a training leaves behind of itself. A row goes to metrics.jsonl before it goes to the tracker, and a picture is
drawn before the row that it goes to the tracker with.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.loader import Batch, Loader
from pipelines.distributed.exits import ExitStatus
from pipelines.errors import Stopped, UserError
from pipelines.model.optimizer import learning_rates
from pipelines.run import figures
from pipelines.run.pairing import compared_with
from pipelines.text import printable
from pipelines.tracking.tracking import Tracking
from pipelines.training.build import Components
from pipelines.training.check import Checked
from pipelines.training.evaluation import BEST_BY, best_scores
from pipelines.training.progress import EpochTable, Interval
from pipelines.training.report import input_report, save_last_figures, save_train_batch
from pipelines.training.session import Session

import numpy as np
import torch


class Recorder:
    """Writes rows, pictures and lines. Its methods are called on all processes; the main process writes.

    As a part of a checkpoint it holds the sums since the last row and since the epoch's start.
    """

    def __init__(self, checked: Checked, components: Components, session: Session) -> None:
        self._run, self._accelerator, self._classes = checked.run, checked.accelerator, checked.classes
        self._dataset, self._is_main = checked.dataset, checked.state.is_main_process
        self._config, self._schedule, self._training = checked.config, components.schedule, components.training
        self._optimizer, self._progress, self._facts = components.optimizer, session.progress, components.facts
        self._checked, self._components = checked, components
        self._has_advised = False  # on what the training waits for
        self._best_by = BEST_BY[checked.config.best_by]
        device = checked.accelerator.device
        self._interval, self._whole_epoch = Interval(device), Interval(device)
        epochs = components.resolved_config.epochs
        assert epochs != "auto"
        self._table = EpochTable(visible=self._is_main, epochs=epochs, steps_per_epoch=checked.steps_per_epoch)
        session.close_at_end(self._table.close)
        session.on_end(self.end_early)
        self._tracking: Tracking | None = None

    def state_dict(self) -> dict[str, Any]:
        """JSON: `interval` and `whole_epoch`."""
        waited = self._training.wait_seconds
        return {"interval": self._interval.state(waited), "whole_epoch": self._whole_epoch.state(waited)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """state: what `state_dict` has returned, maybe among other things."""
        self._interval.restore(state["interval"])
        self._whole_epoch.restore(state["whole_epoch"])

    def start(self) -> None:
        """Starts the tracker, and writes the row of a head that was fitted just now."""
        self._tracking = Tracking(self._accelerator, self._config, self._run, self._dataset, self._facts)
        if row := self._components.head_row:
            self._run.append_metrics(row)
            self._show("head_penalty")
            self._tracker.log(row, hold=True)

    def end_early(self, status: ExitStatus) -> None:
        """The attempt ends before the run is done; the tracker is told."""
        if self._tracking is None:
            return
        if status.exit_code == Stopped.exit_code:
            self._tracking.stopped(status.line)
        else:
            self._tracking.abandon(status.exit_code, status.line)

    def start_epoch(self, start_step: int) -> None:
        """start_step: steps of it that were done in an attempt before."""
        self._table.start_epoch(self._progress.epoch + 1, start_step)
        if start_step == 0:
            self._interval.start(self._training.wait_seconds)
            self._whole_epoch.start(self._training.wait_seconds)

    def step(self, sums: torch.Tensor, batch: Batch) -> None:
        """One update is done, and counted in `progress`. sums: of `StepSums`. batch: its first micro-batch here."""
        global_step = self._progress.global_step
        # Without kept features a batch may have no photo that can be read, and no other is asked of a loader at work.
        if global_step == 1 and self._is_main and (len(batch.images) or self._components.features.are_kept):
            self._draw_train_batch(batch)
        self._interval.add(sums)
        self._whole_epoch.add(sums)
        self._table.step()
        epoch_ends = self._schedule.ends_epoch(global_step)
        if not epoch_ends and global_step % self._config.log_every:
            return
        row: dict[str, Any] = {"epoch": self._progress.epoch + 1, "global_step": global_step}
        row |= learning_rates(self._optimizer) | self._interval.row(self._training.wait_seconds)
        if self._accelerator.mixed_precision == "fp16":
            row["perf/skipped_steps"] = self._progress.skipped_steps
        self._interval.start(self._training.wait_seconds)
        self._table.training_row(row, epoch_ends=epoch_ends)
        self._run.append_metrics(row)
        self._tracker.log(row, hold=epoch_ends)

    def evaluation(self, row: Mapping[str, Any], records: np.ndarray) -> None:
        """row: of metrics.jsonl, of `records`."""
        self._run.append_metrics(row)
        self._tracker.log(row, records, hold=self._schedule.is_over(row["epoch"], self._progress.best["epoch"]))

    def best_weights(self) -> None:
        """best.pt and model.json are of the evaluation before."""
        self._tracker.log_best(self._progress.global_step)

    def epoch_means(self) -> dict[str, float]:
        """The means and rates of the epoch so far, and its last learning rates."""
        return learning_rates(self._optimizer) | self._whole_epoch.row(self._training.wait_seconds)

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """Prints the epoch that `progress` has just counted. row: its means, where it had updates, and evaluation."""
        self._table.end_epoch(self._progress.epoch, row, best=self._progress.best.get(self._best_by, math.nan))
        if self._is_main and not self._has_advised and (lines := input_report(self._checked, self._components, row)):
            self._has_advised = True
            print(*lines, sep="\n", flush=True)

    def finish(self) -> None:
        """The run is done: the last pictures, and its scores for the tracker."""
        if not self._is_main:
            return
        save_last_figures(self._run, self._classes, self._best_by, mixes_photos=self._config.mixes_photos)
        if not self._schedule.epochs:
            views = self._training.central(self._config)
            self._draw_train_batch(views.empty_batch(), views)
        for picture in ("curves", "calibration", "confusion_matrix", "per_class"):
            self._show(picture)
        best = self._progress.best
        fitted = next((row for row in self._run.read_metrics() if "head/penalty" in row), {})
        of_the_head = {key: value for key, value in fitted.items() if key.startswith("head/")}
        self._tracker.finish(best_scores(best) | {"best/epoch": best["epoch"]} | of_the_head | self._compared())

    def _compared(self) -> dict[str, Any]:
        """The figures beside the run that `compare_to` names, whose verdict is said."""
        if (other := self._config.compare_to) is None:
            return {}
        try:
            verdict, found = compared_with(Path(other), self._run.folder)
        except UserError as error:  # it was there at the start
            verdict, found = str(error), {}
        print(f"compare_to: {printable(verdict)}", flush=True)
        return found

    @property
    def _tracker(self) -> Tracking:
        assert self._tracking is not None, "start comes first"
        return self._tracking

    def _show(self, picture: str) -> None:
        self._tracker.show(self._run.figures / f"{picture}.png")

    def _draw_train_batch(self, batch: Batch, training: Loader | None = None) -> None:
        loader = training or self._training
        figures.attempt("train_batch.png", partial(save_train_batch, self._run, batch, loader, self._classes))
        self._show("train_batch")
