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

from pipelines.errors import UserError, write_error

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
STDOUT = Path("-")  # what a flag for a file may name it by
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


def check_output(path: Path, is_own: Callable[[Path], bool], flag: str) -> None:
    """UserError, before any work, where `flag` names what no output can be: as `check_replaceable`, a folder, a place
    in none that can be written to, or "-", where stdout is not meant."""
    if path == STDOUT:
        raise UserError(f"{flag} -: this is not for stdout: give a file's name")
    if os.path.isdir(path):
        raise UserError(f"{flag}: {path} is a folder: give the name of a file in it")
    if not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise UserError(f"{flag}: {path.parent} is no folder that can be written to")
    check_replaceable(path, is_own)


def check_makeable(folder: Path, flag: str) -> None:
    """UserError, before any work, where an output's folder is not there and cannot be made, or not be written to."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not (os.path.isdir(there) and os.access(there, os.W_OK)):
        raise UserError(f"{folder}: {there} is no folder that can be written to: give another {flag}")


def check_apart(outputs: Mapping[str, Path | None]) -> None:
    """UserError where two of a command's outputs, by flag or by what else names them, are one file."""
    found: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is not None and path != STDOUT:
            place = os.path.normcase(os.path.realpath(path))
            if place in found:
                raise UserError(f"{found[place]} and {flag} are one file, {path}: give another name")
            found[place] = flag


def write_output(path: Path, text: str, stdout: TextIO) -> None:
    """A file of UTF-8, whole or not at all; STDOUT is `stdout`. MachineError where the disk is full, UserError where it
    cannot be written otherwise. What is no text, a name's odd byte, is written as Python escapes it."""
    if path == STDOUT:
        stdout.write(text)
        stdout.flush()
        return
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        line = f"{path}: cannot be written ({error.strerror}): give another name"
        raise write_error(error, line) from None


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
