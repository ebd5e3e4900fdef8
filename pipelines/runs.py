"""The run folder `runs/<name>/`: what a run leaves, written by the main process only, each file whole or not at all."""

import json
import math
import os
import re
import secrets
import shutil
import string
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.config import Config, dump_yaml, parse_config
from pipelines.dataset import Dataset
from pipelines.errors import MachineError, UserError
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD

import torch
from filelock import FileLock, Timeout

_OWN_FILES = ("config.yaml", "status.json")
# Settings that do not change what is learned.
_MAY_CHANGE = {
    *("run", "runs", "overwrite", "prepare", "epochs", "checkpoint_minutes"),
    *("tracker", "project", "tags", "group", "alerts", "log_model"),
    *("loader", "loader_threads", "prefetch", "eval_batch_per_device"),
}
_LIBRARIES = (
    *("dalitune", "torch", "torchvision", "accelerate", "numpy", "pillow"),
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130"),  # one of them, by the driver
)


def new_run_name(recipe: str) -> str:
    """A name for a run without one: of the W&B agent's run, the Slurm job, or the time and four random letters."""
    recipe = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe)[:60].lstrip(".-") or "run"
    if os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
        return os.environ["WANDB_RUN_ID"]
    if os.environ.get("SLURM_JOB_ID"):
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{recipe}-{array}-{task}" if array and task else f"{recipe}-{os.environ['SLURM_JOB_ID']}"
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{letters}"


class RunFolder:
    """One run's files under `folder`. Only the main process `writes`; on the others, what would write does nothing."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder = folder
        self._writes = writes
        self._lock = FileLock(folder / ".lock", timeout=0)
        self.best = folder / "best.pt"
        self.figures = folder / "figures"
        self.metrics = folder / "metrics.jsonl"
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

        UserError where a run with other settings is there.
        """
        state = self.status().get("state")
        # A job that Slurm has requeued comes with the flags of its first life, in which --overwrite has done its work.
        overwrite = config.overwrite and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        if overwrite or not self.folder.exists():
            return "new"
        before = self._config_before()
        changed = [key for key, value in before.items() if key not in _MAY_CHANGE and value != asdict(config)[key]]
        if changed:
            raise UserError(
                f"run: {self.folder} was started with other settings ({', '.join(changed)}): give another --run name, "
                "or start it anew with --overwrite"
            )
        if not before:
            return "new"
        return "finished" if state == "finished" and config.epochs <= before["epochs"] else "resumed"

    def _config_before(self) -> dict[str, Any]:
        """The settings in the run's config.yaml; {} where there is none."""
        recipe = self.folder / "config.yaml"
        return asdict(parse_config([f"--config={recipe}"])[0]) if recipe.exists() else {}

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
