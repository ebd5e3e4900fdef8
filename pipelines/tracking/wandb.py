"""Weights & Biases as a tracker: one run there for each run folder, online where that can be, else offline."""

import csv
import errno
import logging
import os
import secrets
import shlex
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from threading import Thread
from typing import Any, Literal

from pipelines.config import Config
from pipelines.data.dataset import Dataset
from pipelines.data.decode import central_views
from pipelines.data.plan import eval_plan
from pipelines.errors import UserError
from pipelines.run.folder import RunFolder
from pipelines.run_files import read_description
from pipelines.text import counted, printable
from pipelines.tracking.base import Tracker, first_line, say
from pipelines.tracking.settings import TrackerNames, is_agents_run, wandb_names
from pipelines.tracking.wandb_files import ID_FILE, attempt_folders, has_key, is_sent, steps_on_disk

import numpy as np
from accelerate import Accelerator

_TABLE_PHOTOS = 16
_PATIENCE = 3.0  # seconds that a server has for an answer
_UPLOAD_SECONDS = 120.0  # that large files may take at the end, as long as the server answers
_LEAST_FREE = 2**20  # bytes; on a full disk W&B loses rows without a word
_LISTED_PHOTOS = 1_000_000  # of a larger dataset the artifact has the fingerprint and the counts only


