"""Which photos of a run's data spoil it: likely wrong labels, copies, outliers, too dark, too bright, blurred, tiny.

    python -m pipelines.review runs/NAME                                   # sheets and photos.csv in runs/NAME/review
    accelerate launch train.py --data runs/NAME/review/photos.csv          # once its column "action" is filled in

photos.csv has a row for each photo, those that something was found of first. A person writes into its column action:
keep, drop, or relabel, to what stands in new_label. Nothing is written into the folder of the photos. One process.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.cache import cache_folder
from pipelines.config import Config, ScriptParser, setting_of_text
from pipelines.data.appearance import Appearance, alike, copies, likeness, look_at, thumbnail
from pipelines.data.dataset import Dataset, Split
from pipelines.data.engines.factory import agree_on_engine
from pipelines.data.headers import FAULTS
from pipelines.data.open import open_dataset
from pipelines.data.preprocess import choose_crop_mode
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.errors import UserError, write_error
from pipelines.files import check_makeable, check_replaceable
from pipelines.model.feature_store import FeatureStore
from pipelines.model.label_errors import LabelErrors, far_out, label_errors, outlier_distances
from pipelines.model.network import build_model
from pipelines.model.weights import Weights, read_weights
from pipelines.run import figures
from pipelines.run.folder import refuse_links
from pipelines.run.predictions import (
    Source,
    own_photos,
    predictions_of,
    read_predictions,
    source_of,
    source_of_run,
    source_of_split,
)
from pipelines.run.review_file import AllPhotos, Found, check_names, check_unedited, order_of, write_review
from pipelines.run_files import read_run_config, read_trained_config
from pipelines.text import check_printed, counted, printable, spelled
from pipelines.training.held_out import (
    Features,
    features_of,
    held_out_probabilities,
    in_order_of_chance,
    most_photos,
)

import numpy as np
import torch
from accelerate import PartialState

ALIKE = 0.985  # of the same photo, coded again, resized or mirrored; others are below (docs/review.md)
_DARK, _BRIGHT = 0.25, 0.75  # grey levels that 19 of 20 pixels are below, and above
_BLURRED = 30.0  # variance of the Laplacian
_SHOWN = 48  # photos of a sheet
_NAMED = 10  # photos in lines
_TILE = 224  # pixels
_TITLES = {
    "copy_across_splits": "copies in two splits: what is learned of one is asked of the other",
    "copy": "copies in one split",
    "wrong_label": "likely wrong labels",
    "outlier": "unlike all others",
    "unreadable": "cannot be read",
    "too_dark": "too dark",
    "too_bright": "too bright",
    "blurred": "blurred",
    "tiny": "tiny",
}


@dataclass(frozen=True)
class Review:
    """findings: by name, in the order of _TITLES, the worst first. notes: lines on what was looked at, and what not."""

    photos: AllPhotos
    findings: dict[str, list[Found]]
    notes: list[str]


def main(arguments: list[str]) -> None:
    """One review. Raises UserError where the run, its photos or its weights are not there."""
    options = _parse(arguments)
    run: Path = options.run
    config = read_trained_config(run) or read_run_config(run)
    own, data = source_of_run(run), own_photos(run) if options.data is None else options.data
    given = {"data": data, "weights": options.weights}
    named: Any = {key: setting_of_text(key, text) for key, text in given.items() if text is not None}
    config = replace(config, **named)
    if options.out is None:
        refuse_links(run, "review")
    folder: Path = options.out or run / "review"
    table = folder / "photos.csv"
    sheets = {name: folder / f"{name}.png" for name in _TITLES}
    check_unedited(table)
    for sheet in sheets.values():
        check_replaceable(sheet, figures.is_own_picture)
    check_makeable(folder, "--out")
    state = start_processes()
    if state.num_processes > 1:
        raise UserError("review: it is for one process: start it with python -m pipelines.review")
    dataset = open_dataset(state, config)
    root = dataset.root.resolve()
    # A run's own folder may lie there, as beside a CSV file: the training has written into it too.
    if options.out and (root == folder.resolve() or root in folder.resolve().parents):
        raise UserError(f"{printable(folder)}: is in the folder of the photos: give an --out elsewhere")
    if own and data is None and own.is_other_than(Source("", dataset.fingerprint)):
        raise UserError(f"{own.data} is not there, and {dataset.data} has other photos: give the run's own with --data")
    found = review(run, config, dataset, state, read_weights(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line = f"{printable(folder)}: cannot be made ({error.strerror}): give another --out"
        raise write_error(error, line) from None
    write_review(table, found.photos, found.findings, str(root))
    lines = {photo: number for number, photo in enumerate(order_of(found.findings), start=2)}
    print(*found.notes, "", sep="\n")
    for name, sheet in sheets.items():
        sheet.unlink(missing_ok=True)
        count = len(found.findings[name])
        drawn = name != "unreadable" and count
        drawn = drawn and figures.attempt(sheet.name, lambda: _save_sheet(sheet, name, found, lines))  # noqa: B023
        print(f"{counted(count, 'photo'):>12}  {_TITLES[name]}{f': {printable(sheet)}' if drawn else ''}")
    print(f"\nall photos: {printable(table)}: write keep, drop or relabel into its column action, and then")
    print(f"  accelerate launch train.py --data {printable(shlex.quote(str(table)))}", flush=True)
    check_printed()


def review(run: Path, config: Config, dataset: Dataset, state: PartialState, weights: Weights) -> Review:
    """What is found of all photos of `dataset`. config: that of `run`; weights: what it began with."""
    photos = AllPhotos([*dataset.splits.values()])
    check_names(photos)
    lines = [f"photos: {printable(dataset.data)}: " + ", ".join(f"{len(s)} {printable(s.name)}" for s in photos.splits)]
    trained = source_of_run(run)
    if trained and trained.is_other_than(Source("", dataset.fingerprint)):
        is_same_place = trained.data == str(dataset.data)
        told = "the photos have changed since the training" if is_same_place else "the run has trained on other photos"
        lines.append(f"{printable(dataset.data)}: {told}")
    looks = [look_at(split, f"looking at {printable(split.name)}") for split in photos.splits]
    findings: dict[str, list[Found]] = {name: [] for name in _TITLES}
    lines += _find_by_looks(photos, looks, config, findings)
    _find_copies(photos, looks, findings)
    by_network, notes = _by_network(run, config, dataset, photos, state, weights)
    findings |= by_network
    return Review(photos, findings, [*lines, *notes])


def _find_by_looks(
    photos: AllPhotos, looks: list[Appearance], config: Config, findings: dict[str, list[Found]]
) -> list[str]:
    """Lines on what cannot be read."""
    lines = list[str]()
    for number, (split, seen) in enumerate(zip(photos.splits, looks, strict=True)):
        first = photos.first(number)
        reasons = {index: FAULTS[split.faults[index]] for index in np.flatnonzero(split.faults).tolist()} | seen.errors
        findings["unreadable"] += [Found(first + index) for index in sorted(reasons)]
        lines += [f"{printable(photos.path(first + index))}: {printable(reasons[index])}" for index in sorted(reasons)]
        shorter = np.where(split.faults == 0, split.sizes.min(axis=1), np.inf)
        judged = {
            "too_dark": (seen.lightest < _DARK, seen.lightest, 1),
            "too_bright": (seen.darkest > _BRIGHT, seen.darkest, -1),
            "blurred": (seen.sharpness < _BLURRED, seen.sharpness, 1),
            "tiny": (shorter < config.image_size / 2, shorter, 1),
        }
        for name, (is_so, scores, sign) in judged.items():
            chosen = np.flatnonzero(is_so)
            ranked = chosen[np.argsort(sign * scores[chosen], kind="stable")]
            findings[name] += [Found(first + index, float(scores[index])) for index in ranked.tolist()]
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return [f"cannot be read: {line}" for line in lines[:_NAMED] + more]


def _find_copies(photos: AllPhotos, looks: list[Appearance], findings: dict[str, list[Found]]) -> None:
    """Of a group of copies one is none: that of a split which is only looked at, so that its scores stay comparable."""
    order = [split.name for split in photos.splits]
    preferred = sorted(order, key=lambda name: (name == "train", name == "val"))
    numbers = np.repeat([preferred.index(name) for name in order], [len(split) for split in photos.splits])
    prints = np.concatenate([seen.prints for seen in looks])
    for photo, original in copies(alike(prints, ALIKE), numbers.tolist()).items():
        name = "copy" if numbers[photo] == numbers[original] else "copy_across_splits"
        score = float(likeness(prints[photo : photo + 1], prints[original : original + 1])[0, 0])
        findings[name].append(Found(photo, min(1.0, score), other=original))


def _by_network(
    run: Path, config: Config, dataset: Dataset, photos: AllPhotos, state: PartialState, weights: Weights
) -> tuple[dict[str, list[Found]], list[str]]:
    """Likely wrong labels and outliers; and lines."""
    findings: dict[str, list[Found]] = {"wrong_label": [], "outlier": []}
    doubts, notes = dict[int, LabelErrors](), list[str]()
    for number, split in enumerate(photos.splits):
        if split.name != "train":
            doubts[number], told = _by_predictions(run, dataset, number, photos)
            notes += told
    if "train" not in dataset.splits or weights.state is None:
        why = (
            "the run began with random weights (--weights names others)"
            if weights.state is None
            else "there is no split train"
        )
        notes.append(f"wrong labels of training photos, outliers: not looked for: {why}")
    else:
        train = [split.name for split in photos.splits].index("train")
        features, line = _features(config, dataset, photos, weights, state)
        notes.append(line)
        split, own = photos.splits[train], features[train]
        labels, classes = split.labels[own.positions], len(split.classes)
        probabilities = held_out_probabilities(own, labels, classes, config.class_weights)
        if isinstance(probabilities, str):
            notes.append(f"wrong labels of training photos: not looked for: {probabilities}")
        else:
            all_of_them = np.full((len(split), classes), np.nan)
            all_of_them[own.positions] = probabilities
            rows = np.arange(len(split))
            doubts[train] = label_errors(split.labels, all_of_them, all_of_them[rows, split.labels])
        everyone = np.concatenate([photos.first(number) + each.positions for number, each in features.items()])
        rows = np.concatenate([each.rows[0].numpy() for each in features.values()])
        distances = outlier_distances(rows, in_order_of_chance(len(rows)))
        findings["outlier"] = [Found(int(everyone[at]), float(distances[at])) for at in far_out(distances)]
    for number, found in sorted(doubts.items()):
        split, first = photos.splits[number], photos.first(number)
        findings["wrong_label"] += [
            Found(first + at, float(-found.margins[at]), new_label=split.classes[found.suggested[at]])
            for at in found.ranked().tolist()
        ]
    findings["wrong_label"].sort(key=lambda each: -(each.score or 0))
    return findings, notes


def _by_predictions(run: Path, dataset: Dataset, number: int, photos: AllPhotos) -> tuple[LabelErrors, list[str]]:
    """By what the run's best weights answer to a split that they were not trained on; and lines."""
    split, first = photos.splits[number], photos.first(number)
    name = printable(split.name)
    file, notes = _answers_to(run, dataset, split)
    if file is None:
        nothing = LabelErrors(np.full(len(split), -1), np.full(len(split), np.nan))
        trained, data = source_of_run(run), str(dataset.data)
        flags = [*(["--data", data] if trained and trained.data != data else []), "--split", split.name]
        command = printable(shlex.join(["accelerate", "launch", "evaluate.py", str(run), *flags]))
        answers = printable(predictions_of(run, split.name).name)
        return nothing, [*notes, f"wrong labels of {name}: not looked for: `{command}` makes {answers}"]
    found = read_predictions(file)
    classes = {spelled(each): at for at, each in enumerate(split.classes)}
    places = {spelled(photos.path(first + index)): index for index in range(len(split))}
    probabilities, own = np.full((len(split), len(classes)), np.nan), np.full(len(split), np.nan)
    of_class = [classes.get(each, -1) for each in found.classes]
    for row, path in enumerate(found.paths):
        index = places.get(path, -1)
        if index >= 0 and of_class[found.labels[row]] == split.labels[index]:
            probabilities[index] = 0
            for answer, probability in zip(found.answers[row], found.probabilities[row], strict=True):
                if of_class[answer] >= 0:
                    probabilities[index, of_class[answer]] = probability
            own[index] = np.exp(-found.losses[row])
    known = int(np.isfinite(own).sum())
    told = f"wrong labels of {name}: by {printable(file)}, which knows {known} of {counted(len(split), 'photo')}"
    return label_errors(split.labels, probabilities, own), [*notes, told]


