"""Exact metrics and figures of a trained model on a labelled split.

    accelerate launch evaluate.py runs/NAME                              # the run's own data, split val
    accelerate launch evaluate.py runs/NAME --data photos/ --split test  # other photos, labels matched by class name
    accelerate launch evaluate.py best.pt --data photos/                 # a bare state_dict, classes as in the folder

Every photo counts once, on any number of processes. `--json FILE` is for programs, the table for people.
"""

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C while the libraries are loaded, which takes seconds; later `run_script` answers it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pipelines import figures
from pipelines.config import Config, ScriptParser, parse_config
from pipelines.dataset import Dataset, Split, check_dataset, map_labels
from pipelines.errors import UserError
from pipelines.evaluation import Scores, predict, score
from pipelines.files import begins_with, check_replaceable
from pipelines.loader import choose_engine, eval_loader
from pipelines.model import Weights, read_description, read_run_weights, read_state_dict, restore_model
from pipelines.processes import main_first, open_dataset, run_script, start_accelerator, start_processes
from pipelines.runs import replacing
from pipelines.torch_engine import central_views
from pipelines.wandb_tracker import add_to_summary, check_tracked

import numpy as np

_SHOWN_PREDICTIONS = 16
_SHOWN_CLASSES = 40  # rows of the table; --json has all


