"""The learning rates are PyTorch's own schedules, counted in global steps."""

import random

from pipelines.config import Config
from pipelines.model.network import TransferModel
from pipelines.model.optimizer import Schedule, learning_rates, lr_factor, make_optimizer, set_learning_rates

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR
from torchvision.models import resnet18

STEPS = 7  # an epoch


def model(frozen_stages: int) -> TransferModel:
    with torch.device("meta"):  # the optimizer looks at the parameters and not at their values
        return TransferModel(resnet18(num_classes=3), frozen_stages=frozen_stages, batchnorm="train")


def factors(config: Config, steps_per_epoch: int = STEPS) -> list[float]:
    return [lr_factor(config, steps_per_epoch, step) for step in range(config.epochs * steps_per_epoch)]


def torchs(schedule: type, count: int, **settings) -> list[float]:
    """What a scheduler of PyTorch makes of the learning rate 1 in `count` calls of its step()."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = schedule(optimizer, **settings), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# Groups


def test_head_and_body_have_learning_rates_of_their_own():
    network = model(frozen_stages=0)
    optimizer = make_optimizer(network, Config(lr=0.1, lr_body=0.02, momentum=0.8, weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.SGD)
    head, body = optimizer.param_groups
    assert (head["name"], head["lr"], body["name"], body["lr"]) == ("head", 0.1, "body", 0.02)
    assert {(group["momentum"], group["weight_decay"]) for group in (head, body)} == {(0.8, 0.3)}
    assert [id(value) for value in head["params"]] == [id(value) for value in network.network.fc.parameters()]
    everything = [id(value) for group in (head, body) for value in group["params"]]
    assert sorted(everything) == sorted(id(value) for value in network.parameters())


def test_without_lr_body_the_body_learns_as_fast_as_the_head():
    head, body = make_optimizer(model(0), Config(lr=0.1)).param_groups
    assert head["lr"] == body["lr"] == 0.1


@pytest.mark.parametrize("frozen_stages", [1, 4, 5])
def test_frozen_parameters_are_not_in_the_optimizer(frozen_stages):
    network = model(frozen_stages)
    groups = make_optimizer(network, Config(lr_body=0.02)).param_groups
    assert [group["name"] for group in groups] == (["head"] if frozen_stages == 5 else ["head", "body"])
    trained = {id(value) for value in network.parameters() if value.requires_grad}
    assert {id(value) for group in groups for value in group["params"]} == trained


STAGE_OF = {"conv1": "stem", "bn1": "stem", "fc": "head", "layer4": "body"}  # of others the name itself


@pytest.mark.parametrize("decays", ["all", "matrices"])
@pytest.mark.parametrize(
    ("frozen_stages", "rates"),
    [
        (0, {"head": 0.1, "body": 0.02, "layer3": 0.01, "layer2": 0.005, "layer1": 0.0025, "stem": 0.00125}),
        (3, {"head": 0.1, "body": 0.02, "layer3": 0.01}),
        (4, {"head": 0.1, "body": 0.02}),
        (5, {"head": 0.1}),
    ],
)
def test_each_stage_learns_more_slowly_than_the_one_after_it(frozen_stages, rates, decays):
    network = model(frozen_stages)
    config = Config(lr=0.1, lr_body=0.02, layer_decay=0.5, weight_decay=0.3, weight_decay_on=decays)
    optimizer = make_optimizer(network, config)
    found = {id(value): (group["name"], group["lr"]) for group in optimizer.param_groups for value in group["params"]}
    trained = [(name, value) for name, value in network.network.named_parameters() if value.requires_grad]
    assert len(trained) == len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, value in trained:
        own = name.partition(".")[0]
        stage = STAGE_OF.get(own, own)
        assert found[id(value)] == (stage, pytest.approx(rates[stage])), name
        vector = decays == "matrices" and value.ndim == 1
        (decay,) = {
            group["weight_decay"] for group in optimizer.param_groups if any(value is own for own in group["params"])
        }
        assert decay == (0 if vector else 0.3), name
    halved = set_learning_rates(optimizer, 0.5)
    assert list(halved) == [f"lr/{name}" for name in rates]
    assert halved == pytest.approx({f"lr/{name}": rate / 2 for name, rate in rates.items()})


def test_without_lr_body_the_last_stage_learns_as_fast_as_the_head():
    rates = set_learning_rates(make_optimizer(model(2), Config(lr=0.1, layer_decay=0.7)), 1)
    assert rates == pytest.approx({"lr/head": 0.1, "lr/body": 0.1, "lr/layer3": 0.07, "lr/layer2": 0.049})


def test_without_layer_decay_the_groups_are_those_of_runs_before_it():
    """Whose checkpoints have them: the order of the parameters is what a state is loaded by."""
    network = model(0)
    body = [id(value) for name, value in network.network.named_parameters() if not name.startswith("fc.")]
    groups = make_optimizer(network, Config(layer_decay=1.0)).param_groups
    assert [group["name"] for group in groups] == ["head", "body"]
    assert [id(value) for value in groups[1]["params"]] == body


def test_adamw():
    optimizer = make_optimizer(model(0), Config(optimizer="adamw", weight_decay=0.05))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_biases_and_normalisation_need_not_decay(optimizer):
    network = model(0)
    made = make_optimizer(
        network, Config(optimizer=optimizer, lr=0.1, lr_body=0.02, weight_decay=0.3, weight_decay_on="matrices")
    )
    decays = {id(value): group["weight_decay"] for group in made.param_groups for value in group["params"]}
    for name, value in network.network.named_parameters():
        is_vector = "bn" in name or "downsample.1" in name or name.endswith("bias")
        assert decays[id(value)] == (0 if is_vector else 0.3), name
    assert set_learning_rates(made, 0.5) == {"lr/head": 0.05, "lr/body": 0.01}
    assert [(group["name"], group["lr"]) for group in made.param_groups] == [
        *(("head", 0.05), ("head", 0.05), ("body", 0.01), ("body", 0.01))
    ]


def test_nesterov():
    optimizer = make_optimizer(model(0), Config(nesterov=True))
    assert {group["nesterov"] for group in optimizer.param_groups} == {True}


def test_rates_are_set_from_the_base_every_time():
    inner = make_optimizer(model(0), Config(lr=0.1, lr_body=0.02))
    optimizer = Accelerator(cpu=True).prepare(inner)
    for factor in (0.5, 0.25, 1.0):
        rates = set_learning_rates(optimizer, factor)
        assert rates == {"lr/head": 0.1 * factor, "lr/body": 0.02 * factor}
        assert [group["lr"] for group in inner.param_groups] == list(rates.values())
    only_head = make_optimizer(model(5), Config(lr=0.1))
    assert set_learning_rates(only_head, 0.5) == {"lr/head": 0.05}


# What is at rest


@pytest.mark.parametrize(
    ("settings", "at_rest"),
    [
        ({}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"freeze_epochs": 3}, [5, 5, 5, 0, 0, 0, 0, 0]),
        ({"freeze_epochs": 3, "freeze": "layer1"}, [5, 5, 5, 2, 2, 2, 2, 2]),
        ({"freeze_epochs": 1, "unfreeze": "gradual"}, [5, 4, 3, 2, 1, 0, 0, 0]),
        ({"freeze_epochs": 2, "unfreeze": "gradual"}, [5, 5, 4, 4, 3, 3, 2, 2]),
        ({"freeze_epochs": 1, "unfreeze": "gradual", "freeze": "layer2"}, [5, 4, 3, 3, 3, 3, 3, 3]),
        ({"freeze_epochs": 1, "freeze": "layer3"}, [5, 4, 4, 4, 4, 4, 4, 4]),
        ({"freeze_epochs": 2, "arch": "swin_t"}, [5, 5, 0, 0, 0, 0, 0, 0]),
        ({"freeze_epochs": 2, "mode": "feature_extract"}, [5, 5, 5, 5, 5, 5, 5, 5]),
    ],
)
def test_what_is_at_rest_goes_by_the_epoch(settings, at_rest):
    schedule = Schedule(Config(**settings), STEPS)
    assert [schedule.stages_at_rest(epoch) for epoch in range(8)] == at_rest


def test_what_is_at_rest_has_no_rate_in_the_rows():
    network = model(2)
    optimizer = make_optimizer(network, Config(layer_decay=0.5, weight_decay=0.1, weight_decay_on="matrices"))
    for at_rest, names in ((5, ["head"]), (4, ["head", "body"]), (2, ["head", "body", "layer3", "layer2"])):
        network.rest(at_rest)
        assert [*learning_rates(optimizer)] == [f"lr/{name}" for name in names]


# The schedule


def test_step_is_pytorchs_step_lr():
    config = Config(epochs=12, schedule="step", step_epochs=5, step_gamma=0.1)
    expected = [rate for rate in torchs(StepLR, 12, step_size=5, gamma=0.1) for _ in range(STEPS)]
    assert factors(config) == pytest.approx(expected, rel=1e-12)
    assert factors(config)[5 * STEPS - 1 : 5 * STEPS + 1] == pytest.approx([1, 0.1])


def test_cosine_is_pytorchs_cosine_annealing():
    config = Config(epochs=6, schedule="cosine")
    expected = torchs(CosineAnnealingLR, 6 * STEPS, T_max=6 * STEPS)
    assert factors(config) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert lr_factor(config, STEPS, 6 * STEPS) == pytest.approx(0)


def test_cosine_ends_at_min_lr():
    config = Config(epochs=6, schedule="cosine", lr=0.5, min_lr=0.1)
    expected = torchs(CosineAnnealingLR, 6 * STEPS, T_max=6 * STEPS, eta_min=0.2)
    assert factors(config) == pytest.approx(expected, rel=1e-9)
    assert lr_factor(config, STEPS, 6 * STEPS) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("min_lr", [0.0, 0.005])
def test_one_cycle_is_pytorchs(warmup_epochs, min_lr):
    config = Config(epochs=6, schedule="one_cycle", lr=0.5, warmup_epochs=warmup_epochs, min_lr=min_lr)
    given = {"pct_start": warmup_epochs / 6} if warmup_epochs else {}
    given |= {"final_div_factor": 4.0} if min_lr else {}  # of lr/25
    expected = torchs(OneCycleLR, 6 * STEPS, max_lr=1.0, total_steps=6 * STEPS, cycle_momentum=False, **given)
    assert factors(config) == pytest.approx(expected, rel=1e-9)
    assert factors(config)[0] == pytest.approx(1 / 25)
    assert factors(config)[-1] == pytest.approx(min_lr / 0.5 if min_lr else 1 / 25 / 1e4)


def test_one_cycle_of_few_steps():
    assert factors(Config(epochs=1, schedule="one_cycle"), 1) == [1.0]
    assert factors(Config(epochs=2, schedule="one_cycle"), 1) == pytest.approx([1.0, 1 / 25e4])
    rising = factors(Config(epochs=1, warmup_epochs=1, schedule="one_cycle"), 3)
    assert rising == pytest.approx([1 / 25, 0.5 * (1 + 1 / 25), 1.0])


def test_constant():
    assert set(factors(Config(epochs=3, schedule="constant"))) == {1.0}


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_the_warm_up_rises_evenly_and_meets_the_schedule(schedule):
    config = Config(epochs=4, schedule=schedule, step_epochs=2, warmup_epochs=1.5)
    rates, warmup = factors(config), 10  # round(1.5 * 7), to the even neighbour
    assert rates[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    assert rates[warmup] == 1.0
    if schedule == "step":
        assert rates[2 * STEPS] == pytest.approx(0.1)  # epochs count from the first step, warm-up or not
    if schedule == "cosine":
        rest = 4 * STEPS - warmup
        assert rates[warmup:] == pytest.approx(torchs(CosineAnnealingLR, rest, T_max=rest), rel=1e-9)


@given(
    schedule=st.sampled_from(["constant", "step", "cosine", "one_cycle"]),
    epochs=st.integers(1, 8),
    steps=st.integers(1, 9),
    warmup=st.floats(0, 1),
)
def test_every_factor_is_above_0_and_at_most_1(schedule, epochs, steps, warmup):
    config = Config(schedule=schedule, epochs=epochs, warmup_epochs=warmup * epochs)
    forwards = factors(config, steps)
    assert all(0 < factor <= 1 for factor in forwards)
    order = list(range(len(forwards)))
    random.Random(0).shuffle(order)
    assert {step: lr_factor(config, steps, step) for step in order} == dict(enumerate(forwards))
