"""Best and last validation accuracy of recipes over several seeds: the table that docs/benchmarks.md shows.

    python benchmarks/accuracy.py --seeds 5                                         # the four recipes, ants and bees
    python benchmarks/accuracy.py --seeds 5 --tutorial                              # and the tutorial's own code
    python benchmarks/accuracy.py --recipes finetune --data photos/ --set lr=0.02   # another folder, another setting
    python benchmarks/accuracy.py --data photos/train --seeds 3                     # choose by a part of train
    python benchmarks/accuracy.py --data photos/train --recipes finetune --vary augment=light "lr=0.02 lr_body=0.002"
    python benchmarks/accuracy.py --data photos/train --recipes finetune --evaluate "--image-size 288 --resize 329"

--vary runs each recipe as it is and once with each of the changes, a change being one setting or several in quotes. The
table then has the differences from the recipe as it is, seed by seed: their mean and standard deviation. --evaluate has
evaluate.py look at the best weights of each run again, with each of the given flags, and compares that in the same way.

Every run is `accelerate launch train.py` (or tutorial.py beside this file) in a process of its own, and a line of
--out, with its settings, versions and commit. Recipes and changes take turns within a seed, so that a busy hour of the
machine meets all of them. A run that is in --out already is not run again, so an interrupted benchmark goes on where
it was; one of another recipe of the name, or of other photos or weights of the environment, is. What code, versions and
machine the rows are of is printed above the table.

`best` is of the best evaluation, with ema_decay of the weights or their average; `last` is of the last one, with
ema_decay of the average. `balanced` is the mean recall of the classes. `seconds` are those of the whole command on the
clock; `processor` are the seconds that all cores together worked for it (0 on Windows, which does not tell), which a
busy machine stretches less.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.distributed.hardware import machine
from pipelines.run.folder import versions
from pipelines.text import lasting_streams

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["tutorial_finetune", "tutorial_features", "finetune", "feature_extract"]
TUTORIAL = {"tutorial.py finetune": "finetune", "tutorial.py features": "features"}


@lasting_streams()
def main() -> None:
    """Parses the command line, runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names in configs/, or YAML files")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--data", help="folder or CSV (default: ants and bees, or DALITUNE_DATA)")
    several: dict[str, Any] = {"nargs": "*", "default": [], "type": _settings}
    parser.add_argument("--set", **several, metavar="KEY=VALUE", help="settings on top of every recipe")
    parser.add_argument("--vary", **several, metavar="CHANGE", help="beside each recipe: KEY=VALUE, or several")
    parser.add_argument(
        "--evaluate",
        nargs="*",
        default=[],
        metavar="FLAGS",
        help='of evaluate.py, in quotes; a single one with a blank: " --test-flips"',
    )
    parser.add_argument("--out", type=Path, default=Path("accuracy.jsonl"), help="JSON lines, one a run")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"], help="of this suite's runs")
    parser.add_argument("--tutorial", action="store_true", help="beside tutorial.py; --data has train/ and val/ then")
    options = parser.parse_args()

    recipes = list(dict.fromkeys([*(TUTORIAL if options.tutorial else []), *options.recipes]))  # each once
    wanted = [
        (recipe, change, seed)
        for seed in range(options.seeds)
        for recipe in recipes
        for change in ("", *(() if recipe in TUTORIAL else dict.fromkeys(options.vary)))
    ]
    known, rows = _read(options.out), []
    for recipe, change, seed in tqdm(wanted, unit="run", disable=None):
        given = [*options.set, change]
        settings = [] if recipe in TUTORIAL else [word for words in given for word in shlex.split(words)]
        precision = "no" if recipe in TUTORIAL else options.precision
        key = {"recipe": recipe, "seed": seed, "data": options.data, "set": settings, "precision": precision}
        key["inputs"] = inputs(recipe)
        # The tutorial's script leaves no run to evaluate.
        again = ["", *options.evaluate] if options.evaluate and recipe not in TUTORIAL else []
        row = next((row for row in known if key.items() <= row.items() and {*again} <= {*row["evaluated"]}), None)
        if row is None:
            row = key | _run(recipe, seed, options.data, settings, precision, again)
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            name = f"{recipe} {change}".strip()
            tqdm.write(f"{name} seed {seed}: best {row['best']:.4f}, last {row['last']:.4f}, {row['seconds']:.0f} s")
        rows.append(row | {"change": change})
    print(f"\n{shlex.join(['python', *sys.argv])}", *origins(rows), sep="\n")
    print(table([row for row in rows if not row["change"]], recipes))
    for recipe in [recipe for recipe in recipes if options.vary and recipe not in TUTORIAL]:
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        print(f"\n{recipe}, changed:\n{table_of_changes(of_recipe)}")
    for recipe in [recipe for recipe in recipes if options.evaluate and recipe not in TUTORIAL]:
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        print(f"\n{recipe}, evaluated again:\n{table_of_evaluations(of_recipe, options.evaluate)}")