def main(arguments: list[str]) -> None:
    """One evaluation. Raises UserError or MachineError."""
    options = _parse(arguments)
    config = _read_config(options)
    folder = options.figures or (options.model / "figures" if options.model.is_dir() else Path("figures"))
    _check_writable(folder, options.json)
    if options.json:
        check_replaceable(options.json, begins_with('{\n  "split": '))
    if options.tracker == "wandb":
        names = check_tracked(options.model, config)
    state = start_processes()
    dataset = open_dataset(state, config)
    main_first(state, lambda: check_dataset(dataset, skip_bad_files=config.skip_bad_files, splits=(options.split,)))
    split = dataset.splits[options.split]
    weights = _read_weights(options.model, config.arch, dataset, split)
    classes = weights.classes or ()
    labels = map_labels(split, classes)
    accelerator = start_accelerator(config, state, trackers=None)

    engine, reason = choose_engine(config.loader, accelerator.device)
    if accelerator.is_main_process:
        print(f"{weights.source} on {dataset.root}, split {options.split}: {len(split)} photos")
        print(f"{accelerator.num_processes} process(es) on {accelerator.device.type}; loader: {engine} ({reason})")
    loader = eval_loader(config, split, labels, state, engine)
    try:
        model = restore_model(config.arch, weights).to(accelerator.device)
        records = predict(model, loader, accelerator)
    finally:
        loader.close()
    if not accelerator.is_main_process:
        return

    scores = score(records, classes)
    matrix, grid = folder / f"confusion_matrix_{options.split}.png", folder / f"predictions_{options.split}.png"
    figures.save_confusion_matrix(matrix, scores.confusion_matrix, classes)
    _save_predictions(grid, records, split, classes, config)
    if options.json:
        facts = {"split": options.split, "world_size": accelerator.num_processes, "classes": list(classes)}
        _write_json(options.json, facts | {"dataset_fingerprint": dataset.fingerprint} | asdict(scores))
    _print_scores(scores, classes)
    if options.tracker == "wandb":
        top5 = {"test/top5": scores.topk[5]} if 5 in scores.topk and len(classes) > 5 else {}
        found = {"test/loss": scores.loss, "test/top1": scores.top1, **top5, "test/ece": scores.ece}
        add_to_summary(options.model, names, found | {"test/photos": scores.count, "test/split": options.split})
    print(f"confusion matrix: {matrix}\npredictions:      {grid}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ScriptParser("evaluate.py", __doc__)
    parser.add_argument("model", type=Path, metavar="RUN_OR_WEIGHTS", help="run folder, or a state_dict file")
    parser.add_argument("--data", help="folder or CSV; default: the run's own")
    parser.add_argument("--split", default="val", help="which split (default: val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores there")
    parser.add_argument(
        "--tracker", choices=("wandb", "none"), default="none", help="wandb: add test/* to the run's summary"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="where pictures go (default: the run's figures/)")
    parser.add_argument("--class-names", help="top or path (default: the run's, or top)")
    parser.add_argument("--arch", help="of a bare state_dict (default: resnet18)")
    parser.add_argument("--image-size", help="square that the network sees (default: the run's, or 224)")
    parser.add_argument("--resize", help="shorter side before the central crop (default: the run's, or 256)")
    parser.add_argument("--loader", default="auto", help="auto, dali or torch (default: auto)")
    parser.add_argument("--eval-batch-per-device", help="photos of a batch on one device (default: 64)")
    parser.add_argument("--skip-bad-files", action="store_const", const=True, help="leave out unreadable photos")
    return parser.parse_args(arguments)


def _read_config(options: argparse.Namespace) -> Config:
    """The run's own settings, or the defaults for a bare state_dict, under the flags that were given."""
    if not options.model.exists():
        raise UserError(f"{options.model}: no such run folder or weights file (trained runs stand in runs/)")
    recipe, description = options.model / "config.yaml", options.model / "model.json"
    if options.data is None and description.exists():
        options.data = read_description(options.model, "model").get("data")
    keys = ("data", "class_names", "arch", "image_size", "resize", "loader", "eval_batch_per_device", "skip_bad_files")
    given = [f"--{key}={value}" for key in keys if (value := getattr(options, key)) is not None]
    config, _ = parse_config([f"--config={recipe}", *given] if recipe.exists() else given)
    return config


def _check_writable(figures_folder: Path, json_file: Path | None) -> None:
    """An evaluation may take an hour: what cannot be written in the end is said at the start."""
    try:
        figures_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{figures_folder}: cannot be made ({error.strerror}): give --figures DIR") from None
    for folder in (figures_folder, json_file.parent if json_file else figures_folder):
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: not a folder that can be written to: give another --figures DIR or --json FILE")


def _read_weights(model: Path, arch: str, dataset: Dataset, split: Split) -> Weights:
    """The weights with their classes: a run folder names them; a bare file has those of the data, in sorted order."""
    if model.is_dir():
        return read_run_weights(model, arch, "model")
    state = read_state_dict(model, arch, "model")
    classes = dataset.splits.get("train", split).classes
    if len(state["fc.bias"]) != len(classes):
        raise UserError(
            f"{model} tells {len(state['fc.bias'])} classes apart, and the data has {len(classes)}: "
            "give the run folder instead, whose model.json names its classes"
        )
    return Weights(state, str(model), classes)


def _save_predictions(path: Path, records: np.ndarray, split: Split, classes: tuple[str, ...], config: Config) -> None:
    """The worst mistakes first, then the right answers that were closest to being wrong."""
    right = records["predicted"] == records["label"]
    shown = records[np.lexsort((-records["loss"], right))][:_SHOWN_PREDICTIONS]
    images = central_views(split, shown["index"], image_size=config.image_size, resize=config.resize)
    predicted, true = ([classes[label] for label in shown[name]] for name in ("predicted", "label"))
    figures.save_predictions(path, np.stack(images), predicted, true, shown["confidence"].tolist())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in content.items()}
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def _print_scores(scores: Scores, classes: tuple[str, ...]) -> None:
    low, high = scores.interval
    print(f"loss               {scores.loss:.4f}")
    print(
        f"top-1              {scores.top1:.4f}   {scores.correct} of {scores.count}, 95 % interval {low:.3f}-{high:.3f}"
    )
    for k, accuracy in sorted(scores.topk.items()):
        if k < len(classes):
            print(f"top-{k:<15}{accuracy:.4f}")
    print(f"calibration error  {scores.ece:.4f}   15 bins")
    width = max(len("class"), *(len(name) for name in classes[:_SHOWN_CLASSES]))
    print(f"\n{'class':<{width}}  precision  recall      f1   photos")
    for name, row in list(zip(classes, scores.per_class, strict=True))[:_SHOWN_CLASSES]:
        print(f"{name:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row['count']:7}")
    if len(classes) > _SHOWN_CLASSES:
        print(f"... and {len(classes) - _SHOWN_CLASSES} more classes: --json FILE has them all")
    print()


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
