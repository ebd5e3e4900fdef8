"""What a review has found, as a CSV file that a person edits and that `--data` takes: every photo of a data set, those
that something was found of first.

    path,label,split,finding,score,other,action,new_label,folder
    train/ants/1.jpg,ants,train,wrong_label,0.91,,keep,bees,/home/me/photos
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipelines.data.dataset import Split
from pipelines.errors import UserError, write_error
from pipelines.files import atomic_write, file_digest
from pipelines.text import printable

import numpy as np

HEADER = ("path", "label", "split", "finding", "score", "other", "action", "new_label", "folder")


@dataclass(frozen=True)
class Found:
    """Something of one photo. photo, other: positions among all photos, `AllPhotos`; other: the photo that this one is
    a copy of, or -1. score: of the finding's own kind, or None. new_label: what the photo may rather be, or ""."""

    photo: int
    score: float | None = None
    other: int = -1
    new_label: str = ""


@dataclass(frozen=True, eq=False)
class AllPhotos:
    """The photos of all splits, one after another, counted from 0."""

    splits: Sequence[Split]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def first(self, number: int) -> int:
        """Where the photos of a split begin."""
        return sum(map(len, self.splits[:number]))

    def at(self, photo: int) -> tuple[Split, int]:
        """The split of a photo, and its position there."""
        for split in self.splits:
            if photo < len(split):
                return split, photo
            photo -= len(split)
        raise IndexError(photo)

    def path(self, photo: int) -> str:
        """Below the data's folder, as a CSV file has it."""
        split, index = self.at(photo)
        path = split.path_below_root(index).decode("utf-8", "surrogateescape")
        return path.replace("\\", "/") if os.sep == "\\" else path

    def label(self, photo: int) -> str:
        split, index = self.at(photo)
        return split.classes[split.labels[index]]


def check_names(photos: AllPhotos) -> None:
    """UserError where a CSV file cannot spell a name so that it is read as the same one."""
    names = (name for split in photos.splits for name in (split.name, *split.classes))
    for text in chain(names, map(photos.path, range(len(photos)))):
        try:
            text.encode()
        except UnicodeEncodeError:
            is_said = False
        else:
            # What Python's writer leaves unquoted, and what a reader of blanks behind quotes would take for one.
            is_said = text == text.strip() and not re.search(r'\r|" +(?=[,;\t\n]|$)', text)
        if not is_said:
            raise UserError(
                f"review: a CSV file cannot say {printable(text)!r}, which is no UTF-8, or has a blank at an end or "
                "behind a quote, or a carriage return: rename it"
            )


def check_unedited(file: Path) -> None:
    """UserError where there is a file that is not as `write_review` has left it."""
    if not file.exists():
        return
    try:
        is_own = _digest_file(file).read_text("utf-8").split()[0] == file_digest(file, "sha256")
    except (OSError, ValueError, IndexError):
        is_own = False
    if not is_own:
        raise UserError(
            f"{printable(file)} has been edited, or is none of a review: it is not replaced; give another --out"
        )


def _digest_file(file: Path) -> Path:
    """For `sha256sum -c`; by it an edited file is known."""
    return file.with_name(f"{file.name}.sha256")


def order_of(findings: dict[str, list[Found]]) -> dict[int, list[tuple[str, Found]]]:
    """By photo, in the order of the file's first rows, all that was found of it."""
    by_photo: dict[int, list[tuple[str, Found]]] = {}
    for name, found in findings.items():
        for each in found:
            by_photo.setdefault(each.photo, []).append((name, each))
    return by_photo


def write_review(file: Path, photos: AllPhotos, findings: dict[str, list[Found]], folder: str) -> None:
    """findings: by name, the weightiest first. folder: what the paths are below. UserError where no file can be,
    MachineError where the disk is full."""
    by_photo = order_of(findings)
    try:
        # With the mark by which spreadsheets know UTF-8.
        with atomic_write(file) as partial, open(partial, "w", encoding="utf-8-sig", newline="") as opened:
            table = csv.writer(opened, lineterminator="\n")
            table.writerow(HEADER)
            table.writerows(_rows(photos, by_photo, folder))
        with atomic_write(_digest_file(file)) as partial:
            partial.write_text(f"{file_digest(file, 'sha256')}  {file.name}\n", "utf-8")
    except OSError as error:
        line = f"{printable(file)}: cannot be written ({error.strerror}): give another --out"
        raise write_error(error, line) from None


def _rows(
    photos: AllPhotos, by_photo: dict[int, list[tuple[str, Found]]], folder: str
) -> Iterator[tuple[str | float, ...]]:
    rest = np.setdiff1d(np.arange(len(photos)), np.array([*by_photo], np.int64)).tolist()
    for photo in (*by_photo, *rest):
        found = by_photo.get(photo, [])
        split, _ = photos.at(photo)
        first = found[0][1] if found else None
        yield (
            photos.path(photo),
            photos.label(photo),
            split.name,
            " + ".join(name for name, _ in found),
            f"{first.score:.4g}" if first and first.score is not None else "",
            next((photos.path(each.other) for _, each in found if each.other >= 0), ""),
            "keep",
            next((each.new_label for _, each in found if each.new_label), ""),
            folder,
        )
