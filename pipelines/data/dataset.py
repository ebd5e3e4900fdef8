"""The index: a folder or a CSV file of labelled photos becomes arrays, by one scan of the headers, which is cached.

What a folder or a CSV file means, `layout` says. The scan alone decides about a file, for all engines (`headers`), and
a later scan opens only new and changed files.
"""

import json
import os
import sys
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any

from pipelines.cache import files_below, remove
from pipelines.data.headers import EDGE, FAULTS, FORMAT, SHRUNK, inspect_file, may_be_uncompressed
from pipelines.data.layout import WANTED, Findings, Photo, folder_of_csv, list_csv, list_folder
from pipelines.data.memory import PhotoMemory
from pipelines.data.shrink import ShrunkCopies, is_whole, shrunk_sizes
from pipelines.errors import MachineError, UserError
from pipelines.files import atomic_write, file_digest
from pipelines.text import composed, counted, listed, printable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

_LAYOUT = [5, *FAULTS]  # an index of another layout, or with other faults, is made anew
# The columns that come out of the files themselves.
_FACTS = ("sizes", "faults", "byte_sizes", "mtimes", "signatures", "kinds")
_PAIRS = ("duplicates", "contradictions")  # of rows
Table = dict[str, np.ndarray]  # columns by name, one row per photo, split after split


