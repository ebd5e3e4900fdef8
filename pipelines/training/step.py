"""One optimizer update, and the sums that the processes make of it."""

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from pipelines.config import Config
from pipelines.data.loader import Batch, Loader, Step
from pipelines.data.plan import dropout_mask, path_mask
from pipelines.distributed.copies import to_device
from pipelines.model.features import FrozenFeatures
from pipelines.model.teacher import sum_of_divergences

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.nn.utils import get_total_norm


class StepSums(NamedTuple):
    """What is summed over all processes in a step: float32 [7] on the device, in this order.

    loss: of the photos. correct: as `number_correct` counts. grad_norm: before it is clipped, 0 where it is not finite.
    finite_steps: 1 where it is finite. stop_votes, save_votes: how many processes want to stop, to save.
    """

    loss: float
    correct: float
    photos: float
    grad_norm: float
    finite_steps: float
    stop_votes: float
    save_votes: float


METRICS = slice(0, StepSums._fields.index("stop_votes"))  # all but the votes


def update(
    model: Any,
    features: FrozenFeatures,
    optimizer: torch.optim.Optimizer,
    step: Step,
    votes: tuple[bool, bool],
    loader: Loader,
    accelerator: Accelerator,
    config: Config,
    class_weights: torch.Tensor | None = None,
    teacher: FrozenFeatures | None = None,
) -> tuple[torch.Tensor, Batch]:
    """One optimizer update from one global batch.

    model: the network's trained part, as Accelerate has prepared it. votes: whether this process wants to stop, to
    save. class_weights: float32 [C], of the photos in the loss. teacher: its answers, where there is one: the loss is
    then shared between the labels' and its own, by `teacher_weight`.
    Returns the tensor of `StepSums`, and this process's first micro-batch.
    The loss is the sum over this process's photos divided by the global number of positions. DDP takes the mean of the
    processes' gradients, hence the factor num_processes; they are exchanged once, after the last micro-batch.
    """
    optimizer.zero_grad()
    sums = torch.zeros(len(StepSums._fields), device=accelerator.device)
    learned, own_votes = sums[METRICS], sums[METRICS.stop :]
    for vote, is_given in zip(own_votes, votes, strict=True):
        if is_given:  # filled, as a copy from the host would wait for all of the step before
            vote.fill_(1)
    for number in range(step.rounds):
        # A process without a share takes part with a batch of no photos, as the others wait for its gradients.
        batch = next(step.batches, None) or loader.empty_batch()
        if number == 0:
            first_batch = batch
        dropped = {}
        if config.dropout:
            dropped["scales"] = dropout_scales(batch, features.head_inputs, config.dropout, accelerator.device)
        if config.drop_path and (blocks := features.droppable_blocks):
            dropped["path_scales"] = path_scales(batch, blocks, config.drop_path, accelerator.device)
        with nullcontext() if number == step.rounds - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                answers = teacher.of(batch).float() if teacher else None
                logits = model(features.of(batch), **dropped).float()
            losses = sum_of_losses(logits, batch, class_weights, config.label_smoothing)
            if answers is not None:
                divergences = sum_of_divergences(logits, answers, config.teacher_temperature)
                losses = torch.lerp(losses, divergences, config.teacher_weight)
            accelerator.backward(losses * (accelerator.num_processes / step.size))
        correct = number_correct(logits, batch)
        learned[:3] += torch.stack([losses.detach(), correct, torch.full_like(correct, len(batch))])
    if config.clip_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
    else:
        accelerator.unscale_gradients(optimizer)
        norm = get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    if accelerator.is_main_process:  # it is the same on all
        learned[3:] = torch.stack([norm.nan_to_num(0, 0, 0), norm.isfinite()])
    optimizer.step()
    return accelerator.reduce(sums, "sum"), first_batch


def dropout_scales(batch: Batch, features: int, chance: float, device: torch.device) -> torch.Tensor:
    """float32 [n, features], on the device, what dropout multiplies the head's inputs by (Srivastava et al. 2014): 0 by
    that chance, else 1 / (1 - chance). By the photos' keys, and so the same wherever and whenever they are trained on.
    """
    assert batch.keys is not None, "only training photos have keys"
    kept = torch.from_numpy(dropout_mask(batch.keys, features, chance))
    return to_device(kept, device) * (1 / (1 - chance))


def path_scales(batch: Batch, blocks: int, chance: float, device: torch.device) -> torch.Tensor:
    """float32 [n, blocks, 2], on the device, what stochastic depth multiplies a block's additions by (Huang et al.
    2016): 0 by a chance that grows evenly from 0 in the first block to `chance` in the last, else 1 / (1 - that), as
    torchvision's. By the photos' keys, as dropout.
    """
    assert batch.keys is not None, "only training photos have keys"
    chances = chance * np.arange(blocks) / max(blocks - 1, 1)
    kept = path_mask(batch.keys, chances) / (1 - chances[:, None])
    return to_device(torch.from_numpy(kept.astype(np.float32)), device)


def sum_of_losses(
    logits: torch.Tensor, batch: Batch, class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The cross-entropy of the photos, summed. Of a mixed photo it is that of a target shared between the two labels,
    which is the mean of both labels' by their shares (Zhang et al. 2018).

    logits: float32 [n, C].
    """
    loss_of = partial(functional.cross_entropy, logits, weight=class_weights, label_smoothing=label_smoothing)
    if batch.partners is None:
        return loss_of(batch.labels, reduction="sum")
    own, other = (loss_of(labels, reduction="none") for labels in (batch.labels, batch.partners.labels))
    return torch.lerp(other, own, batch.partners.shares).sum()


def number_correct(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How many answers are right; an answer to a mixed photo counts by the share that the answered class has in it."""
    answers = logits.argmax(dim=1)
    is_right = answers == batch.labels
    if batch.partners is None:
        return is_right.sum()
    return torch.lerp((answers == batch.partners.labels).float(), is_right.float(), batch.partners.shares).sum()
