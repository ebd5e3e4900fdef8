"""Heat maps: Grad-CAM's formula, on any network, which stays as it was."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from pipelines.errors import UserError
from pipelines.model.gradcam import GradCam
from pipelines.model.network import TransferModel

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, get_model, resnet18

SIZE = 64


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


def small_network(*, in_place: bool = False) -> nn.Module:
    """4 x 4 places of 5 channels, and a head of 3 classes that is not linear in them."""
    torch.manual_seed(0)
    end: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(80, 7)),
        ("relu", nn.ReLU(inplace=in_place)),
        ("fc", nn.Linear(7, 3)),
    ]
    return nn.Sequential(OrderedDict([("conv", nn.Conv2d(3, 5, 16, stride=16)), *end])).eval()


def test_it_is_the_formula() -> None:
    network, batch, labels = small_network(), images(4), torch.tensor([0, 1, 2, 0])
    features = network.conv(batch).detach()
    expected = []
    for place, label in zip(features, labels, strict=True):
        hidden = network.hidden(place.flatten()[None])[0]
        gradient = (network.fc.weight[label] * (hidden > 0)) @ network.hidden.weight  # of the logit, by the chain rule
        weights = gradient.view(5, 16).mean(dim=1)
        expected.append((weights[:, None, None] * place).sum(dim=0).clamp(min=0))
    expected = torch.stack(expected).detach()
    assert (expected.amax(dim=(1, 2)) > 0).all()
    expected /= expected.amax(dim=(1, 2), keepdim=True)
    found = GradCam(network, SIZE)(batch, labels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


class OneCorner(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(maps)
        kept[..., 0, -1] = maps[..., 0, -1]
        return kept


@pytest.mark.parametrize("test_flips", [False, True])
def test_an_answer_that_depends_on_one_corner_lights_that_corner(test_flips: bool) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU(), OneCorner())
    network = nn.Sequential(OrderedDict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 2)))
    nn.init.ones_(network.fc.weight)
    (found,) = GradCam(network, SIZE, test_flips=test_flips)(images(1), torch.tensor([1]))
    lit = [(0, 3)] if not test_flips else [(0, 0), (0, 3)]  # in its mirror image the corner is the other one
    assert list(zip(*np.nonzero(found), strict=True)) == lit
    assert found.max() == 1


def test_with_flips_a_mirrored_photo_has_the_mirrored_map() -> None:
    cam, batch, labels = GradCam(small_network(), SIZE, test_flips=True), images(3), torch.tensor([0, 1, 2])
    found = cam(batch, labels)
    np.testing.assert_allclose(cam(batch.flip(-1), labels), found[..., ::-1], rtol=1e-4, atol=1e-6)
    assert not np.allclose(found, GradCam(small_network(), SIZE)(batch, labels), atol=0.01)


def test_nothing_of_the_network_is_changed() -> None:
    torch.manual_seed(0)
    model = TransferModel(resnet18(num_classes=3), frozen_stages=3, batchnorm="train").train()
    network = model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, trained = (
        [each.training for each in network.modules()],
        [each.requires_grad for each in network.parameters()],
    )
    found = GradCam(network, SIZE)(images(2), torch.tensor([0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [each.training for each in network.modules()] == modes
    assert [each.requires_grad for each in network.parameters()] == trained
    assert all(each.grad is None for each in network.parameters())
    assert not any(each._forward_hooks for each in network.modules())
    model.freeze(5)
    np.testing.assert_array_equal(GradCam(network, SIZE)(images(2), torch.tensor([0, 1])), found)
    network.requires_grad_(True)
    np.testing.assert_array_equal(GradCam(network, SIZE)(images(2), torch.tensor([0, 1])), found)
    folded = GradCam(model.for_evaluation().network, SIZE)(images(2), torch.tensor([0, 1]))
    np.testing.assert_allclose(folded, found, atol=1e-3)


def test_threads_ask_at_once_within_inference_mode() -> None:
    cam, batch = GradCam(small_network(in_place=True), SIZE), images(16)
    labels = torch.arange(16) % 3
    expected = cam(batch, labels)

    def ask(at: int) -> np.ndarray:
        with torch.inference_mode():
            return cam(batch[at : at + 1] * 1, labels[at : at + 1])[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(16)))
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "arch", ["resnet18", "densenet121", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5", "swin_t"]
)
def test_other_networks_have_a_map(arch: str) -> None:
    torch.manual_seed(0)
    found = GradCam(get_model(arch, num_classes=3), 96)(torch.randn(1, 3, 96, 96), torch.tensor([1]))
    assert found.shape == (1, 3, 3)
    assert found.max() in (0, 1)


def test_a_network_that_ends_in_tokens_is_refused() -> None:
    vit = VisionTransformer(
        image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3
    )
    with pytest.raises(UserError, match="--explain: a VisionTransformer has no feature map at its end"):
        GradCam(vit, SIZE)
    assert not any(each._forward_hooks for each in vit.modules())
