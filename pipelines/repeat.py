"""Repeats a training over folds of its photos and over seeds, and says what mean and spread come out.

    python -m pipelines.repeat --folds 5 --seeds 3 --run cv --data photos/ --epochs 20   # all else is train.py's
    python -m pipelines.repeat --folds 1 --seeds 5 --run cv                              # seeds alone
    python -m pipelines.repeat --run cv --launch "accelerate launch --multi_gpu --num_processes 8"

Each fold of the training photos is held out in turn, and validates what the others train; of data without splits all
photos are in folds, else validation and test photos have no part. Each run is one of train.py, runs/NAME-fold1-seed0
and so on. Ctrl-C saves and ends; the same command goes on: what is finished is not repeated, what was cut off goes on.
"""

import argparse
import io
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TextIO

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.cache import cache_folder
from pipelines.config import SCHEMA, Config, ScriptParser, not_named, parse_config
from pipelines.data.dataset import Dataset, Split, load_dataset, scan_dataset
from pipelines.data.samples import locate
from pipelines.distributed.exits import Terminated, run_script
from pipelines.errors import MachineError, Stopped, UserError, write_error
from pipelines.files import ROOT, STDOUT, atomic_write, begins_with, check_output, csv_rows, write_output
from pipelines.model.logistic_regression import folds_of
from pipelines.run.folder import RunFolder
from pipelines.run.significance import mean_interval
from pipelines.run_files import read_description, read_rows, to_json
from pipelines.text import check_printed, counted, printable, stdout_for_programs
from pipelines.training.evaluation import BEST_BY

import numpy as np

_GIVEN_HERE = {"overwrite": "give another --run name", "prepare": "train.py --prepare does it"}
_PHOTOS = "photos"  # a link to them, beside the CSV files: their paths are below the files' folder


@dataclass(frozen=True)
class Training:
    """One run of train.py. fold: from 1 on. data: its CSV file; None for the data as they are."""

    fold: int
    seed: int
    folder: Path
    data: Path | None


@dataclass(frozen=True)
class Result:
    """Of a finished run, on its validation photos: the accuracy that chose its best epoch there, that of the last one,
    NaN where the network had diverged by then, and how many photos there are. averaged: whether the best is of the
    averaged weights, as the last never is."""

    training: Training
    best: float
    last: float
    photos: int
    averaged: bool = False


def main(arguments: list[str]) -> None:
    """All runs, one after the other, and their table. Raises UserError, MachineError, and Stopped after Ctrl-C."""
    options, flags = _parse(arguments)
    with stdout_for_programs(options.json == STDOUT) as stdout:
        _repeat(options, flags, stdout)
    check_printed()


def _repeat(options: argparse.Namespace, flags: list[str], stdout: TextIO) -> None:
    config, _ = parse_config(flags)
    trainings = _trainings(options, config)
    if options.folds > 1:
        cache = cache_folder()  # no process group and no GPU is taken: the trainings want them
        index = scan_dataset(locate(config.data, cache), cache, config.val_fraction, config.class_names)
        _write_folds(load_dataset(index), options.folds, [each.data for each in trainings if each.data])
    own_flags = ("--seed", "--run", *(["--data"] if options.folds > 1 else []))
    shared = _without(flags, own_flags) + _group(config)
    launcher = shlex.split(options.launch) if options.launch else [sys.executable]
    for number, training in enumerate(trainings, start=1):
        own = [f"--seed={training.seed}", f"--run={training.folder.name}"]
        own += [f"--data={training.data}"] if training.data else []
        if _is_finished(training, [*shared, *own]):
            continue
        print(f"repeat: {number} of {len(trainings)}: {printable(training.folder)}", flush=True)
        _train([*launcher, str(ROOT / "train.py"), *shared, *own], training)
    results = [_result(training, BEST_BY[config.best_by]) for training in trainings]
    lines, summary = table(results, config.best_by)
    print(*lines, sep="\n")
    if options.json:
        content = {"repeated": config.run, **summary, "runs": [_as_json(each) for each in results]}
        write_output(options.json, to_json(content, indent=2) + "\n", stdout)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is for here, and the rest, which is train.py's."""
    parser = ScriptParser("python -m pipelines.repeat", __doc__)
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="1: the data's own split (default: 5)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of each fold, from --seed on (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; - is stdout")
    parser.add_argument("--launch", metavar="COMMAND", help="what starts train.py (default: this Python)")
    options, flags = parser.parse_known_args(arguments)
    if options.folds < 1 or options.seeds < 1 or options.folds * options.seeds < 2:
        parser.error("--folds and --seeds are 1 or more, and one run repeats nothing")
    if options.json and options.json != STDOUT:
        check_output(options.json, begins_with('{\n  "repeated": '), "--json")
    return options, flags


