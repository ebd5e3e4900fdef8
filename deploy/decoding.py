"""Strangers' photos are decoded in processes of their own: one that takes too long, or dies, takes no other with it.

A worker is this file as a script. It loads no PyTorch, so that another stands in for a killed one within half a second,
and it obeys limits that the system holds it to: processor time for each photo, and memory.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.data.decode import pixels_of_file
from pipelines.data.headers import inspect_file
from pipelines.data.preprocess import Preprocess
from pipelines.data.structure import TOO_COSTLY
from pipelines.errors import MachineError

import numpy as np

SECONDS = 2.0  # of a processor, for one photo
WALL_SECONDS = 6.0  # for one photo on a busy machine, or where a system cannot count processor time
MAX_PIXELS = 64_000_000  # an opened photo takes 3 to 12 bytes a pixel, while it is turned and composed up to 32
_MEMORY = 32 * MAX_PIXELS + 2**28  # bytes
_LARGE = 16_000_000  # pixels; of larger photos one is opened at a time
_BUSY_SECONDS = 1.0  # of work in the last seconds, from which on an address leaves a worker to the others
_HALF_LIFE = 10.0  # seconds, in which work is half forgotten
WAITING = 256  # photos


class Busy(Exception):
    """No more photos can wait, or the server ends."""


@dataclass
class _Job:
    path: str
    address: str
    number: int
    finish: Callable[[str, np.ndarray | str], Any]
    future: Future = field(default_factory=Future)
    pixels: int = 0  # 0: not judged yet
    is_heavy: bool = False

    def begin(self) -> bool:
        """False where nobody waits for it any more."""
        return self.future.running() or self.future.set_running_or_notify_cancel()


class Decoders:
    """Worker processes, and for each a thread that hands it photos and asks the network about its pixels.

    finish: path, and uint8 [H, W, 3] or an error, as `pixels_of_file` gives them -> what `submit`'s future gets.
    """

    def __init__(
        self, preprocess: Preprocess, finish: Callable[[str, np.ndarray | str], Any], *, whole: bool, workers: int
    ) -> None:
        """Waits until the workers stand ready; MachineError where one does not. whole: see `pixels_of_file`."""
        self._finish = finish
        self._turn = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._spent: dict[str, tuple[float, float]] = {}  # address -> seconds of work, and when that was
        self._numbers = count()
        self._closed = False
        self._workers = [_Worker(preprocess, whole) for _ in range(max(2, workers))]
        try:
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            threading.Thread(target=self._work, args=[worker], name="decoding").start()

    def submit(self, path: str, address: str, finish: Callable[[str, np.ndarray | str], Any] | None = None) -> Future:
        """A photo's turn comes after those of addresses that have had less work done. Raises Busy.

        finish: for this photo, in place of the one that all others have.
        """
        with self._turn:
            if self.is_full(address):
                raise Busy
            job = _Job(path, address, next(self._numbers), finish or self._finish)
            self._waiting.append(job)
            self._turn.notify_all()
        return job.future

    def is_full(self, address: str | None = None) -> bool:
        """Whether another photo, from this address, would be refused. One address may take half of the places."""
        own = sum(job.address == address for job in list(self._waiting))
        return self._closed or len(self._waiting) >= WAITING or own >= WAITING // 2

    def close(self) -> None:
        """Kills what is at work; all futures raise Busy."""
        with self._turn:
            self._closed = True
            jobs, self._waiting = self._waiting, []
            self._turn.notify_all()
        for job in jobs:
            if job.begin():
                job.future.set_exception(Busy())
        for worker in self._workers:
            worker.kill()

    def _work(self, worker: "_Worker") -> None:
        while job := self._take():
            started = time.monotonic()
            try:
                result = self._result(job, worker)
            except BaseException as error:
                job.future.set_exception(Busy() if self._closed else error)
            else:
                if result is not None:
                    job.future.set_result(result)
            self._put_back(job, time.monotonic() - started)
        worker.kill()

    def _result(self, job: _Job, worker: "_Worker") -> Any:
        """None where the photo has only been judged."""
        if not job.pixels:
            error, (height, width) = worker.ask(job.path, decode=False)
            job.pixels = height * width
            if job.pixels > MAX_PIXELS:
                error = "too many pixels"
            return job.finish(job.path, error) if error else None
        return job.finish(job.path, worker.ask(job.path, decode=True))

    def _take(self) -> _Job | None:
        """The next photo that may be worked at; None at the end."""
        with self._turn:
            while not self._closed:
                ready = [job for job in self._waiting if self._may_run(job)]
                if ready:
                    spent = {job.address: self._seconds(job.address) for job in ready}
                    job = min(ready, key=lambda job: (spent[job.address], job.pixels, job.number))
                    self._waiting.remove(job)
                    if not job.begin():
                        continue
                    self._running.append(job)
                    return job
                self._turn.wait(1)  # work is forgotten by and by
            return None

    def _may_run(self, job: _Job) -> bool:
        """One worker is kept for small photos of addresses that have asked for little."""
        job.is_heavy = job.pixels > _LARGE or self._seconds(job.address) > _BUSY_SECONDS
        if job.pixels > _LARGE and any(other.pixels > _LARGE for other in self._running):
            return False
        return not job.is_heavy or sum(other.is_heavy for other in self._running) < len(self._workers) - 1

    def _put_back(self, job: _Job, seconds: float) -> None:
        with self._turn:
            self._running.remove(job)
            self._spent[job.address] = (self._seconds(job.address) + seconds, time.monotonic())
            if len(self._spent) > 10_000:
                self._spent = {key: value for key, value in self._spent.items() if self._seconds(key) > 0.01}
            if not job.future.done():
                if self._closed:
                    job.future.set_exception(Busy())
                else:
                    self._waiting.append(job)
            self._turn.notify_all()

    def _seconds(self, address: str) -> float:
        seconds, then = self._spent.get(address, (0.0, 0.0))
        return seconds * 0.5 ** ((time.monotonic() - then) / _HALF_LIFE)


class _Worker:
    """One process, and another after it has been killed."""

    def __init__(self, preprocess: Preprocess, whole: bool) -> None:
        self._command = [sys.executable, __file__, *map(json.dumps, (asdict(preprocess), whole, SECONDS))]
        self._is_ready = self._is_killed = False
        self._lock = threading.Lock()
        self._start()

    def wait_until_ready(self) -> None:
        """MachineError where the process ends before it is."""
        if not self._is_ready and self._output.readline() != b"ready\n":
            raise MachineError("a process that decodes photos has ended as it began: its own message says why")
        self._is_ready = True

    def kill(self) -> None:
        with self._lock:
            self._is_killed = True
            self._end()

    def ask(self, path: str, *, decode: bool) -> Any:
        """Error and size, or pixels or an error. Raises Busy where the server ends."""
        if self._process.poll() is not None:  # somebody has killed it while it had nothing to do
            self._restart()
        self.wait_until_ready()
        timer = threading.Timer(WALL_SECONDS, self._process.kill)
        timer.start()
        try:
            self._input.write(json.dumps([path, decode]).encode() + b"\n")
            self._input.flush()
            answer = json.loads(self._output.readline())
            if isinstance(answer, dict):
                pixels = self._output.read(int(np.prod(answer["shape"])))
                answer = np.frombuffer(pixels, np.uint8).reshape(answer["shape"])
            return answer
        except (OSError, ValueError):  # it has ended in the middle of an answer
            self._process.kill()
            signalled = -self._process.wait()
            self._restart()
            costly = signalled in (getattr(signal, "SIGPROF", 0), getattr(signal, "SIGKILL", 0))
            error = TOO_COSTLY if costly or sys.platform == "win32" else "damaged"
            return error if decode else (error, (0, 0))
        finally:
            timer.cancel()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._is_ready = False

    def _restart(self) -> None:
        with self._lock:
            if self._is_killed:
                raise Busy
            self._end()
            self._start()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with suppress(OSError, ValueError):
                pipe.close()


def main() -> None:
    """A worker: a line of JSON in, path and whether to decode; a line out, and behind it the pixels."""
    settings, whole, seconds = map(json.loads, sys.argv[1:])
    preprocess = Preprocess(**settings)
    answers = os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends its workers
    _limit_memory()
    answers.write(b"ready\n")
    answers.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)  # a library may speak on stderr
    for line in sys.stdin.buffer:
        path, decode = json.loads(line)
        _limit_time(seconds)
        if decode:
            found = pixels_of_file(path, preprocess, whole=whole)
            _limit_time(0)
            head: Any = found if isinstance(found, str) else {"shape": found.shape}
        else:
            found = ""
            head = inspect_file(os.fsencode(path))[:2]
            _limit_time(0)
        answers.write(json.dumps(head).encode() + b"\n")
        if isinstance(found, np.ndarray):
            answers.write(np.ascontiguousarray(found).data)
        answers.flush()


def _limit_time(seconds: float) -> None:
    """SIGPROF, which ends the process wherever it is."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, most in ((resource.RLIMIT_DATA, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # macOS knows no limit of memory
            resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
    main()
