"""Averages of weights: one that follows a training (Polyak and Juditsky 1992), with a warm-up for short ones, and the
mean of trained ones."""

import copy
from collections.abc import Iterable, Mapping

from pipelines.model.network import TransferModel, batchnorms

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


def average_of(network: TransferModel) -> TransferModel:
    """A copy that `follow` makes an average of what is trained in `network`."""
    average = copy.deepcopy(network)
    average.requires_grad_(False)
    return average


@torch.no_grad()
def follow(average: TransferModel, network: TransferModel, decay: float, updates: int) -> None:
    """Moves the average to the network as it is after `updates` updates, and keeps `decay` of itself, or less at first:
    (updates - 1) / (updates + 8), so that the first update replaces it (TensorFlow's ExponentialMovingAverage).

    Nothing waits for the device. BatchNorm's statistics, where they are trained, are averaged with the weights.
    """
    pairs = [
        (own, its) for own, its in zip(average.parameters(), network.parameters(), strict=True) if its.requires_grad
    ]
    if network.batchnorm in ("train", "sync"):
        for own, its in zip(batchnorms(average), batchnorms(network), strict=True):
            pairs += [(own.running_mean, its.running_mean), (own.running_var, its.running_var)]
            own.num_batches_tracked.copy_(its.num_batches_tracked)
    kept = min(decay, (updates - 1) / (updates + 8))
    get_ema_multi_avg_fn(kept)([own for own, _ in pairs], [its.detach() for _, its in pairs], None)


def mean_of(states: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of state_dicts of one network, float32, summed in float64: of equal ones it is the same, to the bit.

    Of whole numbers, which count BatchNorm's batches, it is the largest. One of the states is held at a time.
    """
    total: dict[str, torch.Tensor] = {}
    count = 0
    for state in states:
        count += 1
        for name, value in state.items():
            if not value.is_floating_point():
                total[name] = torch.maximum(total.get(name, value), value)
            elif name in total:
                total[name] += value
            else:
                total[name] = value.to(torch.float64, copy=True)
    return {name: (value / count).float() if value.is_floating_point() else value for name, value in total.items()}
