"""How a script ends before its end: one line on stderr, and the exit code of docs/errors.md."""

import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.distributed.sync import default_store, is_global_rank_zero
from pipelines.errors import MachineError, Stopped, UserError, is_disk_error
from pipelines.text import lasting_streams, printable

import torch
import torch.distributed as dist

# What ends a script, or asks a training to stop.
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
_POLL_SECONDS = 0.2
_FAILED = "dalitune/failed"  # where a process that fails alone leaves its line
_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport")


@dataclass(frozen=True)
class ExitStatus:
    """How a run ends before its end: one line and the exit code.

    bad_photo: split and position of the photo that it is about, where it is about one.
    is_said: another process has said the line. needs_trace: the line does not say all, as with an error of our own.
    """

    line: str
    exit_code: int
    bad_photo: tuple[str, int] | None = None
    is_said: bool = False
    needs_trace: bool = False


class Terminated(BaseException):
    """SIGTERM outside the training loop; the launcher sends it, too, when another process has failed."""


@lasting_streams()
def run_script(script: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a script's main function. Its errors become one line on stderr and an exit code of docs/errors.md."""
    before = {number: signal.signal(number, _terminate) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        script(arguments)
    except SystemExit:
        raise
    except BaseException as error:
        status = exit_status_of(error)
        is_alone = getattr(error, "on_one_process", False) or isinstance(error, torch.OutOfMemoryError)
        if is_alone and dist.is_initialized():
            default_store().set(_FAILED, json.dumps([status.line, status.exit_code, status.bad_photo]))
        if status.needs_trace:
            traceback.print_exc()
        elif (is_global_rank_zero() or is_alone) and not status.is_said:
            label = "" if isinstance(error, (KeyboardInterrupt, Stopped, Terminated)) else "error: "
            print(f"{label}{status.line}", file=sys.stderr, flush=True)
        # A launcher of several processes takes any code but 0 for a failure, and prints its trace.
        several = dist.is_initialized() and dist.get_world_size() > 1
        return 0 if status.exit_code == Stopped.exit_code and several else status.exit_code
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def exit_status_of(error: BaseException) -> ExitStatus:
    """The line and the exit code for what ended a run: the same for stderr, for the exit and for status.json."""
    if not hasattr(error, "exit_status"):  # the store is asked once
        error.exit_status = _exit_status_of(error)  # type: ignore[attr-defined]
    return error.exit_status  # type: ignore[attr-defined]


def _exit_status_of(error: BaseException) -> ExitStatus:
    if isinstance(error, (UserError, MachineError, Stopped)):
        return ExitStatus(printable(str(error)), error.exit_code, error.bad_photo)
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus("interrupted", 130)
    if isinstance(error, OSError) and is_disk_error(error):
        return ExitStatus(f"{error.filename or 'disk'}: {error.strerror}", MachineError.exit_code)
    if isinstance(error, torch.OutOfMemoryError):
        line = "the GPU's memory is full: add --max-batch-per-device auto, or lower --eval-batch-per-device"
        return ExitStatus(line, MachineError.exit_code)
    if isinstance(error, Terminated):
        asked = ExitStatus(
            "stopped on request outside the training loop: the same command begins again", Stopped.exit_code
        )
        return _failure_of_another_process() or asked
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        lost = ExitStatus("another process has ended; its own message says why", MachineError.exit_code)
        return _failure_of_another_process() or lost
    return ExitStatus(repr(error), MachineError.exit_code, needs_trace=True)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and the status must not be cut off
    raise Terminated


def _failure_of_another_process() -> ExitStatus | None:
    """What a process that failed alone has left for the others before it ended."""
    try:
        store = default_store()
        give_up = time.monotonic() + 10 * _POLL_SECONDS
        while not store.check([_FAILED]) and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS)
        line, exit_code, photo = json.loads(store.get(_FAILED)) if store.check([_FAILED]) else (None, 0, None)
    except (RuntimeError, ValueError):  # the store has gone with its process
        return None
    return ExitStatus(line, exit_code, tuple(photo) if photo else None, is_said=True) if line else None