def _trainings(options: argparse.Namespace, config: Config) -> list[Training]:
    """In order, all seeds of a fold together. UserError where a setting is for one run alone."""
    if config.run is None:
        raise UserError("repeat: give the runs a name with --run, so that the same command goes on")
    for key, advice in _GIVEN_HERE.items():
        if getattr(config, key) != SCHEMA[key]["default"]:
            raise UserError(f"repeat: --{key} is not for several runs: {advice}")
    found = []
    for fold in range(1, options.folds + 1):
        data = Path(config.runs).resolve() / f"{config.run}-folds" / f"fold{fold}.csv" if options.folds > 1 else None
        for seed in range(config.seed, config.seed + options.seeds):
            name = f"{config.run}-fold{fold}-seed{seed}" if data else f"{config.run}-seed{seed}"
            found.append(Training(fold, seed, Path(config.runs) / name, data))
    return found


def _group(config: Config) -> list[str]:
    """All runs are of one group in W&B, unless they are told another."""
    has_one = config.tracker != "wandb" or config.group is not None or os.environ.get("WANDB_RUN_GROUP")
    return [] if has_one else [f"--group={config.run}"]


def _without(flags: list[str], names: Sequence[str]) -> list[str]:
    """The flags but those of these names, of which each run has its own."""
    left, is_value = list[str](), False
    for flag in flags:
        name, _, value = flag.partition("=")
        if name in names:
            is_value = not value
            continue
        if not is_value or flag.startswith("--"):
            left.append(flag)
        is_value = False
    return left


def _write_folds(dataset: Dataset, folds: int, files: Sequence[Path]) -> None:
    """The folds' CSV files and the link to the photos. UserError where there are others for other photos already, or a
    fold would hold out nothing; MachineError where the disk is full."""
    whole = dataset.undivided(without_others=True)
    split = whole.splits.get("all") or whole.splits.get("train")
    if split is None:
        raise UserError(f"repeat: {printable(dataset.root)} has no split 'train', whose photos would be in folds")
    fewest = min(split.class_counts().values(), default=0)
    of_photo = folds_of(split.labels, folds)
    alone = int((of_photo < 0).sum())
    told = f"; {alone} of them, each the only one of a class, would train in all" if alone else ""
    if len(split) - alone < folds:
        raise UserError(f"repeat: {counted(len(split), 'photo')} cannot be in {folds} folds{told}: give fewer --folds")
    if fewest < folds:
        print(f"repeat: the smallest class has {counted(fewest, 'photo')}: some folds hold out none of it", flush=True)
    folder = files[0].parent
    # Bytes, as a name may have a \r in it, which reading text makes a \n of.
    contents = {
        folder / f"fold{fold + 1}.csv": fold_csv(split, of_photo == fold).encode("utf-8", "surrogateescape")
        for fold in range(folds)
    }
    link, root = folder / _PHOTOS, os.fsdecode(split.root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(link):
            link.symlink_to(root, target_is_directory=True)
        if os.path.realpath(link) != os.path.realpath(root):
            raise UserError(f"repeat: {printable(link)} leads to other photos: give another --run name")
        for file, content in contents.items():
            if file.exists() and file.read_bytes() != content:
                raise UserError(f"repeat: {printable(file)} has other photos in its fold: give another --run name")
            if not file.exists():
                with atomic_write(file) as partial:
                    partial.write_bytes(content)
    except OSError as error:
        raise write_error(error, f"repeat: {printable(folder)}: cannot be written to ({error.strerror})") from None
    shown = ", ".join(str(int((of_photo == fold).sum())) for fold in range(folds))
    told = f"; {alone} train in all, each the only one of its class" if alone else ""
    print(f"folds: of {counted(len(split), 'photo')} {shown} are held out in turn{told}", flush=True)


def fold_csv(split: Split, held_out: np.ndarray) -> str:
    """`path,label,split`, with paths below the link to the photos. held_out: bool [N], of the split's photos."""
    text = io.StringIO()
    write = csv_rows(text)
    write(("path", "label", "split"))
    for index, label in enumerate(split.labels.tolist()):
        path = f"{_PHOTOS}/{split.path_below_root(index).decode('utf-8', 'surrogateescape')}"
        write((path, split.classes[label], "val" if held_out[index] else "train"))
    return text.getvalue()


def _is_finished(training: Training, flags: list[str]) -> bool:
    """Whether nothing is left to do. UserError as train.py would raise it, with other settings than the run has."""
    run = RunFolder(training.folder, not_named=not_named(flags))
    try:
        return run.beginning(parse_config(flags)[0]) == "finished"
    finally:
        run.close()


def _train(command: Sequence[str], training: Training) -> None:
    """One run of train.py, which a request to stop is passed on to, once for each."""
    is_asked = False
    with _hangup_asks_to_stop():
        try:
            # Ctrl-C comes from here alone, and so once. What it prints goes where this does.
            stdout = 2 if sys.stdout is sys.stderr else None
            child = subprocess.Popen(command, start_new_session=True, stdout=stdout)
        except OSError as error:
            raise UserError(f"--launch {printable(command[0])}: cannot be started ({error.strerror})") from None
        while child.returncode is None:
            try:
                child.wait()
            except (KeyboardInterrupt, Terminated):
                is_asked = True
                if hasattr(os, "killpg"):  # on Windows there are no sessions: the console has told the child
                    with suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGINT)
    if is_asked or child.returncode == Stopped.exit_code:
        raise Stopped(f"repeat: stopped in {training.folder}: the same command goes on")
    if child.returncode:
        told = f"repeat: {training.folder} ended with exit code {child.returncode}, as its lines above say: the same "
        told += "command goes on with it once that is put right"
        raise UserError(told) if child.returncode == UserError.exit_code else MachineError(told)
    # A launcher of several processes ends with 0 after a stop, too.
    if RunFolder(training.folder).status().get("state") != "finished":
        raise Stopped(f"repeat: stopped in {training.folder}: the same command goes on")


