"""How many photos a device takes at a time."""

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.config import Config
from pipelines.data.loader import largest_training_batch
from pipelines.errors import MachineError
from pipelines.model.network import TransferModel, batchnorms

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch.nn import functional

_MARGIN = 0.1  # of a GPU's memory: for kept features and finished batches, which come later
_LATER_WEIGHTS = 3  # as does as much as the trained weights: the optimizer's state, twice at most, and their average
_MOST_DECODED = 0.5  # of a GPU's memory: more is not kept back for the photos that DALI decodes, rarely all large ones


def micro_batch_of(
    config: Config,
    model: Any,
    network: TransferModel,
    accelerator: Accelerator,
    engine: str,
    sizes: Mapping[str, np.ndarray],
    teacher: TransferModel | None = None,
) -> int:
    """The most photos of one forward and backward pass on a process: its share of a step, or what is set, or what fits.

    model: the trained part of `network`, as Accelerate has prepared it. engine: "dali" decodes in the GPU's memory.
    sizes: of `train` and of `val`, int [N, 2], height and width of each photo. teacher: where there is one, it is asked
    too. With `max_batch_per_device: auto` a GPU tries its share, half of it and so on, and the smallest answer of all
    processes counts. MachineError where not even one photo fits.
    """
    share = -(-config.batch_size // accelerator.num_processes)
    if config.max_batch_per_device != "auto":
        return min(share, config.max_batch_per_device or share)
    if accelerator.device.type != "cuda":
        return share
    total = torch.cuda.mem_get_info(accelerator.device)[1]
    weights = sum(each.numel() * each.element_size() for each in network.parameters() if each.requires_grad)

    def attempt(size: int) -> None:
        others = int(_MARGIN * total) + _LATER_WEIGHTS * weights
        if engine == "dali":
            others += decoded_bytes(config, sizes, size, most=int(_MOST_DECODED * total))
        reserve = torch.empty(others, dtype=torch.uint8, device=accelerator.device)
        _try(size, config.image_size, model, network, accelerator, teacher)
        del reserve

    fits = largest_that_fits(share, attempt)
    torch.cuda.empty_cache()
    smallest = int(accelerator.gather(torch.tensor([fits], device=accelerator.device)).min())
    if not smallest:
        raise MachineError(
            "the GPU's memory does not take a single photo: free the GPU; a new run may lower --image-size"
        )
    return smallest


def decoded_bytes(config: Config, sizes: Mapping[str, np.ndarray], micro_batch: int, *, most: int) -> int:
    """What DALI's decoder may hold at once: all batches in the making, whole, in RGB, of a split's largest photos.

    sizes: as for `micro_batch_of`. most: bytes, no more is said. DALI keeps what it has had, and one pool
    serves training and validation.
    """
    largest = 0
    batches = {"train": largest_training_batch(config, micro_batch), "val": config.eval_batch_per_device}
    for split, photos in batches.items():
        pixels = np.sort(sizes[split].prod(axis=1, dtype=np.int64))[-photos:].sum()
        largest = max(largest, 3 * int(pixels) * (config.prefetch + 1))
    return min(largest, most)


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


def _try(
    size: int,
    image_size: int,
    model: Any,
    network: TransferModel,
    accelerator: Accelerator,
    teacher: TransferModel | None,
) -> None:
    """One pass with a made-up batch, of which nothing stays: no gradient and no statistics; nothing is exchanged."""
    network.train()
    for module in batchnorms(network):
        module.eval()
    images = torch.zeros(size, 3, image_size, image_size, device=accelerator.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=accelerator.device)
    try:
        with accelerator.no_sync(model), accelerator.autocast():
            if teacher:
                teacher.forward_frozen(images)
            logits = model(network.forward_frozen(images))
            functional.cross_entropy(logits.float(), labels).backward()
    finally:
        network.zero_grad(set_to_none=True)
