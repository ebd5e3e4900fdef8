"""The run folder `runs/<name>/`: what a run leaves, written by the main process only, each file whole or not at all."""

import json
import math
import os
import re
import secrets
import shutil
import string
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.config import Config, dump_yaml, parse_config
from pipelines.dataset import Dataset, Split, load_dataset
from pipelines.errors import MachineError, UserError
from pipelines.known_photos import in_known_places, keep_photos
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD
from pipelines.model import read_weights
from pipelines.resume import ask_for_the_same_photos, is_longer, other_result, spelled

import numpy as np
import torch
from filelock import FileLock, Timeout

_OWN_FILES = ("config.yaml", "status.json")
_LIBRARIES = (
    *("dalitune", "torch", "torchvision", "accelerate", "numpy", "pillow"),
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130"),  # one of them, by the driver
)


def new_run_name(recipe: str, runs: str = "runs") -> str:
    """A name for a run without one: the recipe's, the time and four random letters, or one that is found again.

    Found again are the training of a W&B agent's run, by its id, and a Slurm job's own, by the job's number, which
    `slurm/train.sbatch` hands to that one alone: what else is started in an allocation, as from a notebook, is new.
    """
    recipe = _as_name(recipe)[:60] or "run"
    if os.environ.get("WANDB_SWEEP_ID") and (of_agent := _as_name(os.environ.get("WANDB_RUN_ID", ""))[:100]):
        # An agent starts no finished run again: this is another training in the same trial.
        if RunFolder(Path(runs) / of_agent).status().get("state") != "finished":
            return of_agent
    elif job := _as_name(os.environ.get("DALITUNE_JOB", "")):
        return f"{recipe}-{job}"[:100]
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{letters}"


