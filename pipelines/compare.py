"""Compares runs on this disk: settings that differ, metrics, time; and, photo by photo, which of them is better.

    python -m pipelines.compare runs/*                              # a table, a plot, a verdict on each
    python -m pipelines.compare runs/A runs/B --html page.html      # and the photos on which they differ
    python -m pipelines.compare runs/A runs/B --split test          # by what evaluate.py --split test has left

Photos decide by what each run's predictions.csv says of them: all are compared with the first run that is named, by
McNemar's exact test. Runs whose settings differ in the seed alone are one recipe, which has a mean and a spread. It
needs no tracker: it reads run folders.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TextIO

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.distributed.exits import run_script
from pipelines.errors import UserError
from pipelines.files import STDOUT, begins_with, check_apart, check_output, write_output
from pipelines.report import photo_address
from pipelines.run import figures
from pipelines.run.folder import RunFolder
from pipelines.run.pairing import Pairing, pair
from pipelines.run.predictions import (
    Predictions,
    Source,
    name_in_files,
    predictions_of,
    read_predictions,
    source_of,
    source_of_run,
)
from pipelines.run.resume import REFUSED
from pipelines.run.significance import LEVEL, mean_interval
from pipelines.run_files import Description, read_description, read_run_config, read_status, to_json
from pipelines.text import check_printed, counted, listed, printable, stdout_for_programs
from pipelines.training.evaluation import BEST_BY

_NOT_COMPARED = {"run", "runs", "overwrite", "prepare", "compare_to"}
_OF_A_RECIPE = (REFUSED | {"epochs", "max_steps", "patience", "weights", "dataset", "average_of"}) - {"seed"}
_WIDEST = 28  # characters of a cell
_ABSENT = "-"
_PAGE = Path(__file__).with_name("compare.html")
_PICTURES, _PICTURES_IN_ALL = 24, 240  # photos of a comparison on the page, and of all
_PICTURE = 176  # pixels of a side
_LISTED = 1000  # photos of a comparison in the JSON
_CURVE = 400  # points


@dataclass(frozen=True)
class Run:
    """One run folder. rows: those of metrics.jsonl. description: its model.json, None before there is one."""

    folder: Path
    description: Description | None
    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    state: str

    def last(self, key: str) -> float | None:
        """A metric's last value."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    @property
    def best(self) -> Mapping[str, Any]:
        """The evaluation row that the run takes for its best, the earlier one of a tie; {} where there is none."""
        if self.description and self.description["scores"].get("averaged"):  # rows have those weights as ema/...
            return self.description["scores"]
        rows = [row for row in self.rows if row.get(self.best_by) is not None]
        return max(rows, key=lambda row: row[self.best_by], default={})

    @property
    def best_by(self) -> str:
        """The accuracy that decides which row is best."""
        return BEST_BY.get(str(self.settings.get("best_by")), "val/top1")

    @property
    def minutes(self) -> float:
        """Time spent in updates, of all attempts at the run: from steps, batch size and photos a second."""
        seconds, before = 0.0, 0
        for row in self.rows:
            if speed := row.get("perf/images_per_s"):
                seconds += (row["global_step"] - before) * self.settings["batch_size"] / speed
                before = row["global_step"]
        return seconds / 60


