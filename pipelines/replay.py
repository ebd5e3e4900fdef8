"""What a step of a run saw: its photos, crops and flips, by process, from the plan alone.

    python -m pipelines.replay runs/NAME --step 1234                  # a table, and a picture in the run's figures/
    python -m pipelines.replay runs/NAME --step 1234 --processes 4    # shared out as on so many; default: the run's own

Steps are counted as in metrics.jsonl and in messages: step 1 is the first update. Any step can be asked for, also one
that a run has not come to; nothing is trained, and the photos must lie where the run has found them, or with --data.
"""

import argparse
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config
from pipelines.data.dataset import Split
from pipelines.data.loader import train_loader
from pipelines.data.mixing import MixedViews, mixed_views
from pipelines.data.open import open_dataset
from pipelines.data.plan import OPERATIONS, share, train_plan
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, choose_crop_mode
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_processes
from pipelines.errors import UserError
from pipelines.files import check_output, check_replaceable
from pipelines.run import figures
from pipelines.run.folder import RunFolder, refuse_links
from pipelines.run.predictions import own_photos
from pipelines.run_files import newest_progress, read_run_config, read_trained_config, what_auto_came_to
from pipelines.text import check_printed, counted, printable

import numpy as np
from accelerate import PartialState

_DRAWN = 64  # photos


@dataclass(frozen=True)
class Step:
    """One update, the one after `within` others of its epoch. epoch: 0 is the first. views: of its global batch of n
    photos, in order. processes: int [n], who has each."""

    epoch: int
    within: int
    views: MixedViews
    processes: np.ndarray


def main(arguments: list[str]) -> None:
    """One replay. Raises UserError where the run or its photos are not there, or the step cannot be."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.replay", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="which update, 1 is the first")
    parser.add_argument("--processes", type=int, metavar="N", help="shared out as on N (default: as the run was last)")
    parser.add_argument("--data", help="where the photos are (default: the run's own)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="the picture (default: in the run's figures/)")
    options = parser.parse_args(arguments)
    newest = newest_progress(options.run)
    processes = options.processes or (newest[1]["world_size"] if newest else 1)
    if options.step < 1 or processes < 1:
        raise UserError("replay: --step and --processes are 1 or more")
    run = RunFolder(options.run, writes=False)
    config = what_auto_came_to(run.folder, read_trained_config(run.folder) or read_run_config(run.folder))
    if "auto" in (config.views_per_photo, config.epochs):
        raise UserError(f"replay: {run.folder} has no checkpoint yet, which would tell what auto has come to")
    if not config.epochs:
        raise UserError(f"replay: {run.folder} has no steps: it is a fitted head (epochs 0)")
    picture = options.figure or run.figures / f"step_{options.step}.png"
    if options.figure is None:
        refuse_links(run.folder, "figures")
    else:
        check_output(picture, figures.is_own_picture, "--figure")
    check_replaceable(picture, figures.is_own_picture)
    state = start_processes()
    data = (own_photos(run.folder) or config.data) if options.data is None else options.data
    dataset = open_dataset(state, replace(config, data=data), run.arrange)
    if "train" not in dataset.splits:
        raise UserError(f"replay: {dataset.root} has no split 'train': give --data")
    split = dataset.splits["train"]
    if config.crop_mode == "auto":
        config = replace(config, crop_mode=choose_crop_mode(split.sizes[split.faults == 0])[0])
    step = step_of(config, split, options.step, processes)
    bad = set(newest[1]["bad"].get("train", ())) if newest else set()
    done = run.status().get("global_step", 0)
    print(
        f"step {options.step} of {printable(run.folder)}, in epoch {step.epoch + 1}, on {counted(processes, 'process')}"
    )
    if options.step > done:
        print(f"the run stands at step {done}: this is what that step would see")
    images, names, seen = images_of(config, split, state, step, bad)
    print("process  crop: left, top, width x height, of width x height    class, photo, what else is done to it")
    print(*(line_of(split, step, at, seen) for at in range(len(step.views))), sep="\n")
    processes_seen = step.processes[seen[: len(step.views)]]
    names = [f"{name}\nprocess {process}" for name, process in zip(names, processes_seen, strict=True)]

    def draw() -> None:
        figures.save_train_batch(picture, images, names, mean=IMAGENET_MEAN, std=IMAGENET_STD, most=_DRAWN)

    if figures.attempt(picture.name, draw):
        more = f", the first {_DRAWN}" if len(names) > _DRAWN else ""
        print(f"\npicture: {printable(picture)}{more}", flush=True)
    check_printed()


def step_of(config: Config, split: Split, step: int, processes: int) -> Step:
    """The update after which `global_step` is `step`. config: with what auto has come to."""
    plan = train_plan(config, split.sizes, split.labels)
    epoch, within = divmod(step - 1, -(-plan.length // config.batch_size))
    first = within * config.batch_size
    size = min(config.batch_size, plan.length - first)
    shares = [share(size, rank, processes) for rank in range(processes)]
    owners = np.repeat(np.arange(processes), [stop - start for start, stop in shares])
    return Step(epoch, within, mixed_views(plan, epoch, np.arange(first, first + size)), owners)


def images_of(
    config: Config, split: Split, state: PartialState, step: Step, bad: Collection[int]
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The first squares that the network saw, float32 [n, 3, S, S], normalised; what each of them all is; and which of
    the views it saw at all, bool: those that can be read, and are not among `bad`."""
    micro_batch = min(config.batch_size, config.eval_batch_per_device)
    config = replace(config, skip_bad_files=True)
    loader = train_loader(config, split, split.labels, state, "pillow", micro_batch)
    loader.bad |= set(bad)
    size = step.views.views.image_size
    images = np.empty((0, 3, size, size), np.float32)
    names = list[str]()
    try:
        for batch in next(loader.epoch(step.epoch, step.within)).batches:
            names += batch.names(split.classes)
            images = np.concatenate([images, batch.images.cpu().numpy()])[:_DRAWN]
    finally:
        loader.close()
    indices = step.views.views.indices
    return images, names, (split.faults[indices] == 0) & ~np.isin(indices, list(loader.bad))


