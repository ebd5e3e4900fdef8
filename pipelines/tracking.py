"""Tracking: Weights & Biases or TensorBoard through Accelerate, on the main process, and never in training's way.

metrics.jsonl has every row; a tracker gets each `global_step` once, whatever happens to the run or to the tracker.
"""

import csv
import math
import os
import platform
import secrets
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import disk_usage
from threading import Thread
from typing import Any

from pipelines.config import Config
from pipelines.dataset import Dataset
from pipelines.errors import UserError
from pipelines.model import TransferModel, parameter_counts, read_description
from pipelines.runs import RunFolder, versions
from pipelines.torch_engine import central_views
from pipelines.wandb_sync import ID_FILE, has_key, is_sent, life_folders, steps_on_disk

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

_TABLE_PHOTOS = 16
_PATIENCE = 3.0  # seconds that a server has for an answer
_UPLOAD_SECONDS = 120.0  # that large files may take at the end, as long as the server answers
_LEAST_FREE = 2**20  # bytes; on a full disk W&B loses rows without a word
_LISTED_PHOTOS = 1_000_000  # of a larger dataset the artifact has the fingerprint and the counts only


class Tracking:
    """Sends rows, pictures, weights and the summary of a run to the tracker that `config` names.

    A row that metrics.jsonl has already, as in a resumed run, and that no earlier life delivered, is sent at the start;
    one that was delivered is not sent again. facts: what `describe_run` says. A tracker that fails is left behind in
    one line.
    """

    def __init__(
        self, accelerator: Accelerator, config: Config, run: RunFolder, dataset: Dataset, facts: Mapping[str, Any]
    ) -> None:
        self._accelerator, self._config, self._run, self._dataset = accelerator, config, run, dataset
        self._settings = asdict(config) | dict(facts)
        self._wandb: Any = None  # the W&B run, while there is one
        self._delivered: Collection[int] = ()
        self._sent: set[int] = set()
        self._held: dict[str, Any] = {}
        self._pictures: dict[str, Path] = {}
        self._photos: dict[int, Any] = {}
        self._artifacts: list[Any] = []
        self._may_restart = config.tracker == "wandb"
        self._alive = config.tracker != "none" and accelerator.is_main_process
        self._attempt(self._start)

    def log(self, row: Mapping[str, Any], records: np.ndarray | None = None, *, hold: bool = False) -> None:
        """One row of metrics.jsonl, after it was written there.

        records: those of `evaluation.predict`, for the table of validation photos. hold: keep the row until one of the
        same `global_step`, which is merged with it, or of another, or `finish` comes.
        """
        self._attempt(lambda: self._log(row, records, hold))

    def show(self, path: Path) -> None:
        """A PNG that goes out with the next row, under its file's name."""
        if path.exists():  # a picture that could not be saved was told already
            self._pictures[path.stem] = path

    def log_best(self, global_step: int) -> None:
        """best.pt and model.json have improved at `global_step`."""
        if self._config.log_model == "best" and global_step not in self._delivered:
            self._attempt(self._log_model)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is done; summary: what W&B's run table shows of it as a whole."""
        self._attempt(lambda: self._finish(summary))

    def stopped(self) -> None:
        """The run stops on request and will go on: W&B shows it as preempted, not as crashed."""
        self._may_restart = False  # it would only take time
        if self._wandb is not None:
            self._attempt(lambda: self._wandb.mark_preempting())
        self.abandon(exit_code=75)

    def abandon(self, exit_code: int = 1) -> None:
        """The run ends without being done."""
        self._may_restart = False
        self._attempt(lambda: self._end(exit_code))

    def _attempt(self, task: Callable[[], None]) -> None:
        """Whatever a tracker raises, the training goes on."""
        if not self._alive:
            return
        try:
            task()
        except Exception as error:
            if _has_lost_its_process(error) and self._may_restart:
                self._may_restart = False
                self._attempt(partial(self._restart, _first_line(error)))
                self._attempt(task)
            else:
                self._give_up(error)

    def _add(self, what: str, task: Callable[[], None]) -> None:
        """Something besides the rows: where it cannot be had, as a photo that is gone, the run does without it."""
        try:
            task()
        except Exception as error:
            if _has_lost_its_process(error):
                raise
            self._say(f"wandb: {what} could not be added ({_first_line(error)})")

    def _give_up(self, error: Exception) -> None:
        run, self._alive, self._wandb = self._wandb, False, None
        with suppress(Exception):
            run.finish(1)
        if _has_lost_its_process(error):
            _forget_process()
        self._say(f"tracking has stopped ({_first_line(error)}); the training goes on, and metrics.jsonl has every row")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # Starting, and starting again

    def _start(self) -> None:
        if self._config.tracker == "wandb":
            self._start_wandb()
        else:
            self._accelerator.project_configuration.logging_dir = str(self._run.folder)
            # Everything is sent anew, so what an earlier life wrote does not count.
            self._accelerator.init_trackers("tensorboard", self._settings, {"tensorboard": {"purge_step": 0}})
        self._send_what_metrics_have()

    def _restart(self, why: str) -> None:
        """W&B's own process has ended: another one goes on, offline, and gets what is not on the disk."""
        _forget_process()
        time.sleep(1)  # W&B's folders are named by the second
        self._sent, self._photos, self._artifacts = set(), {}, []
        self._accelerator.trackers.clear()
        self._start_wandb(f"W&B's own process has ended: {why}")
        self._send_what_metrics_have()

    def _send_what_metrics_have(self) -> None:
        rows = dict[int, dict[str, Any]]()
        for row in self._run.read_metrics():
            values = {key: math.nan if value is None else value for key, value in row.items()}
            rows[row["global_step"]] = rows.get(row["global_step"], {}) | values
        # The newest may wait for its other half.
        self._held = rows.pop(max(rows)) if rows else {}
        for row in rows.values():
            self._send(row)

    def _start_wandb(self, reason_to_be_offline: str = "") -> None:
        import wandb

        directory, run_id = wandb_directory(self._run.folder), _wandb_id(self._run.folder)
        earlier = life_folders(directory, run_id)
        mode, why = ("offline", reason_to_be_offline) if reason_to_be_offline else _wandb_mode(earlier)
        if mode != "disabled" and disk_usage(directory).free < _LEAST_FREE:
            raise OSError(f"the disk under {directory} is full")
        try:
            self._init_wandb(mode, run_id, directory)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()
            self._accelerator.trackers.clear()  # the one that failed would be started again
            mode, why = "offline", _first_line(error)
            self._init_wandb(mode, run_id, directory)
        run = self._wandb = self._accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        # `_step` is our global_step: the server tells the last one that it has, and the files have them all.
        self._delivered = range(run.starting_step) if mode == "online" else steps_on_disk(earlier)
        if mode == "offline":
            self._say(f"wandb: offline ({why}); send the run later with: {_sync_command(self._run.folder)}")
        elif mode == "online":
            self._say(f"wandb: {run.url}")
        if not self._delivered:
            self._add("the index of the photos", self._log_dataset)

    def _init_wandb(self, mode: str, run_id: str, directory: Path) -> None:
        options = {
            "id": run_id,
            "mode": mode,
            "resume": "allow",
            "dir": str(directory),
            "name": os.environ.get("WANDB_NAME") or self._run.folder.name,
            "tags": [tag.strip() for tag in self._config.tags.split(",")] if self._config.tags else None,
            "group": self._config.group,
            "settings": _wandb_settings(),
        }
        self._accelerator.init_trackers(project_name(self._config), self._settings, {"wandb": options})

    # Rows and what goes with them

    def _log(self, row: Mapping[str, Any], records: np.ndarray | None, hold: bool) -> None:
        if self._held and self._held["global_step"] != row["global_step"]:
            self._send(self._take_held())
        self._held = self._held | dict(row)
        if records is not None and self._wandb is not None and row["global_step"] not in self._delivered:
            self._add("the photos", partial(self._hold_predictions, records))
        if not hold:
            self._send(self._take_held())

    def _take_held(self) -> dict[str, Any]:
        row, self._held = self._held, {}
        return row

    def _send(self, row: dict[str, Any]) -> None:
        step = row["global_step"]
        if step in self._delivered or step in self._sent:
            return
        if self._wandb is None:
            for tracker in self._accelerator.trackers:
                tracker.log(row, step=step)
        else:
            import wandb

            pictures = {name: wandb.Image(str(path)) for name, path in self._pictures.items() if path.exists()}
            self._accelerator.get_tracker("wandb").log(row | pictures, step=step, commit=True)
        self._pictures = {}
        self._sent.add(step)

    def _hold_predictions(self, records: np.ndarray) -> None:
        """The same photos each time, so that one can follow them through the training."""
        import wandb

        split, classes = self._dataset.splits["val"], self._dataset.splits["train"].classes
        if not self._photos:
            sound = np.flatnonzero(split.faults == 0)
            chosen = sound[np.linspace(0, len(sound) - 1, min(_TABLE_PHOTOS, len(sound))).round().astype(int)]
            chosen = chosen[np.isin(chosen, records["index"])]
            views = central_views(split, chosen, image_size=self._config.image_size, resize=self._config.resize)
            self._photos = {
                int(index): wandb.Image(view, file_type="jpg") for index, view in zip(chosen, views, strict=True)
            }
        table = wandb.Table(["photo", "file", "truth", "prediction", "confidence", "right"])
        for record in records[np.isin(records["index"], list(self._photos))]:
            truth, prediction = classes[record["label"]], classes[record["predicted"]]
            table.add_data(
                self._photos[int(record["index"])],
                os.path.basename(split.path(int(record["index"]))).encode("utf-8", "replace").decode(),
                truth,
                prediction,
                float(record["confidence"]),
                truth == prediction,
            )
        self._held["predictions"] = table

    def _log_model(self) -> None:
        if self._wandb is not None and len(self._run.best_files()) == 2:
            self._add("the best weights", self._log_best_files)

    def _log_best_files(self) -> None:
        import wandb

        best = wandb.Artifact(f"model-{self._wandb.id}", "model", metadata=_scores(self._run.folder))
        for path in self._run.best_files():
            best.add_file(str(path))
        self._artifacts.append(self._wandb.log_artifact(best, aliases=["best", self._run.folder.name]))

    def _log_dataset(self) -> None:
        """The index: one line a photo, and the hash of all."""
        import wandb

        data = self._dataset
        counts = {f"{name}_photos": len(split) for name, split in data.splits.items()}
        index = wandb.Artifact(f"dataset-{data.fingerprint}", "dataset", metadata={"hash": data.fingerprint} | counts)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.csv"
            with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                lines = csv.writer(file)
                lines.writerow(("split", "label", "path"))
                if sum(counts.values()) <= _LISTED_PHOTOS:
                    for name, split in data.splits.items():
                        paths = (os.path.relpath(split.path(place), data.root) for place in range(len(split)))
                        lines.writerows((name, split.classes[y], at) for y, at in zip(split.labels, paths, strict=True))
            index.add_file(str(path))  # W&B keeps a copy
        self._artifacts.append(self._wandb.log_artifact(index))

    # Ending

    def _finish(self, summary: Mapping[str, Any]) -> None:
        if self._held:
            self._send(self._take_held())
        if self._wandb is not None:
            self._wandb.summary.update(dict(summary))
            # A life that was killed may have taken its last weights with it; W&B knows what it has by its hash.
            if self._config.log_model == "end" or (self._config.log_model == "best" and self._delivered):
                self._log_model()
            self._wait_for_uploads()
        self._end(exit_code=0)

    def _wait_for_uploads(self) -> None:
        """Weights are large: they may take their time, as long as there is a server that takes them."""
        if self._wandb.offline:
            return
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        give_up = time.monotonic() + _UPLOAD_SECONDS
        for artifact in self._artifacts:
            with suppress(Exception):  # what the server refuses is not waited for
                while time.monotonic() < give_up and _answers(self._wandb.settings.base_url):
                    try:
                        artifact.wait(timeout=5)
                        break
                    except WaitTimeoutError:
                        self._say(f"wandb: {artifact.name} is being sent ...")

    def _end(self, exit_code: int) -> None:
        if self._wandb is None:
            for tracker in self._accelerator.trackers:
                tracker.finish()
        else:
            self._end_wandb(self._wandb, exit_code)
        # Only now: W&B may have lost its process without anybody's notice, and another one has to take everything.
        self._alive, self._wandb = False, None

    def _end_wandb(self, run: Any, exit_code: int) -> None:
        folder, later = Path(run.dir).parent, _sync_command(self._run.folder)
        try:
            run.finish(exit_code)
        except TimeoutError:
            self._say(f"wandb: the server has not taken everything; send the rest later with: {later}")
            return
        if run.offline and (lost := _missing(self._sent, folder)):
            self._say(f"wandb: {len(lost)} rows are not in {folder}: is the disk full? metrics.jsonl has them")