def main(arguments: list[str]) -> None:
    """The table and the verdicts on stdout, the plot as a PNG. Raises UserError where no run is named."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="the plot (default: comparison.png beside the runs)")
    parser.add_argument("--split", metavar="NAME", help="by figures/predictions_NAME.csv (default: predictions.csv)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; - is stdout")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all of it there, for a browser")
    options = parser.parse_args(arguments)
    with stdout_for_programs(options.json == STDOUT) as stdout:
        _compare(options, stdout)
    check_printed()


def _compare(options: argparse.Namespace, stdout: TextIO) -> None:
    folders, passed_over = _folders(options.runs)
    named = [read_run(folder) for folder in folders]
    names = Counter(run.name for run in named)
    named = [replace(run, name=str(run.folder)) if names[run.name] > 1 else run for run in named]
    if not named:
        raise UserError("compare: none of these is a run folder with a config.yaml (trained runs stand in runs/)")
    path = options.figure or options.runs[0].resolve().parent / "comparison.png"
    check_apart({"--figure": path, "--json": options.json, "--html": options.html})
    check_output(path, figures.is_own_picture, "--figure")
    if options.json and options.json != STDOUT:
        check_output(options.json, begins_with('{\n  "compared": '), "--json")
    if options.html:
        check_output(options.html, begins_with(_PAGE.read_text("utf-8").partition("\n")[0]), "--html")
    common = {run.best_by for run in named}
    order = common.pop() if len(common) == 1 else "val/top1"
    runs = sorted(named, key=lambda run: -run.best.get(order, -1.0))
    print("\n".join(comparison_table(runs)))
    sides, notes = read_sides(named, options.split)
    pairings = [pair(sides[0].predictions, side.predictions, _level(sides)) for side in sides[1:]]
    notes = passed_over + notes + notes_on(sides, pairings, options.split)
    lines = [*sides_table(sides), *(found.verdict(sides[0].name, side.name) for found, side in _pairs(sides, pairings))]
    print(*[""][: len(lines + notes)], *lines, *notes, sep="\n")
    content = _content(runs, sides, pairings, lines, notes)
    if options.json:
        write_output(options.json, to_json(content, indent=2) + "\n", stdout)
    if options.html:
        write_output(options.html, _page(content, runs, sides), stdout)
        print(f"page: {printable(options.html)}")
    if figures.attempt(path.name, lambda: figures.save_comparison(path, {run.name: run.rows for run in runs})):
        print(f"\nplot: {printable(path)}", flush=True)


def _folders(named: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The run folders, each once, and a line on folders that are none; files, as runs/* may name, are no runs.
    UserError where a name is of nothing: a misspelled first run would not be what the others are compared with."""
    found, others = dict[str, Path](), list[str]()
    for folder in named:
        if not os.path.lexists(folder):
            raise UserError(f"compare: there is no {folder}: give run folders (trained runs stand in runs/)")
        if os.path.isfile(folder / "config.yaml"):
            found.setdefault(os.path.realpath(folder), folder)
        elif not os.path.isfile(folder):
            others.append(str(folder))
    return [*found.values()], [f"passed over, without a config.yaml: {listed(others)}"] if others else []


def read_run(folder: Path) -> Run:
    """A run from its folder. UserError where a file of it is damaged."""
    run = RunFolder(folder)
    settings = {key: value for key, value in asdict(read_run_config(folder)).items() if key not in _NOT_COMPARED}
    description = read_description(folder, "compare") if (folder / "model.json").exists() else None
    settings["average_of"] = ", ".join(description["average_of"] if description else []) or _ABSENT
    settings["dataset"] = (description["dataset_fingerprint"][:8] if description else "") or _ABSENT
    status, name = read_status(folder), folder.resolve().name
    return Run(folder, description, name, settings, run.read_metrics(), status["state"] if status else _ABSENT)


@dataclass(frozen=True)
class Side:
    """Runs of one recipe, of different seeds, with the predictions of each, and which photos these are of."""

    runs: list[Run]
    predictions: list[Predictions]
    sources: list[Source]

    @property
    def name(self) -> str:
        """The first run's, and how many seeds there are."""
        name = printable(self.runs[0].name)
        return name if len(self.runs) == 1 else f"{name} ({len(self.runs)} seeds)"


