"""The folder for what can be made again."""

import functools
import os
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from pipelines.errors import MachineError

import platformdirs


def cache_folder() -> Path:
    """The folder for what can be made again: the variable DALITUNE_CACHE, else the system's own place for caches.

    It is created. Where the home folder is missing or read-only, one below the system's temporary folder stands in,
    with a line on stderr. MachineError if it cannot be written to.
    """
    if given := os.environ.get("DALITUNE_CACHE"):
        folder = Path(os.path.expanduser(given))
    else:
        folder = platformdirs.user_cache_path("dalitune")
        try:
            return _writable(folder)
        except OSError as error:
            folder = _stand_in_for(folder, error.strerror)
    try:
        return _writable(folder)
    except OSError as error:
        raise MachineError(
            f"the cache folder {folder} cannot be written to ({error.strerror}): "
            "set the variable DALITUNE_CACHE to a folder that can"
        ) from error


@functools.cache  # said once
def _stand_in_for(usual: Path, reason: str) -> Path:
    folder = _private_folder(f"dalitune-{os.getuid() if hasattr(os, 'getuid') else 'cache'}")
    print(
        f"{usual} cannot be written to ({reason}): the cache is {folder}; DALITUNE_CACHE names another",
        file=sys.stderr,
        flush=True,
    )
    return folder


def _private_folder(name: str) -> Path:
    """A folder below the system's temporary one that nobody else can write to: of that name, or another where somebody
    else has made it, or made it a link."""
    folder = Path(tempfile.gettempdir(), name)
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        state = folder.lstat()
        is_private = stat.S_ISDIR(state.st_mode) and not stat.S_IMODE(state.st_mode) & 0o077
        if not hasattr(os, "getuid") or (is_private and state.st_uid == os.getuid()):
            return folder
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    except OSError:  # as where the temporary folder is full; whoever writes there will tell
        return folder


def make_room(folder: Path, size: int, limit: int, needed: Collection[Path] = ()) -> None:
    """Removes files below `folder`, the longest unused first, until all of them and `size` bytes more are no more than
    `limit` bytes; those that a killed run was writing too. needed: files that stay."""
    files = [(state.st_mtime, state.st_size, file) for file, state in files_below(folder)]
    total = size + sum(freed for _, freed, _ in files)
    for _, freed, file in sorted(files):
        if total <= limit:
            return
        if file not in needed:
            remove(file, folder)
            total -= freed


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each file at any depth; not those that somebody removes meanwhile."""
    for inner, _, names in os.walk(folder):
        for name in names:
            file = Path(inner, name)
            with suppress(OSError):
                if stat.S_ISREG((state := file.stat()).st_mode):
                    yield file, state


def remove(file: Path, folder: Path) -> None:
    """Removes a file somewhere below `folder`, and a folder that this leaves empty there."""
    with suppress(OSError):
        file.unlink()
        if file.parent != folder:
            file.parent.rmdir()


def _writable(folder: Path) -> Path:
    """`folder`, created where it is not there. OSError if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder
