"""Kills a training over and over, with SIGKILL, and compares what is left with an undisturbed run, bit for bit.

    python benchmarks/kills.py --kills 20                  # one process
    python benchmarks/kills.py --kills 20 --processes 2    # two, on the CPU
    python benchmarks/kills.py --calls 1                   # before each call in turn that touches the run folder

Half of the kills come after a random number of new rows, the others while a checkpoint is being written. After each,
the same command is started again. Weights, optimizer, best weights and predictions.csv must be equal in every bit, and
metrics.jsonl must have the same rows, each once (but for the speeds in them).

With --calls N a short training is killed before each N-th call to the operating system that touches its folder: while
the folder is made, or emptied of an earlier run, while all is saved in it, and while it ends. It is started again as
Slurm does, which lets an --overwrite of its first attempt be.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.distributed.exits import run_script
from pipelines.run_files import checkpoint_folders
from pipelines.text import lasting_streams

import numpy as np
import psutil
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "image_size": 64,
    "resize": 72,
    "batch_size": 4,
    "lr": 0.01,
    "weights": "none",
    "freeze": "none",
    "head_init": "zeros",
    "tracker": "none",
    "batchnorm": "train",  # it follows the batches, so each process has statistics of its own between evaluations
    "deterministic": "true",
    "log_every": 1,
    "checkpoint_minutes": 0.02,
}
STEPS_PER_EPOCH = 10
LONGEST_LIFE = 300  # seconds


@dataclass(frozen=True)
class Outcome:
    """What was seen. differences: what is not as in the undisturbed run, in words."""

    kills: int
    in_a_checkpoint: int
    steps: int
    differences: list[str]


@lasting_streams()
def main() -> None:
    """Parses the command line, runs, prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--calls", type=int, metavar="N", help="kill before each N-th call that touches the run folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.calls:
            for overwrite in (False, True):
                kills, differences = kill_at_calls(Path(folder) / str(overwrite), options.calls, overwrite=overwrite)
                what = "emptied of an earlier run" if overwrite else "made"
                print(f"folder {what}: {kills} kills: {', '.join(differences) or 'no bit differs'}", flush=True)
                if differences:
                    sys.exit(1)
            return
        outcome = compare(Path(folder), options.kills, options.processes, options.seed)
    print(
        f"{options.processes} process(es), {outcome.steps} steps, {outcome.kills} kills, {outcome.in_a_checkpoint} of "
        f"them while a checkpoint was written: {', '.join(outcome.differences) or 'no bit differs'}"
    )
    sys.exit(bool(outcome.differences))


def compare(folder: Path, kills: int, processes: int, seed: int) -> Outcome:
    """Trains undisturbed and under `kills` kills in `folder`, and compares."""
    draw = random.Random(seed)
    epochs = max(8, kills)  # long enough for every kill
    most = STEPS_PER_EPOCH * epochs // (kills + 1)
    _make_photos(folder / "photos")
    undisturbed, killed = folder / "runs" / "undisturbed", folder / "runs" / "killed"
    _attempt(folder, undisturbed.name, processes, epochs)
    in_a_checkpoint = 0
    for number in range(kills):
        saving = number % 2 == 1
        if not _attempt(folder, killed.name, processes, epochs, _Moment(killed, saving, draw.randint(1, most))):
            raise SystemExit(f"the training was over before kill {number + 1}: give fewer")
        in_a_checkpoint += (killed / "checkpoints" / ".unfinished").exists()
    _attempt(folder, killed.name, processes, epochs)
    return Outcome(kills, in_a_checkpoint, _rows(killed)[-1]["global_step"], _differences(undisturbed, killed))


def kill_at_calls(folder: Path, every: int, *, overwrite: bool) -> tuple[int, list[str]]:
    """Kills a training before every `every`-th call that touches its folder; the number of kills, and what differs."""
    sys.path.insert(0, str(ROOT))
    import_module("train")  # once for all forks
    torch.set_num_threads(1)  # in a fork of a process with threads OpenMP would wait for them for ever
    _make_photos(folder / "photos")
    runs, differences = folder / "runs", list[str]()
    _short_attempt(folder, "undisturbed")
    _short_attempt(folder, "earlier", "--lr=0.5")
    for kills in itertools.count():
        run = runs / "killed"
        if overwrite:
            shutil.copytree(runs / "earlier", run)
        call = 1 + kills * every
        if _short_attempt(folder, run.name, *(["--overwrite"] if overwrite else []), die_at=call):
            return kills, differences
        # Slurm's second attempt lets --overwrite be, and would refuse to go on with an earlier run that is still whole.
        is_whole = not (run / ".unbegun").exists() and "\nlr: 0.5\n" in _text_of(run / "config.yaml")
        if _short_attempt(folder, run.name, "--overwrite", requeued=not (overwrite and is_whole)):
            differences += [f"{name} after call {call}" for name in _differences(runs / "undisturbed", run)]
        else:
            differences.append(f"no second attempt after call {call}")
        shutil.rmtree(run)
    raise AssertionError


