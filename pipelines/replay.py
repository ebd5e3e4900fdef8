"""What a step of a run saw: its photos, crops and flips, by process, from the plan alone.

    python -m pipelines.replay runs/NAME --step 1234                  # a table, and a picture in the run's figures/
    python -m pipelines.replay runs/NAME --step 1234 --processes 4    # shared out as on so many; default: the run's own

Steps are counted as in metrics.jsonl and in messages: step 1 is the first update. Any step can be asked for, also one
that a run has not come to; nothing is trained, and the photos must lie where the run has found them, or with --data.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config
from pipelines.data.dataset import Split
from pipelines.data.decode import decoding_error, view_of
from pipelines.data.open import open_dataset
from pipelines.data.plan import Views, share, train_plan
from pipelines.data.preprocess import choose_crop_mode
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_processes
from pipelines.errors import UserError
from pipelines.files import check_replaceable
from pipelines.run import figures
from pipelines.run.folder import RunFolder, refuse_links
from pipelines.run_files import newest_progress, read_run_config, read_trained_config, what_auto_came_to
from pipelines.text import check_printed, counted, printable

import numpy as np

_DRAWN = 64  # photos


@dataclass(frozen=True)
class Step:
    """One update. epoch: 0 is the first. views: of its global batch, in order. processes: int [n], who has each."""

    epoch: int
    views: Views
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
    check_replaceable(picture, figures.is_own_picture)
    dataset = open_dataset(start_processes(), replace(config, data=options.data or config.data), run.arrange)
    if "train" not in dataset.splits:
        raise UserError(f"replay: {dataset.root} has no split 'train': give --data")
    split = dataset.splits["train"]
    step = step_of(config, split, options.step, processes)
    bad = set(newest[1]["bad"].get("train", ())) if newest else set()
    names = list[str]()
    photos = list[np.ndarray]()
    done = run.status().get("global_step", 0)
    print(
        f"step {options.step} of {printable(run.folder)}, in epoch {step.epoch + 1}, on {counted(processes, 'process')}"
    )
    if options.step > done:
        print(f"the run stands at step {done}: this is what that step would see")
    print("process  crop: left, top, width x height, of width x height    flip  class, photo")
    for line, name, pixels in _described(split, step, bad, config.image_size):
        print(line)
        if pixels is not None and len(photos) < _DRAWN:
            photos.append(pixels)
            names.append(name)
    if photos and figures.attempt(picture.name, lambda: figures.save_views(picture, np.stack(photos), names)):
        more = f", the first {len(photos)}" if len(photos) == _DRAWN < len(step.views) else ""
        print(f"\npicture: {printable(picture)}{more}", flush=True)
    check_printed()


def step_of(config: Config, split: Split, step: int, processes: int) -> Step:
    """The update after which `global_step` is `step`. config: with what auto has come to."""
    if config.crop_mode == "auto":
        config = replace(config, crop_mode=choose_crop_mode(split.sizes[split.faults == 0])[0])
    plan = train_plan(config, split.sizes, split.labels)
    epoch, within = divmod(step - 1, -(-plan.length // config.batch_size))
    first = within * config.batch_size
    size = min(config.batch_size, plan.length - first)
    parts = [range(*share(size, rank, processes)) for rank in range(processes)]
    owners = np.repeat(np.arange(processes), [len(part) for part in parts])
    return Step(epoch, plan.views(epoch, np.arange(first, first + size)), owners)


def _described(
    split: Split, step: Step, bad: set[int], image_size: int
) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """A line on each photo, its title, and the square that the network saw, uint8 [S, S, 3]; None where left out."""
    for at in range(len(step.views)):
        index, process = int(step.views.indices[at]), int(step.processes[at])
        (top, left, height, width), (whole_height, whole_width) = step.views.windows[at], split.sizes[index]
        name, flip = printable(split.classes[split.labels[index]]), "flip" if step.views.flips[at] else "-"
        photo = f"{name}, {printable(split.path(index))}"
        pixels, why = None, "cannot be read" if split.faults[index] or index in bad else ""
        try:
            if not why:
                pixels = np.asarray(view_of(split, step.views, at, image_size))
        except Exception as error:  # Pillow's, of many kinds
            why = decoding_error(error)
        crop = (
            f"{left}, {top}, {width} x {height}, of {whole_width} x {whole_height}" if not why else f"left out: {why}"
        )
        yield f"{process:7}  {crop:<52}  {flip:<4}  {photo}", f"{name}\nprocess {process}", pixels


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
