"""An exponential moving average of the weights (Polyak and Juditsky 1992), with a warm-up for short trainings."""

import copy

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
