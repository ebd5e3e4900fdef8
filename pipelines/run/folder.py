"""The run folder `runs/<name>/`: what a run leaves, written by the main process only, each file whole or not at all."""

import os
import re
import secrets
import shutil
import string
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from errno import ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.config import FORMAT, SCHEMA, Config, dump_yaml
from pipelines.data.dataset import Dataset, Split, load_dataset
from pipelines.data.engines.factory import libraries
from pipelines.data.known_photos import in_known_positions, keep_photos
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import MachineError, UserError
from pipelines.files import atomic_write
from pipelines.model.weights import read_weights
from pipelines.run.resume import REFUSED, ask_for_the_same_photos, is_longer, other_result, spelled
from pipelines.run_files import (
    MEANT_BEFORE,
    MODEL_FORMAT,
    is_run_config,
    read_rows,
    read_run_config,
    read_status,
    read_texts,
    read_trained_config,
    to_json,
)
from pipelines.text import listed, printable

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from pydantic import ValidationError

# What a run leaves, by name: of a folder, what is in it.
_OWN_FILES = re.compile(
    r"\.?(config\.yaml|status\.json|metrics\.jsonl|best\.pt|model\.json|predictions\.csv|photos\.npz|bad_photos\.json"
    r"|report\.html)"
    r"(\.tmp)?"
    r"|wandb_id|STOP|\.sync\.lock"
)
_OWN_FOLDERS = {
    "checkpoints": r"epoch-\d+-step-\d+|\.unfinished",
    "figures": r"\.?(train_batch|step_\d+|head_penalty|curves|per_class"
    r"|(calibration|confusion_matrix|predictions|explanations).*)\.png(\.\w+)*"
    r"|\.?predictions_.*\.(csv|json)(\.tmp)?",
    "export": r"README\.md|confusion_matrix\.png|model\..+",
    "dvclive": ".*",
    "tensorboard": ".*",
    "wandb": ".*",
}
_WRITTEN_INTO = (*_OWN_FOLDERS, "metrics.jsonl", "wandb_id", ".sync.lock")  # other files are replaced as a whole
_UNBEGUN = ".unbegun"  # there as long as what else is there is not a run, or no longer one
_NO_LOCKS = (ENOSYS, ENOTSUP, EOPNOTSUPP, ENOLCK)
BEST_FILES = ("best.pt", "model.json", "predictions.csv")  # the best weights, and what is kept of them
_LIBRARIES = ("dalitune", "torch", "torchvision", "accelerate", "numpy")


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
    """One run's files under `folder`. Only the main process `writes`; on the others, what would write does nothing.

    not_named: settings that neither a flag nor a recipe has named, where a run that is there goes on as it began.
    """

    def __init__(self, folder: Path, *, writes: bool = True, not_named: Collection[str] = ()) -> None:
        self.folder = folder
        self._not_named = not_named
        self._writes = writes
        self._lock: BaseFileLock = FileLock(folder / ".lock", timeout=0)
        self.best = folder / "best.pt"
        self.predictions = folder / "predictions.csv"
        self.figures = folder / "figures"
        self.metrics = folder / "metrics.jsonl"
        self._photos, self._bad_photos = folder / "photos.npz", folder / "bad_photos.json"
        self.stop_file = folder / "STOP"

    def status(self) -> dict[str, Any]:
        """The content of status.json; {} where the run never started, or the file is damaged."""
        try:
            return dict(read_status(self.folder) or {})
        except UserError:
            return {}

    def beginning(self, config: Config) -> str:
        """How a run of this name begins: "new", "resumed", or "finished" where nothing is left to do.

        Where a run is there it is kept from others from here on, so that what is read of it stays true.
        UserError where a run is there that goes on, whose result other settings have decided, or that has lost what it
        would go on from, or something that is no run. Photos and first weights are not looked at.
        """
        # A job that Slurm has requeued has the flags of its first attempt, in which --overwrite has done its work if
        # it came so far.
        overwrite = config.overwrite and not (_is_requeued() and self.status().get("job", _job()) == _job())
        try:
            if self._is_unbegun():
                return "new"
            self._refuse_what_is_no_run()
            self._hold()
        except OSError as error:
            reason = error.strerror or error
            line = f"run: cannot write into {self.folder} ({reason}): give another --run, or --runs DIR"
            raise UserError(line) from None
        try:
            beginning = "new" if overwrite or self._is_unbegun() else self._continuation(config)
        except UserError:
            self._lock.release(force=True)
            raise
        if beginning == "finished":
            self.close()
        return beginning

    def _continuation(self, config: Config) -> str:
        status, before = self.status(), self.settings_before()
        for line in self._edited():
            print(printable(line), file=sys.stderr, flush=True)
        if older := self.meant_before(config):
            # crop_mode is what auto came to.
            is_said = [key for key in older if key != "crop_mode" or config.crop_mode != "auto"]
            if words := ", ".join(f"{key} {spelled(older[key])}" for key in is_said):
                print(f"run: {printable(self.folder)} goes on as it began, with {words}", file=sys.stderr, flush=True)
            config = replace(config, **older)
        is_finished = status.get("state") == "finished"
        at = status.get("epoch", 0), status.get("global_step", 0)
        # Before the first checkpoint nothing is lost: a setting may be put right that has ended the run at its start.
        if (changed := other_result(before, config)) and (is_finished or self.has_saved()):
            values = ", ".join(f"{key} {spelled(getattr(before, key))}" for key in changed)
            less = " (of less memory with --max-batch-per-device)" if "batch_size" in changed else ""
            raise UserError(
                f"run: {self.folder} was started with other settings ({', '.join(changed)}): it goes on with "
                f"{values}{less}; for a new run give another --run name, or start it anew with --overwrite"
            )
        # Best weights that somebody has removed are in the checkpoint, and are put back on the way to the end.
        has_its_weights = self.best.exists() or not self.has_checkpoint()
        if is_finished and has_its_weights and not is_longer(before, config, *at, self._not_named):
            return "finished"
        # A run that is cut off before its first checkpoint may have best weights, of its first epoch, and begins anew.
        has_lost = is_finished or status.get("epoch", 0) > 1
        if has_lost and self.best.exists() and not self.has_checkpoint():
            raise UserError(
                f"run: {self.folder} has been trained, and its checkpoints are gone: put one back, or begin a new run "
                f"with its weights: --run NAME --weights {self.folder}"
            )
        return "resumed"

    def meant_before(self, config: Config) -> dict[str, Any]:
        """What settings that nobody has named, or that are newer than the run, mean for it."""
        before, now = asdict(self.settings_before()), asdict(config)
        are_default = {key for key in MEANT_BEFORE if now[key] == SCHEMA[key]["default"]}
        meant = {key: MEANT_BEFORE[key] for key in are_default if before[key] == MEANT_BEFORE[key]}
        if self.has_saved():  # auto is what it came to, or what the run was begun with in its place
            autos = ("crop_mode", "epochs")
            meant |= {key: before[key] for key in autos if now[key] == "auto" and before[key] != "auto"}
        own = {key: before[key] for key in self._not_named if key in REFUSED and before[key] != now[key]}
        for each in (own | meant, meant):
            with suppress(ValidationError):  # with a flag that does not go with them all that differs is to be told
                replace(config, **each)
                return each
        return {}

    def settings_before(self) -> Config:
        """Those with which the run was trained: its newest checkpoint has them, config.yaml before there is one."""
        return read_trained_config(self.folder) or read_run_config(self.folder)

    def _edited(self) -> list[str]:
        """A line where config.yaml, which anybody may have changed, is not what the run was trained with."""
        trained = read_trained_config(self.folder)
        if trained is None:
            return []
        try:
            changed = other_result(trained, read_run_config(self.folder))
        except UserError as error:
            return [f"{error}: the settings in its checkpoint count"]
        values = ", ".join(f"{key} {spelled(getattr(trained, key))}" for key in changed)
        file = self.folder / "config.yaml"
        return [f"{file} has been changed: the run was trained with {values}, and that counts"] if changed else []

    def has_the_same_data(self, config: Config) -> bool:
        """Whether `data` says what it said when the run began."""
        return ask_for_the_same_photos(self.settings_before(), config)

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
        arranged, lines, differences = in_known_positions(index_file, self._photos, self._noted().keys())
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
            with atomic_write(self._photos) as partial, open(partial, "wb") as file:
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
        with suppress(OSError, UserError):
            return read_texts(self._bad_photos)
        return {}

    def check_first_weights(self, config: Config, digest: str | None) -> None:
        """UserError where `weights` is set to others than the run began with, whose digest is `digest`, if known.

        A checkpoint holds all weights: the first ones need not be there any more.
        """
        if config.weights in (None, "none", self.settings_before().weights) or digest is None:
            return
        try:
            is_same = read_weights(config).digest() == digest
        except (UserError, MachineError) as error:
            print(f"{printable(error)}; not needed, as the checkpoint has all weights", file=sys.stderr, flush=True)
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
            if not resumed and not self._is_unbegun() and self.folder.is_dir():
                self._refuse_what_is_no_run()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            if not resumed:
                if not config.overwrite and not self._is_unbegun():
                    raise UserError(
                        f"run: another run has just been started in {self.folder}: give another --run name, or start "
                        "again to go on with it"
                    )
                (self.folder / _UNBEGUN).touch()
                self._empty()
            refuse_links(self.folder, *_WRITTEN_INTO)
            self.figures.mkdir(exist_ok=True)
        except UserError:
            self._lock.release(force=True)
            raise
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"runs: cannot make the folder {self.folder} ({reason}): give --runs DIR") from None
        # --overwrite was for this once: with it, --config RUN/config.yaml would empty the folder again.
        kept = replace(config, overwrite=False) if config.overwrite else config
        self._write("config.yaml", f"format: {FORMAT}\n{dump_yaml(kept)}")
        if not resumed:
            self.write_status("running")
            (self.folder / _UNBEGUN).unlink()
        if self.stop_file.exists() and not _is_requeued():
            self.stop_file.unlink()
            print(
                f"{printable(self.stop_file)} is of an earlier attempt at the run: removed", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """Lets other runs into the folder. Whoever asked this one for a stop has it now."""
        if self._lock.is_locked:
            with suppress(OSError):
                self.stop_file.unlink(missing_ok=True)
        self._lock.release(force=True)

    def _hold(self) -> None:
        """Takes the run's lock, which the system lets go of when the process ends, however it ends."""
        refuse_links(self.folder, ".lock")
        try:
            self._lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, Timeout):
                raise UserError(self._why_it_waits()) from None
            if getattr(error, "errno", ENOSYS) not in _NO_LOCKS:
                raise
            self._lock = SoftFileLock(self.folder / ".lock.held", timeout=0)
            self._hold()

    def _why_it_waits(self) -> str:
        line = f"run: another run is writing into {self.folder}: give another --run name"
        if isinstance(self._lock, SoftFileLock):
            # The file stays when the run is killed; only on the same machine it is known then that its process is gone.
            line += f"; if none is, as it was killed on another machine, remove {self._lock.lock_file}"
        return line

    def _is_unbegun(self) -> bool:
        """Whether no run stands here: no folder, an empty one, or one whose making or emptying was cut off."""
        if not os.path.lexists(self.folder):
            return True
        if not self.folder.is_dir():
            return False
        names = {path.name for path in self.folder.iterdir()}
        return _UNBEGUN in names or not names - {".lock", ".lock.held"}

    def _refuse_what_is_no_run(self) -> None:
        # --runs and --run may name any folder, a source tree or a thesis too, and a config.yaml stands in many.
        if not self.status() and not is_run_config(self.folder / "config.yaml"):
            raise UserError(f"run: {self.folder} is not a run folder, and is not overwritten: give another --run name")

    def _empty(self) -> None:
        """Removes what a run has left, by name: what else lies there is somebody's, and stays."""
        for path in self.folder.iterdir():
            within = _OWN_FOLDERS.get(path.name) or (path.name.startswith(".export-") and ".*")
            if not path.is_dir() or path.is_symlink():
                if _OWN_FILES.fullmatch(path.name) or within:
                    path.unlink()
            elif within:
                for inner in path.iterdir():
                    if re.fullmatch(within, inner.name, re.DOTALL):
                        shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
                with suppress(OSError):  # somebody's files are in it
                    path.rmdir()
        if left := sorted(path.name for path in self.folder.iterdir() if path.name not in (".lock", _UNBEGUN)):
            print(f"left as it is in {printable(self.folder)}: {listed(left)}", file=sys.stderr, flush=True)

    def write_status(
        self, state: str, reason: str = "", exit_code: int | None = None, epoch: int = 0, global_step: int = 0
    ) -> None:
        """status.json, which programs read: state is running, stopped, finished or failed."""
        where = {"epoch": epoch, "global_step": global_step}
        status = {"state": state, "reason": reason, "exit_code": exit_code, **where, "job": _job()}
        self._write_json("status.json", status)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line more in metrics.jsonl, or none of it. MachineError where the disk is full."""
        if not self._writes:
            return
        line = to_json(row) + "\n"
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
        """Those of BEST_FILES that are there."""
        return [path for name in BEST_FILES if (path := self.folder / name).exists()]

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_rows(self.metrics)

    def save_best(
        self,
        network: torch.nn.Module,
        description: Mapping[str, Any],
        write_predictions: Callable[[Path], object] | None = None,
    ) -> None:
        """best.pt, a plain state_dict on the CPU that torchvision's network loads, and model.json and predictions.csv
        beside it.

        write_predictions: writes that file under the name that it is given. MachineError where the disk is full; the
        best weights before stay as they are, with their files.
        """
        if not self._writes:
            return
        state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        try:
            # A file of our own is closed, and its room given back, when the disk is full; PyTorch's own is not.
            with ExitStack() as renamed_last:
                if write_predictions:
                    write_predictions(renamed_last.enter_context(atomic_write(self.predictions)))
                description_file = renamed_last.enter_context(atomic_write(self.folder / "model.json"))
                _write_text(description_file, _as_text(description))
                with atomic_write(self.best) as partial:
                    with open(partial, "wb") as file:
                        torch.save(state, file)
                    self.predictions.unlink(missing_ok=True)  # a kill from here on leaves none of other weights
        except (OSError, RuntimeError) as error:  # PyTorch tells of a full disk by either
            raise cannot_save(self.best, error) from None

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, _as_text(content))

    def _write(self, name: str, text: str) -> None:
        if not self._writes:
            return
        try:
            with atomic_write(self.folder / name) as partial:
                _write_text(partial, text)
        except OSError as error:
            raise cannot_save(self.folder / name, error) from None


def _as_text(content: Mapping[str, Any]) -> str:
    return to_json(content, indent=2) + "\n"


def _write_text(path: Path, text: str) -> None:
    # A folder's name need not be UTF-8: what is not, JSON reads back from its escape.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def describe_model(config: Config, dataset: Dataset, scores: Mapping[str, Any]) -> dict[str, Any]:
    """model.json: what a reader of best.pt needs to use it as it was trained, and to know where it comes from."""
    return {
        "format": MODEL_FORMAT if config.shrink else 2 if config.crop_mode == "squash" else 1,
        "arch": config.arch,
        "classes": list(dataset.splits["train"].classes),
        "image_size": config.evaluation_size,
        "resize": config.resize,
        "crop_mode": config.crop_mode,
        "shrink": config.shrink,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "transparency": config.transparency,
        "test_flips": config.test_flips,
        "scores": dict(scores),
        "data": str(dataset.data),
        "dataset_fingerprint": dataset.fingerprint,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that a run's numbers depend on, those of all engines among them."""
    found = {}
    for name in (*_LIBRARIES, *libraries()):
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
    """What a full disk ends a run with, or a folder that somebody has removed. `path` is what should be saved."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return MachineError(f"{path}: cannot be saved, as its folder is no longer there")
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
    return MachineError(
        f"{path}: cannot be saved ({reason}; {free / 2**20:.0f} MiB free): what was saved before is whole"
    )


def refuse_links(run: Path, *names: str) -> None:
    """UserError where one of these names in a run folder is a link that leads out of it: nothing is written there."""
    for path in (run / name for name in names):
        if path.is_symlink() and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(run), "")):
            raise UserError(
                f"{path} is a link that leads out of the run, to {os.path.realpath(path)}, and nothing is written "
                "through it: remove the link"
            )


def _job() -> str | None:
    """The Slurm job that this is; one of an array has its own."""
    return os.environ.get("SLURM_JOB_ID")


def _is_requeued() -> bool:
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
