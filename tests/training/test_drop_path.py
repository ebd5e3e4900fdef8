"""Stochastic depth, planned: what is left out, how often, of which networks."""

from functools import partial
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

from pipelines.config import DROPS_PATHS, Arch, Config
from pipelines.data.loader import Batch, Step
from pipelines.model.features import FrozenFeatures
from pipelines.model.network import TrainedPart, TransferModel
from pipelines.training.step import path_scales, update

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models import get_model_builder
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import StochasticDepth

CPU = torch.device("cpu")


def convnext(chance: float = 0.3) -> nn.Module:
    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=chance, layer_scale=1.0, num_classes=3)


def swin(chance: float = 0.3) -> nn.Module:
    sizes: Any = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": [4, 4]}
    return SwinTransformer(**sizes, stochastic_depth_prob=chance, num_classes=3)


def efficientnet(chance: float = 0.3) -> nn.Module:
    block = partial(MBConvConfig, 2, 3, 1, width_mult=1.0, depth_mult=1.0)
    blocks = [block(input_channels=8, out_channels=8, num_layers=each) for each in (1, 2)]
    return EfficientNet(blocks, 0.2, stochastic_depth_prob=chance, num_classes=3)


def model_of(network: nn.Module) -> TransferModel:
    return TransferModel(network, frozen_stages=0, batchnorm="frozen").train()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def batch(keys: range) -> Batch:
    count = len(keys)
    return Batch(images(count), torch.zeros(count, dtype=torch.int64), torch.arange(count), None, np.array(keys, "u8"))


@pytest.mark.parametrize("make", [convnext, swin, efficientnet])
def test_chances_are_torchvisions(make):
    """Of an EfficientNet's last block torchvision's is a little less than what is asked for, by (L - 1) / L."""
    torchvisions = np.array([each.p for each in make(0.3).modules() if isinstance(each, StochasticDepth)])
    torchvisions *= len(torchvisions) / (len(torchvisions) - 1) if make is efficientnet else 1
    scales = path_scales(batch(range(4000)), 3, 0.3, CPU)
    assert scales.dtype == torch.float32
    kept = (scales > 0).double().mean(dim=(0, 2)).numpy()
    assert kept == pytest.approx(1 - torchvisions, abs=0.03)
    assert scales.mean(dim=(0, 2)).numpy() == pytest.approx(np.ones(3), abs=0.03), "the mean is as it would be without"
    for block, chance in enumerate(torchvisions):
        assert scales[:, block].unique().tolist() == pytest.approx([0.0, 1 / (1 - chance)] if chance else [1.0])


@pytest.mark.parametrize("make", [convnext, swin, efficientnet])
def test_what_is_left_out_is_what_the_block_adds(make):
    network = make()
    model = model_of(network)
    photos, ones = images(3), torch.ones(3, 3, 2)
    plain = model.forward_trained(photos)
    assert torch.equal(model.forward_trained(photos, None, ones), plain)
    last = [each for each in network.modules() if any(isinstance(of, StochasticDepth) for of in each.children())][-1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    last.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    scales = ones.clone()
    scales[1, 2] = 0  # of the second photo the last block
    dropped = model.forward_trained(photos, None, scales)
    (before, after), others = seen[0], [0, 2]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(dropped[others], plain[others])
    assert not torch.allclose(dropped[1], plain[1])
    torch.testing.assert_close(model.forward_trained(photos), plain)  # no hook is left
    assert model.forward_trained(photos[:0], None, scales[:0]).shape == (0, 3)

    model.rest(5)
    assert model.droppable == []


@pytest.mark.parametrize("drop_path", [0.0, 0.9])
def test_an_update_owes_nothing_to_the_micro_batches(drop_path):
    """Nor, so, to the processes; and something is left out, in the training only."""
    found, accelerator, config = [], Accelerator(cpu=True), Config(arch="swin_t", drop_path=drop_path)
    for sizes in ([6], [2, 4]):
        torch.manual_seed(0)
        model = model_of(swin())
        training: Any = SimpleNamespace(plan=SimpleNamespace(length=6), empty_batch=lambda: batch(range(0)))
        features = FrozenFeatures(model, training, accelerator, views_per_photo=None, epochs=1, micro_batch=6)
        whole, first = batch(range(6)), np.cumsum([0, *sizes])
        parts = [
            Batch(*(each[a:b] for each in (whole.images, whole.labels, whole.indices)), None, whole.keys[a:b])
            for a, b in pairwise(first)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Step(6, len(sizes), iter(parts))
        sums, _ = update(TrainedPart(model), features, optimizer, step, (False, False), training, accelerator, config)
        found.append([sums[:4], model.head.weight.detach()])
    torch.testing.assert_close(*found)
    torch.manual_seed(0)
    loss = nn.functional.cross_entropy(model_of(swin())(images(6)), torch.zeros(6, dtype=torch.int64), reduction="sum")
    assert (abs(found[0][0][0] - loss) < 1e-4) == (drop_path == 0)


def test_networks_that_have_blocks_to_leave_out_are_those_that_are_taken():
    for arch in get_args(Arch):
        has_blocks = hasattr(import_module(get_model_builder(arch).__module__), "StochasticDepth")
        assert has_blocks == arch.startswith(DROPS_PATHS), arch
