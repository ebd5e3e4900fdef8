"""Looks at a folder or a CSV file of photos before a training: the same scan, as a person wants it.

    python -m pipelines.inspect_data photos/                   # a report, and a contact sheet in the cache folder
    python -m pipelines.inspect_data photos/ --sheet look.png  # that sheet elsewhere
    python -m pipelines.inspect_data photos/ --json -          # for programs

Nothing is written into the folder of the photos. The exit code is 0 also where a training would be refused.
"""

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.cache import cache_folder
from pipelines.config import SCHEMA, ScriptParser
from pipelines.data.dataset import Dataset, Split, check_dataset, load_dataset, scan_dataset
from pipelines.data.decode import central_views
from pipelines.data.headers import FORMAT, FORMATS, TRANSPARENT
from pipelines.data.plan import EvalPlan
from pipelines.data.samples import locate
from pipelines.data.shrink_pass import shrink_advice
from pipelines.distributed.exits import run_script
from pipelines.errors import UserError
from pipelines.files import STDOUT, begins_with, check_apart, check_output, check_replaceable, write_output
from pipelines.run import figures
from pipelines.text import check_printed, counted, printable, stdout_for_programs

import numpy as np

_IMAGE_SIZE, _RESIZE = (SCHEMA[key]["default"] for key in ("image_size", "resize"))
_LARGE = 4 * _RESIZE  # pixels of the shorter side
_IMBALANCED = 3  # photos of the commonest class for one of the rarest
_ROWS, _COLUMNS, _TILE = 30, 8, 112  # of the contact sheet; pixels
_FEW, _MANY = 2_000, 500_000  # photos: for which the recipes are made


def main(arguments: list[str]) -> None:
    """One look. Raises UserError where the data is not made of labelled photos."""
    options = _parse(arguments)
    cache = cache_folder()
    data = locate(options.data, cache)
    index = scan_dataset(data, cache, SCHEMA["val_fraction"]["default"], options.class_names)
    dataset = load_dataset(index)
    sheet = options.sheet or index.with_suffix(".png")
    for path in (options.sheet, options.json):
        _check_outside(path, dataset.root)
    check_apart({"--sheet": sheet, "--json": options.json})
    if options.sheet:
        check_output(sheet, figures.is_own_picture, "--sheet")
    check_replaceable(sheet, figures.is_own_picture)
    if options.json and options.json != STDOUT:
        check_output(options.json, begins_with('{\n  "data": '), "--json")
    facts = survey(dataset, options.class_names)
    drawn = figures.attempt("the contact sheet", lambda: save_sheet(sheet, dataset))
    text = json.dumps(facts | {"contact_sheet": str(sheet) if drawn else None}, indent=2)
    with stdout_for_programs(options.json == STDOUT) as stdout:
        if options.json:
            write_output(options.json, text + "\n", stdout)
        print("\n".join(_lines(dataset, facts)))
        if drawn:
            print(f"contact sheet: {printable(sheet)}")
    check_printed()


def survey(dataset: Dataset, class_names: str = "top") -> dict[str, Any]:
    """What is to be known of the data, as JSON takes it; names in printable characters."""
    splits = dataset.splits.values()
    sound = [split.faults == 0 for split in splits]
    kinds = np.concatenate([split.kinds[good] for split, good in zip(splits, sound, strict=True)])
    shorter = np.concatenate([split.sizes[good].min(axis=1) for split, good in zip(splits, sound, strict=True)])
    train = dataset.splits.get("train") or next(iter(splits))
    present = {name: count for name, count in train.class_counts().items() if count}
    rarest, commonest = (choose(present, key=present.__getitem__, default="") for choose in (min, max))
    try:
        check_dataset(dataset, skip_bad_files=True)
        refused = None
    except UserError as error:
        refused = str(error)
    return {
        "data": printable(dataset.data),
        "fingerprint": dataset.fingerprint,
        "splits": {
            printable(split.name): {printable(name): count for name, count in split.class_counts().items()}
            for split in splits
        },
        "val_fraction": dataset.val_fraction,
        "formats": {FORMATS[kind]: count for kind, count in Counter((kinds & FORMAT).tolist()).most_common()},
        "transparent": int((kinds >= TRANSPARENT).sum()),
        "shorter_side": dict(zip(("min", "median", "max"), _quantiles(shorter), strict=True)),
        "smaller_than_the_model_sees": int((shorter < _IMAGE_SIZE).sum()),
        "much_larger_than_needed": int((shorter > _LARGE).sum()),
        "passed_over": {
            "hidden_or_system": dataset.findings.hidden,
            "of_runs_or_tools": len(dataset.findings.tools),
            "other_endings": {printable(ending): count for ending, count in dataset.findings.endings.items()},
        },
        "notes": dataset.findings.notes,
        "bad_files": [line for split in splits for line in split.faulty_files()],
        "duplicates": [
            {"splits": [printable(name) for name in names], "paths": [printable(path) for path in pair]}
            for names, pairs in dataset.duplicates.items()
            for pair in pairs
        ],
        "contradictions": [[printable(path) for path in pair] for pair in dataset.contradictions],
        "commonest": {"class": printable(commonest), "photos": present.get(commonest, 0)},
        "rarest": {"class": printable(rarest), "photos": present.get(rarest, 0)},
        "refused": refused,
        "command": None if refused else _command(dataset, train, present, class_names),
    }


