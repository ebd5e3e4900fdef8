"""PyTorch's transfer-learning tutorial, its own procedure without this suite: what the recipes are compared with.

    python benchmarks/tutorial.py finetune --seed 0      # or features; ants and bees, 10 epochs
    python benchmarks/accuracy.py --seeds 5 --tutorial   # both, several seeds, in turn with the recipes

https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html with 10 epochs for its 25, and with a drop
of the rate after 5 for its 7. As there, a frozen network stays in train mode: its BatchNorm statistics move. It prints
a JSON line: best and last validation accuracy (0 to 1) and the last validation loss.
"""

import argparse
import json
from pathlib import Path

from pipelines.config import Config
from pipelines.loader import IMAGENET_MEAN, IMAGENET_STD
from pipelines.photos import cache_folder, locate
from pipelines.weights import read_weights

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision import transforms as T


def main() -> None:
    """Parses the command line, trains, prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["finetune", "features"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", help="folder with train/ and val/ (default: ants and bees, or DALITUNE_DATA)")
    options = parser.parse_args()
    print(json.dumps(train(locate(options.data, cache_folder()), options.mode, options.seed, options.epochs)))


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
    loaders = {split: DataLoader(photos[split], batch_size=4, shuffle=True) for split in photos}

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
