"""Whether two checkouts train alike: the same short trainings in each, loss for loss and weight for weight.

    git worktree add ../before HEAD~1
    python benchmarks/same.py ../before .              # says "identical", or by how much they differ, and exits with 1
    python benchmarks/same.py . --write trajectory.json

Drawn photos of 64 pixels, seed 0, one process on the CPU, decoded by Pillow, some steps of each recipe; the first
weights are drawn, too.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines.files import file_digest
from pipelines.text import lasting_streams

import torch
from torchvision.models import resnet18
from tqdm import tqdm

STEPS = 20
# Pillow's pixels, which are the same wherever it runs; `auto` takes what is installed.
_ALL = ["--data", "shapes", "--image-size", "64", "--resize", "72", "--log-every", "1", "--tracker", "none"]
_ALL += ["--loader", "pillow"]
TRAININGS = {
    # At its own rate the last bits, which differ between processors, are in all digits after ten steps.
    "quickstart": ["--config", "configs/quickstart.yaml", "--lr", "0.00001"],
    "finetune": ["--config", "configs/finetune.yaml", "--weights", "WEIGHTS"],
    "finetune, layer4 alone": ["--config", "configs/finetune.yaml", "--weights", "WEIGHTS", "--freeze", "layer3"],
}
_COMPARED = ("train/loss", "val/loss", "val/top1", "head/top1")


@lasting_streams()
def main() -> int:
    """Parses the command line, trains, prints a line for each training. Returns 0 where all are identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT", help="two, or one with --write")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the losses of the first, for test_trajectory.py")
    options = parser.parse_args()
    if len(options.checkouts) != 2 and not (options.write and len(options.checkouts) == 1):
        parser.error("two checkouts are compared, or one is written with --write")
    with tempfile.TemporaryDirectory() as folder:
        weights = draw_weights(Path(folder))
        wanted = [(name, checkout) for name in TRAININGS for checkout in options.checkouts]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAININGS}
        for number, (name, checkout) in enumerate(tqdm(wanted, unit="training", disable=None)):
            found[name].append(train(checkout, name, weights, Path(folder, str(number))))
    if options.write:
        losses = {name: made[0]["losses"] for name, made in found.items()}
        rows = {name: ",\n".join(f"  {json.dumps(row)}" for row in made) for name, made in losses.items()}
        text = ",\n".join(f" {json.dumps(name)}: [\n{made}\n ]" for name, made in rows.items())
        options.write.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    lines = [f"{name}: {difference(*made)}" for name, made in found.items() if len(made) == 2]
    if lines:
        print(*lines, sep="\n")
    return int(any(not line.endswith(": identical") for line in lines))


def draw_weights(folder: Path) -> Path:
    """A file with a state_dict of a ResNet-18, the same on every machine."""
    torch.manual_seed(0)
    file = folder / "weights.pth"
    torch.save(resnet18().state_dict(), file)
    return file


def train(checkout: Path, name: str, weights: Path, runs: Path) -> dict[str, Any]:
    """One training of TRAININGS with the code of `checkout`: "losses", a list of rows, and "weights", a digest."""
    flags = [str(weights) if flag == "WEIGHTS" else flag for flag in TRAININGS[name]]
    flags += [*_ALL, "--max-steps", str(STEPS), "--runs", str(runs), "--run", "run", "--cache-gb", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}, {name} failed:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [{key: row[key] for key in ("global_step", *_COMPARED) if key in row} for row in rows]
    return {"losses": losses, "weights": file_digest(runs / "run" / "best.pt")}


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """ "identical", or in what two trainings differ."""
    if one == other:
        return "identical"
    pairs = list(zip(one["losses"], other["losses"], strict=False))
    if len(one["losses"]) != len(other["losses"]) or any(a.keys() != b.keys() for a, b in pairs):
        return f"other rows: {len(one['losses'])} and {len(other['losses'])}"
    gaps = [(_gap(a[key], b[key]), a["global_step"], key) for a, b in pairs for key in a]
    largest, step, key = max(gaps)
    if not largest:
        return "the same losses, other weights"
    return f"losses differ, by {largest:.2g} of their value at most ({key} at step {step})"


def _gap(one: float | None, other: float | None) -> float:
    """Relative to `one`. None is a loss that was not finite."""
    if one is None or other is None:
        return 0.0 if one == other else math.inf
    return abs(one - other) / max(abs(one), 1e-9)


if __name__ == "__main__":
    sys.exit(main())
