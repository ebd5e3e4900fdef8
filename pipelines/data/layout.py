"""What a folder or a CSV file of photos means: which folder is a split, which a class, which file a photo.

ROOT/<split>/<class>/* is read as torchvision.datasets.ImageFolder reads it, but for what no person means: hidden and
system files, the folders of runs and of other tools. What is passed over is counted; what can be read in two ways is
refused, with what to type.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Container, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipelines.data.headers import ENDINGS, UNREAD_ENDINGS
from pipelines.errors import UserError
from pipelines.text import composed, counted, listed, name_of_folder, path_on_disk, printable

WANTED = "give a folder with train/CLASS/* or CLASS/* in it, or a CSV file path,label[,split]"
Photo = tuple[str, str, bytes]  # split, class, path below the root

_SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF = {word: split for split, words in _SPELLINGS.items() for word in words}
_SUFFIX = re.compile(r"[ _-]*(set|data|dataset|split|images|imgs|photos|pictures|samples)?$")
_LIKE_VAL = ("eval", "evaluation", "vali", "validate", "crossval", "cv", "va")  # val or test: who knows
# Compared in lower case. Besides them, everything that begins with a dot.
_SYSTEM = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "@tmp", "#snapshot", "$recycle.bin"),
    *("found.000", "@sharesnap", "@recently-snapshot", "~snapshot", "network trash folder"),
    *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
_TOOLS = {"wandb", "mlruns", "mlartifacts", "lightning_logs", "tb_logs", "__pycache__", "node_modules"}
# Files by which the folder of a run or of a tool is known, whatever its name: our own run folders, what deploy/ needs
# of one, ultralytics' and timm's, Lightning's, Hugging Face's, and a virtual environment.
_MARKS = (
    {"config.yaml", "status.json"},
    {"best.pt", "model.json"},
    *({name} for name in ("args.yaml", "hparams.yaml", "trainer_state.json", "pyvenv.cfg")),
)
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
ACTIONS = ("keep", "drop", "relabel")  # of a row of a review
_OF_A_REVIEW = {"finding", "action"}  # both: a CSV file may have an "action" of its own
_ELSEWHERE = re.compile(r"[A-Za-z][\w+.-]*://|[A-Za-z]:[\\/]")  # a URL, a path on a drive of Windows
_BLANKS_BEHIND_QUOTE = re.compile(r'" +(?=[,;\t\r\n]|$)')
_EVENTS = "events.out.tfevents"  # TensorBoard's
_OWN_PICTURES = re.compile(r"(confusion_matrix|predictions)_\w+\.png")  # evaluate.py's, where it has no run folder


@dataclass
class Findings:
    """What a person should know of how the data was read.

    root: the folder that was read. hidden: how many hidden and system files and folders were passed over; tools: the
    folders of runs and of other tools that were. endings: how many other files were, by their ending. notes: whole
    lines.
    """

    root: str = ""
    hidden: int = 0
    tools: list[str] = field(default_factory=list)
    endings: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the report of a data set."""
        unread = {ending: count for ending, count in self.endings.items() if ending in UNREAD_ENDINGS}
        others = {ending: count for ending, count in self.endings.items() if ending not in UNREAD_ENDINGS}
        parts = [
            counted(self.hidden, "hidden or system file or folder", "hidden or system files and folders")
            if self.hidden
            else "",
            f"{counted(len(tools), 'folder of a run or tool', 'folders of runs or tools')} ({listed(tools)})"
            if (tools := sorted({os.path.relpath(folder, self.root or os.curdir) for folder in self.tools}))
            else "",
            f"{counted(sum(others.values()), 'other file')} ({_counted(others)})" if others else "",
        ]
        passed = [f"passed over: {', '.join(filter(None, parts))}"] if any(parts) else []
        if unread:
            advice = next((UNREAD_ENDINGS[ending] for ending in unread if UNREAD_ENDINGS[ending]), "")
            passed.append(
                f"{counted(sum(unread.values()), 'picture is', 'pictures are')} not used, of formats that are not read "
                f"here: {_counted(unread)}" + (f"; {advice}" if advice else "")
            )
        return [*self.notes, *passed]


