"""BatchNorm folded into convolutions: the same answers, of whatever the network's weights are at the time."""

import copy
import gc
import weakref

from pipelines.config import Config
from pipelines.model.average import average_of, follow
from pipelines.model.folding import foldable
from pipelines.model.network import TransferModel, batchnorms, build_model
from pipelines.model.optimizer import make_optimizer
from pipelines.model.weights import Weights

import pytest
import torch
from torch import nn
from torch.autograd import _unsafe_preserve_version_counter
from torchvision.models import get_model


def drawn_state(arch: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights whose BatchNorm does something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = get_model(arch, weights=None)
        for module in batchnorms(network):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.state_dict()


def images(count: int = 2) -> torch.Tensor:
    drawn = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    return drawn.contiguous(memory_format=torch.channels_last)


def model_of(arch: str = "resnet18", seed: int = 0, **settings) -> TransferModel:
    return build_model(Config(arch=arch, **settings), Weights(drawn_state(arch, seed), ""), ("ant", "bee", "wasp"))


def assert_same_answers(model: TransferModel) -> None:
    """To 1e-4 of the largest: of the network as it stands, through its frozen part, and as an evaluation asks it."""
    was_training = model.training
    with torch.no_grad():
        expected = model.eval().network(images())
        evaluated = model.for_evaluation()
        for logits in (model(images()), evaluated.mean_logits(evaluated.view_features(images()))):
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    model.train(was_training)


# BatchNorm layers that no convolution precedes alone: a DenseNet's, which come first.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "left"),
    [
        ("resnet18", 0),
        ("resnet50", 0),
        ("densenet121", 62),
        ("efficientnet_b0", 0),
        ("mobilenet_v3_small", 0),
        ("regnet_y_400mf", 0),
        ("shufflenet_v2_x0_5", 0),
        ("vgg11_bn", 0),
        ("swin_t", 0),
    ],
)
def test_a_folded_network_gives_the_same_answers(arch, left):
    model = model_of(arch, mode="feature_extract")
    assert_same_answers(model)
    assert len(batchnorms(model.for_evaluation())) == left
    assert len(foldable(model.network)) == len(batchnorms(model)) - left


@pytest.mark.parametrize("settings", [{"freeze": "layer2"}, {"mode": "feature_extract"}, {"batchnorm": "train"}, {}])
def test_the_folded_copy_follows_the_weights_and_is_not_saved(settings):
    model = model_of(**settings)
    names, parameters = list(model.state_dict()), [id(value) for value in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    assert_same_answers(model)
    assert list(model.state_dict()) == names
    assert [id(value) for value in model.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    optimizer = make_optimizer(model, Config(lr=0.1, **settings))
    kept = model._folded_frozen_part
    assert (kept is not None) == model.frozen_part_is_fixed
    model.train()(images(3)).square().sum().backward()
    optimizer.step()
    assert_same_answers(model)
    assert model._folded_frozen_part is kept, "the frozen part has not changed"

    model.load_state_dict(model_of(seed=1, **settings).state_dict())
    assert_same_answers(model)
    model.to(memory_format=torch.contiguous_format)
    assert_same_answers(model)
    model.double()
    assert model.forward_frozen(images(2).double()).dtype == model.for_evaluation().network.conv1.weight.dtype


@pytest.mark.parametrize("settings", [{"freeze": "layer2"}, {"mode": "feature_extract"}, {}])
def test_an_average_is_folded_as_it_is_now(settings):
    """On a GPU one kernel moves all weights, and PyTorch counts no version of what it has changed."""
    model = model_of(**settings)
    average = average_of(model)
    for step in range(1, 4):
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1 + 0.1 * value.requires_grad)
        with _unsafe_preserve_version_counter(tuple(average.parameters())):
            follow(average, model, 0.9, step)
        assert_same_answers(average)


def test_the_copy_takes_memory_for_new_weights_only():
    model = model_of(freeze="layer1")
    model.forward_frozen(images())
    assert model._folded_frozen_part is not None
    own = {value.data_ptr() for value in model.parameters()}
    new = {
        name for name, value in model._folded_frozen_part[1].network.named_parameters() if value.data_ptr() not in own
    }
    assert {name.split(".")[0] for name in new} == {"conv1", "layer1"}


def test_looking_for_what_can_be_folded_keeps_no_weights_alive():
    network = get_model("resnet18", weights=None)
    weight = weakref.ref(network.conv1.weight)
    gc.disable()
    try:
        assert foldable(network)
        del network
        assert weight() is None, "without a collection, which may come much later"
    finally:
        gc.enable()


def test_a_copy_made_in_inference_mode_serves_training():
    model = model_of(freeze="layer3")
    with torch.inference_mode():
        model.for_evaluation()
    model.train()(images()).sum().backward()
    assert model.head.weight.grad is not None
