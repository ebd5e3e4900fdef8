"""A trained network whose answers are learned beside the labels (Hinton, Vinyals and Dean 2015)."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import Config
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import UserError
from pipelines.model.network import STAGES, TransferModel, restore_model
from pipelines.model.weights import Weights, read_run_weights
from pipelines.run_files import read_description, read_run_config, read_trained_config
from pipelines.text import composed, printable

import torch
from torch.nn import functional

_SAME_CLASSES = "give a run of the same classes"


class Teacher(TransferModel):
    """A network of which nothing is trained: `forward_frozen` runs all of it and gives logits, float [n, classes], not
    calibrated, so that `FrozenFeatures` keeps them where photos have few views.

    order: for each class of the training, its place among those of `weights`. source: the run's folder. digest: hex, of
    the values, with the classes in the training's order. dataset_fingerprint: of the photos that it was trained on.
    """

    def __init__(self, arch: str, weights: Weights, order: Sequence[int], dataset_fingerprint: str = "") -> None:
        network = restore_model(arch, weights).network
        super().__init__(network, frozen_stages=len(STAGES), batchnorm="frozen")
        self.eval()
        with torch.no_grad():
            for value in self.head.parameters():
                value.copy_(value[list(order)])
        self.arch, self.source, self.dataset_fingerprint = arch, weights.source, dataset_fingerprint
        self.digest = Weights(network.state_dict(), "").digest()

    @torch.no_grad()
    def forward_frozen(self, images: torch.Tensor) -> torch.Tensor:
        """float [n, 3, H, W] -> logits float [n, classes], of the view that is given alone."""
        return self.head(super().forward_frozen(images))

    def forward_trained(
        self, hidden: torch.Tensor, scales: torch.Tensor | None = None, path_scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Nothing is left to do."""
        return hidden

    def frozen_digest(self) -> str:
        """Hex, of all layers and values, as the answers depend on the head too."""
        head = {name: value.cpu() for name, value in self.head.state_dict().items()}
        return super().frozen_digest() + Weights(head, "").digest()


def read_teacher(config: Config, classes: Sequence[str], digest: str | None = None) -> Teacher:
    """The run folder that `teacher` names, on the CPU, its classes in the order of `classes`.

    digest: of the teacher that a run which goes on has had so far, None where there was none. UserError where the
    folder is no trained run, has other classes, wants another input than this training gives it, or holds another
    teacher than that one.
    """
    run, own = Path(os.path.expanduser(str(config.teacher))), Path(config.runs) / str(config.run)
    if os.path.realpath(run) == os.path.realpath(own):
        raise UserError(f"teacher: {run} is this run itself: give another run's folder, or another --run name")
    description = read_description(run, "teacher")
    if not (run / "best.pt").is_file():
        raise UserError(f"teacher: {run} has no best.pt: give the folder of a finished run")
    names, wanted = [*map(composed, description["classes"])], [*map(composed, classes)]
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"teacher: {run} does not know the class {printable(unknown[0])!r}: {_SAME_CLASSES}")
    if others := [name for name in names if name not in wanted]:
        raise UserError(f"teacher: {run} has a class {printable(others[0])!r}, and the photos none: {_SAME_CLASSES}")
    trained = read_trained_config(run) or (read_run_config(run) if (run / "config.yaml").is_file() else None)
    # model.json has the size that it was evaluated at; of an exported folder nothing else is known.
    size, sizes = description["image_size"], {config.image_size, config.evaluation_size}
    if trained:
        size, sizes = trained.image_size, {config.image_size}
    takes_one = description["arch"].startswith("vit_")
    if takes_one and not config.image_size == (config.first_image_size or config.image_size) == size:
        raise UserError(f"teacher: {run} is a vision transformer: give --image_size {size}, and no first_image_size")
    if size not in sizes:
        raise UserError(
            f"teacher: {run} was trained for {size} pixels, and it sees what this run sees, {config.image_size}: give "
            f"--image_size {size} (with a --resize to go with it), or another teacher"
        )
    if (tuple(description["mean"]), tuple(description["std"])) != (IMAGENET_MEAN, IMAGENET_STD):
        raise UserError(f"teacher: {run} wants another mean or std of its input than ImageNet's: give another teacher")
    weights = read_run_weights(run, description["arch"], "teacher")
    teacher = Teacher(
        *(description["arch"], weights, [names.index(name) for name in wanted], description["dataset_fingerprint"])
    )
    if digest not in (None, teacher.digest):
        raise UserError(
            f"teacher: {run} has other weights than the teacher that run {config.run} has had so far: give that one's "
            "folder, or put its best.pt back; for a new run give another --run name"
        )
    return teacher


def sum_of_divergences(logits: torch.Tensor, answers: torch.Tensor, temperature: float) -> torch.Tensor:
    """The Kullback-Leibler divergence of the network's probabilities from the teacher's, both at `temperature`, summed
    over the photos, times the temperature's square, which keeps the gradient's size whatever the temperature is.

    logits, answers: float32 [n, C], the network's and the teacher's.
    """
    own, its = (functional.log_softmax(each / temperature, dim=1) for each in (logits, answers))
    return functional.kl_div(own, its, reduction="sum", log_target=True) * temperature**2
