"""How well `pipelines.review` finds what was planted: wrong labels, and copies.

    python benchmarks/review.py flowers34/ food10/ hymenoptera_data/      # folders with train/ and val/
    python benchmarks/review.py flowers34/ --seeds 10 --share 0.1

Labels: of each seed, `--share` of the training labels become another class's, all others as likely; the same of the
validation labels. Those of training photos are looked for by heads fitted to five folds, wrong labels among them, of
which each answers what it has not seen; those of validation photos by a head fitted to the training photos as they are,
as a run's predictions.csv has it. A set's own wrong labels count as mistakes of the review.

Copies: of 100 photos of each set, chosen by a hash, one for each way; the review is asked which of all photos and
copies look alike. Other pairs are counted, too: they may be copies that the set has had before. Nothing is written into
the folders.
"""

import argparse
import io
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipelines.cache import cache_folder
from pipelines.config import Config
from pipelines.data.appearance import alike, look_at
from pipelines.data.dataset import Dataset, Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import agree_on_engine
from pipelines.distributed.hardware import machine
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.model.feature_store import FeatureStore
from pipelines.model.label_errors import LabelErrors, label_errors
from pipelines.model.logistic_regression import choose_and_fit, class_weights_of
from pipelines.model.network import build_model
from pipelines.model.weights import read_weights
from pipelines.review import ALIKE
from pipelines.run.folder import versions
from pipelines.training.held_out import Features, features_of, held_out_probabilities, in_order_of_chance

import numpy as np
import torch
from PIL import Image, ImageOps

