"""A training step never makes the host wait for the GPU: what a CPU can hold of it (`test_gpu.py` asks CUDA itself)."""

from types import SimpleNamespace
from typing import Any

from pipelines.config import Config
from pipelines.data.augment import altered
from pipelines.data.loader import Batch, Partners, Step
from pipelines.data.mixing import mixed
from pipelines.data.plan import OPERATIONS, Augmentation, TrainPlan
from pipelines.distributed.copies import to_device
from pipelines.model.average import average_of, follow
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TrainedPart, TransferModel
from pipelines.model.optimizer import make_optimizer
from pipelines.model.teacher import sum_of_divergences
from pipelines.training.evaluation import _outcomes
from pipelines.training.progress import Interval
from pipelines.training.step import number_correct, sum_of_losses, update

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

STAND_IN = torch.device("meta")  # for a GPU: another device than the CPU, on which nothing can be read


class StandInForSyncDebugMode(TorchDispatchMode):
    """For torch.cuda.set_sync_debug_mode("error"), with the stand-in for a GPU.

    Reading a value of the stand-in is an error of PyTorch's own. Here everything is one that CUDA waits for in a copy
    from the host: a tensor made of Python's numbers, memory that is not pinned, an index on the CPU, a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [each for each in torch.utils._pytree.tree_leaves(args) if isinstance(each, torch.Tensor)]
        hosts = [each for each in given if each.device.type == "cpu" and each.ndim]
        if isinstance(result, torch.Tensor) and result.device == STAND_IN:
            waits = name == "lift_fresh" or (hosts and name not in ("_to_copy", "copy_"))
            if name in ("_to_copy", "copy_") and hosts:
                options = [*args[2:], (kwargs or {}).get("non_blocking")]
                waits = True not in options or hosts[0].data_ptr() not in self.pinned
            if waits:
                raise RuntimeError(f"called a synchronizing operation: {func}")
        return result


@pytest.fixture
def no_waiting(monkeypatch) -> StandInForSyncDebugMode:
    """The stand-ins, for pinned memory too, which needs a driver."""
    mode = StandInForSyncDebugMode()

    def stand_in_for_pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        mode.pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", stand_in_for_pin_memory)
    return mode


@pytest.mark.parametrize(
    "waits",
    [
        lambda gpu: gpu.sum().item(),
        lambda gpu: gpu.tolist(),
        lambda gpu: gpu.cpu(),
        lambda gpu: gpu[gpu > 0],
        lambda gpu: bool(gpu.isfinite().all()),
        lambda gpu: torch.tensor([1.0, 0.0], device=STAND_IN),
        lambda gpu: torch.zeros(3).to(STAND_IN),
        lambda gpu: torch.zeros(3).to(STAND_IN, non_blocking=True),  # not pinned
        lambda gpu: gpu.copy_(torch.zeros(3)),
        lambda gpu: gpu[torch.tensor([0, 2])],
    ],
)
def test_the_stand_in_finds_what_waits(no_waiting, waits):
    gpu = torch.zeros(3, device=STAND_IN)
    with no_waiting, pytest.raises(RuntimeError):  # NotImplementedError is one
        waits(gpu)
    with no_waiting:
        to_device(torch.zeros(3), STAND_IN)
        gpu.add_(1).fill_(2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("frozen_stages", [0, 4, 5])
@pytest.mark.parametrize(("clip", "dropout"), [(None, 0.0), (1.0, 0.3)])
def test_a_training_step_waits_for_nothing(no_waiting, monkeypatch, optimizer, frozen_stages, clip, dropout):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "device", STAND_IN)
    config = Config(image_size=64, optimizer=optimizer, clip_grad_norm=clip, label_smoothing=0.1, dropout=dropout)
    with STAND_IN:
        network = TransferModel(resnet18(num_classes=3), frozen_stages=frozen_stages, batchnorm="frozen").train()
        images = torch.zeros(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, config)
    training: Any = SimpleNamespace(plan=SimpleNamespace(length=9), empty_batch=lambda: batch(images[:0]))
    features = FrozenFeatures(network, training, accelerator, views_per_photo=2, epochs=3, micro_batch=4)
    assert features.are_kept == (frozen_stages > 0)
    for home in ("cpu", "meta"):  # where features are kept
        if features.are_kept:
            features._now = torch.zeros(9, features.bytes // (2 * 9 * 4), device=home)
        interval = Interval(STAND_IN)
        with no_waiting:
            for votes in ((False, False), (True, True)):
                batches = (batch(images[:0] if features.are_kept else images) for _ in range(2))
                sums, first = update(
                    TrainedPart(network), features, optimizer, Step(8, 2, batches), votes, training, accelerator, config
                )
                interval.add(sums)
                assert sums.device == STAND_IN
                assert len(first) == 4


def batch(images: torch.Tensor, *, is_mixed: bool = False) -> Batch:
    labels = to_device(torch.zeros(4, dtype=torch.int64), STAND_IN)
    partners = Partners(labels, to_device(torch.ones(4), STAND_IN)) if is_mixed else None
    return Batch(images, labels, torch.arange(4), partners, np.arange(4).astype(np.uint64))


def test_the_loss_of_mixed_photos_and_of_a_teacher_wait_for_nothing(no_waiting):
    with STAND_IN:
        logits, images = torch.zeros(4, 3), torch.zeros(4, 3, 64, 64)
    with no_waiting:
        of_mixed = batch(images, is_mixed=True)
        assert sum_of_losses(logits, of_mixed, None, 0.1).device == number_correct(logits, of_mixed).device == STAND_IN
        assert sum_of_divergences(logits, logits + 1, 2.0).device == STAND_IN


def test_what_comes_behind_a_step_and_behind_the_engine_waits_for_nothing(no_waiting):
    with STAND_IN:
        network = TransferModel(resnet18(num_classes=3), frozen_stages=0, batchnorm="train").train()
        images = torch.zeros(99, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    average = average_of(network)
    plan = TrainPlan(
        np.full((99, 2), 80),
        seed=0,
        image_size=64,
        crop_scale_min=0.5,
        flip_probability=0.5,
        augmentation=Augmentation(0.5, True, 0.4, 0.4, 0.4, 0.1, 0.9, 30, 10, 0.2, 0.5, 0.9, "strong"),
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    alterations, mixing = plan.views(0, np.arange(99)).alterations, plan.mixing(0, np.arange(99))
    assert alterations
    assert set(alterations.operations) == set(range(len(OPERATIONS)))
    assert mixing
    assert mixing.boxes.any()
    with no_waiting:
        follow(average, network, 0.9, 3)
        assert mixed(altered(images, alterations), mixing).device == STAND_IN


def test_an_evaluation_waits_for_nothing_within_it(no_waiting):
    logits, labels = torch.zeros(4, 3, device=STAND_IN), torch.zeros(4, dtype=torch.int64, device=STAND_IN)
    with no_waiting:
        assert {each.device for each in _outcomes(logits, labels)} == {STAND_IN}


@pytest.mark.parametrize("votes", [(False, False), (True, False), (False, True)])
def test_votes_reach_the_sums(votes):
    network = TransferModel(resnet18(num_classes=3), frozen_stages=5, batchnorm="frozen").train()
    config, accelerator = Config(image_size=64), Accelerator(cpu=True)
    images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)
    step = Step(2, 1, iter([Batch(images, labels, torch.arange(2))]))
    features: Any = SimpleNamespace(of=lambda batch: network.forward_frozen(batch.images))
    loader: Any = None
    sums, _ = update(
        TrainedPart(network), features, make_optimizer(network, config), step, votes, loader, accelerator, config
    )
    assert (sums[2].item(), sums[5:].bool().tolist()) == (2, list(votes))
