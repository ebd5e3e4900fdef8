"""The photos that a run began with, kept in its folder: it goes on with them in their places, and says what changed.

A plan counts by a photo's position in its split. A photo that has left keeps its place, empty, and nobody else moves.
"""

import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Collection, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.data.dataset import _FACTS, _PAIRS, Table, _path_at, _path_hashes, _read_index, _write_index
from pipelines.data.headers import EDGE, FAULTS
from pipelines.data.layout import split_of
from pipelines.errors import UserError
from pipelines.text import counted, listed, printable

import numpy as np

_FORMAT = 1
_MISSING = FAULTS.index("missing")
_USED = ("train", "val")  # of other splits a training knows nothing
_DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError)
_DAMAGE += (zipfile.BadZipFile, zlib.error, RecursionError, NotImplementedError, OverflowError)
_MOST_PACKED = 100  # of ten bytes a photo some are alike
_COLUMNS = ("path_blob", "path_lengths", "labels", "byte_sizes", "faults")


def keep_photos(index_file: Path, file: BinaryIO) -> None:
    """Writes what `in_known_positions` needs of an index: some ten bytes a photo (`benchmarks/scaling.py`)."""
    header, table = _read_index(index_file)
    splits = [split for split in header["splits"] if split[0] in _USED]
    count = sum(number for *_, number in splits)
    offsets = table["path_offsets"][: count + 1].astype(np.int64)
    about = {"format": _FORMAT, **{key: header[key] for key in ("val_fraction", "fingerprint")}, "splits": splits}
    about["edge"] = EDGE
    columns: dict[str, Any] = {name: table[name][:count] for name in ("labels", "byte_sizes", "faults")}
    columns |= {"signatures": _short(table["signatures"][:count])}
    columns |= {"path_blob": table["path_blob"][: offsets[-1]], "path_lengths": np.diff(offsets).astype(np.uint32)}
    np.savez_compressed(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)


def kept_counts(kept: Path) -> dict[str, dict[str, int]]:
    """How many photos of each class `keep_photos` has noted, by split; {} where there is no such file, or it is
    damaged."""
    try:
        _refuse_packed(kept)
        with np.load(kept, allow_pickle=False) as file:
            splits, labels = json.loads(file["about"].tobytes())["splits"], file["labels"]
        counts, first = dict[str, dict[str, int]](), 0
        for name, classes, number in splits:
            of_class = np.bincount(labels[first : first + number], minlength=len(classes))
            counts[str(name)] = dict(zip(map(str, classes), of_class.tolist(), strict=True))
            first += number
    except _DAMAGE:
        return {}
    return counts


def _refuse_packed(kept: Path) -> None:
    with zipfile.ZipFile(kept) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > _MOST_PACKED * os.path.getsize(kept) + (1 << 20):
            raise ValueError("much more than was ever written into it")