def _text_of(file: Path) -> str:
    return file.read_text("utf-8") if file.exists() else ""


def _short_attempt(folder: Path, name: str, *flags: str, die_at: int = 0, requeued: bool = False) -> bool:
    """A run of three steps in a fork, which has all libraries. Returns whether it came to its end."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    calls = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event.startswith(("open", "os.", "shutil.", "fcntl.")) and f"runs/{name}" in str(arguments)
        if touches and next(calls) == die_at:
            os._exit(9)

    code = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ |= {"ACCELERATE_USE_CPU": "true", "DALITUNE_CACHE": str(folder / "cache")}
        os.environ["SLURM_RESTART_COUNT"] = str(int(requeued))
        sys.addaudithook(watch)
        paths = [f"--data={folder / 'photos'}", f"--runs={folder / 'runs'}", f"--run={name}"]
        settings = [f"--{key}={value}" for key, value in SETTINGS.items() if f"--{key}=" not in " ".join(flags)]
        code = run_script(import_module("train").main, [*paths, "--epochs=1", "--max-steps=3", *settings, *flags])
    finally:
        os._exit(code)


class _Moment:
    """When to kill: while a checkpoint is written, or after some new rows."""

    def __init__(self, run: Path, saving: bool, rows: int) -> None:
        self._metrics, self._unfinished = run / "metrics.jsonl", run / "checkpoints" / ".unfinished"
        self._saving, self._rows = saving, rows
        self._was_there = self._unfinished.exists()
        self._first: int | None = None

    def has_come(self) -> bool:
        if self._saving:
            # What an earlier kill left is taken away before the next checkpoint is written.
            self._was_there = self._was_there and self._unfinished.exists()
            return self._unfinished.exists() and not self._was_there
        count = self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0
        if self._first is None or count < self._first:  # the rows since the checkpoint are taken back first
            self._first = count
        return count >= self._first + self._rows


def _attempt(folder: Path, name: str, processes: int, epochs: int, kill: _Moment | None = None) -> bool:
    """One attempt at the run. Returns True if it was killed, False if it ended by itself, as it should."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command += [str(ROOT / "train.py"), f"--data={folder / 'photos'}", f"--runs={folder / 'runs'}", f"--run={name}"]
    command += [f"--epochs={epochs}"]
    command += [f"--{key}={value}" for key, value in SETTINGS.items()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "DALITUNE_CACHE": str(folder / "cache")}
    log = folder / f"{name}.log"
    with open(log, "a+", encoding="utf-8") as file:
        start = file.tell()
        launcher = psutil.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        give_up = time.monotonic() + LONGEST_LIFE
        while launcher.poll() is None and time.monotonic() < give_up:
            if kill is not None and kill.has_come():
                return True
            time.sleep(0.005)
    finally:
        kill_all(launcher)
    said = log.read_text(encoding="utf-8", errors="replace")[start:]
    if launcher.returncode != 0:
        raise SystemExit(f"the training failed:\n{said[-3000:]}")
    if f"processes: {processes} on cpu" not in said:
        raise SystemExit(f"not {processes} processes:\n{said[-3000:]}")
    return False


def kill_all(launcher: psutil.Popen) -> None:
    """The workers first: a launcher's death is a stop request to them."""
    workers = launcher.children(recursive=True) if launcher.is_running() else []
    for process in [*workers, launcher]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()
    psutil.wait_procs(workers)


def _differences(one: Path, other: Path) -> list[str]:
    found = [] if _equal_files(one / "best.pt", other / "best.pt") else ["best.pt"]
    if (one / "predictions.csv").read_bytes() != (other / "predictions.csv").read_bytes():
        found.append("predictions.csv")
    last = [checkpoint_folders(run / "checkpoints")[-1] for run in (one, other)]
    if last[0].name != last[1].name or not _equal_files(*(checkpoint / "state.pt" for checkpoint in last)):
        found.append("the last checkpoint")
    return found + (["metrics.jsonl"] if _rows(one) != _rows(other) else [])


def _equal_files(one: Path, other: Path) -> bool:
    return equal(*(torch.load(path, weights_only=True) for path in (one, other)))


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states are the same in every bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def _make_photos(folder: Path) -> None:
    """37 + 10 noisy photos of two classes: ten steps an epoch, the last one short."""
    rng = np.random.default_rng(0)
    for number in range(47):
        path = folder / ("train" if number < 37 else "val") / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(path)


if __name__ == "__main__":
    main()