class WandbTracker(Tracker):
    """Each row is sent once, whatever happens to the run, to W&B's own process or to the server.

    A run has one id for good. Its rows' `_step` is our `global_step`: the server tells the last one that it has, and
    the files of offline attempts have them all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunFolder,
        names: TrackerNames,
        settings: Mapping[str, Any],
        config: Config,
        dataset: Dataset,
    ) -> None:
        super().__init__("wandb", accelerator, run, names, settings)
        self._config, self._dataset = config, dataset
        self._wandb: Any = None  # the W&B run, while there is one
        self._photos: dict[int, Any] = {}
        self._artifacts: list[Any] = []

    def start(self, reason_to_be_offline: str = "") -> None:
        import wandb

        directory, run_id = wandb_directory(self._run.folder), _wandb_id(self._run.folder)
        earlier = attempt_folders(directory, run_id)
        mode, why = ("offline", reason_to_be_offline) if reason_to_be_offline else _wandb_mode(earlier)
        if mode != "disabled" and disk_usage(directory).free < _LEAST_FREE:
            raise OSError(f"the disk under {directory} is full")
        try:
            self._init(mode, run_id, directory)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()
            self._accelerator.trackers.clear()  # the one that failed would be started again
            mode, why = "offline", first_line(error)
            self._init(mode, run_id, directory)
        run = self._wandb = self._accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        self.delivered = range(run.starting_step) if mode == "online" else steps_on_disk(earlier)
        if mode == "offline":
            say(f"wandb: offline ({why}); send the run later with: {_sync_command(self._run.folder)}")
        elif mode == "online":
            say(f"wandb: {run.url}")
        if not self.delivered:
            self._add("the index of the photos", self._log_dataset)

    def _init(self, mode: str, run_id: str, directory: Path) -> None:
        options = {
            "id": run_id,
            "mode": mode,
            "resume": "allow",
            "dir": str(directory),
            "entity": self._names.entity,
            "name": os.environ.get("WANDB_NAME") or self._run.folder.name,
            "tags": list(self._names.tags) or None,
            "group": self._names.group,
            "settings": _wandb_settings(),
        }
        self._accelerator.init_trackers(self._names.project, dict(self._settings), {"wandb": options})
        for handler in logging.getLogger("wandb").handlers:  # its debug.log: on a full disk a trace for each line
            handler.handleError = lambda record: None  # type: ignore[method-assign]

    def send(self, row: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        import wandb

        shown = {name: wandb.Image(str(path)) for name, path in pictures.items() if path.exists()}
        self._accelerator.get_tracker("wandb").log(dict(row) | shown, step=row["global_step"], commit=True)

    def predictions(self, records: np.ndarray) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._add("the photos", lambda: found.update(predictions=self._table_of(records)))
        return found

    def log_best(self) -> None:
        if self._run.best.exists():
            self._add("the best weights", self._log_best_files)

    def announce(self, title: str, text: str, level: Literal["INFO", "WARN", "ERROR"]) -> None:
        self._add("the alert", lambda: self._wandb.alert(title, text, level))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._wandb.summary.update(dict(summary))
        # An attempt that was killed may have taken its last weights with it; W&B knows what it has by its hash.
        if self._config.log_model == "end" or (self._config.log_model == "best" and self.delivered):
            self.log_best()
        self._wait_for_uploads()

    def preempt(self) -> None:
        self._wandb.mark_preempting()

    def end(self, exit_code: int, sent: set[int]) -> None:
        run, folder, later = self._wandb, Path(self._wandb.dir).parent, _sync_command(self._run.folder)
        try:
            run.finish(exit_code)
        except TimeoutError:
            say(f"wandb: the server has not taken everything; send the rest later with: {later}")
            return
        except OSError as error:  # of its debug.log, as that is closed
            if error.errno != errno.ENOSPC:
                raise
        if run.offline and (lost := _missing(sent, folder)):
            are = counted(len(lost), "row is", "rows are")
            say(f"wandb: {are} not in {folder}: is the disk full? metrics.jsonl has them")

    def abort(self, error: Exception) -> None:
        with suppress(Exception):
            self._wandb.finish(1)
        if self.has_lost_its_process(error):
            _forget_process()

    def has_lost_its_process(self, error: Exception) -> bool:
        return _has_lost_its_process(error)

    def restart(self, why: str) -> None:
        """Another process goes on, offline, and is to get what is not on the disk."""
        _forget_process()
        time.sleep(1)  # W&B's folders are named by the second
        self._photos, self._artifacts = {}, []
        self._accelerator.trackers.clear()
        self.start(f"W&B's own process has ended: {why}")

    def _add(self, what: str, task: Callable[[], object]) -> None:
        """Something besides the rows: where it cannot be had, as a photo that is gone, the run does without it."""
        try:
            task()
        except Exception as error:
            if _has_lost_its_process(error):
                raise
            say(f"wandb: {what} could not be added ({first_line(error)})")

    def _table_of(self, records: np.ndarray) -> Any:
        """The same photos each time, so that one can follow them through the training."""
        import wandb

        split, classes = self._dataset.splits["val"], self._dataset.splits["train"].classes
        if not self._photos:
            sound = np.flatnonzero(split.faults == 0)
            chosen = sound[np.linspace(0, len(sound) - 1, min(_TABLE_PHOTOS, len(sound))).round().astype(int)]
            chosen = chosen[np.isin(chosen, records["index"])]
            views = central_views(split, chosen, eval_plan(self._config, split.sizes))
            self._photos = {
                int(index): wandb.Image(view, file_type="jpg") for index, view in zip(chosen, views, strict=True)
            }
        table = wandb.Table(["photo", "file", "truth", "prediction", "confidence", "right"])
        for record in records[np.isin(records["index"], list(self._photos))]:
            truth, prediction = classes[record["label"]], classes[record["predicted"]]
            table.add_data(
                self._photos[int(record["index"])],
                printable(os.path.basename(split.path(int(record["index"])))),
                printable(truth),
                printable(prediction),
                float(record["confidence"]),
                truth == prediction,
            )
        return table

    def _log_best_files(self) -> None:
        import wandb

        best = wandb.Artifact(f"model-{self._wandb.id}", "model", metadata=_scores(self._run.folder))
        for path in self._run.best_files():
            if path != self._run.predictions:  # of which the run has a table already
                best.add_file(str(path))
        self._artifacts.append(self._wandb.log_artifact(best, aliases=["best", self._run.folder.name]))

    def _log_dataset(self) -> None:
        """The index: one line a photo, and the hash of all."""
        import wandb

        data = self._dataset
        counts = {f"{printable(name)}_photos": len(split) for name, split in data.splits.items()}
        index = wandb.Artifact(f"dataset-{data.fingerprint}", "dataset", metadata={"hash": data.fingerprint} | counts)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.csv"
            with open(path, "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file)
                lines.writerow(("split", "label", "path"))
                if sum(counts.values()) <= _LISTED_PHOTOS:
                    for name, split in data.splits.items():
                        paths = (os.path.relpath(split.path(index), data.root) for index in range(len(split)))
                        rows = ((name, split.classes[y], at) for y, at in zip(split.labels, paths, strict=True))
                        lines.writerows(map(printable, row) for row in rows)
            index.add_file(str(path))  # W&B keeps a copy
        self._artifacts.append(self._wandb.log_artifact(index))

    def _wait_for_uploads(self) -> None:
        """Weights are large: they may take their time, as long as there is a server that takes them."""
        if self._wandb.offline:
            return
        from wandb.sdk.artifacts.exceptions import WaitTimeoutError

        give_up = time.monotonic() + _UPLOAD_SECONDS
        for artifact in self._artifacts:
            is_sent = False
            while not is_sent:
                # Asked for each: what does not answer one of them will not answer the others.
                if time.monotonic() > give_up or not _answers(self._wandb.settings.base_url):
                    return
                try:
                    artifact.wait(timeout=5)
                    is_sent = True
                except WaitTimeoutError:
                    say(f"wandb: {artifact.name} is being sent ...")
                except Exception:  # what the server refuses is not waited for
                    is_sent = True


def check_tracked(run: Path, config: Config) -> TrackerNames:
    """Where the run is filed. UserError where W&B knows no run of this folder, or is just being told of it."""
    if not (run / ID_FILE).exists():
        raise UserError(f"tracker: {run} is no run that was trained with --tracker wandb: leave --tracker out")
    if RunFolder(run).status().get("state") == "running":
        raise UserError(f"tracker: {run} is not finished: finish it first, or leave --tracker out")
    return wandb_names(config)


def add_to_summary(run: Path, names: TrackerNames, scores: Mapping[str, float | str]) -> None:
    """Adds scores to the summary of a run that W&B knows already, online or in an offline attempt of its own."""
    import wandb

    directory, run_id = wandb_directory(run), _wandb_id(run)
    mode, why = _wandb_mode(attempt_folders(directory, run_id))
    try:
        settings: Any = {"id": run_id, "mode": mode, "resume": "allow", "dir": directory, "settings": _wandb_settings()}
        with wandb.init(project=names.project, entity=names.entity, **settings) as known:
            known.summary.update(dict(scores))
    except Exception as error:
        say(f"wandb: the scores were not sent ({first_line(error)})")
        return
    if mode == "offline":
        say(f"wandb: offline ({why}); send the scores later with: {_sync_command(run)}")


def wandb_directory(run: Path) -> Path:
    """Where W&B keeps a run's files, with those that wait to be sent: beside the run, not on some node of a cluster."""
    directory = Path(os.environ.get("WANDB_DIR") or run)
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))
    return directory