def split_of(name: str) -> str | None:
    """ "train", "val" or "test" where a name is a known spelling of it, in any case; else None."""
    return _SPLIT_OF.get(_SUFFIX.sub("", name.strip().lower()))


def _like(name: str) -> str | None:
    """The split that a name reminds of, by one of its words: `seg_train`, `val2017`, `my-test`."""
    words = re.findall("[a-z]+", name.lower())
    found = {_SPLIT_OF.get(word) or ("val" if word in _LIKE_VAL else None) for word in words} - {None}
    return found.pop() if len(found) == 1 else None


def _check_spellings(where: str, names: Sequence[str]) -> None:
    """Raises UserError where two names mean one split, or one is like the "train" or "val" that is missing."""
    meant: dict[str, str] = {}
    for name in names:
        split = split_of(name) or name
        if split in meant:
            raise UserError(
                f"{where}: {meant[split]!r} and {name!r} both mean the split {split!r}: merge them, or give one "
                "another name"
            )
        meant[split] = name
    for name in names:
        like = _like(name)
        if split_of(name) is None and like in ("train", "val") and like not in meant:
            raise UserError(
                f"{where}: no split {like!r}, but {name!r} reminds of it: call it {like} if it is meant, or else "
                "something without that word"
            )


def list_folder(root: Path, class_names: str, findings: Findings) -> Iterator[Photo]:
    """The photos of a folder. class_names: "top", a class is a folder in its split; "path", every folder with photos is
    one, called by its path below the split. UserError where there are none, or where what is meant cannot be told."""
    findings.root = str(root)
    folders, _ = _look_into(root, findings, is_root=True)
    if any(map(split_of, folders)):
        splits = _splits(root, folders, findings)
    else:
        _check_flat(root, folders)
        splits = {"": "train"}
        if split_of(root.name) and (beside := _splits_beside(root)):
            findings.notes.append(
                f"{printable(root.name)} alone was given; beside it are {listed(beside)}: --data "
                f"{printable(root.parent)} takes them all"
            )
    is_nested = False
    for folder, split in sorted(splits.items(), key=lambda item: (item[1] != "train", item)):
        is_nested |= yield from _list_split(root, folder, split, class_names, findings, is_noted=is_nested)
    if class_names == "path" and not is_nested:
        findings.notes.append("class_names: path changes nothing: no class folder has folders with photos in it")


def _list_split(
    root: Path, folder: str, split: str, class_names: str, findings: Findings, *, is_noted: bool
) -> Generator[Photo, None, bool]:
    """The photos of one split; returns whether its class folders have folders with photos in them."""
    top = root / folder
    classes, loose = _look_into(top, findings if folder else Findings(), is_root=not folder)  # the root: once is enough
    if not classes and split in ("train", "val"):
        raise _no_classes(top)
    if loose:
        are = counted(loose, "photo in no class folder is", "photos in no class folder are")
        findings.notes.append(f"{printable(top)}: {are} not used")
    below_root, below_top = len(os.path.join(root, "")), len(os.path.join(top, ""))
    split_name, tops, paths, example = name_of_folder(split), 0, 0, ""
    inside: dict[str, set[str]] = {}  # class folder -> folders in it with photos at some depth
    for name in classes:
        tools, found = len(findings.tools), sorted(_walk(str(top / name), findings))
        if not found and split in ("train", "val") and len(findings.tools) == tools:
            raise _no_photos(top / name)
        if not folder:
            _check_class(root, name, found, is_alone=len(classes) == 1)
        tops, paths = tops + bool(found), paths + len(found)
        inside[name] = {below[below_top:].partition(os.sep)[2].partition(os.sep)[0] for below, _ in found}
        for below, names in found:
            path = below[below_top:].replace(os.sep, "/")
            example = example or (path if path != name else "")
            label = name_of_folder(path if class_names == "path" else name)
            before = os.path.join(below, "")[below_root:]
            for file in names:
                yield split_name, label, os.fsencode(before + file)
    if example and not is_noted:
        readings = {
            "top": f"{counted(tops, 'class')} by their first folder",
            "path": f"{paths} by their path, as {example!r}",
        }
        other = "path" if class_names == "top" else "top"
        findings.notes.append(
            f"class folders are nested: {printable(split)} has {printable(readings[class_names])} (class_names: "
            f"{class_names}); with --class_names {other} it would be {printable(readings[other])}"
        )
    if not folder and class_names == "top":
        findings.notes += _like_splits(root, inside)
    return bool(example)