def read_sides(runs: Sequence[Run], split: str | None) -> tuple[list[Side], list[str]]:
    """The recipes of `runs`, in order, and a line on runs without predictions, which are in none, and on old ones."""
    sides: dict[tuple[str, ...], list[Side]] = {}
    order, without, stale = list[Side](), list[str](), list[str]()
    name = f"figures/predictions_{name_in_files(split)}.csv" if split else "predictions.csv"
    for run in runs:
        own = predictions_of(run.folder, split)
        if not own.exists():
            without.append(run.name)
            continue
        found = read_predictions(own)
        scores = run.description["scores"] if run.description else {}
        told = (scores.get("correct"), scores.get("count"))
        if own.name == "predictions.csv" and told != (int(found.right.sum()), len(found)) and None not in told:
            raise UserError(
                f"{own}: {int(found.right.sum())} of {len(found)} photos are right, and by model.json {told[0]} of "
                f"{told[1]}: it is not of these weights; remove it, and `accelerate launch evaluate.py {run.folder}`"
            )
        key = tuple(str(run.settings.get(each, _ABSENT)) for each in sorted(_OF_A_RECIPE))
        seed = run.settings["seed"]
        alike = sides.setdefault(key, [])
        side = next((side for side in alike if seed not in [each.settings["seed"] for each in side.runs]), None)
        if side is None:  # the same seed again: another version of the code, say
            side = Side([], [], [])
            alike.append(side)
            order.append(side)
        side.runs.append(run)
        side.predictions.append(found)
        side.sources.append(source_of(own) or source_of_run(run.folder) or Source("", ""))
        best = run.folder / "best.pt"
        if own.parent != run.folder and best.exists() and best.stat().st_mtime > own.stat().st_mtime:
            stale.append(run.name)
    flags = f" --split {split}" if split else ""
    advice = f"`accelerate launch evaluate.py RUN{flags}` makes one"
    notes = [f"not by photo, as there is no {printable(name)}: {listed(without)} ({advice})"] if without else []
    notes += [f"evaluated before best.pt was last written, maybe of other weights: {listed(stale)}"] if stale else []
    return order, notes


def sides_table(sides: Sequence[Side]) -> list[str]:
    """A line for each recipe of several seeds: mean, spread and Student's interval of its accuracies."""
    lines = []
    for side in sides:
        if len(side.runs) > 1:
            found = [float(each.right.mean()) for each in side.predictions]
            low, high = mean_interval(found)
            told = f"{100 * fmean(found):.2f} % \u00b1 {100 * stdev(found):.2f}, 95 % interval of the mean "
            lines.append(f"{side.name}: {told}{100 * low:.2f} to {100 * high:.2f}")
    return lines


def notes_on(sides: Sequence[Side], pairings: Sequence[Pairing], split: str | None) -> list[str]:
    """What a person should know who reads the verdicts, in lines."""
    notes = []
    if len(sides) == 1 and len(sides[0].runs) > 1:
        notes.append("the runs differ in nothing but the seed: no recipe is compared with another")
    if any(found.p is not None for found in pairings):
        notes.append("a verdict is on these trainings: with another seed each might have been better or worse")
    if any(len(side.runs) > 1 for side in sides) and (alone := [side.name for side in sides if len(side.runs) == 1]):
        notes.append(f"with one seed alone it is not known what another would change: {listed(alone)}")
    if len(pairings) > 1:
        told = f"{len(pairings)} comparisons: {100 * _level(sides):.3g} % each, so that all hold with 95 % (Dunn 1961)"
        notes.append(told)
    if pairings and split in (None, "val"):
        notes.append("these photos have chosen each run's best epoch: --split compares on others")
    sources = [source for side in sides for source in side.sources]
    if any(one.is_other_than(other) for one, other in combinations(sources, 2)):
        told = listed(list(dict.fromkeys(source.data for source in sources if source.data)))
        notes.append(f"answers to different data ({told}): photos of one path and label are taken for the same")
    if left_out := max((found.left_out for found in pairings), default=0):
        notes.append(f"left out: {counted(left_out, 'photo')} of other labels in other runs")
    return notes


def _level(sides: Sequence[Side]) -> float:
    return 1 - (1 - LEVEL) / max(1, len(sides) - 1)


def _pairs(sides: Sequence[Side], pairings: Sequence[Pairing]) -> Iterator[tuple[Pairing, Side]]:
    return zip(pairings, sides[1:], strict=True)


def _content(
    runs: Sequence[Run], sides: Sequence[Side], pairings: Sequence[Pairing], verdicts: list[str], notes: list[str]
) -> dict[str, Any]:
    """What --json has."""
    keys = differing_settings(runs)
    return {
        "compared": "runs",
        "verdicts": verdicts,
        "notes": notes,
        "runs": [
            {
                "run": printable(run.name),
                "settings": {key: run.settings.get(key) for key in keys},
                "best": dict(run.best),
                "minutes": run.minutes,
                "state": run.state,
            }
            for run in runs
        ],
        "recipes": [
            {
                "name": side.name,
                "runs": [printable(run.name) for run in side.runs],
                "accuracies": [float(found.right.mean()) if len(found) else None for found in side.predictions],
            }
            for side in sides
        ],
        "comparisons": [
            {
                "first": sides[0].name,
                "second": side.name,
                "photos": found.photos,
                "left_out": found.left_out,
                "only_first": found.only_one[0],
                "only_second": found.only_one[1],
                "difference": found.difference,
                "level": found.level,
                "interval": list(found.interval),
                "seeds_interval": list(found.seeds_interval) if found.seeds_interval else None,
                "p": found.p,
                "is_shown": found.is_shown,
                "differing": [_differing(sides[0], side, found, photo) for photo in found.differing()[:_LISTED]],
            }
            for found, side in _pairs(sides, pairings)
        ],
    }


