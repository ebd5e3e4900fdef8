"""Best and last validation accuracy of recipes over several seeds: the table that the README shows.

    python benchmarks/accuracy.py --seeds 5                                         # the four recipes, ants and bees
    python benchmarks/accuracy.py --recipes finetune --data photos/ --set lr=0.02   # another folder, another setting
    python benchmarks/accuracy.py --data photos/train --seeds 3                     # choose by a part of train

Every run is `accelerate launch train.py` in a process of its own. Recipes take turns within a seed, so that a busy hour
of the machine meets all of them. A run that is in --out already is not run again, so an interrupted benchmark goes on
where it was.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines.runs import versions

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ["tutorial_finetune", "tutorial_features", "finetune", "feature_extract"]


def main() -> None:
    """Parses the command line, runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names in configs/, or YAML files")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--data", help="folder or CSV (default: ants and bees, or DALITUNE_DATA)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of every recipe")
    parser.add_argument("--out", type=Path, default=Path("accuracy.jsonl"), help="JSON lines, one a run")
    options = parser.parse_args()

    wanted = [(recipe, seed) for seed in range(options.seeds) for recipe in options.recipes]
    rows = _read(options.out)
    for recipe, seed in tqdm(wanted, unit="run", disable=None):
        key = {"recipe": recipe, "seed": seed, "data": options.data, "set": options.set}
        if any(key.items() <= row.items() for row in rows):
            continue
        row = key | _run(recipe, seed, options.data, options.set)
        rows.append(row)
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(f"{recipe} seed {seed}: best {row['best']:.4f}, last {row['last']:.4f}, {row['seconds']:.0f} s")
    chosen = [row for row in rows if row["data"] == options.data and row["set"] == options.set]
    _print_table([row for row in chosen if (row["recipe"], row["seed"]) in wanted], options.recipes)


def _run(recipe: str, seed: int, data: str | None, settings: list[str]) -> dict[str, Any]:
    """One training: best and last accuracy, the last loss, and the seconds of the whole command."""
    config = Path(recipe) if recipe.endswith(".yaml") else ROOT / "configs" / f"{recipe}.yaml"
    flags = [f"--config={config}", f"--seed={seed}", "--tracker=none", "--run=run", *(f"--{pair}" for pair in settings)]
    flags += [f"--data={data}"] if data else []
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py"), *flags, f"--runs={runs}"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{recipe}, seed {seed} failed:\n{done.stderr[-2000:]}")
        metrics = [json.loads(line) for line in (Path(runs) / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in metrics if "val/top1" in row]
    accuracies = [row["val/top1"] for row in evaluations]
    facts = {"last_loss": evaluations[-1]["val/loss"], "seconds": round(seconds, 1), "versions": versions()}
    return {"best": max(accuracies), "last": accuracies[-1], **facts}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _print_table(rows: list[dict[str, Any]], recipes: list[str]) -> None:
    print(f"\n{platform.machine()}, {os.cpu_count()} cores; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    print("| recipe | n | best: mean ± sd | best: least-most | last: mean ± sd | last loss | seconds, median |")
    print("|---|---|---|---|---|---|---|")
    for recipe in recipes:
        of_recipe = [row for row in rows if row["recipe"] == recipe]
        best, last = ([row[name] for row in of_recipe] for name in ("best", "last"))
        loss = statistics.mean(row["last_loss"] for row in of_recipe)
        seconds = statistics.median(row["seconds"] for row in of_recipe)
        print(
            f"| `{Path(recipe).stem}` | {len(best)} | {_mean_and_spread(best)} | {min(best):.4f}-{max(best):.4f} "
            f"| {_mean_and_spread(last)} | {loss:.4f} | {seconds:.0f} |"
        )


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