def _splits(root: Path, folders: list[str], findings: Findings) -> dict[str, str]:
    """Folder -> split, of those that hold class folders, where some have the name of a split."""
    kinds = {}
    for name in folders:
        try:
            kinds[name] = _kind(root / name, findings)
        except PermissionError:
            if split_of(name):
                raise
            findings.notes.append(f"{printable(root / name)}: cannot be read, and is not used")
    whole = [name for name, kind in kinds.items() if kind == "classes"]
    known = {split_of(name) for name in whole} - {None}
    _check_spellings(printable(root), whole)
    named = sorted((name for name in folders if split_of(name)), key=lambda name: split_of(name) != "train")
    strays = [name for name, kind in kinds.items() if kind == "photos" and not split_of(name)]
    # Beside two splits or more a folder of photos is no class, and no split; beside one, a folder of other classes.
    if len(known) == 1:
        tops = {
            name: {composed(label).casefold() for label in _look_into(root / name, Findings())[0]} for name in whole
        }
        classes = {label for name in whole if split_of(name) for label in tops[name]}
        strays += [name for name in whole if not split_of(name) and classes.isdisjoint(tops[name])]
    if strays and len(known) < 2:
        raise UserError(
            f"{printable(root)}: {listed(named)} by name a split, beside folders of photos, {listed(strays)}: if these "
            "are classes, move them into train/ and val/, or rename the former if it is a class; if not, move them away"
        )
    for name in named:
        if name not in whole and split_of(name) in ({"train", "val"} if known else {"train", "val", "test"}) - known:
            raise UserError(
                f"{printable(root / name)}: no class folders with photos in it; add {printable(name)}/CLASS/*, or "
                "remove the folder"
            )
        if name not in whole and kinds[name] == "photos":
            strays.append(name)
    if strays:
        findings.notes.append(f"{printable(root)}: not used, as it has photos but no class folders: {listed(strays)}")
    return {name: split_of(name) or name for name in whole}


def _check_flat(root: Path, folders: list[str]) -> None:
    """Raises UserError where the folders are no classes by their names, or there are none."""
    if not folders:
        raise _no_classes(root)
    likes = {name: like for name in folders if (like := _like(name))}
    if len(set(likes.values())) > 1 and 2 * len(likes) >= len(folders):  # not a `bullet train` among many
        raise UserError(
            f"{printable(root)}: {listed(list(likes))} remind of splits: call them train, val and test if they are; if "
            "they are classes, give a CSV file path,label[,split]"
        )


