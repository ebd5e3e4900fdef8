"""What a model answers to each photo of a split, as a CSV file: a run's `predictions.csv`, and what evaluate.py leaves.

    path,split,label,answer,probability,loss,answer_2,probability_2
    val/ants/10308379.jpg,val,ants,ants,0.981172,0.0190075,bees,0.0188282

A file for people and for programs: some 80 bytes a photo, or twice that with five answers. Neither writing nor reading
keeps more of it in memory than numbers and paths.
"""

import csv
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pipelines.data.dataset import Dataset, Split
from pipelines.errors import UserError
from pipelines.files import atomic_write, file_digest
from pipelines.run_files import read_description, read_texts, refuse_what_is_no_file, to_json
from pipelines.text import printable, spelled

import numpy as np

MOST_ANSWERS = 5
_FIRST = ("path", "split", "label", "answer", "probability", "loss")
BEGINNING = ",".join(_FIRST)  # of such a file
BEGINNING_OF_NOTE = '{\n  "data": '
_ROWS = 1 << 14  # made at once
_UNFIT = re.compile(r'[\x00-\x1f\x7f"*/:<>?\\|%\udc80-\udcff]')  # some file system refuses them; % spells them
_LONGEST = 160  # bytes of a name in a file's name, which has more around it


@dataclass(frozen=True, eq=False)
class Predictions:
    """N photos and the K most probable answers to each, the first being the model's.

    split: of the data. classes: the names that occur. paths: N. All are `text.spelled`. labels: int32 [N] and answers:
    int32 [N, K], positions in `classes`; probabilities: float32 [N, K]; losses: float32 [N], cross-entropy.
    """

    split: str
    classes: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray
    answers: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def right(self) -> np.ndarray:
        """bool [N]: whether the first answer is the label."""
        return self.answers[:, 0] == self.labels


@dataclass(frozen=True)
class Source:
    """Which photos answers are to, and "" for what is not known. data: the folder or CSV file. dataset: fingerprint of
    the data set; split: that of the split alone."""

    data: str
    dataset: str
    split: str = ""

    def is_other_than(self, other: "Source") -> bool:
        """Whether the photos are known not to be the same."""
        known = ((one, its) for one, its in ((self.split, other.split), (self.dataset, other.dataset)) if one and its)
        return next((one != its for one, its in known), False)


def source_of_run(run: Path) -> Source | None:
    """What a run was trained on; None before its model.json is there. UserError where that is damaged."""
    if not (run / "model.json").exists():
        return None
    description = read_description(run, "model")
    return Source(description["data"], description["dataset_fingerprint"])


def own_photos(run: Path) -> str | None:
    """The folder or CSV file a run was trained on, as model.json has it: the settings may have a path that was below
    another folder than this. None before there is a model.json, and where nothing lies there. UserError where it is
    damaged.
    """
    own = source_of_run(run)
    return own.data if own and os.path.exists(own.data) else None


def source_of_split(dataset: Dataset, split: Split) -> Source:
    """That of a split, which goes by its photos' paths below the root, labels, byte sizes and edges."""
    present, labels = np.unique(split.labels, return_inverse=True)
    names = [split.classes[label] for label in present.tolist()]
    digest = blake2b(json.dumps([len(split), names]).encode(), digest_size=16)
    first, last = int(split.path_offsets[0]), int(split.path_offsets[-1])
    columns = np.diff(split.path_offsets), split.path_blob[first:last], labels.astype(np.int32), split.signatures
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return Source(str(dataset.data), dataset.fingerprint, digest.hexdigest())


def source_of(file: Path) -> Source | None:
    """Of a run's predictions.csv, and of a file that evaluate.py has left. None where an earlier version has left it,
    or it is another than was left."""
    if file.name == "predictions.csv":
        return source_of_run(file.parent)
    with suppress(OSError, UserError):  # somebody's own file may have that name
        found = read_texts(note_beside(file))
        if found.get("digest") == file_digest(file):
            return Source(*(found.get(name, "") for name in ("data", "dataset_fingerprint", "split_fingerprint")))
    return None


def note_source(file: Path, source: Source) -> None:
    """Writes beside a file of `write_predictions` which photos it is of."""
    content = {"data": source.data, "dataset_fingerprint": source.dataset, "split_fingerprint": source.split}
    with atomic_write(note_beside(file)) as partial:
        text = to_json(content | {"digest": file_digest(file)}, indent=2)
        partial.write_text(f"{text}\n", "utf-8", "backslashreplace")


def note_beside(file: Path) -> Path:
    """Where it is noted which photos a file of answers is of."""
    return file.with_suffix(".json")


