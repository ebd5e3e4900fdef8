"""Copies between the host and a GPU that neither of the two waits for, and what a GPU may keep.

From pageable memory CUDA copies at once and the host waits until the GPU has come so far; from pinned memory it queues.
"""

from collections.abc import Callable

import torch

_SHARE = 32  # of a GPU's free memory one part; two kept things stay well within the margin of `micro_batch`


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`, whose next work has them; the host goes on at once."""
    if values.device.type == device.type:
        return values
    if device.type not in ("cpu", "mps"):  # Apple's GPU shares the host's memory
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """`values` in the host's memory, once the GPU has come so far; the host goes on at once and must not read them."""
    if values.device.type != "cuda":
        return values.cpu()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Starts a copy to the host. What is returned gives the numbers; it waits for them, not for later work."""
    copy = to_host(values)
    if values.device.type != "cuda":
        return copy.tolist
    event = torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return copy.tolist()

    return read


def free_bytes_on(device: torch.device) -> int:
    """How many bytes may be kept on a GPU for a whole run, asked before it trains; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] // _SHARE if device.type == "cuda" else 0
