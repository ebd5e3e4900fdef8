"""Stop requests: a signal or a file asks; the loop answers at a step boundary that all processes agree on."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from pipelines.distributed.exits import STOP_SIGNALS
from pipelines.distributed.sync import default_store

import torch.distributed as dist

_LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 1.0
_KEY = "dalitune/stop"  # in the process group's store: why some process has been asked
_ANOTHER_PRESS = 0.3  # seconds; one Ctrl-C may reach a process twice, from the terminal and from the launcher


class StopRequest:
    """From `listen` on, SIGTERM, SIGINT, SIGUSR1 and the launcher's death ask for a stop, and end nothing.

    file: a file that asks for a stop by being there; the main process looks for it, the others give None.
    reason: what has asked this process; "" while nothing has.
    A second SIGINT ends the process at once with exit code 130.
    """

    def __init__(self, file: Path | None) -> None:
        self.reason = ""
        self._file = file
        self._looked_at = self._asked_at = self._interrupted = -_POLL_SECONDS

    def listen(self) -> None:
        """Takes over the signals, until `exits.run_script` gives them back."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        _ask_for_signal_on_launcher_death()

    def is_made(self) -> bool:
        """Whether this process has been asked. Cheap: the file is looked for once a second."""
        if not self.reason and self._file and time.monotonic() - self._looked_at > _POLL_SECONDS:
            self._looked_at = time.monotonic()
            if self._file.exists():
                self.reason = f"the file {self._file}"
        return bool(self.reason)

    def is_made_anywhere(self) -> bool:
        """Whether any process has been asked, as far as is known here: for work without collectives, once a second."""
        if self.is_made():
            self.tell()
            return True
        if time.monotonic() - self._asked_at < _POLL_SECONDS:
            return False
        self._asked_at = time.monotonic()
        return self._is_told()

    def tell(self) -> None:
        """Tells the other processes what has asked this one."""
        if self.reason and dist.is_initialized():
            default_store().set(_KEY, self.reason)

    def why(self) -> str:
        """What has asked this process, or another one that has told."""
        if not self.reason and self._is_told():
            return default_store().get(_KEY).decode()
        return self.reason or "another process"

    def _is_told(self) -> bool:
        return dist.is_initialized() and default_store().check([_KEY])

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if 0 < self._interrupted < now - _ANOTHER_PRESS:
                os._exit(130)
            self._interrupted = now
        self.reason = self.reason or signal.Signals(number).name


def _ask_for_signal_on_launcher_death() -> None:
    """A killed launcher leaves its processes running: they are to get SIGTERM then. Linux only.

    Only of a launcher: `nohup python train.py &` is to outlive the shell that started it.
    """
    if sys.platform != "linux":
        return
    try:
        is_launched = any(name in Path(f"/proc/{os.getppid()}/cmdline").read_bytes() for name in _LAUNCHERS)
    except OSError:
        return
    if is_launched:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