def _check_class(root: Path, name: str, found: list[tuple[str, list[str]]], *, is_alone: bool) -> None:
    """Raises UserError where splits lie in what should be a class of a folder without splits."""
    inside: dict[str, dict[str, bool]] = {}  # folder -> split -> whether it has folders in it
    direct = 0
    for below, _ in found:
        parts = below[len(os.path.join(root, "")) :].split(os.sep)
        at = next((at for at in range(1, len(parts)) if split_of(parts[at])), None)
        if at:
            splits, split = inside.setdefault(os.sep.join(parts[:at]), {}), split_of(parts[at]) or ""
            splits[split] = splits.get(split, False) or at + 1 < len(parts)
            direct += at == 1 and len(parts) == 2
    for folder, splits in inside.items():
        if splits.get("train") and (is_alone or len(splits) > 1):
            raise UserError(
                f"{printable(root)}: has no train/ itself, but {printable(folder)} in it has: --data "
                f"{printable(root / folder)}"
            )
    if found and direct == len(found):
        raise UserError(
            f"{printable(root / name)}: a class with the splits in it, {listed(sorted(inside[name]))}: turn them round "
            f"(train/{printable(name)}), or give a CSV file path,label,split"
        )
    if is_alone and len(found) > 1:
        raise UserError(
            f"{printable(root)}: one class only, {printable(name)}, with {len(found)} folders of photos in it: --data "
            f"{printable(os.path.commonpath([below for below, _ in found]))} if those are the classes"
        )


def _like_splits(root: Path, inside: dict[str, set[str]]) -> list[str]:
    """A line where all class folders hold the same folders, as splits do. UserError where one is named like a split."""
    first, *others = inside.values()
    if len(first) < 2 or not others or any(other != first for other in others):
        return []
    told = f"{listed(list(inside))} hold the same folders, {listed(sorted(first))}, as splits do"
    if any(map(_like, inside)):
        raise UserError(
            f"{printable(root)}: {told}: call them train, val and test if they are, or add --class_names path"
        )
    return [f"{told}: call them train, val and test if they are"]


def _no_classes(folder: Path) -> UserError:
    above = next((above for above in folder.parents if split_of(above.name)), None)
    advice = f"--data {printable(above.parent)} takes the whole" if above else WANTED
    return UserError(f"{printable(folder)}: no class folders in it; {advice}")


def _no_photos(folder: Path) -> UserError:
    found = Findings()
    list(_walk(str(folder), found))
    holds = f"; it holds {_counted(found.endings)}" if found.endings else ""
    advice = next((UNREAD_ENDINGS[ending] for ending in found.endings if UNREAD_ENDINGS.get(ending)), "")
    return UserError(
        f"{printable(folder)}: a class without photos ({', '.join(ENDINGS)}){holds}; {advice or 'add some'}, or remove "
        "the folder"
    )


def _splits_beside(root: Path) -> list[str]:
    try:
        folders, _ = _look_into(root.parent, Findings(), is_root=True)
    except (OSError, UserError):
        return []
    return [name for name in folders if split_of(name) not in (None, split_of(root.name))]


def photos_below(folder: str, findings: Findings, *, unread: bool = False) -> list[str]:
    """The paths that torchvision's `make_dataset` finds in a class folder, in its order, but for what is passed over.

    That passes over a subfolder which it may not read, and follows links round in circles: here both are errors.
    unread: pictures of formats that are not read here, too.
    """
    endings = {*ENDINGS, *UNREAD_ENDINGS} if unread else ENDINGS
    return [os.path.join(below, name) for below, names in sorted(_walk(folder, findings, endings)) for name in names]