def tracker_names(config: Config) -> str | None:
    """What `Accelerator(log_with=...)` takes. UserError where the tracker is not installed."""
    if config.tracker == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UserError(
                "tracker: tensorboard is not installed: pip install tensorboard, or --tracker none"
            ) from None
    return None if config.tracker == "none" else config.tracker


def describe_run(
    accelerator: Accelerator, dataset: Dataset, network: TransferModel, engine: str
) -> dict[str, str | int | bool | None]:
    """What explains a difference between runs besides their settings, flat. All processes must call it."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    all_parameters, trained_parameters = parameter_counts(network)
    facts: dict[str, str | int | bool | None] = {
        "world_size": accelerator.num_processes,
        "devices": ", ".join(sorted(set(gather_object([name])))),
        "precision": accelerator.mixed_precision,
        "engine": engine,
        "parameters": all_parameters,
        "trained_parameters": trained_parameters,
        "dataset_fingerprint": dataset.fingerprint,
        "classes": len(dataset.splits["train"].classes),
    }
    facts |= {f"{split.name}_photos": sum(split.class_counts().values()) for split in dataset.splits.values()}
    if accelerator.is_main_process:
        facts["git_commit"], facts["git_dirty"] = _git_state(Path(__file__).resolve().parent.parent)
    facts["version_python"] = platform.python_version()
    return facts | {f"version_{library}": number for library, number in versions().items()}


def check_tracked(run: Path) -> None:
    """UserError where W&B knows no run of this folder, or is just being told of it."""
    if not (run / ID_FILE).exists():
        raise UserError(f"tracker: {run} is no run that was trained with --tracker wandb: leave --tracker out")
    if RunFolder(run).status().get("state") == "running":
        raise UserError(f"tracker: {run} is not finished: finish it first, or leave --tracker out")


def add_to_summary(run: Path, config: Config, scores: Mapping[str, float | str]) -> None:
    """Adds scores to the summary of a run that W&B knows already, online or in an offline life of its own."""
    import wandb

    directory, run_id = wandb_directory(run), _wandb_id(run)
    mode, why = _wandb_mode(life_folders(directory, run_id))
    try:
        settings: Any = {"id": run_id, "mode": mode, "resume": "allow", "dir": directory, "settings": _wandb_settings()}
        with wandb.init(project=project_name(config), **settings) as known:
            known.summary.update(dict(scores))
    except Exception as error:
        print(f"wandb: the scores were not sent ({_first_line(error)})", file=sys.stderr)
        return
    if mode == "offline":
        print(f"wandb: offline ({why}); send the scores later with: {_sync_command(run)}", file=sys.stderr)


def project_name(config: Config) -> str:
    """The tracker's project: the setting, W&B's variable, or dalitune."""
    return config.project or os.environ.get("WANDB_PROJECT") or "dalitune"


def wandb_directory(run: Path) -> Path:
    """Where W&B keeps a run's files, with those that wait to be sent: beside the run, not on some node of a cluster."""
    directory = Path(os.environ.get("WANDB_DIR") or run)
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))
    return directory