def _answers_to(run: Path, dataset: Dataset, split: Split) -> tuple[Path | None, list[str]]:
    """The file of the run's answers to a split; and a line on each that is of other photos."""
    wanted, notes = source_of_split(dataset, split), list[str]()
    for file in (*([run / "predictions.csv"] if split.name == "val" else []), predictions_of(run, split.name)):
        if not file.exists():
            continue
        source = source_of(file)
        if source and source.is_other_than(wanted):
            notes.append(f"not by {printable(file)}, which is of other photos, of {printable(source.data)}")
        elif source or not notes:  # one that says nothing of its photos is of the run's own
            return file, notes
    return None, notes


def _features(
    config: Config, dataset: Dataset, photos: AllPhotos, weights: Weights, state: PartialState
) -> tuple[dict[int, Features], str]:
    """By number of the split; and a line. Of too many photos some are looked at, chosen by a hash."""
    if config.crop_mode == "auto":
        train = dataset.splits["train"]
        config = replace(config, crop_mode=choose_crop_mode(train.sizes[train.faults == 0])[0])
    accelerator = start_accelerator(config, state, trackers=None)
    engine, _ = agree_on_engine(config.loader, state)
    network = build_model(config, weights, dataset.splits["train"].classes).to(accelerator.device)
    store = FeatureStore(cache_folder() / "features", int(config.cache_gb * 1e9)) if config.cache_gb else None
    views = 1 + (config.flip_probability > 0)
    most, total = most_photos(network.head.in_features, views), len(photos)
    features = {}
    for number, split in enumerate(photos.splits):
        kept = len(split) if total <= most else -(-most * len(split) // total)
        chosen = np.sort(in_order_of_chance(len(split))[:kept])
        with torch.no_grad():
            features[number] = features_of(network, split, chosen, engine, accelerator, config, store, views=views)
    looked_at = f", {most} of the {total} photos" if total > most else ""
    return features, (
        f"wrong labels of training photos, outliers: by a head fitted to features of {weights.source}{looked_at}, each "
        "photo by one that has not seen it; the run's own body has learned the labels"
    )


def _save_sheet(sheet: Path, name: str, found: Review, lines: dict[int, int]) -> None:
    images, captions = [], []
    for each in found.findings[name][:_SHOWN]:
        photos, label = found.photos, found.photos.label
        pair = [each.photo, *([each.other] if each.other >= 0 else [])]
        squares = [thumbnail(*photos.at(photo), _TILE) for photo in pair]
        told = f"line {lines[each.photo]}: {Path(photos.path(each.photo)).name}"
        below = f"{photos.at(each.photo)[0].name}: {label(each.photo)}"
        if each.other >= 0:
            below += f"\n= {Path(photos.path(each.other)).name}\n{photos.at(each.other)[0].name}: {label(each.other)}"
        elif each.new_label:
            below += f"\nrather {each.new_label} ({each.score:.2f})"
        else:
            below += f"\n{each.score:.3g}"
        images.append(np.concatenate(squares, axis=1))
        captions.append(f"{told}\n{below}")
    figures.save_captioned(sheet, images, captions)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("python -m pipelines.review", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--data", help="where the photos are (default: where the run found its own)")
    parser.add_argument("--weights", help="of the body whose features are looked at (default: that the run began with)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where photos.csv and sheets go (default: RUN/review)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
