"""What trains and what moves under every setting, and the head that a new model gets."""

from typing import get_args

from pipelines.config import Arch, Config
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.model.average import average_of, follow
from pipelines.model.network import (
    STAGES,
    TransferModel,
    average_batchnorm_statistics,
    batchnorms,
    build_model,
    parameter_counts,
    resolve_batchnorm,
    restore_model,
)
from pipelines.model.optimizer import make_optimizer
from pipelines.model.weights import Weights, head_name
from pipelines.run.folder import RunFolder

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import get_model, get_model_weights, resnet18

CLASSES = ("ant", "bee", "wasp")
FREEZES = {
    0: {"freeze": "none"},
    1: {"freeze": "stem"},
    2: {"freeze": "layer1"},
    3: {"freeze": "layer2"},
    4: {"freeze": "layer3"},
    5: {"mode": "feature_extract"},
}  # frozen stages -> settings


def plain_state(classes: int = 1000, seed: int = 0) -> dict[str, torch.Tensor]:
    """A resnet18 whose BatchNorm statistics are not the ones that a new network has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = resnet18(num_classes=classes)
        for module in batchnorms(network):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.state_dict()


@pytest.fixture(scope="module")
def pretrained() -> Weights:
    return Weights(plain_state(), "pretrained")


def images(count: int, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def frozen_names(frozen_stages: int) -> tuple[str, ...]:
    prefixes = {"stem": ("conv1.", "bn1.")}
    return tuple(prefix for stage in STAGES[:frozen_stages] for prefix in prefixes.get(stage, (f"{stage}.",)))


def snapshot(model: TransferModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


# What is trained, what is frozen


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
@pytest.mark.parametrize("frozen_stages", FREEZES)
def test_an_update_moves_what_is_trained_and_no_photo_moves_nothing(pretrained, frozen_stages, batchnorm):
    model = build_model(Config(batchnorm=batchnorm, **FREEZES[frozen_stages]), pretrained, CLASSES).train()
    frozen = frozen_names(frozen_stages)
    parameters = {name for name, _ in model.network.named_parameters()}
    trained = {name for name in parameters if not name.startswith(frozen or "nothing")}
    assert {name for name, value in model.network.named_parameters() if value.requires_grad} == trained

    before, batch = snapshot(model), images(3).requires_grad_(frozen_stages > 0)
    hidden = model.forward_frozen(batch)
    assert hidden.grad_fn is None
    assert not hidden.requires_grad
    assert (hidden is batch) == (frozen_stages == 0)
    functional.cross_entropy(model.forward_trained(hidden), torch.tensor([0, 1, 2])).backward()
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1).step()

    assert all(value.grad is None for name, value in model.network.named_parameters() if name not in trained)
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    statistics = set(before) - parameters
    assert moved & parameters == trained
    assert moved & statistics == (statistics if batchnorm == "train" else set())
    assert model.frozen_part_is_fixed == (frozen_stages > 0 and batchnorm == "frozen")

    model.zero_grad()
    modes, before = [module.training for module in model.modules()], snapshot(model)
    logits = model(images(0))
    functional.cross_entropy(logits, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert logits.shape == (0, 3)
    # Zero, and not missing: the other processes of a DDP run wait for it.
    assert all(not value.grad.any() for value in model.parameters() if value.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("frozen_stages", "at_rest", "batchnorm"), [(0, 5, "frozen"), (0, 4, "train"), (2, 4, "frozen")]
)
def test_what_is_at_rest_is_moved_by_neither_gradient_momentum_nor_decay(pretrained, frozen_stages, at_rest, batchnorm):
    model = build_model(Config(batchnorm=batchnorm, **FREEZES[frozen_stages]), pretrained, CLASSES).train()
    optimizer = make_optimizer(model, Config(lr=0.1, weight_decay=0.1))
    found: list[bool] = []
    model.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].requires_grad))
    for number, stages in enumerate((frozen_stages, at_rest, frozen_stages)):
        assert model.rest(stages) == (number > 0)
        model.for_evaluation()  # a copy that has the same parameters
        optimizer.zero_grad()
        before, names = snapshot(model), [name for name, _ in model.network.named_parameters()]
        logits = model(images(3))
        assert found.pop() == (stages < 5), "nothing is kept for a backward pass through what rests"
        functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        optimizer.step()
        moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
        resting = frozen_names(stages)
        assert moved & {*names} == {name for name in names if not name.startswith(resting or "nothing")}
        assert moved - {*names} == ({*before} - {*names} if batchnorm == "train" else set())
        assert all(value.grad is None for name, value in model.network.named_parameters() if name not in moved)
    average = average_of(model)
    model.rest(at_rest)
    follow(average, model, 0.9, 5)
    assert all(torch.equal(value, snapshot(average)[name]) for name, value in snapshot(model).items())


@pytest.mark.parametrize("frozen_stages", FREEZES)
def test_both_parts_together_are_torchvisions_network(pretrained, frozen_stages):
    model = build_model(Config(**FREEZES[frozen_stages]), pretrained, CLASSES).eval()
    with torch.no_grad():
        logits = model(images(2))
        assert not frozen_stages or model._folded_frozen_part
        torch.testing.assert_close(logits, model.network(images(2)), rtol=1e-4, atol=1e-5)


OTHERS = {"mobilenet_v3_small": 64, "regnet_y_400mf": 64, "swin_t": 64, "vit_b_32": 224}  # -> pixels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "mode"),
    [
        ("mobilenet_v3_small", "finetune"),
        ("mobilenet_v3_small", "feature_extract"),
        ("regnet_y_400mf", "feature_extract"),
        ("swin_t", "finetune"),
        ("vit_b_32", "feature_extract"),
    ],
)
def test_a_network_without_stages_is_frozen_as_a_whole_or_not_at_all(arch, mode):
    config = Config(arch=arch, mode=mode, image_size=OTHERS[arch])
    state = get_model(arch, weights=None).state_dict()
    model = build_model(config, Weights(state, ""), CLASSES).train()
    has_batchnorm = bool(batchnorms(model))
    assert model.batchnorm == ("frozen" if has_batchnorm else "none")
    assert model.frozen_part_is_fixed == (mode == "feature_extract")
    assert model.dropout_is_left_out == (arch in ("mobilenet_v3_small", "swin_t"))
    head = {f"{model.head_name}.weight", f"{model.head_name}.bias"}
    parameters = {name for name, _ in model.network.named_parameters()}
    trained = {name for name, value in model.network.named_parameters() if value.requires_grad}
    assert trained == (parameters if mode == "finetune" else head)
    groups = [group["name"] for group in make_optimizer(model, config).param_groups]
    assert groups == (["head", "body"] if mode == "finetune" else ["head"])
    before, batch = snapshot(model), images(3, OTHERS[arch])
    assert all(torch.equal(before[name], state[name]) for name in state.keys() - head)
    hidden = model.forward_frozen(batch)
    assert hidden.shape == ((3, model.head.in_features) if mode == "feature_extract" else batch.shape)
    logits = model.forward_trained(hidden)
    torch.testing.assert_close(logits, model.eval().network(batch))  # training drops nothing
    functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1).step()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert head <= moved <= trained
    model.zero_grad()
    model.train()(images(0, OTHERS[arch])).sum().backward()
    assert all(not value.grad.any() for value in model.parameters() if value.requires_grad)
    restored = restore_model(arch, Weights(model.network.state_dict(), "", CLASSES)).eval()
    torch.testing.assert_close(restored(batch), model.eval().network(batch))


@pytest.mark.slow
def test_every_named_network_is_one_of_torchvisions():
    smallest = {arch[:4]: arch for arch in reversed(get_args(Arch))}.values()  # of each family
    for arch in get_args(Arch):
        transforms = get_model_weights(arch).DEFAULT.transforms()
        assert (transforms.mean, transforms.std) == ([*IMAGENET_MEAN], [*IMAGENET_STD])
        if arch in smallest:
            network = get_model(arch, weights=None, num_classes=3)
            head = network.get_submodule(head_name(network))
            assert (head.out_features, len(head.bias)) == (3, 3)


def test_train_mode_leaves_frozen_batchnorm_in_eval(pretrained):
    network = build_model(Config(), pretrained, CLASSES).network
    for batchnorm in ("frozen", "train"):
        model = TransferModel(network, frozen_stages=0, batchnorm=batchnorm).train()
        assert {module.training for module in batchnorms(model)} == {batchnorm == "train"}
        assert model.network.layer4[0].conv1.training
        assert not any(module.training for module in model.eval().modules())


def test_sync_in_one_process_is_plain_batchnorm(pretrained):
    """SyncBatchNorm runs on GPUs only, and one process has nobody to talk to."""
    model = build_model(Config(batchnorm="sync"), pretrained, CLASSES)
    assert model.batchnorm == "sync"
    assert {type(module) for module in batchnorms(model)} == {nn.BatchNorm2d}
    assert model.train()(images(0)).shape == (0, 3)
    assert model.network.bn1.running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("setting", "state", "expected"),
    [("auto", {}, "frozen"), ("auto", None, "train"), ("train", {}, "train"), ("frozen", None, "frozen")],
)
def test_batchnorm_auto_is_frozen_with_weights_and_train_without(setting, state, expected):
    assert resolve_batchnorm(Config(batchnorm=setting), Weights(state, "")) == expected


def test_statistics_of_frozen_batchnorm_are_never_averaged(pretrained):
    """(x + x + x) / 3 is not always x, and there is no process group here: touching them would fail."""
    average_batchnorm_statistics(build_model(Config(), pretrained, CLASSES), world_size=3)


def test_parameter_counts(pretrained):
    assert parameter_counts(build_model(Config(mode="feature_extract"), pretrained, ("a", "b"))) == (11177538, 1026)
    assert parameter_counts(build_model(Config(), pretrained, ("a", "b"))) == (11177538, 11177538)


def test_channels_last_memory(pretrained):
    for wanted in (True, False):
        weight = build_model(Config(channels_last=wanted), pretrained, CLASSES).network.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


# The head


def test_the_head_is_drawn_from_the_seed_alone(pretrained):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    head = build_model(Config(seed=7), pretrained, CLASSES).network.fc
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_model(Config(seed=7), pretrained, CLASSES).network.fc
    assert torch.equal(head.weight, again.weight)
    assert torch.equal(head.bias, again.bias)
    other = build_model(Config(seed=8), pretrained, CLASSES).network.fc
    assert not torch.isclose(head.weight, other.weight).all(dim=1).any()
    # PyTorch's own range, filled evenly.
    bound = 512**-0.5
    assert 0.99 * bound < head.weight.max() <= bound
    assert -bound <= head.weight.min() < -0.99 * bound
    assert head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_head_of_zeros_needs_no_seed(pretrained):
    for seed in (1, 2):
        head = build_model(Config(head_init="zeros", seed=seed), pretrained, ("ant", "bee")).network.fc
        assert not head.weight.any()
        assert not head.bias.any()
    of_run = Weights(plain_state(2), "run", ("ant", "bee"))
    kept = build_model(Config(head_init="zeros"), of_run, ("ant", "bee")).network.fc
    assert torch.equal(kept.weight, of_run.state["fc.weight"])


def test_the_heads_first_weights_never_change(pretrained):
    """Golden values: a run of last year must begin with the same head."""
    head = build_model(Config(seed=0), pretrained, CLASSES).network.fc
    values = [*head.weight[0, :3].tolist(), head.weight[2, 511].item(), *head.bias.tolist()]
    golden = [0.038633302, 0.017791513, 0.007096863, -0.0016641546, 0.00027887908, 0.043966208, 0.021082517]
    assert values == pytest.approx(golden, abs=1e-8)


def test_random_weights_come_from_the_seed(pretrained):
    settings = {"weights": "none", "batchnorm": "train"}
    first, again, other = (
        build_model(Config(seed=seed, **settings), Weights(None, "random"), CLASSES).network for seed in (3, 3, 4)
    )
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_the_head_of_a_run_is_kept_where_its_classes_are_the_same(pretrained):
    weights = Weights(plain_state(3), "run", CLASSES)
    kept = build_model(Config(), weights, CLASSES).network
    assert torch.equal(kept.fc.weight, weights.state["fc.weight"])
    assert torch.equal(kept.conv1.weight, weights.state["conv1.weight"])
    turned = build_model(Config(), weights, CLASSES[::-1]).network
    assert torch.equal(turned.conv1.weight, weights.state["conv1.weight"])
    assert torch.equal(turned.fc.weight, build_model(Config(), pretrained, CLASSES).network.fc.weight)


def test_restore_model_is_the_model_as_it_was_saved():
    state = plain_state(3)
    plain = resnet18(num_classes=3).eval()
    plain.load_state_dict(state)
    model = restore_model("resnet18", Weights(state, "run", CLASSES)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images(2)), plain(images(2)), rtol=1e-4, atol=1e-4)


# Files


@pytest.mark.parametrize("sync", [False, True])
def test_best_weights_load_with_the_tutorials_three_lines(pretrained, tmp_path, sync):
    model = build_model(Config(), pretrained, CLASSES)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(model.network) if sync else model.network
    RunFolder(tmp_path).save_best(network, {})
    saved = torch.load(tmp_path / "best.pt", map_location="cpu", weights_only=True)
    assert list(saved) == list(resnet18().state_dict())
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in saved.values())

    m = resnet18()
    m.fc = nn.Linear(512, 3)
    m.load_state_dict(torch.load(tmp_path / "best.pt", map_location="cpu"))
    with torch.no_grad():
        expected = model.eval()(images(2))
        torch.testing.assert_close(m.eval()(images(2)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "regnet_y_400mf"])
@pytest.mark.parametrize("mode", ["finetune", "feature_extract"])
def test_scales_are_those_of_the_heads_inputs(arch, mode):
    state = get_model(arch, weights=None).state_dict()
    model = build_model(Config(arch=arch, mode=mode, image_size=64), Weights(state, ""), CLASSES).train()
    photos, features = model.forward_frozen(images(3)), model._features(images(3))
    scales = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).round() * 2
    found = model.forward_trained(photos, scales)
    torch.testing.assert_close(found, model.head(features * scales), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model.forward_trained(photos))
    torch.testing.assert_close(model.forward_trained(photos, torch.ones_like(scales)), model.forward_trained(photos))