_COPIED = 100
WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 30": lambda photo: photo,
    "half the size": lambda photo: photo.resize((max(1, photo.width // 2), max(1, photo.height // 2))),
    "mirrored": ImageOps.mirror,
    "grey": lambda photo: photo.convert("L").convert("RGB"),
    "1.2 times as bright": lambda photo: photo.point(lambda level: min(255, int(1.2 * level))),
    "5 % cut off": lambda photo: ImageOps.crop(photo, round(0.0125 * sum(photo.size) / 2)),
}


def main() -> None:
    """Parses the command line, measures, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="folders with train/ and val/")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels that become wrong")
    options = parser.parse_args()
    labels, found = [], []
    for folder in options.data:
        dataset = load_dataset(scan_dataset(folder, cache_folder(), 0.2))
        features = {name: _features(dataset, name) for name in ("train", "val")}
        labels += label_rows(folder.name, dataset, features, options.seeds, options.share)
        found.append(copy_row(folder.name, dataset))
    print(shlex.join(["python", *sys.argv]), machine(), sep="\n")
    print(", ".join(f"{library} {number}" for library, number in versions().items()))
    print(*label_table(labels), "", *found_table(found), sep="\n")


def _features(dataset: Dataset, name: str) -> Features:
    state, config, split = start_processes(), Config(crop_mode="center"), dataset.splits[name]
    accelerator = start_accelerator(config, state, trackers=None)
    network = build_model(config, read_weights(config), split.classes).to(accelerator.device)
    engine, store = agree_on_engine("auto", state)[0], FeatureStore(cache_folder() / "features", 1 << 32)
    everyone = np.arange(len(split))
    with torch.no_grad():
        return features_of(network, split, everyone, engine, accelerator, config, store, views=2)


def with_wrong_labels(labels: np.ndarray, classes: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels, int [N], so many of them another class's, and which, bool [N]."""
    rng = np.random.default_rng(seed)
    flipped = rng.choice(len(labels), round(share * len(labels)), replace=False)
    changed = labels.astype(np.int64)
    changed[flipped] = (changed[flipped] + rng.integers(1, classes, len(flipped))) % classes
    is_wrong = np.zeros(len(labels), bool)
    is_wrong[flipped] = True
    return changed, is_wrong


def scores_of(found: LabelErrors, is_wrong: np.ndarray) -> dict[str, float]:
    """Precision among as many photos of the smallest margins as are wrong; of those in doubt how many there are, their
    precision, and the share of the wrong ones among them."""
    number, ranked = int(is_wrong.sum()), found.ranked()
    first = np.argsort(np.where(np.isnan(found.margins), np.inf, found.margins), kind="stable")[:number]
    return {
        "flipped": number,
        "at_number": float(is_wrong[first].mean()),
        "in_doubt": len(ranked),
        "precision": float(is_wrong[ranked].mean()) if len(ranked) else 0.0,
        "recall": float(is_wrong[ranked].sum() / number),
    }


def label_rows(
    name: str, dataset: Dataset, features: dict[str, Features], seeds: int, share: float
) -> list[dict[str, object]]:
    """Of train and val, the scores of each seed."""
    train, val = (dataset.splits[each] for each in ("train", "val"))
    own, classes = features["train"], len(train.classes)
    rows: dict[str, list[dict[str, float]]] = {"train": [], "val": []}
    as_they_are = choose_and_fit(own.rows, train.labels[own.positions], class_weights_of("none", train.labels, classes))
    assert as_they_are is not None
    answers = as_they_are.head.logits(features["val"].rows[0].double()).softmax(dim=1).numpy()
    for seed in range(seeds):
        labels, is_wrong = with_wrong_labels(train.labels[own.positions], classes, share, seed)
        probabilities = held_out_probabilities(own, labels, classes, "none")
        assert isinstance(probabilities, np.ndarray), probabilities
        rows["train"].append(scores_of(_errors(labels, probabilities), is_wrong))
        labels, is_wrong = with_wrong_labels(val.labels[features["val"].positions], classes, share, seed)
        rows["val"].append(scores_of(_errors(labels, answers), is_wrong))
        print(f"{name} seed {seed}: train {rows['train'][-1]}, val {rows['val'][-1]}", file=sys.stderr, flush=True)
    return [{"set": name, "split": split, "seeds": found} for split, found in rows.items()]


def _errors(labels: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    return label_errors(labels, probabilities, probabilities[np.arange(len(labels)), labels])


def copy_row(name: str, dataset: Dataset) -> dict[str, object]:
    """How many copies of each way are found, of how many, and false pairs."""
    prints, paths = [], list[str]()
    for split in dataset.splits.values():
        prints.append(look_at(split, f"{name} {split.name}").prints)
        paths += map(split.path, range(len(split)))
    chosen = in_order_of_chance(len(paths))[:_COPIED].tolist()
    with tempfile.TemporaryDirectory() as folder:
        for way, change in WAYS.items():
            for photo in chosen:
                with Image.open(paths[photo]) as opened:
                    copy = change(ImageOps.exif_transpose(opened).convert("RGB"))
                file = Path(folder, "train", f"{[*WAYS].index(way)}", f"{photo}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                written = io.BytesIO()
                copy.save(written, "JPEG", quality=30 if way.startswith("JPEG") else 85)
                file.write_bytes(written.getvalue())
        copied: Split = load_dataset(scan_dataset(Path(folder), Path(folder, "cache"), 0.2)).undivided().splits["all"]
        prints.append(look_at(copied, f"{name}, copies").prints)
        names = [Path(copied.path(index)) for index in range(len(copied))]
    of = [*range(len(paths)), *(int(file.stem) for file in names)]  # the photo that each is of
    pairs = alike(np.concatenate(prints), ALIKE)
    known, false = {way: set[int]() for way in WAYS}, set[tuple[int, int]]()
    for one, other in pairs.tolist():
        if of[one] != of[other]:
            false.add((of[one], of[other]))
        elif one < len(paths) <= other:
            known[[*WAYS][int(names[other - len(paths)].parent.name)]].add(of[one])
    return {
        "set": name,
        "photos": len(paths),
        "copied": len(chosen),
        "found": {way: len(each) for way, each in known.items()},
        "false": len({tuple(sorted(pair)) for pair in false}),
    }


def label_table(rows: list[dict[str, object]]) -> list[str]:
    """Mean and, of the first figure, spread over the seeds."""
    lines = ["", "| set | photos of | flipped | precision at that number | in doubt | of these flipped | found |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        seeds: list[dict[str, float]] = row["seeds"]  # type: ignore[assignment]
        means = {key: statistics.fmean(each[key] for each in seeds) for key in seeds[0]}
        spread = statistics.stdev(each["at_number"] for each in seeds) if len(seeds) > 1 else 0.0
        lines.append(
            f"| {row['set']} | {row['split']} | {means['flipped']:.0f} | {means['at_number']:.2f} ± {spread:.2f} | "
            f"{means['in_doubt']:.0f} | {means['precision']:.2f} | {means['recall']:.2f} |"
        )
    return lines


def found_table(rows: list[dict[str, object]]) -> list[str]:
    """Copies that are found, of how many; pairs that are none."""
    lines = [f"| set | photos | {' | '.join(WAYS)} | other pairs |", f"|---|---|{'---|' * (len(WAYS) + 1)}"]
    for row in rows:
        found: dict[str, int] = row["found"]  # type: ignore[assignment]
        each = " | ".join(f"{found[way]} of {row['copied']}" for way in WAYS)
        lines.append(f"| {row['set']} | {row['photos']} | {each} | {row['false']} |")
    return lines


if __name__ == "__main__":
    main()
