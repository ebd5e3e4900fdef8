"""How many photos a device takes at a time."""

from collections.abc import Callable
from typing import Any

from pipelines.config import Config
from pipelines.errors import MachineError
from pipelines.model import TransferModel, batchnorms

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

_MARGIN = 0.1  # of a GPU's memory: for the optimizer's state and the engine's batches, which come later


def micro_batch_of(config: Config, model: Any, network: TransferModel, accelerator: Accelerator) -> int:
    """The most photos of one forward and backward pass on a process: its share of a step, or what is set, or what fits.

    model: `network` as Accelerate has prepared it. With `max_batch_per_device: auto` a GPU tries its share, half of it
    and so on, and the smallest answer of all processes counts. MachineError where not even one photo fits.
    """
    share = -(-config.batch_size // accelerator.num_processes)
    if config.max_batch_per_device != "auto":
        return min(share, config.max_batch_per_device or share)
    if accelerator.device.type != "cuda":
        return share
    reserve = torch.empty(
        int(_MARGIN * torch.cuda.mem_get_info(accelerator.device)[1]), dtype=torch.uint8, device=accelerator.device
    )
    fits = largest_that_fits(share, lambda size: _try(size, config.image_size, model, network, accelerator))
    del reserve
    torch.cuda.empty_cache()
    smallest = int(accelerator.gather(torch.tensor([fits], device=accelerator.device)).min())
    if not smallest:
        raise MachineError("the GPU's memory does not take a single photo: lower --image-size, or free the GPU")
    return smallest


def largest_that_fits(share: int, attempt: Callable[[int], None]) -> int:
    """The first of share, share / 2, ... for which `attempt` does not run out of memory; 0 where none does."""
    size = share

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    def first(size: int) -> int:
        attempt(size)
        return size

    # Not as a decorator: before Accelerate 1.15 that form forgets reduce_batch_size_fn.
    search = find_executable_batch_size(first, starting_batch_size=share, reduce_batch_size_fn=halve)
    try:
        return search()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0


def _try(size: int, image_size: int, model: Any, network: TransferModel, accelerator: Accelerator) -> None:
    """One pass with a made-up batch, of which nothing stays: no gradient and no statistics; nothing is exchanged."""
    network.train()
    for module in batchnorms(network):
        module.eval()
    images = torch.zeros(size, 3, image_size, image_size, device=accelerator.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=accelerator.device)
    try:
        with accelerator.no_sync(model), accelerator.autocast():
            logits = model(network.frozen_part(images))
            functional.cross_entropy(logits.float(), labels).backward()
    finally:
        network.zero_grad(set_to_none=True)
