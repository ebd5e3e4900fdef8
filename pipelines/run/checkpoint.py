"""Checkpoints: all that a training needs to go on from a step as if it had never stopped.

    runs/NAME/checkpoints/epoch-0003-step-00000120/
        state.pt             what PyTorch's own parts hold (model, optimizer, fp16 scaler), by the part's name, and each
                             process's BatchNorm statistics; tensors only
        best.pt, model.json, predictions.csv
                             the best weights so far, and what belongs to them (hard links)
        progress.json        what the other parts hold (counters, sums), side by side; decisions and settings; the
                             digest of every file

One is written under another name, flushed and then renamed, so it is whole or not there.

Accelerate's `save_state` is not used: under DDP its weights have names that a single process cannot load, each process
writes the scaler into the same file, and the random states that it keeps have no part here, as all is planned.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipelines.data.dataset import Dataset
from pipelines.data.loader import Loader, share_bad_photos
from pipelines.distributed.sync import on_main_process
from pipelines.errors import UserError
from pipelines.files import file_digest
from pipelines.model.network import TransferModel
from pipelines.model.tensors import load_tensors
from pipelines.model.weights import Weights, take_weights
from pipelines.run.folder import BEST_FILES, RunFolder, cannot_save, versions
from pipelines.run_files import CHECKPOINT_FORMAT, NewerFormat, checkpoint_folders, read_progress, to_json
from pipelines.text import printable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

_MOST_NAMES = 1 << 26  # bytes; of each process's statistics too
_FOLDER, _STATE, _PROGRESS = "checkpoints", "state.pt", "progress.json"
_OF_PYTORCH = (torch.nn.Module, torch.optim.Optimizer, torch.amp.GradScaler)


@dataclass
class Progress:
    """Where a training stands.

    epoch: epochs trained and evaluated. global_step: updates. skipped_steps: those that the fp16 scaler has skipped.
    best: the row of the best evaluation, with its `correct` and `count`.
    """

    epoch: int = 0
    global_step: int = 0
    skipped_steps: int = 0
    best: dict[str, Any] = field(default_factory=lambda: {"epoch": 0})

    @property
    def has_best(self) -> bool:
        """Whether any evaluation has given a finite loss."""
        return "val/loss" in self.best

    def keep_best(self, row: Mapping[str, Any], best_key: str, correct: int, count: int) -> bool:
        """Whether a validation row is the best so far by its `best_key`; it is kept then.

        Its loss must be finite, and of a tie the earlier one stays. correct, count: its photos.
        """
        is_best = row[best_key] > self.best.get(best_key, -1.0) and math.isfinite(row["val/loss"])
        if is_best:
            self.best = {**row, "correct": correct, "count": count}
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """state: what `state_dict` has returned, maybe among other things."""
        for each in fields(self):
            setattr(self, each.name, state[each.name])


class Stateful(Protocol):
    """A part of a training that a checkpoint holds, as PyTorch's modules and optimizers are.

    state_dict is called on all processes together, and what the main process returns is written: tensors of a part of
    PyTorch's, else a mapping for progress.json, whose keys no other part has; load_state_dict gets all of that file.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class UnreadablePhotos:
    """The photos of both splits that a training has met and could not decode: left out from then on, also after a
    resume, unless their files have changed."""

    def __init__(self, run: RunFolder, loaders: Sequence[Loader]) -> None:
        self._run = run
        self._loaders = loaders

    def state_dict(self) -> dict[str, Any]:
        """`bad`: positions by split. The run's folder notes them too."""
        for loader in self._loaders:
            share_bad_photos(loader)
        for loader in self._loaders:  # after what all take part in, as a full disk ends the main process alone
            self._run.note_bad(loader.split, loader.bad)
        return {"bad": {loader.split.name: sorted(loader.bad) for loader in self._loaders}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Those of the positions whose files are still what they were."""
        for loader in self._loaders:
            loader.bad = self._run.still_bad(loader.split, state["bad"][loader.split.name])


class CheckpointClock:
    """Says when the next checkpoint is due."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self.start()

    def start(self) -> None:
        """A checkpoint has been written."""
        self._started = time.monotonic()

    def has_run_out(self) -> bool:
        """Whether the time between two checkpoints is over."""
        return time.monotonic() - self._started > self._seconds


class Checkpoints:
    """The checkpoints of a run. All methods are called on all processes; the main process reads and writes.

    parts: all that a training needs to go on, by name, among them its TransferModel as "model". decisions: JSON, what
    was settled when the run began. kept: how many stay, the last ones.
    """

    def __init__(
        self,
        run: RunFolder,
        dataset: Dataset,
        accelerator: Accelerator,
        parts: Mapping[str, Stateful],
        decisions: Mapping[str, Any],
        kept: int = 2,
    ) -> None:
        self._run = run
        self._folder = run.folder / _FOLDER
        self._dataset = dataset
        self._accelerator = accelerator
        self._tensors = {name: part for name, part in parts.items() if isinstance(part, _OF_PYTORCH)}
        self._others = {name: part for name, part in parts.items() if name not in self._tensors}
        self._decisions = decisions
        self._kept = kept
        networks = {name: part for name, part in parts.items() if isinstance(part, TransferModel)}
        self._networks = {"" if name == "model" else f"{name}.": network for name, network in networks.items()}

    def save(self) -> None:
        """Writes a checkpoint and removes all but the last ones.

        MachineError where the disk is full; the earlier checkpoints stay whole.
        """
        state: dict[str, Any] = {"scaler": {}, "batchnorm": []}  # where there is none
        state |= {name: part.state_dict() for name, part in self._tensors.items()}
        progress = dict(self._decisions)
        for name, part in self._others.items():
            own = part.state_dict()
            assert not own.keys() & progress.keys(), f"{name} and another part keep something under the same name"
            progress |= own
        if self._networks[""].batchnorm == "train" and self._accelerator.num_processes > 1:
            # Each process's own between evaluations: their mean alone would not lead to the same bits.
            state["batchnorm"] = gather_object([_statistics(self._networks)])
        on_main_process(self._accelerator.state, partial(self._write, state, progress))

    def load(self, progress: Mapping[str, Any]) -> None:
        """Puts all parts back where they were at `progress`, and the run's best weights.

        UserError where they are not of this network.
        """
        folder = self._folder / progress["checkpoint"]
        try:
            self._load_state(folder / _STATE)
        except (OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of PyTorch and its unpickler, of many kinds
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise UserError(f"{folder / _STATE} does not hold the state of this network ({reason})") from None
        for part in self._others.values():
            part.load_state_dict(progress)
        on_main_process(self._accelerator.state, partial(self._restore_best, folder))

    def _load_state(self, file: Path) -> None:
        state = load_tensors(file, most_names=_MOST_NAMES)
        for name, part in self._tensors.items():
            if state[name] or name != "scaler":  # of another precision: it looks for its scale anew
                part.load_state_dict(state[name])
        if state["batchnorm"]:
            own = _own_or_mean(state["batchnorm"], self._accelerator.process_index, self._accelerator.num_processes)
            for prefix, network in self._networks.items():
                of_it = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
                network.load_state_dict(of_it, strict=False)

    def _write(self, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        name = f"epoch-{progress['epoch']:04}-step-{progress['global_step']:08}"
        target, unfinished = self._folder / name, self._folder / ".unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._folder.mkdir(exist_ok=True)  # a run's folder that is gone is not made anew
            unfinished.mkdir()
            with open(unfinished / _STATE, "wb") as file:
                torch.save(dict(state), file)
            for path in self._run.best_files():
                _link(path, unfinished / path.name)
            content = {
                "format": CHECKPOINT_FORMAT,
                **progress,
                "world_size": self._accelerator.num_processes,
                "precision": self._accelerator.mixed_precision,
                "dataset_fingerprint": self._dataset.fingerprint,
                "metrics_bytes": self._run.metrics_bytes(),
                "versions": versions(),
                "files": {path.name: file_digest(path) for path in unfinished.iterdir()},
            }
            (unfinished / _PROGRESS).write_text(to_json(content, indent=2) + "\n", encoding="utf-8")
            for path in (*unfinished.iterdir(), self._run.metrics, unfinished):
                _flush(path)
            shutil.rmtree(target, ignore_errors=True)  # there where it is damaged, or of a stop right after it
            os.replace(unfinished, target)
            _flush(self._folder)
        except (OSError, RuntimeError) as error:  # PyTorch tells of a full disk by either
            shutil.rmtree(unfinished, ignore_errors=True)
            raise cannot_save(target, error) from None
        for old in checkpoint_folders(self._folder)[: -self._kept]:
            shutil.rmtree(old, ignore_errors=True)

    def _restore_best(self, folder: Path) -> None:
        # An attempt that was cut off may have found better ones after the checkpoint; they are found again.
        for path in self._run.best_files():
            path.unlink()
        for name in BEST_FILES:
            if (folder / name).exists():
                _link(folder / name, self._run.folder / name)


def newest_checkpoint(run: RunFolder, dataset: Dataset) -> dict[str, Any] | None:
    """The progress of a run's newest whole checkpoint, with its folder's name as `checkpoint`; None where none is.

    UserError where there are some and none is whole, or the newest is of other photos.
    """
    folders = checkpoint_folders(run.folder / _FOLDER)
    for folder in reversed(folders):
        try:
            progress = _read(folder)
        except NewerFormat:
            raise
        except (OSError, UserError) as error:
            print(
                f"{printable(folder)} is damaged ({printable(error)}): the checkpoint before it is used",
                file=sys.stderr,
                flush=True,
            )
            continue
        if progress["dataset_fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"run: {run.folder} was trained on other photos than {dataset.root} has now: "
                "give another --run name, or start it anew with --overwrite"
            )
        return progress
    if folders:
        raise UserError(
            f"run: no whole checkpoint among {len(folders)} in {run.folder / _FOLDER}: put a whole one back, "
            "or start the run anew with --overwrite"
        )
    return None


def trained_weights(folder: Path, arch: str, named: str) -> Weights:
    """The network of a checkpoint as it was trained, and not its moving average. UserError where it is damaged."""
    try:
        _read(folder)
        content = load_tensors(folder / _STATE, most_names=_MOST_NAMES)["model"]
    except UserError as error:
        raise UserError(f"{named}: {folder} is damaged: {error}") from None
    except Exception as error:  # of PyTorch and its unpickler, of many kinds
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{named}: {folder} is damaged, or gone ({reason})") from None
    return take_weights(content, arch, folder / _STATE, named)


def _read(folder: Path) -> dict[str, Any]:
    """The progress of a checkpoint. Raises OSError or UserError where the checkpoint is not whole."""
    progress = read_progress(folder)
    for name, digest in progress["files"].items():
        if file_digest(folder / name) != digest:
            raise UserError(f"{name} is not what was written")
    return {**progress, "checkpoint": folder.name}


def _flush(path: Path) -> None:
    """To the disk itself: a rename may reach it before what was written earlier."""
    if not path.exists():
        return
    with suppress(PermissionError):  # a folder, on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    """No second copy of weights that are replaced, never changed; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _statistics(networks: Mapping[str, TransferModel]) -> dict[str, torch.Tensor]:
    """BatchNorm's running statistics, on the CPU: networks that have any have no other buffers.

    networks: by what their statistics' names begin with, "" for the one that is trained.
    """
    return {
        prefix + name: buffer.detach().cpu()
        for prefix, network in networks.items()
        for name, buffer in network.named_buffers()
    }


def _own_or_mean(
    statistics: Sequence[dict[str, torch.Tensor]], process_index: int, num_processes: int
) -> dict[str, torch.Tensor]:
    """A process's own BatchNorm statistics; on another number of processes than they come from, their mean.

    The mean is weighted by the batches that each process has seen, as before an evaluation. Where none has seen
    any, they are the same on all.
    """
    if len(statistics) == num_processes:
        return statistics[process_index]
    mean = {}
    for name, first in statistics[0].items():
        values = torch.stack([each[name] for each in statistics])
        if name.endswith("num_batches_tracked"):
            mean[name] = values.amax(dim=0)
            continue
        counts = [each[f"{name.rpartition('.')[0]}.num_batches_tracked"] for each in statistics]
        weights = torch.stack(counts).to(first.dtype)
        mean[name] = (values * (weights / weights.sum())[:, None]).sum(dim=0) if weights.any() else first
    return mean