def inputs(recipe: str) -> dict[str, str | None]:
    """What a run depends on and its flags do not tell: the recipe's text, and what the environment names."""
    text = None if recipe in TUTORIAL else _recipe_file(recipe).read_text(encoding="utf-8")
    return {"recipe": text} | {name: os.environ.get(name) for name in ("DALITUNE_DATA", "DALITUNE_WEIGHTS")}


def origins(rows: list[dict[str, Any]]) -> list[str]:
    """Lines on the machines, versions and commits that rows are of."""
    found: dict[str, int] = {}
    for row in rows:
        of_row = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        line = f"{row.get('hardware')}; commit {row.get('commit')}; {of_row}"
        found[line] = found.get(line, 0) + 1
    if len(found) == 1:
        return [*found]
    return [
        "these are not all of one machine, code and versions:",
        *(f"{count}: {line}" for line, count in found.items()),
    ]


def _recipe_file(recipe: str) -> Path:
    return Path(recipe) if recipe.endswith(".yaml") else ROOT / "configs" / f"{recipe}.yaml"


def _settings(words: str) -> str:
    """Of a flag: `KEY=VALUE`, or several."""
    if not words.strip() or not all("=" in word for word in shlex.split(words)):
        raise argparse.ArgumentTypeError(f"'{words}' is no KEY=VALUE")
    return words


def _run(
    recipe: str, seed: int, data: str | None, settings: list[str], precision: str, again: list[str]
) -> dict[str, Any]:
    """One training: its accuracies and times, and what evaluate.py finds with each of the flags."""
    with tempfile.TemporaryDirectory() as runs:
        flags = [f"--seed={seed}", *([f"--data={data}"] if data else [])]
        if recipe in TUTORIAL:
            command = [sys.executable, str(ROOT / "benchmarks" / "tutorial.py"), TUTORIAL[recipe], *flags]
        else:
            flags += [f"--config={_recipe_file(recipe)}", f"--runs={runs}", "--run=run", "--tracker=none"]
            # Each run pays for its own features, unless --set says otherwise, as shrink wants a cache.
            chosen = {"cache_gb": "0"} | dict(pair.split("=", 1) for pair in settings)
            flags += [f"--{key}={value}" for key, value in chosen.items()]
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
            command = [*launch, str(ROOT / "train.py"), *flags]
        started, worked = time.perf_counter(), _processor_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds, processor = time.perf_counter() - started, _processor_seconds() - worked
        if done.returncode:
            sys.exit(f"{' '.join([recipe, *settings])}, seed {seed} failed:\n{done.stderr[-2000:]}")
        scores = json.loads(done.stdout) if recipe in TUTORIAL else _scores(Path(runs) / "run")
        scores["evaluated"] = {flags: _evaluation(Path(runs) / "run", flags, precision) for flags in again}
    return scores | {
        "seconds": round(seconds, 1),
        "processor": round(processor, 1),
        "hardware": machine(),
        "versions": versions(),
        "commit": _commit(),
    }