def save_sheet(path: Path, dataset: Dataset) -> None:
    """A PNG of some photos of each class of "train", or else of the first split, as the network sees them."""
    split = dataset.splits.get("train") or next(iter(dataset.splits.values()))
    classes = [label for label, count in enumerate(split.class_counts().values()) if count]
    chosen = [classes[at] for at in np.linspace(0, len(classes) - 1, min(len(classes), _ROWS)).astype(int)]
    rows = []
    for label in chosen:
        of_class = np.flatnonzero((split.labels == label) & (split.faults == 0))
        some = of_class[np.linspace(0, len(of_class) - 1, min(len(of_class), _COLUMNS)).astype(int)]
        rows.append((split.classes[label], np.stack([_view(split, int(index)) for index in some])))
    if not rows:
        raise UserError("there is no photo that can be used")
    more = f", {len(chosen)} of its {len(classes)} classes" if len(chosen) < len(classes) else ""
    figures.save_contact_sheet(path, rows, title=f"{split.name} of {dataset.data.name}{more}")


def _view(split: Split, index: int) -> np.ndarray:
    try:
        plan = EvalPlan(split.sizes, image_size=_TILE, resize=_TILE * _RESIZE // _IMAGE_SIZE)
        return central_views(split, np.array([index]), plan)[0]
    except Exception:  # Pillow's parsers raise many kinds of error on broken data
        return np.full((_TILE, _TILE, 3), 200, np.uint8)


def _lines(dataset: Dataset, facts: dict[str, Any]) -> list[str]:
    """The report of a training, and what only matters before it."""
    sides, formats = facts["shorter_side"], facts["formats"]
    lines = dataset.report()
    lines += [f"formats: {', '.join(f'{name} {count}' for name, count in formats.items())}"] if formats else []
    if facts["transparent"]:
        photos = counted(facts["transparent"], "photo")
        lines.append(f"{photos} may have transparent pixels: composed on --transparency white")
    lines.append(f"shorter side: {sides['min']} to {sides['max']} pixels, median {sides['median']}")
    if small := facts["smaller_than_the_model_sees"]:
        are = counted(small, "photo is", "photos are")
        lines.append(f"{are} smaller than the {_IMAGE_SIZE} pixels that the model sees, and enlarged")
    if large := facts["much_larger_than_needed"]:
        lines.append(
            f"{counted(large, 'photo has', 'photos have')} a shorter side above {_LARGE} pixels, "
            f"{_LARGE // _RESIZE} times the {_RESIZE} that an evaluation makes of it"
        )
    train = dataset.splits.get("train") or next(iter(dataset.splits.values()))
    lines += shrink_advice(train, resize=_RESIZE, image_size=_IMAGE_SIZE)
    commonest, rarest = facts["commonest"], facts["rarest"]
    if commonest["photos"] >= _IMBALANCED * max(rarest["photos"], 1):
        photos = counted(commonest["photos"], "photo")
        lines.append(f"imbalance: {photos} of {commonest['class']}, {rarest['photos']} of {rarest['class']}")
    if facts["refused"]:
        return [*lines, f"a training would be refused: {facts['refused']}"]
    if (few := sum(facts["splits"]["train"].values())) < _FEW:
        lines.append(f"{counted(few, 'photo')} to train on: --config configs/feature_extract.yaml takes less time")
    return [*lines, f"fits: {facts['command']}"]


def _command(dataset: Dataset, train: Split, present: dict[str, int], class_names: str) -> str:
    words = ["accelerate", "launch", "train.py", "--data", str(dataset.data)]
    if len(train) >= _MANY:
        words += ["--config", "configs/imagenet.yaml"]
    if class_names != "top":
        words += ["--class_names", class_names]
    if any(dataset.splits[name].faults.any() for name in ("train", "val")):
        words.append("--skip_bad_files")
    if max(present.values()) >= _IMBALANCED * min(present.values()):
        words += ["--best_by", "balanced"]
    return printable(shlex.join(words))


def _quantiles(values: np.ndarray) -> list[int]:
    return [int(value) for value in np.quantile(values, (0, 0.5, 1))] if len(values) else [0, 0, 0]


def _check_outside(path: Path | None, root: Path) -> None:
    if path and path != STDOUT and Path(os.path.realpath(root)) in Path(os.path.realpath(path)).parents:
        raise UserError(f"{printable(path)}: is in the folder of the photos: give a place elsewhere")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("python -m pipelines.inspect_data", __doc__)
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder, CSV file or shapes; default: DALITUNE_DATA")
    parser.add_argument("--class-names", choices=SCHEMA["class_names"]["enum"], default="top", help="(default: top)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet (default: in the cache folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it for programs; - is stdout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
