"""The moving average is PyTorch's own, with a warm-up, of what is trained."""

from pipelines.model.average import average_of, follow
from pipelines.model.network import TransferModel

import pytest
import torch
from torchvision.models import resnet18


@pytest.mark.parametrize(("batchnorm", "frozen_stages"), [("frozen", 4), ("train", 0)])
def test_it_follows_what_is_trained(batchnorm, frozen_stages):
    torch.manual_seed(0)
    network = TransferModel(resnet18(num_classes=2), frozen_stages=frozen_stages, batchnorm=batchnorm)
    average = average_of(network)
    expected, decay = {}, 0.4
    for updates in range(1, 9):
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
        network.train()
        network(torch.randn(4, 3, 64, 64))  # moves BatchNorm's statistics where they are trained
        kept = min(decay, (updates - 1) / (updates + 8))
        for name, value in network.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * value if updates > 1 else value.clone()
        follow(average, network, decay, updates)
    state = average.state_dict()
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    assert bool(frozen) == (frozen_stages > 0)
    for name, value in network.state_dict().items():
        if name in frozen or "num_batches" in name or (batchnorm == "frozen" and "running" in name):
            assert torch.equal(state[name], value), name
        else:
            torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in average.parameters())
