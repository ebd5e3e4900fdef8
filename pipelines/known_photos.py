"""The photos that a run began with, kept in its folder: it goes on with them in their places, and says what changed.

A plan counts by a photo's place in its split. A photo that has left keeps its place, empty, and nobody else moves.
"""

import json
import os
import sys
import zipfile
import zlib
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.dataset import _FACTS, _PAIRS, Table, _path_at, _path_hashes, _read_index, _write_index
from pipelines.errors import UserError
from pipelines.headers import FAULTS
from pipelines.text import counted, listed, printable

import numpy as np

_FORMAT = 1
_MISSING = FAULTS.index("missing")
_USED = ("train", "val")  # of other splits a training knows nothing
_COLUMNS = ("path_blob", "path_lengths", "labels", "byte_sizes", "faults")


def keep_photos(index_file: Path, file: BinaryIO) -> None:
    """Writes what `in_known_places` needs of an index: some six bytes a photo (`benchmarks/scaling.py`)."""
    header, table = _read_index(index_file)
    splits = [split for split in header["splits"] if split[0] in _USED]
    count = sum(number for *_, number in splits)
    offsets = table["path_offsets"][: count + 1].astype(np.int64)
    about = {"format": _FORMAT, **{key: header[key] for key in ("val_fraction", "fingerprint")}, "splits": splits}
    columns: dict[str, Any] = {name: table[name][:count] for name in ("labels", "byte_sizes", "faults")}
    columns |= {"path_blob": table["path_blob"][: offsets[-1]], "path_lengths": np.diff(offsets).astype(np.uint32)}
    np.savez_compressed(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)


def in_known_places(index_file: Path, kept: Path, bad: Collection[str]) -> tuple[Path, list[str], list[str]]:
    """The index of the photos in the places that `keep_photos` has noted; lines on changes; changes of the result.

    bad: paths below the root of photos that could not be read: they may be mended or removed. Where the result would
    be another, as photos were added or changed, the index is the given one. UserError where `kept` is of a newer
    version.
    """
    header, now = _read_index(index_file)
    try:
        with np.load(kept, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] > _FORMAT:
                raise UserError(f"{kept}: written by a newer version of dalitune: use that, or a newer one")
            if about["fingerprint"] == header["fingerprint"]:
                return index_file, [], []
            then = {name: file[name] for name in _COLUMNS}
            then["path_offsets"] = np.concatenate([[0], np.cumsum(then.pop("path_lengths"), dtype=np.int64)])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{kept} is damaged ({printable(error)}): the fingerprint alone is compared", file=sys.stderr, flush=True)
        return index_file, [], []

    used = sum(number for name, _, number in header["splits"] if name in _USED)
    hashes = _path_hashes(then["path_blob"], then["path_offsets"])
    here = np.full(len(hashes), -1)
    of_now, of_then = np.intersect1d(
        _path_hashes(now["path_blob"], now["path_offsets"][: used + 1]), hashes, return_indices=True
    )[1:]
    here[of_then] = of_now
    may_differ = np.isin(hashes, [_hash(path) for path in bad]) | (then["faults"] > 0)
    at = np.maximum(here, 0)
    faults = now["faults"][at]
    gone = (here < 0) | ((faults == _MISSING) & (then["faults"] != _MISSING))
    differs = ~gone & (faults == 0) & (now["byte_sizes"][at] != then["byte_sizes"])
    split_now, class_now = _meanings(header["splits"], now["labels"])
    split_then, class_then = _meanings(about["splits"], then["labels"])
    moved = class_now[at] != class_then
    if about["val_fraction"] is None:  # otherwise a photo less may move the border between the splits
        moved |= split_now[at] != split_then
    added = np.setdiff1d(np.flatnonzero(now["faults"][:used] == 0), of_now)

    groups = [
        (now, added, "more"),
        (then, np.flatnonzero(differs & ~may_differ), "of other content"),
        (then, np.flatnonzero(~gone & moved), "of another class or split"),
    ]
    differences = [_told(table, rows, what) for table, rows, what in groups if len(rows)]
    classes = [{name for split in each["splits"] if split[0] in _USED for name in split[1]} for each in (header, about)]
    if classes[0] != classes[1]:
        differences += [f"classes {listed(sorted(classes[0]))} for {listed(sorted(classes[1]))}"]
    if header["val_fraction"] != about["val_fraction"]:
        differences += [f"val_fraction {header['val_fraction']} for {about['val_fraction']}"]
    if differences:
        return index_file, [], differences + ([_told(then, np.flatnonzero(gone), "fewer")] if gone.any() else [])

    lines = []
    if gone.any():
        lines += [f"{_told(then, np.flatnonzero(gone), 'gone since the run began')}: their places stay empty"]
    if differs.any():
        lines += [f"{_told(then, np.flatnonzero(differs), 'mended since the run began')}: they are used from here on"]
    target = index_file.with_name(f"{index_file.stem}-{about['fingerprint']}.safetensors")
    _write_index(target, *_arranged(now, header, then, about, at, gone, used))
    return target, lines, []