def _wandb_id(run: Path) -> str:
    """One id for the run's whole life; a sweep's agent has chosen it already."""
    file = run / ID_FILE
    if not file.exists():
        file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _wandb_settings() -> Any:
    """Nothing waits for long: by default a server that is gone would hold the start for minutes, the end for ever."""
    import wandb

    limits = {"init_timeout": 10.0, "finish_timeout": 5.0}
    limits = {name: value for name, value in limits.items() if f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(console="off", silent=True, finish_timeout_raises=True, **limits)


def _wandb_mode(earlier: Sequence[Path]) -> tuple[str, str]:
    """The mode for wandb.init, and why it is not online. Without a key W&B would ask for one, so it is offline then.

    earlier: what the run's lives so far have left.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        return mode, f"WANDB_MODE={mode}"
    if not has_key():
        return "offline", "no key"
    if any(life.name.startswith("offline-") and not is_sent(life) for life in earlier):
        return "offline", "as the earlier parts of the run, which are not sent yet"
    if not _answers(wandb.setup().settings.base_url):
        return "offline", "the server does not answer"
    return "online", ""


def _answers(url: str) -> bool:
    """Whether there is a server, known within seconds: a thread, as a name's look-up cannot be told to give up."""
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=_PATIENCE):
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except (OSError, ValueError) as error:
            answers.append(isinstance(getattr(error, "reason", None), ssl.SSLError))  # W&B has settings for that

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    return any(answers)


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit of the code and whether a file of it has been changed since; None where it is no repository."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(folder), *words]
        return subprocess.run(
            call, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if not git("rev-parse", "--show-prefix"):  # not a folder inside another repository
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    return None, None


def _scores(run: Path) -> dict[str, Any]:
    return {key: value for key, value in read_description(run, "run")["scores"].items() if value is not None}


def _missing(steps: set[int], life: Path) -> set[int]:
    """The steps that W&B, which ends a moment later, has not written, as on a full disk: it does not tell."""
    for _ in range(10):
        if not (missing := steps - steps_on_disk([life])):
            break
        time.sleep(_PATIENCE / 10)
    return missing


def _sync_command(run: Path) -> str:
    return f"python -m pipelines.wandb_sync {shlex.quote(str(run))}"


def _has_lost_its_process(error: Exception) -> bool:
    """Whether W&B's own process has ended: the socket says so, or an answer that will not come."""
    if isinstance(error, ConnectionError):
        return True
    if "wandb" not in sys.modules:
        return False
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return isinstance(error, HandleAbandonedError | MailboxClosedError)


def _forget_process() -> None:
    """W&B asks the process that is not there to end, as it would once more at the end of ours."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