def line_of(split: Split, step: Step, at: int, seen: np.ndarray) -> str:
    """What was done to the photo at a place of the step, and which process had it. seen: as `images_of` returns it."""
    views, mixing = step.views.views, step.views.mixing
    index = int(views.indices[at])
    (top, left, height, width), (whole_height, whole_width) = views.windows[at], split.sizes[index]
    crop = (
        f"{left}, {top}, {width} x {height}, of {whole_width} x {whole_height}" if seen[at] else "left out: unreadable"
    )
    done = ["flip"] if views.flips[at] else []
    if each := views.alterations:
        done += ["up and down"] if each.vertical_flips[at] else []
        done += ["transposed"] if each.transposed[at] else []
        done += [f"{OPERATIONS[each.operations[at]]} {each.magnitudes[at]:.3g}"] if each.operations[at] else []
        shear, turn, right, down = each.geometry[at].tolist()
        if each.geometry[at].any():
            done.append(f"turned by {turn:.1f} degrees, sheared by {shear:.1f}, moved by {right:+.2f}, {down:+.2f}")
        brightness, contrast, saturation, hue = each.colours[at].tolist()
        if each.colours[at].tolist() != [1, 1, 1, 0]:
            done.append(f"brightness x{brightness:.2f} contrast x{contrast:.2f} saturation x{saturation:.2f}")
            done[-1] += f" hue {hue:+.3f}"
        done += [f"blurred by {each.blurs[at]:.2f}"] if each.blurs[at] else []
        top, left, height, width = each.erased[at]
        done += [f"erased {left}, {top}, {width} x {height}"] if height else []
    if mixing and mixing.shares[at] < 1 and seen[partner := mixing.partners[at]]:
        done.append(f"{1 - mixing.shares[at]:.2f} of {printable(split.path(int(views.indices[partner])))} mixed in")
        top, left, height, width = mixing.boxes[at]
        done[-1] += f" at {left}, {top}, {width} x {height}" if height else ""
    name = printable(split.classes[split.labels[index]])
    return f"{step.processes[at]:7}  {crop:<52}  {', '.join([name, printable(split.path(index)), *done])}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
