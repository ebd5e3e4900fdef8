"""Sends what runs have left for Weights & Biases on this disk, again and again, without sending twice.

    python -m pipelines.wandb_sync runs/*        # where there is a network and a key, such as on a cluster's login node

`wandb sync` sends a file from its start, also where the server has a part of it already; here that part is left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config
from pipelines.errors import MachineError, UserError
from pipelines.text import counted, lasting_streams, printable
from pipelines.tracking.settings import wandb_names
from pipelines.tracking.wandb_files import (
    ID_FILE,
    attempt_folders,
    has_key,
    history_row,
    is_sent,
    read_records,
    wandb_files,
    write_records,
)

from filelock import FileLock, Timeout


@lasting_streams()
def main(arguments: list[str]) -> int:
    """Sends what the attempts at these runs have left. Returns 0 where nothing is left to send, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.wandb_sync", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    runs = parser.parse_args(arguments).runs
    try:
        wandb_names(Config())  # a variable that W&B does not take ends it with a trace
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not has_key():
        print("no key for W&B here: wandb login", file=sys.stderr)
        return 1
    all_sent = True
    for run in runs:
        if (run / ID_FILE).is_file():
            all_sent = send_run(run) and all_sent
    return 0 if all_sent else 1


def send_run(run: Path) -> bool:
    """Sends, in order, each attempt at a run that is not sent as a whole. Returns whether all is sent."""
    run_id = (run / ID_FILE).read_text(encoding="utf-8").strip()
    attempts = attempt_folders(Path(os.environ.get("WANDB_DIR") or run), run_id)
    attempts = [attempt for attempt in attempts if not is_sent(attempt)]
    try:
        FileLock(run / ".lock", timeout=0).acquire().lock.release()
        with FileLock(run / ".sync.lock", timeout=0):
            return all(_is_sent_now(attempt) for attempt in attempts)
    except Timeout:
        print(f"{printable(run)}: is being trained, or sent; what it leaves then is sent the next time")
        return False
    except (OSError, NotImplementedError) as error:  # somebody else's, or no locks on this disk
        print(f"{printable(run)}: not sent, as it cannot be locked ({error})", file=sys.stderr)
        return False


def _is_sent_now(attempt: Path) -> bool:
    try:
        rows = _send_attempt(attempt)
    except Exception as error:
        print(
            f"{printable(attempt)}: not sent ({' '.join(str(error).split())[:300] or type(error).__name__})",
            file=sys.stderr,
        )
        return False
    told = "nothing to send" if rows is None else f"sent, {counted(rows, 'row')}"
    print(f"{printable(attempt)}: {told}")
    return True


def _send_attempt(attempt: Path) -> int | None:
    """Sends what the server has not; returns the number of rows, None where there was nothing to send."""
    file = next(iter(wandb_files([attempt])), None)
    if file is None:
        return None
    records = list(read_records(file))
    start = next((record.run for record in records if record.WhichOneof("record_type") == "run"), None)
    rows = None
    if start is not None:
        last_step = _last_step_of_server(start)
        records = [record for record in records if not (row := history_row(record)) or row["_step"] > last_step]
        rows = sum(bool(history_row(record)) for record in records)
        # What an online attempt has left besides rows went to the server as it happened; later attempts have newer.
        if rows or attempt.name.startswith("offline-"):
            _sync(attempt, file.name, records)
        else:
            rows = None
    file.with_name(f"{file.name}.synced").touch()
    return rows


def _last_step_of_server(run: Any) -> int:
    """The last `_step` that the server has of a run; -1 where it has no row, or does not know the run."""
    import wandb

    api = wandb.Api(timeout=30)
    entity = run.entity or api.default_entity
    try:
        return int(api.run(f"{entity}/{run.project}/{run.run_id}").lastHistoryStep)
    except (ValueError, wandb.errors.CommError) as error:
        if "could not find" in str(error).lower():
            return -1
        raise


def _sync(attempt: Path, name: str, records: list[Any]) -> None:
    """`wandb sync` of an attempt whose file holds only these records."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"offline-{attempt.name.removeprefix('offline-')}"
        copy.mkdir()
        (copy / "files").symlink_to((attempt / "files").resolve())
        write_records(copy / name, records)
        call = [sys.executable, "-m", "wandb", "sync", str(copy)]
        done = subprocess.run(call, capture_output=True, text=True, errors="replace")
        if not is_sent(copy):  # its exit code does not tell
            raise MachineError(f"wandb sync: {done.stdout} {done.stderr}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