def _arranged(
    now: Table, header: dict[str, Any], then: Table, about: dict[str, Any], at: np.ndarray, gone: np.ndarray, used: int
) -> tuple[Table, dict[str, Any]]:
    """Table and header of what is there `now` in the order of `then`. at: for each place of then the row of now.

    Behind them come the splits that a training does not use, as they are.
    """
    rows = np.concatenate([at, np.arange(used, len(now["labels"]))])
    table = {name: now[name][rows] for name in _FACTS}
    empty = np.flatnonzero(gone)
    for name in _FACTS:
        table[name][empty] = 0
    table["faults"][empty] = _MISSING
    offsets = now["path_offsets"][used:].astype(np.int64)
    table["labels"] = np.concatenate([then["labels"], now["labels"][used:]])
    table["path_blob"] = np.concatenate([then["path_blob"], now["path_blob"][offsets[0] :]])
    ends = offsets[1:] - offsets[0] + then["path_offsets"][-1]
    table["path_offsets"] = np.concatenate([then["path_offsets"], ends]).astype(np.uint64)
    place = np.full(len(now["labels"]), -1)
    place[rows[~np.isin(np.arange(len(rows)), empty)]] = np.setdiff1d(np.arange(len(rows)), empty)
    for name in _PAIRS:
        pairs = place[now[name]]
        table[name] = pairs[(pairs >= 0).all(axis=1)].astype(np.int64)
    others = [split for split in header["splits"] if split[0] not in _USED]
    gone_rows, start = {}, 0
    for name, _, number in about["splits"]:
        gone_rows[name] = (empty[(empty >= start) & (empty < start + number)] - start).tolist()
        start += number
    known = {key: about[key] for key in ("val_fraction", "fingerprint")}
    return table, {**header, **known, "splits": [*about["splits"], *others], "gone": gone_rows}


def _meanings(splits: list[list[Any]], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [N] each: what stands for the name of the split and of the class of the first N rows, those of _USED."""
    used = [split for split in splits if split[0] in _USED]
    names = [np.full(number, _hash(name), np.uint64) for name, _, number in used]
    classes, start = [], 0
    for _, of_split, number in used:
        classes.append(np.array([_hash(name) for name in of_split], np.uint64)[labels[start : start + number]])
        start += number
    return np.concatenate(names), np.concatenate(classes)


def _told(table: Table, rows: np.ndarray, what: str) -> str:
    paths = [os.fsdecode(_path_at(table["path_blob"], table["path_offsets"], row)) for row in rows[:5].tolist()]
    more = f" and {counted(len(rows) - 5, 'other')}" if len(rows) > 5 else ""
    return f"{counted(len(rows), 'photo')} {what} ({listed(paths)}{more})"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(os.fsencode(text), digest_size=8).digest(), "little")