def _differing(first: Side, second: Side, pairing: Pairing, photo: int) -> dict[str, Any]:
    """A photo, and the runs' answers to it with their probabilities, of both sides."""
    answers = []
    runs, predictions = [*first.runs, *second.runs], [*first.predictions, *second.predictions]
    for run, found, rows in zip(runs, predictions, pairing.rows, strict=True):
        row = int(rows[photo])
        answer, probability = found.classes[found.answers[row, 0]], round(float(found.probabilities[row, 0]), 6)
        answers.append({"run": printable(run.name), "answer": answer, "probability": probability})
    one, row = first.predictions[0], int(pairing.rows[0][photo])
    return {
        "path": one.paths[row],
        "label": one.classes[one.labels[row]],
        "first": answers[: len(first.runs)],
        "second": answers[len(first.runs) :],
    }


def _page(content: dict[str, Any], runs: Sequence[Run], sides: Sequence[Side]) -> str:
    """The page: the same, the table, the curves, and as many photos as it may have, where the first run has answered
    them."""
    of_the_page = {
        "table": _cells(runs),
        "curves": {printable(run.name): _curves(run) for run in runs},
    }
    shown: dict[str, str] = {}
    for comparison in content["comparisons"]:
        most = max(1, min(_PICTURES, _PICTURES_IN_ALL // len(content["comparisons"])))
        comparison["differing"] = comparison["differing"][:most]
        for photo in comparison["differing"]:
            path = photo["path"]
            if path not in shown:
                first, source = sides[0].runs[0], sides[0].sources[0]
                own: Description | None = first.description and {**first.description, "data": source.data}
                shown[path] = photo_address(own, first.folder, path, _PICTURE) if own else ""
            photo["picture"] = shown[path]
    # Within a script, "<" might end it; JSON may spell it so.
    return _PAGE.read_text("utf-8").replace("DATA", to_json(content | of_the_page).replace("<", "\\u003c"))


def _curves(run: Run) -> dict[str, list[list[float]]]:
    found = {}
    for key in ("val/top1", "val/loss", "train/loss"):
        rows = [[row["epoch"], row[key]] for row in run.rows if row.get(key) is not None]
        found[key] = rows[:: max(1, -(-len(rows) // _CURVE))]
    return found


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings in which not all runs agree, in the order of the recipes."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return [key for key in keys if len({str(run.settings.get(key, _ABSENT)) for run in runs}) > 1]


def comparison_table(runs: Sequence[Run]) -> list[str]:
    """Aligned lines: one run each, under a header."""
    table = [[_shortened(cell) for cell in row] for row in _cells(runs)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _cells(runs: Sequence[Run]) -> list[list[str]]:
    keys = differing_settings(runs)
    table = [
        [
            "run",
            *keys,
            "best top1",
            "balanced",
            "at epoch",
            "last top1",
            "last val loss",
            "last loss",
            "minutes",
            "state",
        ]
    ]
    for run in runs:
        best = [_number(run.best.get(key)) for key in BEST_BY.values()] + [str(run.best.get("epoch", _ABSENT))]
        last = [_number(run.last(key)) for key in ("val/top1", "val/loss", "train/loss")]
        settings = [str(run.settings.get(key, _ABSENT)) for key in keys]
        table.append([run.name, *settings, *best, *last, f"{run.minutes:.1f}", run.state])
    return [[printable(cell) for cell in row] for row in table]


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def _shortened(cell: str) -> str:
    """Names that are alike differ at the end."""
    return cell if len(cell) <= _WIDEST else f"…{cell[1 - _WIDEST :]}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