def _scores(run: Path) -> dict[str, Any]:
    """Best and last accuracy, last mean recall and loss, and the settings, from the run's folder."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    used = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    evaluations = [row for row in metrics if "val/top1" in row]
    last, kind = evaluations[-1], "ema" if "ema/top1" in evaluations[-1] else "val"
    return {
        "best": max(max(row["val/top1"], row.get("ema/top1", 0.0)) for row in evaluations),
        "last": last[f"{kind}/top1"],
        "last_balanced": last[f"{kind}/balanced_top1"],
        "last_loss": last[f"{kind}/loss"],
        "config": {key: value for key, value in used.items() if key not in ("run", "runs")},
    }


def _evaluation(run: Path, flags: str, precision: str) -> dict[str, float]:
    """What evaluate.py finds of the best weights with such flags; the loss at the run's own temperature."""
    scores = run / "scores.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision]
    command = [*launch, str(ROOT / "evaluate.py"), str(run), "--json", str(scores), *shlex.split(flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"evaluate.py {flags} failed:\n{done.stderr[-2000:]}")
    found = json.loads(scores.read_text(encoding="utf-8"))
    return {name: found[name] for name in ("top1", "balanced_top1", "loss", "ece")}


def _processor_seconds() -> float:
    """User and system time of all child processes that have ended, their own children included."""
    return os.times().children_user + os.times().children_system


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [{"precision": "no", "evaluated": {}} | json.loads(line) for line in lines]
    # Those of an older version lack the mean recall.
    return [row for row in rows if row["recipe"] in TUTORIAL or "last_balanced" in row]


def table(rows: list[dict[str, Any]], recipes: list[str]) -> str:
    """The Markdown table: one line a recipe, over its rows. sd is the sample standard deviation over the seeds."""
    lines = [
        "| recipe | n | best: mean ± sd | best: range | last: mean ± sd | last loss | seconds | processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in recipes:
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        best, last, loss, seconds, processor = (
            [row[name] for row in of_recipe] for name in ("best", "last", "last_loss", "seconds", "processor")
        )
        name = Path(recipe).stem if recipe.endswith(".yaml") else recipe
        lines.append(
            f"| `{name}` | {len(best)} | {_mean_and_spread(best)} | {min(best):.4f}-{max(best):.4f} "
            f"| {_mean_and_spread(last)} | {statistics.mean(loss):.4f} "
            f"| {statistics.median(seconds):.0f} | {statistics.median(processor):.0f} |"
        )
    return "\n".join(lines)


def table_of_changes(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of one recipe, as it is in the first line, and each change: what its last evaluation reached.

    rows: of one recipe, each with its `change`, "" for the recipe as it is, and all changes of the same seeds.
    """
    lines = [
        "| change | n | last: mean ± sd | difference | balanced: difference | last loss | difference | processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {row["seed"]: row for row in rows if not row["change"]}
    for change in dict.fromkeys(row["change"] for row in rows):
        changed = [row for row in rows if row["change"] == change]
        last, balanced, loss = (
            _differences(changed, plain, name) if change else "" for name in ("last", "last_balanced", "last_loss")
        )
        lines.append(
            f"| {f'`{change}`' if change else 'none'} | {len(changed)} "
            f"| {_mean_and_spread([row['last'] for row in changed])} | {last} | {balanced} "
            f"| {statistics.mean(row['last_loss'] for row in changed):.4f} | {loss} "
            f"| {statistics.median(row['processor'] for row in changed):.0f} |"
        )
    return "\n".join(lines)


def table_of_evaluations(rows: list[dict[str, Any]], evaluations: list[str]) -> str:
    """The Markdown table of the best weights of one recipe and of its changes, evaluated again with each of the flags.

    rows: of one recipe, each with its `change` and what was `evaluated`, "" for the evaluation as it is.
    """
    lines = [
        "| change | evaluated | n | top1: mean ± sd | difference | loss: difference | ECE: difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for change in dict.fromkeys(row["change"] for row in rows):
        found = [row["evaluated"] for row in rows if row["change"] == change]
        for flags in ["", *dict.fromkeys(evaluations)]:
            differences = [
                _mean_and_spread([each[flags][name] - each[""][name] for each in found], sign="+") if flags else ""
                for name in ("top1", "loss", "ece")
            ]
            lines.append(
                f"| {f'`{change}`' if change else 'none'} | {f'`{flags}`' if flags else 'as it is'} | {len(found)} "
                f"| {_mean_and_spread([each[flags]['top1'] for each in found])} | {' | '.join(differences)} |"
            )
    return "\n".join(lines)


def _differences(rows: list[dict[str, Any]], plain: dict[int, dict[str, Any]], name: str) -> str:
    return _mean_and_spread([row[name] - plain[row["seed"]][name] for row in rows], sign="+")


def _mean_and_spread(values: list[float], *, sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
