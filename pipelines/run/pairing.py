"""Two models, or two recipes with several runs each, on the photos that all of them have answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.run.predictions import Predictions, predictions_of, read_predictions, source_of, source_of_run
from pipelines.run.significance import (
    LEVEL,
    difference_interval,
    mcnemar,
    means_interval,
    photos_interval,
    photos_needed,
)
from pipelines.text import counted, printable

import numpy as np

_POINT = 0.01


@dataclass(frozen=True, eq=False)
class Pairing:
    """The second side against the first, on `photos` that all runs of both have, with one label.

    left_out: photos that all have, and not with one label. accuracies: on these photos, of each run of each side.
    difference: the second side's mean accuracy minus the first's; interval: its confidence interval at `level`, over
    photos; seeds_interval: over runs, where both sides have several that are not all alike. p: of McNemar's exact test,
    of two runs. shares: float [N, 2], by photo, the runs of each side that have it right. rows: for each run of the
    first side and then of the second, where its predictions have the photo, int [N].
    """

    photos: int
    left_out: int
    level: float
    accuracies: tuple[list[float], list[float]]
    difference: float
    interval: tuple[float, float]
    seeds_interval: tuple[float, float] | None
    p: float | None
    shares: np.ndarray
    rows: list[np.ndarray]

    @property
    def is_shown(self) -> bool:
        """Whether the difference is more than chance explains, of photos and, where that is known, of seeds."""
        intervals = [self.interval, *([self.seeds_interval] if self.seeds_interval else [])]
        return self.photos > 0 and all(low > 0 or high < 0 for low, high in intervals)

    @property
    def only_one(self) -> tuple[int, int]:
        """Photos that more runs, in share, of the first side have right than of the second, and the other way round."""
        differences = self.shares[:, 1] - self.shares[:, 0]
        return int((differences < 0).sum()), int((differences > 0).sum())

    def differing(self) -> np.ndarray:
        """int [n]: the photos on which the sides differ, the greatest difference first."""
        differences = np.abs(self.shares[:, 1] - self.shares[:, 0])
        order = np.argsort(-differences, kind="stable")
        return order[: np.count_nonzero(differences)]

    def verdict(self, first: str, second: str) -> str:
        """One sentence. first, second: the sides' names."""
        if not self.photos:
            return f"{second} and {first} have no photo in common"
        told = f"{points(self.difference)}, {100 * self.level:.3g} % interval {_range(self.interval)}"
        told += f" over photos and {_range(self.seeds_interval)} over seeds" if self.seeds_interval else ""
        told += f"; p = {self.p:.2g}" if self.p is not None else ""
        if self.is_shown:
            better, worse = (second, first) if self.difference > 0 else (first, second)
            return f"{better} is better than {worse} on photos like these {self.photos:,} ({told})"
        squares = float(((self.shares[:, 1] - self.shares[:, 0]) ** 2).sum())
        # Laplace's rule: that no photo is answered otherwise does not mean that none ever would be.
        needed = photos_needed((squares + 1) / (self.photos + 2), _POINT, self.level)
        rounded = float(f"{needed:.2g}")
        photos, seeds = counted(self.photos, "photo"), " and these seeds" if self.seeds_interval else ""
        return (
            f"no difference between {second} and {first} that {photos}{seeds} could show ({told}); about "
            f"{rounded:,.0f} photos would be needed for one point"
        )


def pair(first: Sequence[Predictions], second: Sequence[Predictions], level: float = LEVEL) -> Pairing:
    """first, second: the runs of each side, at least one."""
    runs = [*first, *second]
    known = [dict(zip(reversed(run.paths), range(len(run) - 1, -1, -1), strict=True)) for run in runs]
    common = [path for path in dict.fromkeys(runs[0].paths) if all(path in each for each in known[1:])]
    rows = [np.array([each[path] for path in common], np.int64) for each in known]
    names = [np.array(run.classes, object)[run.labels[at]] for run, at in zip(runs, rows, strict=True)]
    same = np.logical_and.reduce([names[0] == other for other in names])
    rows = [at[same] for at in rows]
    right = np.stack([run.right[at] for run, at in zip(runs, rows, strict=True)])
    sides = right[: len(first)], right[len(first) :]
    shares = np.stack([side.mean(axis=0) for side in sides], axis=1)
    photos = len(shares)
    one, other = ([float(run.mean()) if photos else 0.0 for run in side] for side in sides)
    p, seeds_interval = None, None
    if len(runs) == 2:
        only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        p = mcnemar(*only)
        interval = difference_interval(*only, photos, level) if photos else (-1.0, 1.0)
    else:
        interval = photos_interval(shares[:, 1] - shares[:, 0], level) if photos > 1 else (-1.0, 1.0)
        if min(len(first), len(second)) > 1:
            seeds_interval = means_interval(one, other, level)
    return Pairing(
        photos=photos,
        left_out=len(common) - photos,
        level=level,
        accuracies=(one, other),
        difference=fmean(other) - fmean(one),
        interval=interval,
        seeds_interval=seeds_interval,
        p=p,
        shares=shares,
        rows=rows,
    )


def check_compared(config: Config) -> None:
    """UserError where `compare_to` names no run that can be compared with."""
    if config.compare_to is not None:
        try:
            read_predictions(predictions_of(Path(config.compare_to)))
        except UserError as error:
            advice = "it wants a run's folder, of an earlier version after evaluate.py has been there"
            raise UserError(f"compare_to: {error}; {advice}") from None


def compared_with(other: Path, run: Path) -> tuple[str, dict[str, Any]]:
    """The verdict on a run beside another one, and the figures as a tracker's summary has them. UserError where either
    has no predictions."""
    files = [predictions_of(folder) for folder in (other, run)]
    there, here = map(read_predictions, files)
    sources = [source_of(file) or source_of_run(folder) for file, folder in zip(files, (other, run), strict=True)]
    found = pair([there], [here])
    one, two = (printable(folder.resolve().name) for folder in (other, run))
    verdict = found.verdict(one, two)
    if sources[0] and sources[1] and sources[0].is_other_than(sources[1]):
        verdict += "; answers to different data: photos of one path and label are taken for the same"
    figures = {"to": one, "photos": found.photos, "difference": found.difference, "p": found.p, "verdict": verdict}
    figures |= {"only_there": found.only_one[0], "only_here": found.only_one[1]}
    figures |= dict(zip(("low", "high"), found.interval, strict=True))
    return verdict, {f"compare/{key}": value for key, value in figures.items()}


def points(difference: float) -> str:
    """A difference of accuracies in points, with its sign."""
    return f"{100 * difference:+.1f} points"


def _range(interval: tuple[float, float]) -> str:
    return " to ".join(f"{100 * end:+.1f}" for end in interval)
