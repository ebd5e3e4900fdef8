"""The optimizer and the learning-rate schedule, a pure function of `global_step`."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import Config
from pipelines.model.network import STAGES, TransferModel, frozen_stages

import torch

_RISE, _FIRST, _LAST = 0.3, 1 / 25, 1 / 25e4  # of one cycle: its share of the steps, and its ends, as PyTorch's


@dataclass(frozen=True)
class Schedule:
    """How long a training is, and its learning rates: functions of `global_step`, which counts updates.

    config: with `epochs` a number, and `freeze` a stage or none.
    """

    config: Config
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Updates of the whole training."""
        assert self.config.epochs != "auto"
        return min(self.config.epochs * self.steps_per_epoch, self.config.max_steps or sys.maxsize)

    @property
    def epochs(self) -> int:
        """Epochs that are begun; the last one ends early where max_steps says so."""
        return -(-self.total_steps // self.steps_per_epoch)

    def is_over(self, epoch: int, best_epoch: int) -> bool:
        """Whether the training ends after `epoch` epochs, `best_epoch` having been the best: all are trained, or
        `patience` of them since were no better."""
        patience = self.config.patience
        return epoch >= self.epochs or (patience is not None and epoch - best_epoch >= patience)

    def ends_epoch(self, global_step: int) -> bool:
        """Whether an epoch is over after so many updates."""
        return global_step % self.steps_per_epoch == 0 or global_step == self.total_steps

    def stages_at_rest(self, epoch: int) -> int:
        """How many of STAGES, the first ones, are not trained in `epoch` (0 is the first): frozen, or yet to join."""
        return len(STAGES) - sum(epoch >= first for first in joining_epochs(self.config).values())

    def set_rates(self, optimizer: torch.optim.Optimizer, global_step: int) -> dict[str, float]:
        """The rates of the update at `global_step` (0 is the first), as `learning_rates` has them."""
        return set_learning_rates(optimizer, lr_factor(self.config, self.steps_per_epoch, global_step))


def joining_epochs(config: Config) -> dict[str, int]:
    """By stage, the last one first, the epoch (0 is the first) from which on it is trained. Frozen ones are left out.

    config: with `freeze` a stage or none. Of a network that is no ResNet all have the same.
    """
    stages = reversed(STAGES[frozen_stages(config, config.freeze) :])
    is_gradual = config.unfreeze == "gradual"
    return {stage: config.freeze_epochs * (1 + number * is_gradual) for number, stage in enumerate(stages)}


def make_optimizer(model: TransferModel, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW over the trained parameters, in the groups "head" and (where the body is trained) "body".

    With `layer_decay` "body" is the last stage alone, and those before it are groups of their own, "layer3" to "stem".
    Each is two groups of that name where only matrices decay: those, and the vectors.
    """
    head = list(model.head.parameters())
    body = [each for each in model.parameters() if each.requires_grad and not any(each is own for own in head)]
    lr_body = config.lr if config.lr_body is None else config.lr_body
    groups: list[dict[str, Any]] = [{"params": head, "name": "head", "base_lr": config.lr}]
    if config.layer_decay < 1:
        for depth, (stage, values) in enumerate(model.trained_stages().items()):
            rate = lr_body * config.layer_decay**depth
            groups.append({"params": values, "name": stage if depth else "body", "base_lr": rate})
    elif body:
        groups.append({"params": body, "name": "body", "base_lr": lr_body})
    if config.weight_decay_on == "matrices":
        groups = [part for group in groups for part in _matrices_and_vectors(group)]
    for group in groups:
        group["lr"] = group["base_lr"]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay)


def _matrices_and_vectors(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The two groups of one, of which the second does not decay; none without parameters."""
    parts = [[each for each in group["params"] if (each.ndim > 1) == is_matrix] for is_matrix in (True, False)]
    halves = [{**group, "params": parts[0]}, {**group, "params": parts[1], "weight_decay": 0.0}]
    return [half for half in halves if half["params"]]


def lr_factor(config: Config, steps_per_epoch: int, global_step: int) -> float:
    """What the base learning rates are multiplied by for the update at `global_step` (0 is the first).

    Linear warm-up over `warmup_epochs`, then `constant`, `step` (x step_gamma every step_epochs epochs, as StepLR) or
    `cosine` (to min_lr at the end of `epochs`; Loshchilov & Hutter 2017, without restarts). `one_cycle` has a warm-up
    of its own (as OneCycleLR; Smith 2018).
    """
    if config.schedule == "one_cycle":
        return _one_cycle(config, steps_per_epoch, global_step)
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if global_step < warmup_steps:
        return (global_step + 1) / (warmup_steps + 1)
    if config.schedule == "step":
        return config.step_gamma ** (global_step // steps_per_epoch // config.step_epochs)
    if config.schedule == "cosine":
        assert config.epochs != "auto"
        remaining = max(1, config.epochs * steps_per_epoch - warmup_steps)
        return _along_cosine(1.0, config.min_lr / config.lr, global_step - warmup_steps, remaining)
    return 1.0


def _one_cycle(config: Config, steps_per_epoch: int, global_step: int) -> float:
    assert config.epochs != "auto"
    last = config.epochs * steps_per_epoch - 1
    peak = max(0.0, (config.warmup_epochs or _RISE * config.epochs) * steps_per_epoch - 1)
    if global_step < peak:
        return _along_cosine(_FIRST, 1.0, global_step, peak)
    if last <= peak:  # of one step, or all warm-up: it does not fall
        return 1.0
    return _along_cosine(1.0, config.min_lr / config.lr or _LAST, global_step - peak, last - peak)


def _along_cosine(start: float, end: float, step: float, steps: float) -> float:
    """Half a wave from `start`, at step 0, to `end`, at `steps`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group's learning rate to `factor` times its base; returns them as `learning_rates` does."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return learning_rates(optimizer)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates that are set, as `lr/head`, `lr/body` and, with `layer_decay`, `lr/layer3` and so on to `lr/stem`; none
    of what is at rest."""
    groups = [group for group in optimizer.param_groups if any(each.requires_grad for each in group["params"])]
    return {f"lr/{group['name']}": group["lr"] for group in groups}


def rate_jump(config: Config, steps_per_epoch: int, global_step: int, last_rates: Mapping[str, float]) -> list[str]:
    """For a run that goes on at `global_step`: a line where the rate is off its course, as other `epochs` make it.

    last_rates: those of the last update, as in the checkpoint; {} where there was none.
    """
    if not last_rates or not global_step:
        return []
    last, following = (lr_factor(config, steps_per_epoch, step) for step in (global_step - 1, global_step))
    was, next_rate = last_rates["lr/head"], config.lr * following
    if math.isclose(was, config.lr * last, rel_tol=1e-6, abs_tol=1e-12):
        return []
    return [
        f"lr: the last step was at {was:.3g} and the next is at {next_rate:.3g}, as the {config.schedule} schedule is "
        f"over {config.epochs} epochs now"
    ]