def _as_name(text: str) -> str:
    """The text, or what of it may be in the name of a run."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")


class RunFolder:
    """One run's files under `folder`. Only the main process `writes`; on the others, what would write does nothing."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder = folder
        self._writes = writes
        self._lock = FileLock(folder / ".lock", timeout=0)
        self.best = folder / "best.pt"
        self.figures = folder / "figures"
        self.metrics = folder / "metrics.jsonl"
        self._photos, self._bad_photos = folder / "photos.npz", folder / "bad_photos.json"
        self.stop_file = folder / "STOP"

    def status(self) -> dict[str, Any]:
        """The content of status.json; {} where the run never started."""
        path = self.folder / "status.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:  # damaged: as if it had never started
            return {}

    def beginning(self, config: Config) -> str:
        """How a run of this name begins: "new", "resumed", or "finished" where nothing is left to do.

        UserError where a run is there whose result other settings have decided, or that has lost what it would go on
        from. Photos and first weights are not looked at.
        """
        status = self.status()
        # A job that Slurm has requeued comes with the flags of its first life, in which --overwrite has done its work.
        overwrite = config.overwrite and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if overwrite or not self.folder.exists():
            return "new"
        before = self.config_before()
        if before is None:
            return "new"
        is_finished = status.get("state") == "finished"
        # Before the first checkpoint nothing is lost: a setting may be put right that has ended the run at its start.
        if (changed := other_result(before, config)) and (is_finished or self.has_saved()):
            values = ", ".join(f"{key} {spelled(getattr(before, key))}" for key in changed)
            less = " (of less memory with --max-batch-per-device)" if "batch_size" in changed else ""
            raise UserError(
                f"run: {self.folder} was started with other settings ({', '.join(changed)}): it goes on with "
                f"{values}{less}; for a new run give another --run name, or start it anew with --overwrite"
            )
        if not is_finished:
            return "resumed"
        if not is_longer(before, config, status.get("global_step", 0)):
            return "finished"
        if self.best.exists() and not self.has_checkpoint():
            raise UserError(
                f"run: {self.folder} is finished, and its checkpoints are gone: put one back, or begin a new run with "
                f"its weights: --run NAME --weights {self.folder}"
            )
        return "resumed"

    def config_before(self) -> Config | None:
        """The settings in the run's config.yaml; None where there is none. One of before `transparency` ignored it."""
        recipe = self.folder / "config.yaml"
        if not recipe.exists():
            return None
        added = [] if "\ntransparency:" in recipe.read_text("utf-8") else ["--transparency=ignored"]
        return parse_config([f"--config={recipe}", *added])[0]

    def has_the_same_data(self, config: Config) -> bool:
        """Whether `data` says what it said when the run began."""
        before = self.config_before()
        return before is not None and ask_for_the_same_photos(before, config)

    def has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        return any((self.folder / "checkpoints").glob("epoch-*"))

    def has_saved(self) -> bool:
        """Whether something would be lost if the run began anew."""
        return self.best.exists() or self.has_checkpoint()

    def arrange(self, index_file: Path) -> Path:
        """For a run that goes on: the index of the photos, each in the place that it had when the run began.

        Says what has changed; UserError where the result would be another.
        """
        if not (self.has_saved() and self._photos.exists()):
            return index_file
        arranged, lines, differences = in_known_places(index_file, self._photos, self._noted().keys())
        if differences:
            raise UserError(
                f"run: {self.folder} was trained on other photos than {load_dataset(index_file).root} has now: "
                f"{'; '.join(differences)}: put them back as they were, give another --run name, or start it anew with "
                "--overwrite"
            )
        for line in lines:
            print(line, flush=True)
        return arranged

    def keep_photos(self, dataset: Dataset, *, anew: bool) -> None:
        """photos.npz: the photos that the run begins with, so that `arrange` finds their places again.

        anew: for a run that begins; otherwise only where an earlier version has written none.
        """
        if not self._writes or (self._photos.exists() and not anew):
            return
        try:
            with replacing(self._photos) as partial, open(partial, "wb") as file:
                keep_photos(dataset.index_file, file)
        except OSError as error:
            raise cannot_save(self._photos, error) from None

    def note_faulty(self, dataset: Dataset) -> None:
        """Notes what the scan has found faulty."""
        for name, split in dataset.splits.items():
            self.note_bad(split, set(np.flatnonzero(split.faults).tolist()) - set(dataset.gone.get(name, ())))

    def note_bad(self, split: Split, positions: Iterable[int]) -> None:
        """bad_photos.json: photos that cannot be read, which may be mended or removed while the run goes on."""
        if not self._writes:
            return
        noted = self._noted()
        found = {_below_root(split, position): _size_and_time(split.path(position)) for position in positions}
        if found.items() - noted.items():
            self._write_json(self._bad_photos.name, noted | found)

    def still_bad(self, split: Split, positions: Iterable[int]) -> set[int]:
        """Those of the noted photos whose files have not changed since."""
        noted = self._noted()
        states = {position: noted.get(_below_root(split, position)) for position in positions}
        return {at for at, state in states.items() if state in (None, _size_and_time(split.path(at)))}

    def _noted(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            noted = json.loads(self._bad_photos.read_text(encoding="utf-8"))
            return noted if isinstance(noted, dict) else {}
        return {}

    def check_first_weights(self, config: Config, digest: str | None) -> None:
        """UserError where `weights` is set to others than the run began with, whose digest is `digest`, if known.

        A checkpoint holds all weights: the first ones need not be there any more.
        """
        before = self.config_before() or config
        if config.weights in (None, "none", before.weights) or digest is None:
            return
        try:
            is_same = read_weights(config).digest() == digest
        except (UserError, MachineError) as error:
            print(f"{error}; not needed, as the checkpoint has all weights", file=sys.stderr, flush=True)
            return
        if not is_same:
            raise UserError(
                f"run: {self.folder} was started with other settings (weights): it began with others than "
                f"{config.weights} holds: leave --weights out; for a new run give another --run name, or start it anew "
                "with --overwrite"
            )

    def create(self, config: Config, *, resumed: bool = False) -> None:
        """Makes the folder, with config.yaml and the status `running`, and keeps other runs out of it until this ends.

        resumed: what is in it stays. UserError where it cannot be made, or another run writes into it.
        """
        if not self._writes:
            return
        try:
            if not resumed:
                self._check_contents(overwrite=config.overwrite)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()  # the system lets go of it when the process ends, however it ends
            if not resumed:
                self._empty()
            self.figures.mkdir(exist_ok=True)
        except Timeout:
            raise UserError(f"run: another run is writing into {self.folder}: give another --run name") from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"runs: cannot make the folder {self.folder} ({reason}): give --runs DIR") from None
        self._write("config.yaml", dump_yaml(config))
        if not resumed:
            self.write_status("running")

    def close(self) -> None:
        """Lets other runs into the folder."""
        self._lock.release()

    def _check_contents(self, *, overwrite: bool) -> None:
        # --runs and --run may name any folder, a source tree too.
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not overwrite or not any((self.folder / name).exists() for name in _OWN_FILES):
            raise UserError(f"run: {self.folder} is not a run folder, and is not overwritten: give another --run name")

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.name == ".lock":
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def write_status(
        self, state: str, reason: str = "", exit_code: int | None = None, epoch: int = 0, global_step: int = 0
    ) -> None:
        """status.json, which programs read: state is running, stopped, finished or failed."""
        self._write_json(
            "status.json",
            {"state": state, "reason": reason, "exit_code": exit_code, "epoch": epoch, "global_step": global_step},
        )

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line more in metrics.jsonl, or none of it. MachineError where the disk is full."""
        if not self._writes:
            return
        line = json.dumps({key: _finite_or_none(value) for key, value in row.items()}) + "\n"
        length = self.metrics_bytes()
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.metrics, length)
            raise cannot_save(self.metrics, error) from None

    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, length: int) -> None:
        """Takes back the rows beyond the first `length` bytes: they are computed again."""
        if self._writes and self.metrics_bytes() > length:
            os.truncate(self.metrics, length)

    def best_files(self) -> list[Path]:
        """best.pt and model.json, where they are."""
        return [path for path in (self.best, self.folder / "model.json") if path.exists()]

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def save_best(self, network: torch.nn.Module, description: Mapping[str, Any]) -> None:
        """best.pt, a plain state_dict on the CPU that torchvision's ResNet loads, and model.json beside it.

        MachineError where the disk is full; the best weights before stay as they are.
        """
        if not self._writes:
            return
        state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        try:
            # A file of our own is closed, and its room given back, when the disk is full; PyTorch's own is not.
            with replacing(self.best) as partial, open(partial, "wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # PyTorch tells of a full disk by either
            raise cannot_save(self.best, error) from None
        self._write_json("model.json", description)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        if not self._writes:
            return
        try:
            with replacing(self.folder / name) as partial:
                # A folder's name need not be UTF-8: what is not, JSON reads back from its escape.
                partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise cannot_save(self.folder / name, error) from None


def describe_model(config: Config, dataset: Dataset, scores: Mapping[str, Any]) -> dict[str, Any]:
    """model.json: what a reader of best.pt needs to use it as it was trained, and to know where it comes from."""
    return {
        "arch": config.arch,
        "classes": list(dataset.splits["train"].classes),
        "image_size": config.image_size,
        "resize": config.resize,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "transparency": config.transparency,
        "scores": dict(scores),
        "data": str(dataset.data),
        "dataset_fingerprint": dataset.fingerprint,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that a run's numbers depend on."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):  # dalitune itself, where its files were copied and not installed
            found[name] = version(name)
    return found


def _below_root(split: Split, position: int) -> str:
    return os.path.relpath(split.path(position), os.fsdecode(split.root))


def _size_and_time(path: str) -> str:
    try:
        state = os.stat(path)
        return f"{state.st_size} bytes, {state.st_mtime_ns} ns"
    except (OSError, ValueError):
        return "missing"


def cannot_save(path: Path, error: Exception) -> MachineError:
    """What a full disk ends a run with. `path` is what should have been saved, in a folder that exists."""
    free = shutil.disk_usage(path.parent).free
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
    return MachineError(
        f"{path}: cannot be saved ({reason}; {free / 2**20:.0f} MiB free): what was saved before is whole"
    )


def _finite_or_none(value: Any) -> Any:
    """Strict JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and puts it in place at the end: whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
