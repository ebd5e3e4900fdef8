"""Names and lines on their way to a person: any name as printable text, and streams that no print can break."""

import io
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any, TextIO

from pipelines.errors import MachineError

_JOINERS = "\u200c\u200d"  # of Persian words and of emoji; they count as not printable


def printable(text: object) -> str:
    """On one line, in characters that every terminal, JSON reader and tracker takes: a file name may hold anything.

    A byte that is not UTF-8 is spelled as in `K\\xe4fer`, so that two names stay apart; control characters are "?".
    """
    shown = str(text)
    with suppress(UnicodeEncodeError):  # what a locale without UTF-8 has taken apart is put together again
        shown = shown.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return "".join(map(_printable, shown))


def spelled(name: str | bytes) -> str:
    r"""The same for a file that programs read: no two names have one spelling.

    A letter that is not printable, and a backslash, is spelled as Python escapes it; a byte that is not UTF-8 as
    `printable` does. bytes: of a path.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_spelled, text))


def _spelled(letter: str) -> str:
    if letter == "\\":
        return r"\\"
    if letter.isprintable() or letter in _JOINERS or "\udc80" <= letter <= "\udcff":
        return _printable(letter)
    return f"\\u{ord(letter):04x}" if "\x80" <= letter <= "\x9f" else ascii(letter)[1:-1]  # \x80 is a byte


def name_of_folder(name: str) -> str:
    """A folder's name as it reads in UTF-8, whatever the locale makes of its bytes: a class has one name."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def path_on_disk(text: str) -> str:
    """A path that a file spells in UTF-8, as the system's calls take it where the locale cannot spell it."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    return text


def _printable(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS:
        return letter
    if "\udc80" <= letter <= "\udcff":  # how os.fsdecode carries such a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return " " if unicodedata.category(letter) == "Zs" else "?"


def composed(name: str) -> str:
    """NFC, in which one name has one spelling: a Mac's NFD writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)


def listed(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(printable(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number: int, one: str, many: str = "") -> str:
    """The number and what it counts: `1 photo`, `2 classes`. many: a plural with more in it, as `photos are`."""
    return f"{number} {one if number == 1 else many or one + ('es' if one.endswith('s') else 's')}"


class LastingStream(io.TextIOWrapper):
    """stdout or stderr whose encoding takes every character, and whose reader or disk may go.

    error: why nothing reaches it any more, or None.
    """

    error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """What is still buffered must go somewhere, or it would fail again at the interpreter's end."""
        if self.error is not None:
            return
        self.error = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        if self is sys.stdout and not isinstance(error, BrokenPipeError):  # `| head` has seen what it wanted
            print(f"stdout: {error.strerror}: what is printed from here on is lost", file=sys.stderr, flush=True)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """No print ends a run: not a name that the terminal's encoding lacks, a closed pipe, a full disk, no stream at all.

    A character that the encoding lacks is spelled as Python escapes it.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        setattr(sys, name, _lasting(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            lasting = getattr(sys, name)
            if isinstance(lasting, LastingStream) and lasting is not stream:
                lasting.flush()
                setattr(sys, name, stream)
                if stream is not None:
                    lasting.detach()  # or it would close the stream that it stood for


def _lasting(stream: Any) -> Any:
    if stream is None:  # closed before the start, as by `>&-`; the next file would get its number, and C's prints
        return LastingStream(open(os.devnull, "wb"), "utf-8", "backslashreplace")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, LastingStream):
        return stream  # a notebook's, which takes everything
    stream.reconfigure(errors="backslashreplace")  # for whoever holds it already
    with suppress(OSError):
        stream.flush()
    options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return LastingStream(stream.buffer, stream.encoding, "backslashreplace", **options)


@contextmanager
def stdout_for_programs(is_for_them: bool) -> Iterator[TextIO]:
    """Gives stdout. is_for_them: a program reads it, so that what is printed goes to stderr meanwhile."""
    stdout = sys.stdout
    if is_for_them:
        stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    with redirect_stdout(sys.stderr) if is_for_them else nullcontext():
        yield stdout


def check_printed() -> None:
    """For a script whose results go to stdout: MachineError where they did not get there, as on a full disk."""
    error = getattr(sys.stdout, "error", None)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise MachineError(f"stdout: {error.strerror}: not all results could be written")
