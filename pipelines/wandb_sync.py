"""Weights & Biases' own files of a run: what is in them, and sending them, again and again, without sending twice.

    python -m pipelines.wandb_sync runs/*        # where there is a network and a key, such as on a cluster's login node

Each life of a run leaves a folder `wandb/[offline-]run-<time>-<id>/` with one file `run-<id>.wandb`. `wandb sync` sends
a file from its start, also where the server has a part of it already; here that part is left out.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.errors import MachineError, UserError
from pipelines.text import counted, lasting_streams, printable
from pipelines.tracker_settings import wandb_names

from filelock import FileLock, Timeout

ID_FILE = "wandb_id"  # in the run folder: the run's name at W&B

# LevelDB's log format: blocks of 32 KiB, in them pieces of records: crc32, length, type, bytes.
_FILE_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_PIECE = struct.Struct("<IHB")
_BLOCK = 32768
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(file: Path) -> Iterator[Any]:
    """The records (`wandb_internal_pb2.Record`) of a .wandb file, up to where it is torn, if it is."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    at, record = len(_FILE_HEADER), b""
    while at + _PIECE.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _PIECE.size:
            at += left
            continue
        checksum, length, kind = _PIECE.unpack_from(data, at)
        piece = data[at + _PIECE.size : at + _PIECE.size + length]
        if len(piece) < length or checksum != _checksum(kind, piece):
            return
        at += _PIECE.size + length
        record = piece if kind in (_WHOLE, _FIRST) else record + piece
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(record)


def write_records(file: Path, records: Iterable[Any]) -> None:
    """A .wandb file of these records."""
    with open(file, "wb") as out:
        out.write(_FILE_HEADER)
        for record in records:
            rest, kind = record.SerializeToString(), _FIRST
            while kind != _LAST and kind != _WHOLE:
                left = _BLOCK - out.tell() % _BLOCK
                if left < _PIECE.size:
                    out.write(bytes(left))
                    left = _BLOCK
                piece, rest = rest[: left - _PIECE.size], rest[left - _PIECE.size :]
                if not rest:
                    kind = _WHOLE if kind == _FIRST else _LAST
                out.write(_PIECE.pack(_checksum(kind, piece), len(piece), kind) + piece)
                kind = _MIDDLE if kind == _FIRST else kind


def _checksum(kind: int, piece: bytes) -> int:
    return zlib.crc32(bytes([kind]) + piece)


def history_row(record: Any) -> dict[str, Any]:
    """The values of a history record, {} of any other."""
    if record.WhichOneof("record_type") != "history":
        return {}
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def steps_on_disk(folders: Iterable[Path]) -> set[int]:
    """The `_step` of each row that stands in the .wandb files of these folders."""
    rows = (history_row(record) for file in _wandb_files(folders) for record in read_records(file))
    return {int(row["_step"]) for row in rows if "_step" in row}


def life_folders(directory: Path, run_id: str) -> list[Path]:
    """What the lives of a run have left below WANDB_DIR, in their order."""
    found = (directory / "wandb").glob(f"*run-*-{run_id}")
    return sorted(found, key=lambda folder: folder.name.removeprefix("offline-"))


def has_key() -> bool:
    """Whether W&B has a key here; without one it would ask for it."""
    import netrc
    from urllib.parse import urlparse

    import wandb

    # What the environment says, and the files that `wandb login` writes.
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        keys = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    # W&B's own server has had another name, under which keys are kept.
    is_default = settings.base_url == wandb.Settings.model_fields["base_url"].default
    return urlparse(settings.base_url).netloc in keys or (is_default and "api.wandb.ai" in keys)


def is_sent(folder: Path) -> bool:
    """Whether `wandb sync` or this module has sent a folder as a whole."""
    return any(folder.glob("*.wandb.synced"))


@lasting_streams()
def main(arguments: list[str]) -> int:
    """Sends what the lives of these runs have left. Returns 0 where nothing is left to send, 1 otherwise."""
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
    """Sends, in order, each life of a run that is not sent as a whole. Returns whether all is sent."""
    run_id = (run / ID_FILE).read_text(encoding="utf-8").strip()
    lives = life_folders(Path(os.environ.get("WANDB_DIR") or run), run_id)
    lives = [life for life in lives if not is_sent(life)]
    try:
        FileLock(run / ".lock", timeout=0).acquire().lock.release()
        with FileLock(run / ".sync.lock", timeout=0):
            return all(_is_sent_now(life) for life in lives)
    except Timeout:
        print(f"{printable(run)}: is being trained, or sent; what it leaves then is sent the next time")
        return False


def _is_sent_now(life: Path) -> bool:
    try:
        rows = _send_life(life)
    except Exception as error:
        print(
            f"{printable(life)}: not sent ({' '.join(str(error).split())[:300] or type(error).__name__})",
            file=sys.stderr,
        )
        return False
    told = "nothing to send" if rows is None else f"sent, {counted(rows, 'row')}"
    print(f"{printable(life)}: {told}")
    return True


def _send_life(life: Path) -> int | None:
    """Sends what the server has not; returns the number of rows, None where there was nothing to send."""
    file = next(iter(_wandb_files([life])), None)
    if file is None:
        return None
    records = list(read_records(file))
    start = next((record.run for record in records if record.WhichOneof("record_type") == "run"), None)
    rows = None
    if start is not None:
        last_step = _last_step_of_server(start)
        records = [record for record in records if not (row := history_row(record)) or row["_step"] > last_step]
        rows = sum(bool(history_row(record)) for record in records)
        # What an online life has left besides rows went to the server as it happened; later lives have newer.
        if rows or life.name.startswith("offline-"):
            _sync(life, file.name, records)
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


def _sync(life: Path, name: str, records: list[Any]) -> None:
    """`wandb sync` of a life whose file holds only these records."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"offline-{life.name.removeprefix('offline-')}"
        copy.mkdir()
        (copy / "files").symlink_to((life / "files").resolve())
        write_records(copy / name, records)
        call = [sys.executable, "-m", "wandb", "sync", str(copy)]
        done = subprocess.run(call, capture_output=True, text=True, errors="replace")
        if not is_sent(copy):  # its exit code does not tell
            raise MachineError(f"wandb sync: {done.stdout} {done.stderr}")


def _wandb_files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("run-*.wandb"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