def _check_columns(about: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Errors of _DAMAGE where they do not belong together."""
    names, classes, numbers = zip(*about["splits"], strict=True)
    count = sum(numbers)
    if not re.fullmatch("[0-9a-f]{32}", about["fingerprint"]) or {*names} - {*_USED} or len({*names}) < len(names):
        raise ValueError("splits of other names")
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in classes):
        raise ValueError("names that are no text")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("numbers of photos that are none")
    for name, column in columns.items():
        length = int(columns["path_lengths"].sum(dtype=np.int64)) if name == "path_blob" else count
        if column.shape != (length,) or column.dtype.kind not in "ui":
            raise ValueError(f"{name}: {column.dtype} of {column.shape} for {count} photos")
    most = np.repeat([len(each) for each in classes], numbers)
    if count and not ((columns["labels"] >= 0) & (columns["labels"] < most)).all():
        raise ValueError("labels of no class")
    if columns["path_blob"].dtype != np.uint8:
        raise ValueError("paths that are no bytes")
    if about["val_fraction"] is not None:
        float(about["val_fraction"])


def in_known_positions(index_file: Path, kept: Path, bad: Collection[str]) -> tuple[Path, list[str], list[str]]:
    """The index of the photos in the positions that `keep_photos` has noted; lines on changes; changes of the result.

    bad: paths below the root of photos that could not be read: they may be mended or removed. Where the result would
    be another, as photos were added or changed, the index is the given one. UserError where `kept` is of a newer
    version.
    """
    header, now = _read_index(index_file)
    used = sum(number for name, _, number in header["splits"] if name in _USED)
    try:
        _refuse_packed(kept)
        with np.load(kept, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] > _FORMAT:
                raise UserError(f"{kept}: written by a newer version of dalitune: use that, or a newer one")
            # Earlier versions kept none, and of another edge they would all be others.
            signatures = file["signatures"] if about.get("edge") == EDGE else None
            if about["fingerprint"] == header["fingerprint"]:
                is_other = False if signatures is None else signatures != _short(now["signatures"][:used])
                if not np.any(is_other & (now["faults"][:used] == 0)):
                    return index_file, [], []
            then = {name: file[name] for name in _COLUMNS}
            _check_columns(about, then if signatures is None else {**then, "signatures": signatures})
            then["path_offsets"] = np.concatenate([[0], np.cumsum(then.pop("path_lengths"), dtype=np.int64)])
    except _DAMAGE as error:
        print(f"{kept} is damaged ({printable(error)}): the fingerprint alone is compared", file=sys.stderr, flush=True)
        return index_file, [], []

    hashes = _path_hashes(then["path_blob"], then["path_offsets"])
    here = np.full(len(hashes), -1)
    hashes_now = _path_hashes(now["path_blob"], now["path_offsets"][: used + 1])
    of_now, of_then = np.intersect1d(hashes_now, hashes, return_indices=True)[1:]
    here[of_then] = of_now
    left, left_now = np.flatnonzero(here < 0), np.setdiff1d(np.arange(used), of_now)
    renamed = left[:0]
    if len(left) and len(left_now):
        keys, keys_now = _keys(about, then), _keys(header, now)
        of_now, of_then = np.intersect1d(keys_now[left_now], keys[left], return_indices=True)[1:]
        here[left[of_then]] = left_now[of_now]
        if signatures is not None:
            still = np.flatnonzero((here < 0) & (then["faults"] == 0))
            still_now = np.setdiff1d(np.flatnonzero(now["faults"][:used] == 0), here)
            found = {"labels": then["labels"], "byte_sizes": then["byte_sizes"], "signatures": signatures}
            contents = _contents(about, found, still)
            contents_now = _contents(header, now, still_now)
            of_now, of_then = np.intersect1d(contents_now, contents, return_indices=True)[1:]
            here[still[of_then]] = still_now[of_now]
        renamed = left[here[left] >= 0]
    at = np.maximum(here, 0)
    noted = [_hash(path) for path in bad]
    may_differ = np.isin(hashes, noted) | np.isin(hashes_now[at], noted) | (then["faults"] > 0)
    faults = now["faults"][at]
    gone = (here < 0) | ((faults == _MISSING) & (then["faults"] != _MISSING))
    is_other = now["byte_sizes"][at] != then["byte_sizes"]
    if signatures is not None:
        is_other |= _short(now["signatures"][at]) != signatures
    differs = ~gone & (faults == 0) & is_other
    split_now, class_now = _meanings(header["splits"], now["labels"])
    split_then, class_then = _meanings(about["splits"], then["labels"])
    moved = class_now[at] != class_then
    if about["val_fraction"] is None:  # otherwise a photo less may move the border between the splits
        moved |= split_now[at] != split_then
    added = np.setdiff1d(np.flatnonzero(now["faults"][:used] == 0), here)
    classes_now, classes_then = (
        {name for split in each["splits"] if split[0] in _USED for name in split[1]} for each in (header, about)
    )
    twins = {}  # classes that have another name now
    for old in classes_then - classes_now:
        sizes = np.sort(then["byte_sizes"][class_then == _hash(old)])
        for new in classes_now - classes_then:
            if len(sizes) and np.array_equal(np.sort(now["byte_sizes"][:used][class_now == _hash(new)]), sizes):
                twins[old] = new
    is_twin = np.isin(class_then, [_hash(name) for name in twins])
    added = added[~np.isin(class_now[added], [_hash(name) for name in twins.values()])]
    fewer, moved = np.flatnonzero(gone & ~is_twin), moved & ~is_twin

    groups = [
        (now, added, "more"),
        (then, np.flatnonzero(differs & ~may_differ), "of other content"),
        (then, np.flatnonzero(~gone & moved), "of another class or split"),
    ]
    differences = [_told(table, rows, what) for table, rows, what in groups if len(rows)]
    if classes_now - set(twins.values()) != classes_then - set(twins):
        differences += [f"classes {listed(sorted(classes_now))} for {listed(sorted(classes_then))}"]
    differences += [f"class {printable(old)} is called {printable(new)} now" for old, new in sorted(twins.items())]
    if header["val_fraction"] != about["val_fraction"]:
        differences += [f"val_fraction {header['val_fraction']} for {about['val_fraction']}"]
    if differences:
        return index_file, [], differences + ([_told(then, fewer, "fewer")] if len(fewer) else [])

    lines = []
    if len(renamed):
        was = printable(os.fsdecode(_path_at(then["path_blob"], then["path_offsets"], renamed[0])))
        lines += [f"{_told(now, here[renamed], 'found under another path')}; before it was {was}"]
    if len(fewer):
        what = "gone since the run began", "its place stays empty", "their places stay empty"
        lines += [f"{_told(then, fewer, what[0])}: {what[1 + (len(fewer) > 1)]}"]
    if differs.any():
        mended = np.flatnonzero(differs)
        used_again = "it is used" if len(mended) == 1 else "they are used"
        lines += [f"{_told(then, mended, 'mended since the run began')}: {used_again} from here on"]
    target = index_file.with_name(f"{index_file.stem}-{about['fingerprint']}.safetensors")
    _write_index(target, *_arranged(now, header, then, about, here, gone, used))
    return target, lines, []


def _arranged(
    now: Table,
    header: dict[str, Any],
    then: Table,
    about: dict[str, Any],
    here: np.ndarray,
    gone: np.ndarray,
    used: int,
) -> tuple[Table, dict[str, Any]]:
    """Table and header of what is there `now` in the order of `then`. here: for each position of then the row of now.

    Behind them come the splits that a training does not use, as they are.
    """
    rows = np.concatenate([np.maximum(here, 0), np.arange(used, len(now["labels"]))])
    table = {name: now[name][rows] for name in _FACTS}
    empty = np.flatnonzero(gone)
    for name in _FACTS:
        table[name][empty] = 0
    table["faults"][empty] = _MISSING
    offsets = now["path_offsets"][used:].astype(np.int64)
    table["labels"] = np.concatenate([then["labels"], now["labels"][used:]])
    positions = [(then, position) if row < 0 else (now, row) for position, row in enumerate(here.tolist())]
    paths = [_path_at(each["path_blob"], each["path_offsets"], row) for each, row in positions]
    table["path_blob"] = np.concatenate([np.frombuffer(b"".join(paths), np.uint8), now["path_blob"][offsets[0] :]])
    lengths = np.concatenate([[0], [len(path) for path in paths], np.diff(offsets)])
    table["path_offsets"] = np.cumsum(lengths).astype(np.uint64)
    position = np.full(len(now["labels"]), -1)
    position[rows[~np.isin(np.arange(len(rows)), empty)]] = np.setdiff1d(np.arange(len(rows)), empty)
    for name in _PAIRS:
        pairs = position[now[name]]
        table[name] = pairs[(pairs >= 0).all(axis=1)].astype(np.int64)
    others = [split for split in header["splits"] if split[0] not in _USED]
    gone_rows, start = {}, 0
    for name, _, number in about["splits"]:
        gone_rows[name] = (empty[(empty >= start) & (empty < start + number)] - start).tolist()
        start += number
    known = {key: about[key] for key in ("val_fraction", "fingerprint")}
    return table, {**header, **known, "splits": [*about["splits"], *others], "gone": gone_rows}


def _keys(about: dict[str, Any], table: Table) -> np.ndarray:
    """uint64 [N]: what stands for each photo of _USED whatever the folders above its class are called: its split, and
    its path without what all share and without the split's own folder, if it lies in one.
    """
    splits = [split for split in about["splits"] if split[0] in _USED]
    meant = [name if about["val_fraction"] is None else "train" for name, _, number in splits for _ in range(number)]
    paths = [os.fsdecode(_path_at(table["path_blob"], table["path_offsets"], row)) for row in range(len(meant))]
    shared = os.path.commonpath([os.path.dirname(path) for path in (min(paths), max(paths))])
    below = [path[len(os.path.join(shared, "")) if shared else 0 :].partition(os.sep) for path in paths]
    means = {head: split_of(head) for head in {head for head, *_ in below}}
    rest = [
        tail if means[head] == of else head + sep + tail for of, (head, sep, tail) in zip(meant, below, strict=True)
    ]
    return np.array([_hash(f"{name}/{path}") for name, path in zip(meant, rest, strict=True)], np.uint64)


def _contents(about: dict[str, Any], table: Table, rows: np.ndarray) -> np.ndarray:
    """uint64 [rows]: what stands for a photo by what is in it, under whatever name: split, class, size, signature."""
    split, label = _meanings(about["splits"], table["labels"])
    if about["val_fraction"] is not None:
        split = np.zeros_like(split)
    columns = (split, label, table["byte_sizes"], _short(table["signatures"]))
    facts = zip(*(column[rows].tolist() for column in columns), strict=True)
    return np.array([_hash(str(each)) for each in facts], np.uint64)


def _short(signatures: np.ndarray) -> np.ndarray:
    """uint32: enough to tell a photo from what has come into its place."""
    return signatures.astype(np.uint32)


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
