"""Exact metrics and figures of a trained model on a labelled split.

    accelerate launch evaluate.py runs/NAME                              # the run's own data, split val
    accelerate launch evaluate.py runs/NAME --data photos/ --split test  # other photos, labels matched by class name
    accelerate launch evaluate.py weights.pth --data photos/             # a bare state_dict, classes as in the folder
    accelerate launch evaluate.py runs/NAME --explain                    # and where in a photo it finds its answers

A folder CLASS/* or a CSV without splits is scored as a whole; of the run's own what was set aside from training. Every
photo counts once, on any number of processes. `--json FILE` is for programs, the table for people; of `--json -`
stdout is for programs, and stderr for people.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config, ScriptParser, parse_config
from pipelines.data.dataset import Dataset, Split, check_dataset, map_labels, spelling_notes
from pipelines.data.decode import central_views
from pipelines.data.engines.factory import agree_on_engine
from pipelines.data.engines.pillow import network_input
from pipelines.data.loader import eval_loader
from pipelines.data.open import open_dataset
from pipelines.data.plan import eval_plan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.shrink import ShrunkCopies
from pipelines.data.shrink_pass import has_room, make_copies
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.sync import on_main_process
from pipelines.errors import UserError, write_error
from pipelines.files import (
    STDOUT,
    atomic_write,
    begins_with,
    check_apart,
    check_output,
    check_replaceable,
    write_output,
)
from pipelines.model.gradcam import GradCam
from pipelines.model.network import restore_model
from pipelines.model.weights import Weights, count_classes, read_run_weights, read_weights_file
from pipelines.run import figures
from pipelines.run.folder import refuse_links
from pipelines.run.heat import laid_over
from pipelines.run.predictions import (
    BEGINNING,
    BEGINNING_OF_NOTE,
    Source,
    name_in_files,
    note_beside,
    note_source,
    source_of,
    source_of_split,
    write_predictions,
)
from pipelines.run.resume import spelled
from pipelines.run_files import Description, read_description, read_run_config, to_json
from pipelines.text import check_printed, counted, listed, printable, stdout_for_programs
from pipelines.tracking.wandb import add_to_summary, check_tracked
from pipelines.training.calibration import at_temperature, calibration_panels, reliability
from pipelines.training.evaluation import Scores, answers_are_finite, confusion_matrix, predict, score

import numpy as np
import torch

_SHOWN_PREDICTIONS = 16
_SHOWN_CLASSES = 40  # rows of the table; --json has all
_DENSE_CLASSES = 250  # up to here --json has the whole confusion matrix


def main(arguments: list[str]) -> None:
    """One evaluation. Raises UserError or MachineError."""
    options = _parse(arguments)
    with stdout_for_programs(options.json == STDOUT) as stdout:
        _evaluate(options, stdout)
    check_printed()


def _evaluate(options: argparse.Namespace, stdout: TextIO) -> None:
    run = _run_of(options.model)
    description = read_description(run, "model") if run and (run / "model.json").exists() else None
    options.model = run or options.model
    config = _read_config(options, description)
    folder = options.figures or (options.model / "figures" if options.model.is_dir() else Path("figures"))
    if folder.parent == options.model:
        refuse_links(options.model, "figures")
    _make_folder(folder)
    if options.json and options.json != STDOUT:
        check_output(options.json, begins_with('{\n  "split": '), "--json")
    if options.tracker == "wandb":
        tracked = check_tracked(options.model, config)
    state = start_processes()
    dataset = open_dataset(state, config)
    dataset, split_name = _choose_split(dataset, options)
    on_main_process(state, lambda: check_dataset(dataset, skip_bad_files=config.skip_bad_files, splits=(split_name,)))
    split = dataset.splits[split_name]
    if config.shrink and not has_room([split], config):
        split = replace(split, copies=ShrunkCopies(config.shrink))  # made in memory: each photo is read once
    pictures = ("confusion_matrix", "predictions", "calibration", "explanations")
    named = name_in_files(split_name)
    table = folder / f"predictions_{named}.csv"
    matrix, grid, diagram, sheet = (folder / f"{name}_{named}.png" for name in pictures)
    outputs = (table, note_beside(table), matrix, grid, diagram, sheet)
    check_apart({"--json": options.json} | {path.name: path for path in outputs})
    check_replaceable(table, begins_with(BEGINNING))
    check_replaceable(note_beside(table), begins_with(BEGINNING_OF_NOTE))
    weights, notes = _read_weights(options, config.arch, dataset, split)
    classes = weights.classes or ()
    labels = map_labels(split, classes)
    names = [printable(name) for name in classes]  # what leaves here, to whatever reader
    accelerator = start_accelerator(config, state, trackers=None)

    engine, reason = agree_on_engine(config.loader, state)
    if accelerator.is_main_process:
        known = description["dataset_fingerprint"] if description else dataset.fingerprint
        is_drawn = dataset.val_fraction is not None and split_name in ("train", "val")
        is_divided_otherwise = is_drawn and dataset.fingerprint != known
        aside = ("here" if is_divided_otherwise else "from training") if is_drawn else None
        scored = _what_is_scored(dataset, split, aside)
        print(f"{printable(weights.source)} on {printable(dataset.root)}, {scored}")
        for note in notes + spelling_notes(split, classes):
            print(note)
        if is_divided_otherwise:
            print("the run has trained on other photos, or on others of these: some of them may be among its own")
        if config.test_flips:
            print("test_flips: an answer is the mean of a photo's logits and its mirror image's")
        if description and description["temperature"] != 1 and description["test_flips"] != config.test_flips:
            own = spelled(description["test_flips"])
            print(f"temperature: fitted to answers with the run's own test_flips {own}, and not to these")
        processes = counted(accelerator.num_processes, "process")
        print(f"{processes} on {accelerator.device.type}; loader: {engine} ({reason})")
    temperature = description["temperature"] if description else 1.0
    mean, std = (description["mean"], description["std"]) if description else (IMAGENET_MEAN, IMAGENET_STD)
    make_copies([split], config, state)
    loader = eval_loader(config, split, labels, state, engine, mean=mean, std=std)
    try:
        answering: Any = {"test_flips": config.test_flips, "temperature": temperature}
        model = restore_model(config.arch, weights, **answering).to(accelerator.device)
        cam = GradCam(model.network, config.evaluation_size, test_flips=config.test_flips) if options.explain else None
        records = predict(model, loader, accelerator)
    finally:
        loader.close()
    if not answers_are_finite(records):
        raise UserError(f"{options.model}: the network's answers are not finite: its training has diverged")
    if not accelerator.is_main_process:
        return

    scores = score(records, len(classes))
    after, before = reliability(records), reliability(at_temperature(records, 1 / temperature))
    if options.json:
        facts = {"split": printable(split_name), "world_size": accelerator.num_processes, "classes": names}
        facts |= {"test_flips": config.test_flips, "temperature": temperature}
        facts |= {"without_temperature": {"loss": before.loss, "ece": before.ece}}
        facts |= {"dataset_fingerprint": dataset.fingerprint} | _as_json(scores)
        write_output(options.json, to_json(facts, indent=2) + "\n", stdout)
    without = f"; without the run's temperature {temperature:g} {before.ece:.4f}, and a loss of {before.loss:.4f}"
    _print_scores(scores, names, without if temperature != 1 else "")
    if options.tracker == "wandb":
        found: dict[str, float | str] = {
            "loss": scores.loss,
            "top1": scores.top1,
            "balanced_top1": scores.balanced_top1,
            "ece": scores.ece,
        }
        found |= {"top5": scores.topk[5]} if 5 in scores.topk and len(classes) > 5 else {}
        found |= {"photos": scores.count, "split": printable(split_name)}
        add_to_summary(options.model, tracked, {f"test/{key}": value for key, value in found.items()})
    _save_answers(table, records, split, classes, source_of_split(dataset, split))
    if figures.attempt(matrix.name, lambda: figures.save_confusion_matrix(matrix, scores.confusion_pairs, names)):
        print(f"confusion matrix: {printable(matrix)}")
    panels = calibration_panels(before.described(), after.described() if temperature != 1 else None, temperature)
    if figures.attempt(diagram.name, lambda: figures.save_calibration(diagram, panels)):
        print(f"calibration:      {printable(diagram)}")
    if figures.attempt(grid.name, lambda: _save_predictions(grid, records, split, names, config)):
        print(f"predictions:      {printable(grid)}", flush=True)
    if cam:

        def heat_of(image: np.ndarray, label: int) -> np.ndarray:
            square = network_input(image[None], mean, std, accelerator.device)
            return cam(square, torch.tensor([label], device=accelerator.device))[0]

        if figures.attempt(sheet.name, lambda: _save_explanations(sheet, records, split, names, config, heat_of)):
            print(f"where it looks:   {printable(sheet)}", flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("evaluate.py", __doc__)
    parser.add_argument("model", type=Path, metavar="RUN_OR_WEIGHTS", help="run folder, or a state_dict file")
    parser.add_argument("--data", help="folder or CSV; default: the run's own")
    parser.add_argument("--split", help="which split (default: val, or all of what has no splits)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores there; - is stdout")
    parser.add_argument(
        "--tracker", choices=("wandb", "none"), default="none", help="wandb: add test/* to the run's summary"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="a picture of where it looked in its worst and its best photos (Grad-CAM)",
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="where pictures go (default: the run's figures/)")
    parser.add_argument("--class-names", help="top or path (default: the run's, or top)")
    parser.add_argument("--arch", help="of a bare state_dict (default: resnet18)")
    parser.add_argument(
        "--class-order", choices=("text", "numeric"), help="of a bare state_dict (default: numeric, if all are numbers)"
    )
    parser.add_argument("--image-size", help="square that the network sees (default: the run's, or 224)")
    parser.add_argument("--resize", help="shorter side before the central crop (default: the run's, or 256)")
    parser.add_argument("--shrink", help="shorter side of the copies of large photos (default: the run's, or null)")
    parser.add_argument("--crop-mode", choices=("center", "squash"), help="default: the run's, or center")
    parser.add_argument("--transparency", help="white, black or ignored (default: the run's, or white)")
    parser.add_test_flips()
    parser.add_argument("--loader", default="auto", help="auto or an engine: dali, nvimgcodec, pillow (default: auto)")
    parser.add_argument("--eval-batch-per-device", help="photos of a batch on one device (default: 64)")
    parser.add_argument("--skip-bad-files", action="store_const", const=True, help="leave out unreadable photos")
    return parser.parse_args(arguments)


def _run_of(model: Path) -> Path | None:
    """The run folder that is meant, by itself or by its best.pt; None for a bare state_dict."""
    if not os.path.exists(model):
        raise UserError(f"{model}: no such run folder or weights file (trained runs stand in runs/)")
    if model.is_dir():
        return model
    return model.parent if model.name == "best.pt" and (model.parent / "model.json").exists() else None


def _read_config(options: argparse.Namespace, description: Description | None) -> Config:
    """The run's own settings, or the defaults for a bare state_dict, under the flags that were given.

    What is done to a photo stands in model.json, as for whoever else reads the weights; image_size is what they see.
    """
    of_the_model = ("data", "arch", "image_size", "resize", "shrink", "crop_mode", "transparency", "test_flips")
    keys = (*of_the_model, "class_names", "loader", "eval_batch_per_device", "skip_bad_files")
    given = {key: value for key in keys if (value := getattr(options, key)) is not None}
    if not description:
        given.setdefault("crop_mode", "center")  # bare weights do not say what they saw
    else:
        own: Mapping[str, Any] = description
        given = {key: own[key] for key in of_the_model if own[key] != ""} | given
    flags = [f"--{key}={'null' if value is None else value}" for key, value in given.items()]
    has_config = (options.model / "config.yaml").exists()
    if has_config:
        flags += [f"--{key}=null" for key in ("eval_size", "first_image_size", "grow_epochs")]
    config = read_run_config(options.model, *flags) if has_config else parse_config(flags)[0]
    if config.crop_mode == "squash" and options.resize is not None:
        raise UserError("--resize plays no part with crop_mode squash: give --crop-mode center with it")
    return config


def _make_folder(figures_folder: Path) -> None:
    """An evaluation may take an hour: what cannot be written in the end is said at the start."""
    try:
        figures_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        line = f"{figures_folder}: cannot be made ({error.strerror}): give --figures DIR"
        raise write_error(error, line) from None
    if not os.access(figures_folder, os.W_OK):
        raise UserError(f"{figures_folder}: not a folder that can be written to: give another --figures DIR")


def _choose_split(dataset: Dataset, options: argparse.Namespace) -> tuple[Dataset, str]:
    """The data and the split of it to score: all of data without splits, unless the run was trained on a part of it."""
    if dataset.val_fraction is None:
        return dataset, options.split or "val"
    run = read_description(options.model, "model") if (options.model / "model.json").exists() else None
    is_own = run and (dataset.fingerprint == run["dataset_fingerprint"] or str(dataset.data) == run["data"])
    if options.split not in ("all", None) or (is_own and not options.split):
        return dataset, options.split or "val"
    whole = dataset.undivided()
    if whole is dataset:
        there = listed([name for name in dataset.splits if name != "val"])
        raise UserError(f"{printable(dataset.root)}: no split 'val'; it has {there}: name one with --split")
    return whole, "all"


def _what_is_scored(dataset: Dataset, split: Split, aside: str | None) -> str:
    """The split, and how many photos of how many. aside: from what a drawn "val" is set aside, or where; None: the
    split was there.
    """
    count, total = len(split), sum(map(len, dataset.splits.values()))
    if aside is None:
        return f"split {printable(split.name)}: {count} of {counted(total, 'photo')}"
    part = f"set aside {aside}" if split.name == "val" else "not set aside"
    are = "is" if count == 1 else "are"
    return f"split {split.name}: the {count} of {counted(total, 'photo')} that {are} {part} (--split all: all of them)"


def _read_weights(options: argparse.Namespace, arch: str, dataset: Dataset, split: Split) -> tuple[Weights, list[str]]:
    """The weights with their classes, and a line on these: a run folder names them; a bare file has those of the data,
    in numeric order where all are numbers, else sorted as text.
    """
    model: Path = options.model
    if model.is_dir():
        return read_run_weights(model, arch, "model"), []
    weights = read_weights_file(model, arch, "model")
    classes = dataset.splits.get("train", split).classes
    if not (found := count_classes(weights, arch)):
        raise UserError(f"{model} has no head that tells classes apart: train.py --weights {model} gives it one")
    if found != len(classes):
        raise UserError(
            f"{model} tells {found} classes apart, and the data has {len(classes)}: "
            "give the run folder instead, whose model.json names its classes"
        )
    are_numbers = all(name.isdecimal() for name in classes)
    if options.class_order == "numeric" and not are_numbers:
        raise UserError("--class-order numeric: not all class names are numbers; leave it out")
    order = options.class_order or ("numeric" if are_numbers else "text")
    numeric = tuple(sorted(classes, key=lambda name: (int(name), name))) if are_numbers else classes
    chosen = numeric if order == "numeric" else classes
    note = f"classes: those of the data, in {order} order: {listed(chosen)}"
    if numeric != classes:  # 10 before 9, or after it
        note += " (ImageFolder's order, and a training's here, is text: --class-order chooses)"
    return replace(weights, classes=chosen), [*weights.notes, note]


def _save_answers(table: Path, records: np.ndarray, split: Split, classes: Sequence[str], source: Source) -> None:
    """The table, and beside it which photos it is of; says where it replaces one of others."""
    before = source_of(table) if table.exists() else None
    try:
        with atomic_write(table) as partial:
            write_predictions(records, split, classes, partial)
        note_source(table, source)
    except OSError as error:
        line = f"{table}: cannot be written ({error.strerror}): give --figures DIR"
        raise write_error(error, line) from None
    told = " (those that were there were to other photos)" if before and before.is_other_than(source) else ""
    print(f"all answers:      {printable(table)}{told}")


def _save_predictions(path: Path, records: np.ndarray, split: Split, names: list[str], config: Config) -> None:
    """The worst mistakes first, then the right answers that were closest to being wrong."""
    right = records["predicted"] == records["label"]
    shown = records[np.lexsort((-records["loss"], right))][:_SHOWN_PREDICTIONS]
    images = central_views(split, shown["index"], eval_plan(config, split.sizes))
    predicted, true = ([names[label] for label in shown[name]] for name in ("predicted", "label"))
    figures.save_predictions(path, np.stack(images), predicted, true, shown["confidence"].tolist())


def _save_explanations(
    path: Path,
    records: np.ndarray,
    split: Split,
    names: list[str],
    config: Config,
    heat_of: Callable[[np.ndarray, int], np.ndarray],
) -> None:
    """Heat maps of the answers to the photos of the highest loss, and to those of the lowest."""
    order = np.argsort(-records["loss"], kind="stable")
    worst = order[: min(_SHOWN_PREDICTIONS // 2, -(-len(order) // 2))]
    best = order[len(worst) :][::-1][: _SHOWN_PREDICTIONS // 2]
    ranks = [
        f"{kind} {rank}" for kind, found in (("worst", worst), ("best", best)) for rank in range(1, len(found) + 1)
    ]
    shown = records[[*worst, *best]]
    images = central_views(split, shown["index"], eval_plan(config, split.sizes))
    heated = [laid_over(image, heat_of(image, label)) for image, label in zip(images, shown["predicted"], strict=True)]
    predicted, true = ([names[label] for label in shown[name]] for name in ("predicted", "label"))
    remarks = [f"confidence {each:.2f} ({rank})" for each, rank in zip(shown["confidence"], ranks, strict=True)]
    figures.save_explanations(path, np.stack(images), np.stack(heated), predicted, true, remarks)


def _as_json(scores: Scores) -> dict[str, Any]:
    """All of them; the confusion matrix as a whole, or of many classes its entries that are not 0."""
    content = asdict(scores)
    pairs = content.pop("confusion_pairs")
    if len(scores.per_class) > _DENSE_CLASSES:
        return content | {"confusion_pairs": pairs.tolist()}
    return content | {"confusion_matrix": confusion_matrix(pairs, len(scores.per_class)).tolist()}


def _print_scores(scores: Scores, names: list[str], without_temperature: str) -> None:
    low, high = scores.interval
    commonest = max(range(len(names)), key=lambda label: scores.per_class[label]["count"] or 0)
    print(f"loss               {scores.loss:.4f}")
    print(
        f"top-1              {scores.top1:.4f}   {scores.correct} of {scores.count}, 95 % interval {low:.3f}-{high:.3f}"
    )
    print(f"balanced           {scores.balanced_top1:.4f}   mean recall of the classes")
    print(f"commonest class    {scores.majority_top1:.4f}   top-1 of always answering {names[commonest]}")
    for k, accuracy in sorted(scores.topk.items()):
        if k < len(names):
            print(f"top-{k:<15}{accuracy:.4f}")
    print(f"calibration error  {scores.ece:.4f}   {figures.CALIBRATION_BINS} bins{without_temperature}")
    rows = sorted(zip(names, scores.per_class, strict=True), key=lambda row: not row[1]["count"])  # n/a comes last
    width = max(len("class"), *(len(name) for name, _ in rows[:_SHOWN_CLASSES]))
    print(f"\n{'class':<{width}}  precision  recall      f1   photos")
    for name, row in rows[:_SHOWN_CLASSES]:
        cells = [f"{'n/a' if row[key] is None else f'{row[key]:.4f}':>6}" for key in ("precision", "recall", "f1")]
        print(f"{name:<{width}}     {'  '.join(cells)}  {row['count']:7}")
    if len(rows) > _SHOWN_CLASSES:
        print(f"... and {counted(len(rows) - _SHOWN_CLASSES, 'more class', 'more classes')}: --json FILE has them all")
    print()


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
