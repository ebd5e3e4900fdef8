"""What frozen stages made of photos in earlier runs, in the cache folder: bounded, and of no harm where it is lost."""

import hashlib
import os
import sys
from pathlib import Path

from pipelines.cache import make_room, remove
from pipelines.files import atomic_write

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from tqdm import tqdm

_DAMAGED = (SafetensorError, KeyError, ValueError, TypeError)


class FeatureStore:
    """Tables of features, a file each: int64 [N] that tell photos and their views, and a row for each.

    folder: made when something is kept. limit: bytes of all files together; the longest unused go first.
    A file is whole or not there, and one that was damaged since is removed: it will be computed again. A disk that
    takes nothing is said once. Several runs may use a folder at the same time.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._may_keep = limit > 0

    def has(self, maker: str, photos: np.ndarray) -> bool:
        """Whether `read` would find all rows, so far as can be told without reading them."""
        return bool(self._files_with(maker, photos))

    def read(self, maker: str, photos: np.ndarray) -> torch.Tensor | None:
        """[N, numbers], the rows of `photos` (int64 [N]), of one table or of several; None where some are missing.

        maker: hex, of all that the numbers depend on besides the photos and their views.
        """
        rows: torch.Tensor | None = None
        files = self._files_with(maker, photos)
        for file in files:
            try:
                table = load(file.read_bytes())
                known, found = table["photos"].numpy(), table["rows"]
                if found.ndim != 2 or len(found) != len(known) or _digest(found) != _said_digest(file):
                    raise ValueError("damaged")
                rows = found.new_empty(len(photos), found.shape[1]) if rows is None else rows
                order = np.argsort(known, kind="stable")
                at = np.minimum(np.searchsorted(known, photos, sorter=order), len(known) - 1)
                is_there = known[order[at]] == photos
                rows[torch.from_numpy(is_there)] = found[torch.from_numpy(order[at][is_there])]
                os.utime(file)  # used just now
            except OSError:
                return None
            except (*_DAMAGED, RuntimeError, IndexError):
                remove(file, self._folder)
                return None
        # Computed in another batch they may differ in the last bits: a resume is to find what this run has found.
        if rows is not None and files != [self._file(maker, photos)]:
            self.keep(maker, photos, rows)
        return rows

    def keep(self, maker: str, photos: np.ndarray, rows: torch.Tensor) -> None:
        """Writes a table, for `read`. photos: int64 [N]; rows: [N, numbers], on the CPU."""
        size = rows.nbytes + photos.nbytes
        if not self._may_keep or size > self._limit:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            make_room(self._folder, size, self._limit)
            content = {"photos": torch.from_numpy(photos), "rows": rows.contiguous()}
            with atomic_write(self._file(maker, photos), shared=True) as partial:
                save_file(content, partial, {"digest": _digest(rows)})
        except (OSError, SafetensorError) as error:
            self._may_keep = False
            reason = getattr(error, "strerror", None) or error
            tqdm.write(f"{self._folder}: features are not kept for later runs ({reason})", file=sys.stderr)

    def _file(self, maker: str, photos: np.ndarray) -> Path:
        return self._folder / f"{maker}-{hashlib.blake2b(photos.tobytes(), digest_size=16).hexdigest()}.safetensors"

    def _files_with(self, maker: str, photos: np.ndarray) -> list[Path]:
        """Files that together have all of `photos`: the one of exactly these, or as few others as the newest allow."""
        own = self._file(maker, photos)
        needed, chosen = np.unique(photos), list[Path]()
        if own.exists():
            return [own]
        for file in sorted(self._folder.glob(f"{maker}-*.safetensors"), key=_age):
            known = self._photos_in(file)
            if np.isin(needed, known).any():
                chosen.append(file)
                needed = np.setdiff1d(needed, known)
            if not len(needed):
                return chosen
        return []

    def _photos_in(self, file: Path) -> np.ndarray:
        try:
            with safe_open(file, framework="pt") as table:
                return table.get_tensor("photos").numpy().copy()
        except OSError:
            pass
        except _DAMAGED:
            remove(file, self._folder)
        return np.empty(0, np.int64)


def _age(file: Path) -> float:
    """Negative seconds since 1970 of the last use: the older, the larger."""
    try:
        return -file.stat().st_mtime
    except OSError:
        return 0.0


def _digest(rows: torch.Tensor) -> str:
    return hashlib.blake2b(rows.contiguous().view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def _said_digest(file: Path) -> str:
    with safe_open(file, framework="pt") as table:
        return (table.metadata() or {})["digest"]
