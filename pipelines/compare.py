"""Compares runs on this disk: the settings that differ, the best and the last metrics, the time; a table and a plot.

    python -m pipelines.compare runs/*

The best run comes first. It needs no tracker: it reads config.yaml, metrics.jsonl and status.json of the run folders.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.distributed.exits import run_script
from pipelines.errors import UserError
from pipelines.files import check_replaceable
from pipelines.run import figures
from pipelines.run.folder import RunFolder
from pipelines.run_files import read_description, read_run_config, read_status
from pipelines.text import check_printed, printable
from pipelines.training.evaluation import BEST_BY

_NOT_COMPARED = {"run", "runs", "overwrite", "prepare"}
_WIDEST = 28  # characters of a cell
_ABSENT = "-"


@dataclass(frozen=True)
class Run:
    """One run folder. rows: those of metrics.jsonl."""

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
    """The table on stdout, the plot as a PNG. Raises UserError where no run is named."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="the plot (default: comparison.png beside the runs)")
    options = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs if (folder / "config.yaml").is_file()]
    if not runs:
        raise UserError("compare: none of these is a run folder with a config.yaml (trained runs stand in runs/)")
    common = {run.best_by for run in runs}
    order = common.pop() if len(common) == 1 else "val/top1"
    runs.sort(key=lambda run: -run.best.get(order, -1.0))
    print("\n".join(comparison_table(runs)))
    path = options.figure or options.runs[0].resolve().parent / "comparison.png"
    check_replaceable(path, figures.is_own_picture)
    if figures.attempt(path.name, lambda: figures.save_comparison(path, {run.name: run.rows for run in runs})):
        print(f"\nplot: {printable(path)}", flush=True)
    check_printed()


def read_run(folder: Path) -> Run:
    """A run from its folder. UserError where a file of it is damaged."""
    run = RunFolder(folder)
    settings = {key: value for key, value in asdict(read_run_config(folder)).items() if key not in _NOT_COMPARED}
    fingerprint = read_description(folder, "compare")["dataset_fingerprint"] if (folder / "model.json").exists() else ""
    settings["dataset"] = fingerprint[:8] or _ABSENT
    status = read_status(folder)
    return Run(folder.resolve().name, settings, run.read_metrics(), status["state"] if status else _ABSENT)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings in which not all runs agree, in the order of the recipes."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return [key for key in keys if len({str(run.settings.get(key, _ABSENT)) for run in runs}) > 1]


def comparison_table(runs: Sequence[Run]) -> list[str]:
    """Aligned lines: one run each, under a header."""
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
    table = [[_shortened(printable(cell)) for cell in row] for row in table]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def _shortened(cell: str) -> str:
    """Names that are alike differ at the end."""
    return cell if len(cell) <= _WIDEST else f"…{cell[1 - _WIDEST :]}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
