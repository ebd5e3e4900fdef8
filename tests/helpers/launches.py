"""What a launch of scripts is told of the machine, without one."""

from types import SimpleNamespace

from pipelines.config import Config
from pipelines.distributed.launch import launcher_hints

import torch


def hints(device: str = "cpu", precision: str = "no", processes: int = 1, photos: int = 10, **settings) -> list[str]:
    launched = SimpleNamespace(device=torch.device(device), mixed_precision=precision, num_processes=processes)
    return launcher_hints(launched, Config(**settings), photos)