def _walk(
    folder: str, findings: Findings, endings: Container[str] = frozenset(ENDINGS)
) -> Iterator[tuple[str, list[str]]]:
    """The folders with photos, from `folder` on, in any order, each with the photos' names, sorted."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    real_paths = dict[str, tuple[str, ...]]()  # of each folder: its own real path, behind those above it
    for below, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real, above = os.path.realpath(below), real_paths.get(os.path.dirname(below), ())
        if real in above:
            raise UserError(f"{printable(below)}: a link to a folder that holds it; remove the link")
        real_paths[below] = (*above, real)
        photos = sorted([name for name in names if name[-4:] in endings or _is_photo(name, endings)])
        if photos and photos[0][0] <= ".":  # hidden ones, and what sorts before them
            photos = [name for name in photos if name[0] != "."]
        if len(photos) < len(names) and _is_of_a_tool(others := set(names).difference(photos)):
            findings.tools.append(below)
            folders.clear()
            continue
        if _are_own_pictures(os.path.basename(below), photos):
            findings.tools.append(below)
            continue
        if folders:
            folders[:] = [name for name in folders if not _is_passed_over(below, name, findings)]
        if len(photos) < len(names):
            _refuse_dead_links(below, others)
            _count_others(others, findings)
        if photos:
            yield below, photos


def _look_into(folder: Path, findings: Findings, *, is_root: bool = False) -> tuple[list[str], int]:
    """The folders in a folder, sorted, without those that are passed over; how many photos lie beside them.

    Nothing where the folder itself is a run's or a tool's, unless it is what was given as data.
    """
    with os.scandir(folder) as entries:
        is_folder = {entry.name: entry.is_dir() for entry in entries}
    files = {name for name, is_one in is_folder.items() if not is_one}
    loose = {name for name in files if _is_photo(name, ENDINGS) and name[0] != "."}
    if not is_root and (_is_of_a_tool(files) or _are_own_pictures(folder.name, loose)):
        findings.tools.append(str(folder))
        return [], 0
    _refuse_dead_links(str(folder), files - loose)
    found = [name for name, is_one in is_folder.items() if is_one]
    folders = [name for name in found if not _is_passed_over(str(folder), name, findings)]
    return sorted(folders), len(loose)


def _is_photo(name: str, endings: Container[str]) -> bool:
    return name[name.rfind(".") :].lower() in endings


def _refuse_dead_links(folder: str, names: set[str]) -> None:
    """Of what is no photo in a folder: a link may be to a split, a class or a part of one, on a disk that is not there.

    A dead link that is called as a photo is a faulty photo, which the scan will name.
    """
    if not names:
        return
    with os.scandir(folder) as entries:  # which knows links without a look at each of perhaps a million files
        links = [entry.path for entry in entries if entry.is_symlink() and entry.name in names and entry.name[0] != "."]
    for link in sorted(links):
        if not os.path.exists(link):
            raise UserError(f"{printable(link)}: a link that leads nowhere; mend it, or remove it")


def _is_passed_over(folder: str, name: str, findings: Findings) -> bool:
    hidden, tool = name[0] == "." or name.lower() in _SYSTEM, name.lower() in _TOOLS
    findings.hidden += hidden
    findings.tools += [os.path.join(folder, name)] if tool else []
    return hidden or tool


def _is_of_a_tool(files: set[str]) -> bool:
    return any(marks <= files for marks in _MARKS) or any(name.startswith(_EVENTS) for name in files)


def _are_own_pictures(folder: str, photos: Collection[str]) -> bool:
    return folder == "figures" and len(photos) > 0 and all(map(_OWN_PICTURES.fullmatch, photos))


def _count_others(files: set[str], findings: Findings) -> None:
    for name in files:
        if name[0] == "." or name.lower() in _SYSTEM:
            findings.hidden += 1
        else:
            ending = os.path.splitext(name)[1].lower() or "no ending"
            findings.endings[ending] = findings.endings.get(ending, 0) + 1


def _counted(endings: dict[str, int]) -> str:
    commonest = sorted(endings, key=lambda ending: (-endings[ending], ending))[:8]
    return ", ".join(f"{printable(ending)} {endings[ending]}" for ending in commonest)


def _kind(folder: Path, findings: Findings) -> str:
    """What lies in a folder: "classes", folders with photos at some depth; "photos" alone; or "", neither."""
    found = Findings()
    folders, loose = _look_into(folder, found)
    if any(True for name in folders for _ in _walk(str(folder / name), found)):
        return "classes"  # which are looked through later
    findings.tools += found.tools
    return "photos" if loose else ""


def folder_of_csv(file: Path) -> Path:
    """The folder that the paths of a CSV file are below: its own, or what the column `folder` of a review says, in its
    first row. UserError where that is not there, or the header is none. What else is wrong `list_csv` says."""
    with open(file, newline="", encoding=_encoding(file)) as text, suppress(UnicodeError, csv.Error):
        line = text.readline()
        first = 1 + line.lower().startswith("sep=")
        delimiter, columns = _read_header(file, first, text.readline() if first == 2 else line)
        if {*columns} >= _OF_A_REVIEW:
            row = next(csv.DictReader(text, columns, delimiter=delimiter, skipinitialspace=True), {})
            given = path_on_disk(os.path.expanduser((row.get("folder") or "").strip()))
            folder = Path(os.path.normpath(file.parent / given))
            if not os.path.isdir(folder):
                raise UserError(
                    f"{printable(file)}: no folder {printable(folder)}, where its photos were: write the one where "
                    "they are into its column folder, in all rows"
                )
            return folder
    return file.parent


def list_csv(file: Path, findings: Findings) -> Iterator[Photo]:
    """The photos of a CSV file, one a row, with paths below `folder_of_csv`. UserError names the line.

    Of a review (`pipelines.review`), what a person has written into its column `action` is done: "keep", or nothing,
    "drop", or "relabel" to what stands in the column `new_label`.
    """
    below_folder = os.path.join(folder_of_csv(file), "")
    real_folder = os.path.join(os.path.realpath(below_folder), "")
    seen: set[bytes] = set()
    meant: dict[str, str] = {}  # split -> as it is spelled
    labels, new_labels = set[str](), dict[str, str]()  # the latter with the line
    left = set[str]()  # splits that a review drops not all of
    done: Counter[str] = Counter()
    mended = 0
    where, reader = f"{printable(file)}, line 1", None
    try:
        with open(file, newline="", encoding=_encoding(file)) as text:
            line = text.readline()
            first = 1 + line.lower().startswith("sep=")  # Excel's own line
            delimiter, columns = _read_header(file, first, text.readline() if first == 2 else line)
            # strict: a quote that is never closed would make one value of all that follows.
            lines = (_BLANKS_BEHIND_QUOTE.sub('"', line) for line in text)
            reader = csv.DictReader(lines, columns, delimiter=delimiter, skipinitialspace=True, strict=True)
            is_review, folder = {*columns} >= _OF_A_REVIEW, None
            for row in reader:
                where = f"{printable(file)}, line {reader.line_num + first}"
                if None in row:
                    raise UserError(
                        f"{where}: more values than columns; put a value with {_DELIMITERS[delimiter]} between quotes"
                    )
                for column in ("path", "label", "split"):
                    value = row.get(column) or ""
                    if "\0" in value:
                        raise csv.Error("line contains NUL")  # as the reader of Python 3.10 says by itself
                    if column in columns and not value.strip():
                        raise UserError(f"{where}: the {column} is empty; fill it in, or remove the line")
                written = path_on_disk(row["path"])
                given = _mended(below_folder, written)
                mended += given != written
                if _ELSEWHERE.match(given) and not os.path.lexists(os.path.join(below_folder, given)):
                    raise UserError(
                        f"{where}: {printable(given)} is no path here: write it as from the CSV file's folder"
                    )
                full = os.path.normpath(os.path.join(below_folder, given))
                if not full.startswith(below_folder) and full.startswith(real_folder):  # reached by a link
                    full = os.path.join(below_folder, full[len(real_folder) :])
                path = os.fsencode(full[len(below_folder) :])
                if not full.startswith(below_folder):
                    whose = printable(below_folder) if is_review else "the folder of the CSV file"
                    raise UserError(f"{where}: {printable(row['path'])} is not in {whose}; move it there")
                if path in seen:
                    told = f"{printable(row['path'])} stands in an earlier line too; keep one of them"
                    raise UserError(f"{where}: {told}")
                seen.add(path)
                spelled = row.get("split", "train").strip()
                split = split_of(spelled) or spelled
                if meant.setdefault(split, spelled) != spelled:
                    _check_spellings(where, (meant[split], spelled))
                label = row["label"].strip()
                if is_review:
                    if folder is not None and row.get("folder") != folder:
                        raise UserError(f"{where}: another folder than in the rows before; one holds all photos")
                    folder = row.get("folder") or ""
                    labels.add(composed(label))
                    action, label = _reviewed(row, label, where)
                    done[action] += 1
                    if action == "drop":
                        continue
                    if action == "relabel":
                        new_labels.setdefault(label, where)
                    left.add(split)
                yield split, label, path
    except UnicodeError as error:
        raise UserError(f"{printable(file)}: not a CSV file in UTF-8 ({printable(error)}); {WANTED}") from None
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(f"{where} or below: a quote is opened and never closed; close it, or remove it") from None
        where = f"{printable(file)}, line {reader.line_num + first if reader else 1}"
        raise UserError(f"{where}: not a CSV file in UTF-8 ({printable(error)}); {WANTED}") from None
    _check_spellings(printable(file), list(meant.values()))
    if unknown := [label for label in new_labels if composed(label) not in labels]:
        raise UserError(
            f"{new_labels[unknown[0]]}: new_label {printable(unknown[0])} is the label of no photo; correct it, or "
            "write it into the column label for a class of its own"
        )
    if done and (gone := [meant[split] for split in meant if split not in left]):
        raise UserError(
            f"{printable(file)}: all photos of split {printable(gone[0])!r} are dropped: keep some, or "
            "delete these rows for data without it"
        )
    if done["drop"] or done["relabel"]:
        left_out = counted(done["drop"], "photo is left out", "photos are left out")
        findings.notes.append(f"review: {left_out}, {done['relabel']} of another label than before")
    if mended:
        findings.notes.append(
            f"{counted(mended, 'path was', 'paths were')} put right, with / for \\ or without blanks around them"
        )


def _reviewed(row: dict[str, str], label: str, where: str) -> tuple[str, str]:
    """What is to be done with a photo, and the label that it has then."""
    action, new_label = ((row.get(column) or "").strip() for column in ("action", "new_label"))
    action = action.lower() or "keep"
    if action not in ACTIONS:
        raise UserError(f"{where}: the action {printable(action)!r} is none: write {', '.join(ACTIONS)}, or nothing")
    if action == "relabel" and not new_label:
        raise UserError(f"{where}: relabel, and no new_label: fill it in, or keep or drop the photo")
    return action, new_label if action == "relabel" else label


def _encoding(file: Path) -> str:
    with open(file, "rb") as content:
        start = content.read(4)
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _read_header(file: Path, number: int, line: str) -> tuple[str, list[str]]:
    """The delimiter and the columns' names, in lower case."""
    if "\0" in line:
        raise csv.Error("line contains NUL, as UTF-16 without its mark does")
    rows = {each: next(csv.reader([line], delimiter=each, skipinitialspace=True), []) for each in _DELIMITERS}
    names = {each: [name.strip().lower() for name in row] for each, row in rows.items()}
    delimiter = max(names, key=lambda each: (len({"path", "label"}.intersection(names[each])), len(names[each])))
    columns, where = names[delimiter], f"{printable(file)}, line {number}"
    if missing := {"path", "label"}.difference(columns):
        found = f"it has {listed(rows[delimiter])}" if any(columns) else "it is empty"
        raise UserError(f"{where}: no column {listed(sorted(missing))}; {found}; {WANTED}")
    for column in ("path", "label", "split"):
        if columns.count(column) > 1:
            raise UserError(f"{where}: the column {column} stands there {columns.count(column)} times; keep one")
    return delimiter, columns


def _mended(folder: str, path: str) -> str:
    """A path with / for \\, or without blanks around it, where there is a file then, and none as it is written."""
    candidates = dict.fromkeys((path, path.strip(), path.replace("\\", "/"), path.strip().replace("\\", "/")))
    if len(candidates) == 1:
        return path
    return next((each for each in candidates if os.path.lexists(os.path.join(folder, each))), path)
