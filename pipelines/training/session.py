"""One attempt at a run: what asks it to stop and to save, what status.json says of it, what is closed after it."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType

from pipelines.distributed.exits import ExitStatus, exit_status_of
from pipelines.distributed.stopping import StopRequest
from pipelines.distributed.sync import on_main_process
from pipelines.errors import MachineError, StopAgreed, Stopped
from pipelines.run.checkpoint import CheckpointClock, Progress
from pipelines.training.check import Checked
from pipelines.training.progress import StepWatch

import torch


class Session:
    """A context: from its beginning to its end no other run writes into `run`, signals ask for a stop, status.json is
    kept, and whatever was registered is closed.

    All processes agree on a stop: by the votes of a step, which `watch_step` finds in its sums, or within a pass over
    photos, which asks `stop_is_asked`. Either raises StopAgreed; the context then saves and raises Stopped in its
    place. Any other error goes on through it.

    progress: where the training stands. watch: looks at the steps' sums. Both are parts of the checkpoints.
    """

    def __init__(self, checked: Checked) -> None:
        self.progress, self.watch = Progress(), StepWatch()
        if checked.saved:
            self.progress.load_state_dict(checked.saved)
        self._checked, self._run, self._state = checked, checked.run, checked.state
        self._stop = StopRequest(self._run.stop_file if self._state.is_main_process else None)
        self._clock = CheckpointClock(checked.config.checkpoint_minutes)
        self._write: Callable[[], object] = lambda: None
        self._told: list[Callable[[ExitStatus], object]] = []
        self._to_close = ExitStack()

    def __enter__(self) -> "Session":
        checked, saved = self._checked, self._checked.saved
        is_there = checked.previous_config is not None
        on_main_process(self._state, partial(self._run.create, checked.config, resumed=is_there))
        self._to_close.callback(self._run.close)
        try:
            on_main_process(self._state, partial(self._run.keep_photos, checked.dataset, anew=saved is None))
            # Rows of steps after the checkpoint are computed again.
            on_main_process(self._state, partial(self._run.cut_metrics, saved["metrics_bytes"] if saved else 0))
            self.write_status("running")
            self.listen()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if isinstance(error, StopAgreed):
                try:
                    self._stop.tell()
                    self.save()
                    raise self._stopped() from None
                except BaseException as ending:
                    self._end(ending)
                    raise
            if error is not None:
                self._end(error)
        finally:
            self._to_close.close()

    def listen(self) -> None:
        """Takes over the signals; again, where something else may have taken them since."""
        self._stop.listen()

    def save_by(self, write: Callable[[], object]) -> None:
        """write: writes a checkpoint, on all processes together. Before it is known, `save` writes nothing."""
        self._write = write

    def on_end(self, tell: Callable[[ExitStatus], object]) -> None:
        """tell: is told how the attempt ends, where that is before the run's end."""
        self._told.append(tell)

    def close_at_end(self, close: Callable[[], object]) -> None:
        """close: called at the end, however it comes; the last that was registered first."""
        self._to_close.callback(close)

    def votes(self) -> tuple[bool, bool]:
        """Whether this process wants to stop, and to save; for the sums of a step."""
        return self._stop.is_made(), self._clock.has_run_out() and self._state.is_main_process

    def stop_is_asked(self) -> bool:
        """For a pass without votes: whether a stop is asked for on any process, as far as is known here."""
        return self._stop.is_made_anywhere()

    def watch_step(self, sums: torch.Tensor, where: Callable[[], str]) -> None:
        """Looks at a step's sums, or on a GPU at those of the step before. See `StepWatch.add`."""
        self.watch.add(sums, where)

    def watch_remaining_steps(self) -> None:
        """Looks at the steps that are left to look at."""
        self.watch.check()

    def stop_if_agreed(self) -> None:
        """Raises StopAgreed where the steps that were looked at have a vote for it."""
        if self.watch.stop:
            raise StopAgreed

    @property
    def save_is_agreed(self) -> bool:
        """Whether the steps that were looked at have a vote for a checkpoint."""
        return self.watch.save

    def save(self) -> None:
        """Writes a checkpoint and starts the clock of the next one. Called on all processes.

        Steps that a GPU has not been asked about yet are looked at first: they belong to it, and may have voted for it.
        """
        self.watch_remaining_steps()
        self._write()
        self._clock.start()
        self.watch.save = False

    def write_status(self, state: str, line: str = "", exit_code: int | None = None) -> None:
        """status.json, with where the training stands."""
        self._run.write_status(state, line, exit_code, self.progress.epoch, self.progress.global_step)

    def _stopped(self) -> Stopped:
        at, why = self.progress.global_step, self._stop.why()
        name = self._run.folder.name
        return Stopped(f"stopped at step {at} by {why}: --run {name} with the same settings goes on")

    def _end(self, error: BaseException) -> None:
        status = exit_status_of(error)
        state = "stopped" if status.exit_code == Stopped.exit_code else "failed"
        with suppress(MachineError):  # on a full disk; what ended the run is what is to be told
            if status.bad_photo:
                split, position = status.bad_photo
                self._run.note_bad(self._checked.dataset.splits[split], [position])
            self.write_status(state, status.line, status.exit_code)
        for tell in self._told:
            tell(status)