@contextmanager
def _hangup_asks_to_stop() -> Iterator[None]:
    """A terminal that is closed tells this process alone, and its run, in a session of its own, would go on."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) is not signal.SIG_DFL:  # nohup ignores it
        yield
        return

    def terminate(*_: object) -> None:
        signal.signal(hangup, signal.SIG_IGN)  # a shell may tell it as well
        raise Terminated

    signal.signal(hangup, terminate)
    try:
        yield
    finally:
        signal.signal(hangup, signal.SIG_DFL)


def _result(training: Training, best_by: str) -> Result:
    scores: Mapping[str, Any] = read_description(training.folder, "repeat")["scores"]
    values = [row[best_by] for row in read_rows(training.folder / "metrics.jsonl") if best_by in row]
    if best_by not in scores or not values:
        raise UserError(f"repeat: {training.folder} has no {best_by} in its metrics.jsonl and model.json")
    last = math.nan if values[-1] is None else values[-1]
    return Result(training, scores[best_by], last, scores["count"], averaged=bool(scores.get("averaged")))


def table(results: Sequence[Result], best_by: str) -> tuple[list[str], dict[str, Any]]:
    """A row for each run, and mean, spread and Student's interval of the mean; the same as JSON.

    Seeds of one fold share their validation photos: the interval is of the folds' means, of one fold of its seeds.
    """
    width = max(3, *(len(result.training.folder.name) for result in results))
    lines = ["", f"{'run':<{width}}  photos  best {best_by}  last {best_by}"]
    for result in results:
        name = printable(result.training.folder.name)
        columns = f"{result.best:{5 + len(best_by)}.4f}  {result.last:{5 + len(best_by)}.4f}"
        averaged = "  best of averaged weights" if result.averaged else ""
        lines.append(f"{name:<{width}}  {result.photos:6}  {columns}{averaged}")
    by_fold: dict[int, list[Result]] = {}
    for result in results:
        by_fold.setdefault(result.training.fold, []).append(result)
    summary: dict[str, Any] = {"best_by": best_by, "folds": len(by_fold), "seeds": len(results) // len(by_fold)}
    for which in ("best", "last"):
        values = [[getattr(each, which) for each in runs] for runs in by_fold.values()]
        if diverged := sum(math.isnan(value) for of_fold in values for value in of_fold):
            summary[which] = None
            lines.append(f"{which} {best_by}: no mean, as {counted(diverged, 'run')} had diverged by then (nan)")
            continue
        units = [fmean(runs) for runs in values] if len(values) > 1 else values[0]
        of_seeds = fmean(stdev(runs) for runs in values) if len(values[0]) > 1 else None
        low, high = mean_interval(units)
        found = {"mean": fmean(units), "spread": stdev(units), "interval": [low, high], "spread_of_seeds": of_seeds}
        summary[which] = found
        told = f"{100 * fmean(units):.2f} % \u00b1 {100 * stdev(units):.2f} over "
        told += counted(len(units), "fold" if len(values) > 1 else "seed")
        more = f"; seeds of a fold ± {100 * of_seeds:.2f}" if of_seeds is not None and len(values) > 1 else ""
        lines.append(f"{which} {best_by}: {told}, 95 % interval of the mean {100 * low:.2f} to {100 * high:.2f}{more}")
    return lines, summary


def _as_json(result: Result) -> dict[str, Any]:
    training = result.training
    told = {"run": printable(training.folder), "fold": training.fold, "seed": training.seed, "photos": result.photos}
    return told | {"best": result.best, "last": result.last, "averaged": result.averaged}


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
