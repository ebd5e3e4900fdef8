"""What a checkpoint holds: each part of a training, by the same entry for all of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import kills
from pipelines.config import Config
from pipelines.model.network import TransferModel
from pipelines.run.checkpoint import Checkpoints, Progress, UnreadablePhotos, _own_or_mean
from pipelines.run.folder import RunFolder
from pipelines.training.progress import StepWatch

import pytest
import torch
from accelerate import Accelerator
from torchvision.models import resnet18


class Counter:
    """A part that somebody adds."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Average(torch.nn.Module):
    """Another, of tensors."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(value))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create(Config())
    return run


def parts_of(run: RunFolder, value: int) -> dict[str, Any]:
    torch.manual_seed(value)
    network = TransferModel(resnet18(num_classes=2), frozen_stages=5, batchnorm="frozen")
    optimizer = torch.optim.SGD(network.head.parameters(), lr=0.1 * (value + 1), momentum=0.9)
    watch = StepWatch()
    watch.not_finite_in_a_row = value
    train: Any = SimpleNamespace(split=Photos("train", run.folder), bad={value})
    val: Any = SimpleNamespace(split=Photos("val", run.folder), bad=set())
    return {
        "model": network,
        "optimizer": optimizer,
        "progress": Progress(value, 2 * value, best={"epoch": value, "val/top1": 0.5}),
        "losses": watch,
        "unreadable": UnreadablePhotos(run, (train, val)),
        "counter": Counter(value),
        "average": Average(float(value)),
    }


class Photos:
    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, str(root).encode()

    def path(self, position: int) -> str:
        return f"{self.root.decode()}/{self.name}/{position}.jpg"


def test_every_part_comes_back(run):
    """A new part needs an entry and nothing else; where it holds tensors of PyTorch's they are in state.pt."""
    dataset, accelerator = SimpleNamespace(fingerprint="f"), Accelerator(cpu=True)
    saved, loaded = parts_of(run, 3), parts_of(run, 0)
    checkpoints = [Checkpoints(run, dataset, accelerator, parts, {"fact": 1}) for parts in (saved, loaded)]
    checkpoints[0].save()
    (folder,) = (run.folder / "checkpoints").iterdir()
    assert folder.name == "epoch-0003-step-00000006"
    progress = json.loads((folder / "progress.json").read_text())
    assert progress["fact"] == 1
    assert set(torch.load(folder / "state.pt", weights_only=True)) >= {"model", "optimizer", "average"}
    checkpoints[1].load({**progress, "checkpoint": folder.name})
    for name, part in loaded.items():
        assert kills.equal(part.state_dict(), saved[name].state_dict()), name


def test_two_parts_do_not_keep_something_under_one_name(run):
    parts = parts_of(run, 1) | {"another": Counter(2)}
    with pytest.raises(AssertionError, match="another and another part keep something under the same name"):
        Checkpoints(run, SimpleNamespace(fingerprint="f"), Accelerator(cpu=True), parts, {}).save()


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(0.5, 1.0)], 0),
        ([(0.5, 1.0), (0.5, 0.5)], 0),
        ([(0.5, 1.0), (0.6, float("nan"))], 0),
        ([(0.1, 9.0), (0.2, 9.0)], 1),
    ],
)
def test_the_best_is_kept(rows, best):
    """Of a tie the earlier; never one whose loss is not finite."""
    progress = Progress()
    assert not progress.has_best
    for number, (top1, loss) in enumerate(rows):
        progress.keep_best({"val/top1": top1, "val/loss": loss, "epoch": number}, "val/top1", 1, 2)
    assert progress.has_best
    assert progress.best["epoch"] == best


@pytest.mark.parametrize(("counts", "mean"), [((1, 3), 1.75), ((0, 2), 2.0), ((0, 0), 1.0)])
def test_another_number_of_processes_has_the_mean_of_batchnorms_statistics(counts, mean):
    """Weighted by batches; where nobody has counted any, those of the first weights."""
    values = (1.0, 2.0) if any(counts) else (1.0, 1.0)
    saved = [
        {"bn.running_mean": torch.full((2,), value), "bn.num_batches_tracked": torch.tensor(count)}
        for value, count in zip(values, counts, strict=True)
    ]
    assert _own_or_mean(saved, 0, 1)["bn.running_mean"].tolist() == [mean, mean]
    assert _own_or_mean(saved, 1, 2) is saved[1]
