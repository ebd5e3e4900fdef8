"""Weights & Biases' own files of a run: what is in them, and whether they have been sent.

Each attempt at a run leaves a folder `wandb/[offline-]run-<time>-<id>/` with one file `run-<id>.wandb`.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    rows = (history_row(record) for file in wandb_files(folders) for record in read_records(file))
    return {int(row["_step"]) for row in rows if "_step" in row}


def attempt_folders(directory: Path, run_id: str) -> list[Path]:
    """What the attempts at a run have left below WANDB_DIR, in their order."""
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


def wandb_files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("run-*.wandb"))]