@dataclass(frozen=True, eq=False)
class Split:
    """The N labelled photos of one split, in their fixed order. The arrays are read-only views of the index file.

    labels: int32 [N], positions in `classes` (sorted names).
    sizes: int32 [N, 2], height and width in pixels after EXIF rotation; 0, 0 for a faulty file. Where photos are read
    from shrunk copies, those of the copies.
    faults: uint8 [N], positions in FAULTS; 0 is a sound file.
    path_blob: uint8, path_offsets: uint64 [N + 1]: the path of photo i below `root`, in the file system's own bytes,
    is path_blob[path_offsets[i]:path_offsets[i + 1]].
    signatures: uint64 [N], of byte size and edges, 0 for a faulty file; mtimes: int64 [N], nanoseconds. The two tell
    whether a photo is the same as in an earlier run.
    kinds: uint8 [N], `headers.Inspection.kind`; of a photo that is read from a shrunk copy its format, and SHRUNK.
    transparency: what transparent pixels are composed on, "white" or "black", or "ignored". copies, memory: None where
    none are.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    faults: np.ndarray
    root: bytes
    path_blob: np.ndarray
    path_offsets: np.ndarray
    signatures: np.ndarray
    mtimes: np.ndarray
    kinds: np.ndarray
    transparency: str = "white"
    copies: ShrunkCopies | None = None
    memory: PhotoMemory | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The absolute path of a photo, 0 <= index < N."""
        return os.fsdecode(self.path_bytes(index))

    def path_bytes(self, index: int) -> bytes:
        """The same in the file system's own bytes."""
        return os.path.join(self.root, self.path_below_root(index))

    def path_below_root(self, index: int) -> bytes:
        """The path of a photo below `root`; of a CSV file that has it so, an absolute one."""
        return _path_at(self.path_blob, self.path_offsets, index)

    def source(self, index: int) -> bytes:
        """The path of what is opened for a photo's pixels: of itself, or of its shrunk copy."""
        copy = self.copy_file(index)
        return os.fsencode(copy) if copy else self.path_bytes(index)

    def has_source(self, index: int) -> bool:
        """Whether `source` is of the size that the split says; else `decode.window_of` makes a copy."""
        copy = self.copy_file(index)
        return is_whole(copy) if copy else not self.kinds[index] & SHRUNK

    def copy_file(self, index: int) -> Path | None:
        """Where the shrunk copy of a photo is kept; None where none is."""
        if not self.copies or not self.kinds[index] & SHRUNK:
            return None
        name = self.path_below_root(index)
        return self.copies.file(name, int(self.signatures[index]), int(self.mtimes[index]), self.transparency)

    def shrunk(self, copies: ShrunkCopies) -> "Split":
        """The same photos, the larger ones read from copies."""
        is_large = self.sizes.min(axis=1) > copies.shrink
        kinds = np.where(is_large, self.kinds & FORMAT | SHRUNK, self.kinds)
        return replace(self, sizes=shrunk_sizes(self.sizes, copies.shrink), kinds=kinds, copies=copies, memory=None)

    def only(self, chosen: np.ndarray) -> "Split":
        """The photos at some positions, int [n], in that order."""
        paths = [self.path_below_root(index) for index in chosen.tolist()]
        names = ("labels", "sizes", "faults", "signatures", "mtimes", "kinds")
        columns: dict[str, Any] = {each: getattr(self, each)[chosen] for each in names}
        offsets = np.cumsum([0, *map(len, paths)]).astype(np.uint64)
        blob = np.frombuffer(b"".join(paths), np.uint8)
        return replace(self, path_blob=blob, path_offsets=offsets, memory=None, **columns)

    @cached_property
    def path_keys(self) -> np.ndarray:
        """uint64 [N], 0 where signature and time tell one photo from all others.

        Of what is stored without compression many have one size and the same edges, as drawings and scans with margins
        do, and one time where they came out of an archive: these have a hash of their absolute path.
        """
        keys = np.zeros(len(self), np.uint64)
        root = os.path.realpath(self.root)
        for row in np.flatnonzero(may_be_uncompressed(self.kinds)).tolist():
            path = os.path.join(root, self.path_below_root(row))
            keys[row] = int.from_bytes(blake2b(path, digest_size=8).digest(), "little")
        return keys

    def class_counts(self) -> dict[str, int]:
        """How many sound photos each class has."""
        counts = np.bincount(self.labels[self.faults == 0], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def faulty_files(self, besides: Collection[int] = ()) -> list[str]:
        """One line per faulty file: the path below `root`, the reason. besides: positions that are not asked for."""
        rows = np.setdiff1d(np.flatnonzero(self.faults), list(besides)).tolist()
        paths = [os.fsdecode(self.path_below_root(row)) for row in rows]
        return [f"{printable(path)} ({FAULTS[self.faults[row]]})" for path, row in zip(paths, rows, strict=True)]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set.

    data: the folder or the CSV file. root: the folder that paths are given below.
    splits: by name, "train" and "val" first.
    fingerprint: hex, of the paths below `root`, labels, class names and byte sizes; not of times, place or machine.
    duplicates: for each two splits that share photos, the earlier one first, pairs of paths below `root` of the same
    bytes; a photo of the later split stands here once at most. contradictions: the same under two class names.
    val_fraction: the share of "train" that was set aside as "val"; None where the data has a "val" of its own.
    findings: how the data was read. index_file: where it comes from.
    gone: for a run that goes on, by split, the positions of photos that have left since it began.
    """

    data: Path
    root: Path
    splits: dict[str, Split]
    fingerprint: str
    duplicates: dict[tuple[str, str], list[tuple[str, str]]]
    contradictions: list[tuple[str, str]]
    val_fraction: float | None
    findings: Findings
    index_file: Path
    gone: Mapping[str, Sequence[int]]

    def undivided(self, *, without_others: bool = False) -> "Dataset":
        """The same with one split, "all", where "val" was taken from "train" and there is no other split.

        without_others: others are left out.
        """
        if self.val_fraction is None or (len(self.splits) > 2 and not without_others):
            return self
        train, val = self.splits["train"], self.splits["val"]
        names = ("labels", "sizes", "faults", "signatures", "mtimes", "kinds")
        columns: dict[str, Any] = {each: np.concatenate([getattr(train, each), getattr(val, each)]) for each in names}
        offsets = np.concatenate([train.path_offsets, val.path_offsets[1:]])
        whole = replace(train, name="all", path_offsets=offsets, **columns)
        return replace(self, splits={"all": whole}, duplicates={}, val_fraction=None)

    def shrunk(self, copies: ShrunkCopies) -> "Dataset":
        """The same photos, the larger ones read from copies."""
        return replace(self, splits={name: split.shrunk(copies) for name, split in self.splits.items()})

    def decoded_bytes(self) -> int:
        """What all photos of train and val would take decoded."""
        return sum(int(3 * self.splits[name].sizes.prod(axis=1, dtype=np.int64).sum()) for name in ("train", "val"))

    def remembered(self, limit: int, area: Callable[[int], Any]) -> "Dataset":
        """The same photos; of train and then of val as many as `limit` bytes allow stay in memory, once decoded."""
        splits = dict(self.splits)
        for name in ("train", "val"):
            memory = PhotoMemory(splits[name].sizes, limit, area)
            splits[name] = replace(splits[name], memory=memory)
            limit -= memory.bytes
        return replace(self, splits=splits)

    def report(self) -> list[str]:
        """What a person should know of the data before a run, in lines."""
        lines = [f"data: {printable(self.root)} (fingerprint {self.fingerprint})", *self.findings.lines()]
        for split in self.splits.values():
            counts = split.class_counts()
            each = ", ".join(f"{printable(name)} {count}" for name, count in counts.items())
            if len(counts) > 10:
                each = f"{min(counts.values())} to {counted(max(counts.values()), 'photo')} in a class"
            number = f"{counted(sum(counts.values()), 'photo')}, {counted(len(counts), 'class')}"
            lines.append(f"{printable(split.name)}: {number}: {each}")
        if self.val_fraction is not None:
            lines.append(f"val was taken from train: {self.val_fraction:g} of each class, chosen by a hash of the path")
        known = {composed(name): name for split in self.splits.values() for name in split.classes}
        for split in self.splits.values():
            there = {composed(name) for name, count in split.class_counts().items() if count}
            if absent := sorted(name for key, name in known.items() if key not in there):
                lines.append(f"{printable(split.name)} has no photo of {listed(absent)}")
            lines += spelling_notes(split, self.splits["train"].classes if "train" in self.splits else split.classes)
        folded = dict[str, str]()
        for name in known.values():
            if (twin := folded.setdefault(" ".join(name.casefold().split()), name)) != name:
                lines.append(
                    f"{printable(twin)} and {printable(name)} are two classes: they differ in case or blanks only"
                )
        if "val" in self.splits:
            lines += majority_notes(self.splits["val"])
        for (earlier, later), pairs in self.duplicates.items():
            name = printable(later)
            photos = counted(len(pairs), f"photo of {name} is", f"photos of {name} are")
            lines += _pair_lines(f"{photos} in {printable(earlier)} too:", pairs)
        if self.contradictions:
            stand = counted(len(self.contradictions), "photo stands", "photos stand")
            title = f"{stand} under another class too, with the same bytes:"
            lines += _pair_lines(title, self.contradictions)
        faulty = [line for split in self.splits.values() for line in split.faulty_files()]
        if faulty:  # each is named: it is left out
            lines += [f"{counted(len(faulty), 'file')} cannot be used:", *(f"  {file}" for file in faulty)]
        return lines


def scan_dataset(data: Path, cache: Path, val_fraction: float, class_names: str = "top") -> Path:
    """Reads the headers of the photos of a folder or a CSV file; returns the index file, for `load_dataset`.

    The index is kept in cache/scan. Only files that are new to it, or of another byte size or time, are opened; where
    nothing has changed it is left as it is. Where there is "train" and no "val", `val_fraction` of each class of
    "train" becomes "val". class_names: "top" or "path", as in `layout.list_folder`. Raises UserError where `data` is
    not made of labelled photos, MachineError where `cache` cannot be written.
    """
    data = _absolute(data)
    is_folder = os.path.isdir(data)
    if not is_folder and os.path.exists(data) and not os.path.isfile(data):  # reading a pipe would wait for ever
        raise UserError(f"{printable(data)}: neither a folder nor a file; {WANTED}")
    findings = Findings()
    try:
        root = os.fsencode(data if is_folder else folder_of_csv(data))
        photos = list_folder(data, class_names, findings) if is_folder else list_csv(data, findings)
        table, splits, divided = _collect(photos, val_fraction)
    except OSError as error:
        raise UserError(f"{printable(error.filename or data)}: cannot be read ({error.strerror}); {WANTED}") from None
    if not splits:
        raise UserError(f"{printable(data)}: no photos in it; {WANTED}")

    chosen = repr(val_fraction) + ("" if class_names == "top" else class_names)
    name = blake2b(os.fsencode(data) + chosen.encode(), digest_size=16).hexdigest()
    index_file = cache / "scan" / f"{name}.safetensors"
    known_header, known = dict[str, Any](), Table()
    with suppress(SafetensorError, OSError, KeyError, ValueError):
        known_header, known = _read_index(index_file, is_checked=True)
        _take_over(table, known)
    _scan(root, table)
    header = {
        "layout": _LAYOUT,
        "data": str(data),
        "root": os.fsdecode(root),
        "splits": splits,
        "val_fraction": val_fraction if divided else None,
        "fingerprint": _fingerprint(table, splits),
        "findings": asdict(findings),
    }
    is_same = header["splits"] == known_header.get("splits") and all(
        np.array_equal(column, known[name]) for name, column in table.items()
    )
    if header != known_header or not is_same:
        table |= {name: known[name] for name in _PAIRS} if is_same else _twins(root, table, splits)
        _write_index(index_file, table, header)
        _remove_unused(index_file.parent)
    with suppress(OSError):
        os.utime(index_file, ns=(time.time_ns(), index_file.stat().st_mtime_ns))  # it is used, and as old as it was
    return index_file


def _absolute(data: Path) -> Path:
    """As `abspath`, but that `link/..` is what the system takes for it, the folder above the one that link leads to."""
    parts = data.expanduser().parts
    above = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return Path(os.path.abspath(os.path.join(os.path.realpath(os.path.join("", *parts[:above])), *parts[above:])))


def load_dataset(index_file: Path, transparency: str = "white") -> Dataset:
    """The data set of an index file, memory-mapped: the processes of a machine share one copy.

    transparency: as in `Split`. Raises MachineError where the file is not a whole index.
    """
    try:
        header, table = _read_index(index_file)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise MachineError(f"{index_file}: not a readable index ({printable(error)}); scan the data again") from None
    blob, offsets = table["path_blob"], table["path_offsets"]
    splits, start = {}, 0
    for name, classes, count in header["splits"]:
        names = ("labels", "sizes", "faults", "signatures", "mtimes", "kinds")
        columns: dict[str, Any] = {column: table[column][start : start + count] for column in names}
        splits[name] = Split(
            name,
            tuple(classes),
            root=os.fsencode(header["root"]),
            path_blob=blob,
            path_offsets=offsets[start : start + count + 1],
            transparency=transparency,
            **columns,
        )
        start += count
    split_names = [name for name, *_ in header["splits"]]
    ends = np.cumsum([count for *_, count in header["splits"]])
    duplicates: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for pair in table["duplicates"]:
        first, second = np.searchsorted(ends, pair, side="right").tolist()
        duplicates.setdefault((split_names[first], split_names[second]), []).append(_paths_at(blob, offsets, pair))
    return Dataset(
        Path(header["data"]),
        Path(header["root"]),
        splits,
        header["fingerprint"],
        duplicates,
        [_paths_at(blob, offsets, pair) for pair in table["contradictions"]],
        header["val_fraction"],
        Findings(**header["findings"]),
        index_file,
        header.get("gone", {}),
    )


def map_labels(split: Split, classes: Sequence[str]) -> np.ndarray:
    """int32 [N]: the labels of the split's photos as positions in a model's `classes`, matched by name.

    Two spellings that differ in Unicode normalisation only are one name (`spelling_notes` says so). Where the labels
    are the split's own, its memory-mapped column is given: no copy for every process. Raises UserError where photos
    have a class that the model lacks.
    """
    lookup = np.array(_positions(split.classes, classes), np.int32)
    if unknown := [split.classes[label] for label in np.flatnonzero((lookup < 0) & (_counts(split) > 0))]:
        raise UserError(
            f"split {printable(repr(split.name))} has classes that the model lacks: {listed(unknown)}; it knows "
            f"{listed(classes)}{_case_hint(unknown, classes)}"
        )
    same = np.array_equal(lookup, np.arange(len(lookup)))
    return split.labels if same else lookup[split.labels]


def spelling_notes(split: Split, classes: Sequence[str]) -> list[str]:
    """A line on class names of `split` that are taken for one of `classes` in another spelling, where there are any."""
    positions = zip(split.classes, _positions(split.classes, classes), strict=True)
    other = [name for name, position in positions if position >= 0 and name != classes[position]]
    note = f"{printable(split.name)}: {listed(other)}: matched, though spelled in another Unicode normalisation"
    return [note] if other else []


def majority_notes(split: Split) -> list[str]:
    """A line with the score that no model should fall short of; none where there is no photo."""
    counts = np.array([*split.class_counts().values()])
    if not counts.any():
        return []
    name, top1 = split.classes[counts.argmax()], counts.max() / counts.sum()
    return [
        f"always answering {printable(name)}, the commonest class of {printable(split.name)}: top1 {top1:.4f}, "
        f"balanced {1 / np.count_nonzero(counts):.4f}"
    ]


def _positions(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Where each of `names` stands in `classes`, -1 where it does not."""
    alike = {composed(name): position for position, name in reversed([*enumerate(classes)])}
    exact = {name: position for position, name in enumerate(classes)}
    return [exact.get(name, alike.get(composed(name), -1)) for name in names]


def _case_hint(unknown: Sequence[str], known: Sequence[str]) -> str:
    folded = {composed(name).casefold(): name for name in known}
    for name in unknown:
        if twin := folded.get(composed(name).casefold()):
            return f" ({printable(name)} and {printable(twin)} differ in case only: rename one of them)"
    return ""


def _counts(split: Split) -> np.ndarray:
    """int64 [classes]: photos, sound or not."""
    return np.bincount(split.labels, minlength=len(split.classes))


def check_dataset(dataset: Dataset, *, skip_bad_files: bool, splits: Sequence[str] = ("train", "val")) -> None:
    """Raises UserError where the data does not do for a run that needs `splits`.

    That is: one of them is missing or has no sound photo; faulty files, unless `skip_bad_files`; photos of fewer than
    two classes in "train"; a class with photos in another of the splits and none in "train".
    """
    root = printable(dataset.root)
    for name in splits:
        if name not in dataset.splits:
            raise UserError(f"{root}: no split {name!r}; it has {listed(list(dataset.splits))}; {WANTED}")
    bad = [line for name in splits for line in dataset.splits[name].faulty_files(dataset.gone.get(name, ()))]
    if bad and not skip_bad_files:
        first = "; ".join(bad[:10]) + ("; ..." if len(bad) > 10 else "")
        advice = "Mend them, or add --skip-bad-files, which names each and leaves it out"
        raise UserError(f"{root}: {counted(len(bad), 'file')} cannot be used: {first}. {advice}")
    counts = {name: dataset.splits[name].class_counts() for name in splits}
    present = {name: {label for label, count in counts[name].items() if count} for name in splits}
    train = present.get("train")
    for name in splits:
        if not present[name]:
            raise UserError(f"{root}: split {name!r} has no photo that can be used; add some")
        there = {composed(label) for label in train or ()}
        if train and (absent := sorted(label for label in present[name] if composed(label) not in there)):
            end = f"{_case_hint(absent, sorted(train))}; add some, or remove those of {name!r}"
            if name == "val" and dataset.val_fraction is not None:  # which nobody but us has put there
                end = ": of so few, those that were not set aside to validate cannot be read; mend these, or add some"
            raise UserError(f"{root}: {name!r} has classes without a photo in 'train': {listed(absent)}{end}")
        spellings = Counter(map(composed, present[name]))
        if name == "train" and (twins := [label for label, count in spellings.items() if count > 1]):
            raise UserError(
                f"{root}: 'train' has {listed(twins)} twice, in two Unicode normalisations (NFC, NFD): put the photos "
                "into one folder"
            )
    if train and len(train) < 2:
        raise UserError(f"{root}: 'train' has photos of one class only, {listed(list(train))}; two are needed")


def _collect(photos: Iterable[Photo], val_fraction: float) -> tuple[Table, list[list[Any]], bool]:
    """The table of all photos, split after split; [name, classes, number of photos] of each split; whether "val" was
    taken from "train". No Python object per photo is kept, since there may be millions."""
    numbers: dict[tuple[str, str], int] = {}  # of (split, class), as they come
    number_of, blob, offsets = array("i"), bytearray(), array("Q", [0])
    for split, label, path in photos:
        number_of.append(numbers.setdefault((split, label), len(numbers)))
        blob += path
        offsets.append(len(blob))
    classes: dict[str, list[str]] = {}
    for split, label in sorted(numbers):
        classes.setdefault(split, []).append(label)
    divided = "train" in classes and "val" not in classes
    if divided:
        classes["val"] = classes["train"]
    names = sorted(classes, key=lambda name: (name != "train", name != "val", name))
    positions = {(split, label): (names.index(split), at) for split in names for at, label in enumerate(classes[split])}
    split_of, labels = np.array([positions[key] for key in numbers], np.int32).reshape(-1, 2)[number_of].T
    if divided:
        split_of[_choose_val(labels, split_of == 0, _path_hashes(blob, offsets), val_fraction)] = 1
    order = np.argsort(split_of, kind="stable")
    lengths = np.diff(np.array(offsets, np.int64))[order]
    table = {
        "path_blob": np.frombuffer(b"".join(_path_at(blob, offsets, row) for row in order), np.uint8),
        "path_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64),
        "labels": labels[order],
        "sizes": np.zeros((len(order), 2), np.int32),
        "faults": np.zeros(len(order), np.uint8),
        "byte_sizes": np.full(len(order), -1, np.int64),  # -1: not looked at so far
        "mtimes": np.zeros(len(order), np.int64),  # nanoseconds
        "signatures": np.zeros(len(order), np.uint64),  # of byte size and edges; 0: faulty
        "kinds": np.zeros(len(order), np.uint8),
    }
    counts = np.bincount(split_of, minlength=len(names)).tolist()
    return table, [[name, classes[name], count] for name, count in zip(names, counts, strict=True)], divided


def _choose_val(labels: np.ndarray, in_train: np.ndarray, hashes: np.ndarray, val_fraction: float) -> np.ndarray:
    """Which rows of "train" become "val": of each class those that hash lowest, one of two at least, never all."""
    rows = np.flatnonzero(in_train)
    rows = rows[np.lexsort((hashes[rows], labels[rows]))]
    counts = np.bincount(labels[rows])
    shares = np.minimum(np.maximum(np.round(val_fraction * counts), 1), counts - 1)
    rank_in_class = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows[rank_in_class < np.repeat(shares, counts)]


def _take_over(table: Table, known: Table) -> None:
    """Fills in what an earlier scan found out about the same paths."""
    rows = known_rows = np.arange(len(table["labels"]))
    if not all(np.array_equal(table[name], known[name]) for name in ("path_blob", "path_offsets")):
        new, old = (_path_hashes(index["path_blob"], index["path_offsets"]) for index in (table, known))
        _, rows, known_rows = np.intersect1d(new, old, return_indices=True)
    for name in _FACTS:
        table[name][rows] = known[name][known_rows]


def _scan(root: bytes, table: Table) -> None:
    """Judges each file whose byte size or time is not the table's."""

    def look(row: int) -> None:
        path = os.path.join(root, _path_at(table["path_blob"], table["path_offsets"], row))
        try:
            state = os.stat(path)
            byte_size, mtime = state.st_size, state.st_mtime_ns
        except (OSError, ValueError):
            byte_size, mtime = 0, 0  # the inspection will tell why
        unchanged = table["byte_sizes"][row] == byte_size and table["mtimes"][row] == mtime
        # That a file can be read by now, as with pillow-heif installed, shows neither in its size nor in its time.
        if unchanged and not table["faults"][row]:
            return
        fault, size, signature, kind = inspect_file(path)
        for name, fact in zip(_FACTS, (size, FAULTS.index(fault), byte_size, mtime, signature, kind), strict=True):
            table[name][row] = fact

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data and large photos
        in_threads(look, len(table["labels"]), f"scan of {printable(os.fsdecode(root))}")


def in_threads(
    look: Callable[[int], None], total: int, title: str, threads: int | None = None, *, is_shown: bool = True
) -> None:
    """Calls `look` for each row, in `threads` threads, or as many as keep a slow disk busy. is_shown: with a bar on a
    terminal, elsewhere with a line at start and end, if it takes its time."""
    start, announced = time.monotonic(), False
    step = min(256, total // 256 + 1)  # few photos on a slow disk are to keep all threads busy, too
    chunks = [range(at, min(at + step, total)) for at in range(0, total, step)]
    pool = ThreadPoolExecutor(threads or min(32, 4 * (os.cpu_count() or 1)))
    has_ended = Event()

    def look_at(chunk: range) -> int:
        for row in chunk:
            if has_ended.is_set():  # after an error, or Ctrl-C
                break
            look(row)
        return len(chunk)

    try:
        disable = None if is_shown else True
        with tqdm(total=total, desc=title, unit="photo", disable=disable, leave=False) as bar:
            for done in pool.map(look_at, chunks):
                bar.update(done)
                if is_shown and bar.disable and not announced and time.monotonic() - start > 2:
                    announced = True
                    print(f"{title}: {counted(total, 'photo')} ...", file=sys.stderr, flush=True)
    finally:
        has_ended.set()
        pool.shutdown(cancel_futures=True)
    if announced:
        print(f"{title}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _twins(root: bytes, table: Table, splits: list[list[Any]]) -> dict[str, np.ndarray]:
    """Pairs of rows of the same bytes, int64 [any, 2]: "duplicates", a row for each of the later of two splits with the
    first such row of the earlier one; "contradictions", a row with the first such row, which has another class name.

    Whole files are read where size and edges agree and the edges are not all of them.
    """
    ends = np.cumsum([count for *_, count in splits])
    numbers: dict[str, int] = {}  # of class names, over all splits
    lookup = np.array([numbers.setdefault(composed(name), len(numbers)) for _, names, _ in splits for name in names])
    first_class = np.cumsum([0, *(len(names) for _, names, _ in splits)])
    order = np.argsort(table["signatures"], kind="stable")
    signatures = table["signatures"][order]
    agree = (signatures[1:] == signatures[:-1]) & (signatures[1:] != 0)
    if not agree.any():
        return {name: np.zeros((0, 2), np.int64) for name in _PAIRS}
    rows = order[np.concatenate([agree, [False]]) | np.concatenate([[False], agree])]
    split_of = np.searchsorted(ends, rows, side="right")
    class_of = lookup[first_class[split_of] + table["labels"][rows]]
    # Of those who agree, only the ones in several splits or classes matter.
    positions, keys = split_of * len(numbers) + class_of, table["signatures"][rows]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    differ = np.minimum.reduceat(positions, starts) != np.maximum.reduceat(positions, starts)
    wanted = np.flatnonzero(np.repeat(differ, np.diff(starts, append=len(rows)))).tolist()
    contents = _digests(root, table, rows[wanted].tolist())
    same: dict[bytes, list[int]] = {}
    for at, content in zip(wanted, contents, strict=True):
        if content:
            same.setdefault(content, []).append(at)
    duplicates, contradictions = [], []
    for members in same.values():
        firsts = dict[int, int]()  # of each split; the members are in the order of their rows
        for at in members:
            duplicates += [(rows[first], rows[at]) for split, first in firsts.items() if split != split_of[at]]
            firsts.setdefault(int(split_of[at]), at)
            if class_of[at] != class_of[members[0]]:
                contradictions.append((rows[members[0]], rows[at]))
    pairs = {"duplicates": duplicates, "contradictions": contradictions}
    return {name: np.array(sorted(found), np.int64).reshape(-1, 2) for name, found in pairs.items()}


def _digests(root: bytes, table: Table, rows: list[int]) -> list[bytes]:
    """Of each file's content; b"" where it cannot be read. Of links to one file, one is read."""
    found, known = [b""] * len(rows), dict[tuple[int, int], bytes]()

    def look(at: int) -> None:
        row = rows[at]
        if table["byte_sizes"][row] <= 2 * EDGE:  # the signature is of all of it
            found[at] = table["signatures"][row].tobytes()
            return
        path = os.path.join(root, _path_at(table["path_blob"], table["path_offsets"], row))
        with suppress(OSError):
            state = os.stat(path)
            key = state.st_dev, state.st_ino
            if key not in known:
                known[key] = file_digest(Path(os.fsdecode(path))).encode()
            found[at] = known[key]

    in_threads(look, len(rows), "comparing photos that look like copies")
    return found


def _read_index(index_file: Path, *, is_checked: bool = False) -> tuple[dict[str, Any], Table]:
    """Header and arrays, memory-mapped: safetensors maps a file for PyTorch, for numpy it copies.

    is_checked: a file whose content has changed since it was written raises ValueError; the scan looks, once.
    """
    with safe_open(index_file, framework="pt") as file:
        digest, _, text = (file.metadata() or {})["header"].partition(" ")
        header = json.loads(text)
        if header["layout"] != _LAYOUT:
            raise ValueError("an index of another version")
        names = ("path_blob", "path_offsets", "labels", *_FACTS, *_PAIRS)
        table = {name: file.get_tensor(name).numpy() for name in names}
        if is_checked and digest != _index_digest(table, text):
            raise ValueError("damaged since it was written")
    for column in table.values():
        column.flags.writeable = False
    return header, table


def _write_index(index_file: Path, table: Table, header: dict[str, Any]) -> None:
    try:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(header)  # keeps names that are not valid Unicode, which safetensors refuses
        with atomic_write(index_file, shared=True) as partial:
            save_file(table, partial, {"header": f"{_index_digest(table, text)} {text}"})
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{index_file.parent}: the index cannot be written there: {printable(error)}") from None


def _remove_unused(folder: Path) -> None:
    """Indexes and contact sheets that nobody has asked for in a month, as those of a folder that a job has for itself;
    what was being written when a process was killed, a week ago."""
    for file, state in files_below(folder):
        days = (time.time() - max(state.st_atime, state.st_mtime)) / 86400
        if days > (7 if file.suffix == ".tmp" else 30):
            remove(file, folder)


def _index_digest(table: Table, header: str) -> str:
    digest = blake2b(header.encode(), digest_size=16)
    for name in sorted(table):
        digest.update(f"{name} {table[name].dtype} {table[name].shape}".encode())
        digest.update(np.ascontiguousarray(table[name]).data)
    return digest.hexdigest()


def _fingerprint(table: Table, splits: list[list[Any]]) -> str:
    digest = blake2b(json.dumps(splits).encode(), digest_size=16)
    for name in ("path_blob", "path_offsets", "labels", "byte_sizes"):
        digest.update(np.ascontiguousarray(table[name]).data)
    return digest.hexdigest()


def _path_at(blob: np.ndarray | bytearray, offsets: np.ndarray | array, row: int) -> bytes:
    return bytes(blob[offsets[row] : offsets[row + 1]])


def _paths_at(blob: np.ndarray, offsets: np.ndarray, pair: np.ndarray) -> tuple[str, str]:
    first, second = (os.fsdecode(_path_at(blob, offsets, row)) for row in pair)
    return first, second


def _pair_lines(title: str, pairs: list[tuple[str, str]]) -> list[str]:
    more = [f"  and {len(pairs) - 10} more"] if len(pairs) > 10 else []
    return [title, *(f"  {printable(one)} = {printable(other)}" for one, other in pairs[:10]), *more]


def _path_hashes(blob: np.ndarray | bytearray, offsets: np.ndarray | array) -> np.ndarray:
    """uint64 [N]: the same in every process and on every machine, unlike Python's own hash."""
    paths = (_path_at(blob, offsets, row) for row in range(len(offsets) - 1))
    hashes = (int.from_bytes(blake2b(path, digest_size=8).digest(), "little") for path in paths)
    return np.fromiter(hashes, np.uint64, len(offsets) - 1)