def _wandb_id(run: Path) -> str:
    """One id for all attempts at the run; an agent has chosen it already.

    Without one the variable was left in the shell, and would put this run's rows among another's.
    """
    file, given = run / ID_FILE, os.environ.get("WANDB_RUN_ID")
    if not file.exists():
        if given and not is_agents_run():
            say(f"wandb: WANDB_RUN_ID={given} is not used: no agent has set it, and each run has an id of its own")
            given = None
        file.write_text(given or secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _wandb_settings() -> Any:
    """Nothing waits for long: by default a server that is gone would hold the start for minutes, the end for ever."""
    import wandb

    limits = {"init_timeout": 10.0, "finish_timeout": 5.0}
    limits = {name: value for name, value in limits.items() if f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(console="off", silent=True, finish_timeout_raises=True, **limits)


def _wandb_mode(earlier: Sequence[Path]) -> tuple[str, str]:
    """The mode for wandb.init, and why it is not online. Without a key W&B would ask for one, so it is offline then.

    earlier: what the attempts at the run so far have left.
    """
    import wandb

    given = os.environ.get("WANDB_MODE", "online")
    mode = {"run": "online", "dryrun": "offline"}.get(given, given)  # W&B's older names
    if mode != "online":
        return mode, f"WANDB_MODE={given}"
    if not has_key():
        return "offline", "no key"
    if any(attempt.name.startswith("offline-") and not is_sent(attempt) for attempt in earlier):
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


def _scores(run: Path) -> dict[str, Any]:
    return {key: value for key, value in read_description(run, "run")["scores"].items() if value is not None}


def _missing(steps: set[int], attempt: Path) -> set[int]:
    """The steps that W&B, which ends a moment later, has not written, as on a full disk: it does not tell."""
    for _ in range(10):
        if not (missing := steps - steps_on_disk([attempt])):
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
