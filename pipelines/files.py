"""Files of any kind."""

import csv
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pipelines.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
_BLOCK = 1 << 20  # bytes in memory at once


def file_digest(path: Path, algorithm: str = "blake2b") -> str:
    """Hex, of a file's content. algorithm: a name that hashlib knows; of blake2b the 128-bit variant.

    OSError, too, where it is no regular file: reading a pipe or a device would wait, or never end.
    """
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.blake2b(digest_size=16) if algorithm == "blake2b" else hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_replaceable(path: Path, is_own: Callable[[Path], bool]) -> None:
    """UserError where an output would replace a file that is not `is_own`, as a photo whose name a shell has put in."""
    if path.is_file() and path.stat().st_size and not is_own(path):
        raise UserError(f"{path} is something else than such an output: it is not replaced; give another name")


def begins_with(beginning: str) -> Callable[[Path], bool]:
    """For `check_replaceable`: whether a file begins with a text (UTF-8)."""

    def is_own(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(beginning.encode())) == beginning.encode()

    return is_own


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write a file to, and puts it in place at the end: whole or not at all.

    shared: others may write this file at the same moment, so the temporary name is this call's own; else it is always
    the same, and what a killed process has left there is written over.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{own}.tmp")
    partial.unlink(missing_ok=True)  # it might be a link
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def csv_rows(file: TextIO) -> Callable[[Sequence[object]], None]:
    """What writes a row of a CSV file, whatever the texts in it, so that they are read back as they are."""
    plain = csv.writer(file, lineterminator="\n")
    # Before Python 3.13 a \r is quoted only where lines end with one, and read as a line's end where it is not.
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(row: Sequence[object]) -> None:
        (quoted if "\r" in "".join(map(str, row)) else plain).writerow(row)

    return write


def keep_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` for what can be found out again: a disk that takes nothing is no error."""
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, shared=True) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