def name_in_files(split: str) -> str:
    """What stands for a split in the name of a file, as any file system takes it: no two splits have one.

    A CSV file may call a split anything: a letter that some system refuses is spelled as in a URL, `hold%2Fout`, and
    what is too long is cut, with a digest of all of it.
    """
    name = _UNFIT.sub(lambda letter: f"%{ord(letter[0]) & 0xFF:02X}", split)
    whole = name.encode("utf-8", "surrogatepass")
    if len(whole) <= _LONGEST:
        return name
    return f"{whole[: _LONGEST - 18].decode('utf-8', 'ignore')}%~{blake2b(whole, digest_size=8).hexdigest()}"


def predictions_of(run: Path, split: str | None = None) -> Path:
    """The file that says what a run answers to a split, as evaluate.py has left it; None: to its validation photos,
    which of a run of an earlier version evaluate.py has left, too."""
    own, evaluated = run / "predictions.csv", run / "figures" / f"predictions_{name_in_files(split or 'val')}.csv"
    return evaluated if split or (evaluated.exists() and not own.exists()) else own


def write_predictions(records: np.ndarray, split: Split, classes: Sequence[str], path: Path) -> None:
    """records: of `training.evaluation.predict`, whose labels are positions in `classes`."""
    answers = min(MOST_ANSWERS, len(classes))
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_header(answers))
        for first in range(0, len(records), _ROWS):
            table.writerows(_rows(records[first : first + _ROWS], split, [*map(spelled, classes)], answers))


def _header(answers: int) -> list[str]:
    return [*_FIRST, *(f"{name}_{at}" for at in range(2, answers + 1) for name in ("answer", "probability"))]


def _rows(records: np.ndarray, split: Split, names: Sequence[str], answers: int) -> Iterator[tuple[str, ...]]:
    ranked = zip(records["answers"].T[:answers], records["probabilities"].T[:answers], strict=True)
    (answer, probability), *others = [
        ([names[at] for at in column.tolist()], _numbers(each)) for column, each in ranked
    ]
    return zip(
        (spelled(_with_slashes(split.path_below_root(index))) for index in records["index"].tolist()),
        [spelled(split.name)] * len(records),
        [names[label] for label in records["label"].tolist()],
        answer,
        probability,
        _numbers(records["loss"]),
        *(column for pair in others for column in pair),
        strict=True,
    )


def _with_slashes(path: bytes) -> bytes:
    return path.replace(b"\\", b"/") if os.sep == "\\" else path


def _numbers(values: np.ndarray) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]


def read_predictions(file: Path) -> Predictions:
    """A file of `write_predictions`, from anywhere, its rows in any order. UserError where it is missing or damaged."""
    try:
        refuse_what_is_no_file(file)
        with open(file, encoding="utf-8-sig", newline="") as opened:
            lines = csv.reader(opened, strict=True)
            try:
                return _read(lines)
            except (ValueError, csv.Error) as error:  # UnicodeDecodeError is the former
                where = f"{file}, line {lines.line_num}"
                raise UserError(printable(f"{where}: not as predictions.csv is ({str(error)[:120]})")) from None
    except OSError as error:
        raise UserError(f"{printable(file)}: cannot be read ({error.strerror})") from None


def _read(lines: Iterator[list[str]]) -> Predictions:
    header = next(lines, [])
    answers = 1 + (len(header) - len(_FIRST)) // 2
    if header != _header(answers) or not 2 <= answers <= MOST_ANSWERS:
        raise ValueError(f"its header is not {','.join(_header(2))}")
    names: dict[str, int] = {}
    paths, splits = list[str](), set[str]()
    labels, chosen, probabilities, losses = array("i"), array("i"), array("f"), array("f")
    for row in lines:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under {len(header)} headings")
        path, split, label, answer, probability, loss, *others = row
        words = (path, split, label, answer, *others[::2])
        if not all(word and (word.isprintable() or printable(word) == word) for word in words):
            raise ValueError("a name that is empty or not printable")
        numbers = [*map(float, (probability, *others[1::2]))]
        if not all(0 <= number <= 1 for number in numbers) or not 0 <= float(loss) < math.inf:
            raise ValueError("a probability that is none, or a loss")
        paths.append(path)
        splits.add(split)
        labels.append(names.setdefault(label, len(names)))
        chosen.extend(names.setdefault(name, len(names)) for name in (answer, *others[::2]))
        probabilities.extend(numbers)
        losses.append(float(loss))
    if len(splits) > 1:
        raise ValueError("photos of several splits")
    return Predictions(
        next(iter(splits), ""),
        tuple(names),
        paths,
        np.array(labels, np.int32),
        np.array(chosen, np.int32).reshape(-1, answers),
        np.array(probabilities, np.float32).reshape(-1, answers),
        np.array(losses, np.float32),
    )
