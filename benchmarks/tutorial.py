"""PyTorch's transfer-learning tutorial, its own procedure without this suite: what the recipes are compared with.

    python benchmarks/tutorial.py finetune --seed 0      # or features; ants and bees, 10 epochs
    python benchmarks/accuracy.py --seeds 5 --tutorial   # both, several seeds, in turn with the recipes
    python benchmarks/tutorial.py compare --runs 3       # whole commands on the clock, in turn with this suite's

https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html with 10 epochs for its 25, and with a drop
of the rate after 5 for its 7. As there, a frozen network stays in train mode: its BatchNorm statistics move. It prints
a JSON line: best and last validation accuracy (0 to 1) and the last validation loss.

`compare` starts the tutorial's code and `accelerate launch train.py` with the recipe for the same purpose by turns,
each command in a process of its own, cold: with an empty cache folder, so that nothing is known of photos or features.
It prints seconds from a command's start to its end, medians, their ratio, and the best accuracies.
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

from pipelines.cache import cache_folder
from pipelines.config import Config
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.samples import locate
from pipelines.model.weights import read_weights

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision import transforms as T

# What this suite has for each of the tutorial's two ways.
RECIPES = {"features": "feature_extract", "finetune": "finetune"}


def main() -> None:
    """Parses the command line, trains, prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=[*RECIPES, "compare"])
    parser.add_argument("--runs", type=int, default=3, help="compare: how often each command runs, seeds 0 to N-1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", help="folder with train/ and val/ (default: ants and bees, or DALITUNE_DATA)")
    options = parser.parse_args()
    if options.mode == "compare":
        print(compare(locate(options.data, cache_folder()), options.runs, options.epochs))
        return
    print(json.dumps(train(locate(options.data, cache_folder()), options.mode, options.seed, options.epochs)))


def compare(folder: Path, runs: int, epochs: int) -> str:
    """A Markdown table: for each purpose the tutorial's command and ours, `runs` times by turns."""
    here = Path(__file__).resolve()
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(here.parent.parent / "train.py")]
    rows = []
    for mode, recipe in RECIPES.items():
        seconds: dict[str, list[float]] = {"tutorial": [], "ours": []}
        best: dict[str, list[float]] = {"tutorial": [], "ours": []}
        for seed in range(runs):
            with tempfile.TemporaryDirectory() as empty:
                flags = [f"--data={folder}", f"--seed={seed}"]
                ours = [f"--config={here.parent.parent / 'configs' / recipe}.yaml", f"--runs={empty}/runs", "--run=run"]
                commands = {
                    "tutorial": [sys.executable, str(here), mode, *flags, f"--epochs={epochs}"],
                    "ours": [*launch, *flags, *ours, "--tracker=none"],
                }
                for whose, command in commands.items():
                    started = time.perf_counter()
                    environment = os.environ | {"DALITUNE_CACHE": f"{empty}/cache"}
                    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                    seconds[whose].append(time.perf_counter() - started)
                    print(f"{mode}, seed {seed}, {whose}: {seconds[whose][-1]:.1f} s", file=sys.stderr, flush=True)
                    if done.returncode:
                        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
                    if whose == "tutorial":
                        best[whose].append(json.loads(done.stdout)["best"])
                    else:
                        best[whose].append(
                            json.loads(Path(empty, "runs/run/model.json").read_text())["scores"]["val/top1"]
                        )
        medians = {whose: statistics.median(all_of) for whose, all_of in seconds.items()}
        for whose in seconds:
            each = " ".join(f"{second:.1f}" for second in seconds[whose])
            ratio = f"{medians['tutorial'] / medians[whose]:.2f}"
            name = f"tutorial.py {mode}" if whose == "tutorial" else f"{recipe}.yaml"
            accuracy = f"{statistics.mean(best[whose]):.4f}"
            rows.append(f"| `{name}` | {runs} | {each} | {medians[whose]:.1f} | {ratio} | {accuracy} |")
    title = "| command | n | seconds | median | times as fast as the tutorial | best accuracy, mean |"
    return "\n".join([title, "|---|---|---|---|---|---|", *rows])


def train(folder: Path, mode: str, seed: int, epochs: int) -> dict[str, float]:
    """One training by the tutorial: best and last validation accuracy, the last loss."""
    torch.manual_seed(seed)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    normalise = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    transforms = {
        "train": T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), T.ToTensor(), normalise]),
        "val": T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), normalise]),
    }
    photos = {split: datasets.ImageFolder(folder / split, transform) for split, transform in transforms.items()}
    loaders = {split: DataLoader(photos[split], batch_size=4, shuffle=True, num_workers=4) for split in photos}

    network = models.resnet18()
    network.load_state_dict(read_weights(Config()).state or {})
    network.requires_grad_(mode == "finetune")
    network.fc = nn.Linear(network.fc.in_features, len(photos["train"].classes))
    network = network.to(device)
    trained = network.parameters() if mode == "finetune" else network.fc.parameters()
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    criterion = nn.CrossEntropyLoss()

    accuracies, loss_sum = [], 0.0
    for _ in range(epochs):
        for split in ("train", "val"):
            network.train(split == "train")
            loss_sum, correct = 0.0, 0
            for images, labels in loaders[split]:
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()
                with torch.set_grad_enabled(split == "train"):
                    outputs = network(images)
                    loss = criterion(outputs, labels)
                    if split == "train":
                        loss.backward()
                        optimizer.step()
                loss_sum += loss.item() * len(labels)
                correct += int((outputs.argmax(dim=1) == labels).sum())
        scheduler.step()
        accuracies.append(correct / len(photos["val"]))
    return {"best": max(accuracies), "last": accuracies[-1], "last_loss": loss_sum / len(photos["val"])}


if __name__ == "__main__":
    main()
