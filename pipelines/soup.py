"""Averages the weights of several runs, or of one run's last checkpoints: a model soup, as fast as one network.

    python -m pipelines.soup runs/A runs/B runs/C --out runs/soup    # the best weights of each (Wortsman et al. 2022)
    python -m pipelines.soup runs/A --last 3 --out runs/soup         # the last 3 checkpoints (Izmailov et al. 2018)

The runs have the same network, classes, sizes and photos; other seeds, rates or augmentations. No photo is read, and so
nothing is known of the average before `evaluate.py` has tried it. What is left is a run folder for evaluate.py,
deploy/, pipelines.compare and train.py --weights.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import pipelines.early_interrupt  # noqa: F401

from pipelines.config import Config, ScriptParser
from pipelines.distributed.exits import run_script
from pipelines.errors import UserError, write_error
from pipelines.files import check_makeable
from pipelines.model.average import mean_of
from pipelines.model.network import restore_model
from pipelines.model.weights import Weights, read_run_weights
from pipelines.run.checkpoint import trained_weights
from pipelines.run.folder import RunFolder, versions
from pipelines.run_files import (
    Description,
    Preprocessing,
    checkpoint_folders,
    newest_progress,
    read_description,
    read_progress,
    read_run_config,
)
from pipelines.text import composed, counted, printable

from tqdm import tqdm

_FEWEST = 2
_ALIKE = ("arch", *Preprocessing.__annotations__, "test_flips")
_UNKNOWN: dict[str, Any] = {"scores": {}, "temperature": 1.0, "calibration": None, "unsure": []}


def main(arguments: list[str]) -> None:
    """One average. UserError where the networks are not alike, one is damaged, or the folder is there already."""
    parser = ScriptParser("python -m pipelines.soup", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--last", type=int, metavar="N", help="of one run: the last N checkpoints, not the best weights"
    )
    options = parser.parse_args(arguments)
    runs, out = options.runs, options.out
    if os.path.lexists(out):
        raise UserError(f"soup: {out} is there already, and is not overwritten: give another --out")
    check_makeable(out.parent, "--out")
    descriptions = [read_description(run, "soup") for run in runs]
    first = descriptions[0]
    if options.last is None:
        if len(runs) < _FEWEST:
            raise UserError("soup: give several runs, or --last N for the last N checkpoints of one")
        _check_differ(runs)
        _check_alike(runs, descriptions)
        sources, notes = list(runs), _on_beginnings(runs)
    else:
        sources, notes = _checkpoints(runs, options.last)
    config = read_run_config(runs[0]) if (runs[0] / "config.yaml").exists() else None

    statistics: set[str] = set()

    def states() -> Iterator[Mapping[str, Any]]:
        for source in tqdm(sources, desc="soup", unit="network", disable=None):
            read = read_run_weights if options.last is None else trained_weights
            state = read(source, first["arch"], "soup").state or {}
            statistics.add(Weights({name: each for name, each in state.items() if "running_" in name}, "").digest())
            yield state

    weights = Weights(mean_of(states()), "", tuple(first["classes"]))
    names = [source.resolve().name for source in sources]
    if options.last is not None:
        names = [f"{runs[0].resolve().name}/{name}" for name in names]
    own: Any = {**first, **_UNKNOWN, "average_of": [*map(printable, names)], "versions": versions()}
    _write(out, config, weights, own)
    print(f"{printable(out)}: the mean of {counted(len(names), 'network')}: {', '.join(own['average_of'])}")
    if len(statistics) > 1:
        notes.append(
            "BatchNorm's statistics were trained and differ: they are averaged too, and not computed anew from photos, "
            "as Izmailov et al. do"
        )
    print(*notes, sep="\n", end="\n" * bool(notes))
    print(f"nothing has tried it yet: accelerate launch evaluate.py {printable(out)}", flush=True)


def _check_differ(runs: Sequence[Path]) -> None:
    """UserError where one is named twice: the mean would have it twice, or be no mean."""
    named: dict[Path, Path] = {}
    for run in runs:
        if (before := named.setdefault(run.resolve(), run)) is not run:
            both = f"{run} is given twice" if before == run else f"{before} and {run} are one run"
            raise UserError(f"soup: {both}: give each once")


def _check_alike(runs: Sequence[Path], descriptions: Sequence[Description]) -> None:
    """UserError, which says what differs, where the weights of all of them do not mean the same."""
    one: Mapping[str, Any] = descriptions[0]
    for run, other in zip(runs[1:], descriptions[1:], strict=True):
        differing = [f"{key} is {one[key]} and {other[key]}" for key in _ALIKE if one[key] != other[key]]  # type: ignore[literal-required]
        own, its = ([*map(composed, each["classes"])] for each in (one, other))
        if own != its:
            alone = [name for name in (*own, *its) if (name in own) != (name in its)]
            differing.append(f"of the classes {alone[0]!r} is in one alone" if alone else "the classes' order differs")
        if not differing and one["dataset_fingerprint"] != other["dataset_fingerprint"]:
            differing.append(
                "they are of other photos, or another split of them: what validates one may have trained the other"
            )
        if differing:
            raise UserError(f"soup: {runs[0]} and {run} cannot be averaged: {printable('; '.join(differing))}")


def _on_beginnings(runs: Sequence[Path]) -> list[str]:
    """A line where runs did not begin with the same weights, so far as checkpoints tell."""
    begun = set()
    for run in runs:
        with suppress(UserError):
            begun.add(newest[1]["first_weights"] if (newest := newest_progress(run)) else None)
    begun.discard(None)
    if len(begun) > 1 or Weights(None, "").digest() in begun:
        return [
            "these runs began with different or random weights: the mean of such networks is mostly worse than each "
            "(Neyshabur et al. 2020)"
        ]
    return []


def _checkpoints(runs: Sequence[Path], last: int) -> tuple[list[Path], list[str]]:
    """The last checkpoints of the one run, oldest first, and a line where it has not as many as `last`."""
    if len(runs) > 1 or last < _FEWEST:
        raise UserError(f"soup: --last is for the checkpoints of one run, and {_FEWEST} or more")
    run, found = runs[0], []
    for folder in checkpoint_folders(run / "checkpoints"):
        try:
            if read_progress(folder)["global_step"]:  # before the first update there is nothing to average
                found.append(folder)
        except OSError as error:
            raise UserError(f"soup: {folder} cannot be read ({error.strerror}): is the run still going on?") from None
    advice = "train with --keep_checkpoints for more"
    if len(found) < _FEWEST:
        raise UserError(f"soup: {run} has {counted(len(found), 'checkpoint')} of a training: {advice}")
    too_few = f"{printable(run)} has {counted(len(found), 'checkpoint')}, not {last}: {advice}"
    return found[-last:], [too_few] * (len(found) < last)


def _write(out: Path, config: Config | None, weights: Weights, description: Mapping[str, Any]) -> None:
    """The folder, whole or not there. config: of the run whose photos it is evaluated on, where that is known."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".soup-", dir=out.parent) as temporary:
            run = RunFolder(Path(temporary, "soup"))
            if config:
                run.create(replace(config, run=None, overwrite=False, tracker="none", compare_to=None))
            else:
                run.folder.mkdir()
            run.save_best(restore_model(description["arch"], weights).network, description)
            run.write_status("finished", "an average of trained weights", exit_code=0)
            run.close()
            os.rename(run.folder, out)
    except OSError as error:
        raise write_error(error, f"soup: {out} cannot be made ({error.strerror}): give another --out") from None


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
