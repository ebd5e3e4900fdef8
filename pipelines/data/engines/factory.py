"""Which engine decodes here, and why; and one of them, made."""

import importlib.util
from collections.abc import Sequence

from pipelines.data.dataset import Split
from pipelines.data.engines.base import Engine
from pipelines.data.engines.dali_check import fault_of_dali
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import MachineError, UserError

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def choose_engine(wanted: str, device: torch.device) -> tuple[str, str]:
    """Which engine runs on `device` for the setting `loader` (auto, dali or pillow), and why: ("dali", "...").

    On a GPU DALI is tried in a child process first (`dali_check`). Raises UserError where DALI is asked for and is not
    installed, MachineError where it is asked for and does not work.
    """
    on_gpu = device.type == "cuda"
    if wanted == "pillow" or (wanted == "auto" and not on_gpu):
        return "pillow", "as asked" if wanted == "pillow" else "no GPU"
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        if wanted == "auto":
            return "pillow", "a GPU, but DALI is not installed"
        raise UserError(
            "loader: dali is not installed here (its wheels exist for Linux on x86-64 and aarch64): "
            "install nvidia-dali-cuda130, or use --loader pillow"
        )
    misfit = _dali_misfit() if on_gpu else None
    if wanted == "dali" and misfit:
        raise UserError(f"loader: {misfit}: install the build that fits, or use --loader pillow")
    fault = misfit or (fault_of_dali(device) if on_gpu else "")
    if wanted == "dali" and fault:
        raise MachineError(f"loader: {fault}: use --loader pillow")
    return ("pillow", fault) if fault else ("dali", "as asked" if wanted == "dali" else "a GPU, and DALI works there")


def agree_on_engine(wanted: str, state: PartialState) -> tuple[str, str]:
    """`choose_engine` for all processes of a run: one process of each node tries, and all take the same engine."""
    if state.num_processes == 1:
        return choose_engine(wanted, state.device)
    chosen, error = None, None
    if state.is_local_main_process:
        try:
            chosen = choose_engine(wanted, state.device)
        except (UserError, MachineError) as failure:
            error = failure
    answers = gather_object([(chosen, error and (type(error), str(error)))])
    for _, failed in answers:
        if failed:
            raise failed[0](failed[1])
    return min((answer for answer, _ in answers if answer), key=lambda answer: answer[0] != "pillow")


def make_engine(
    name: str,
    split: Split,
    *,
    image_size: int,
    micro_batch: int,
    device: torch.device,
    threads: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Engine:
    """The engine `name` ("dali" or "pillow") for the photos of a split, with `threads` threads on the CPU."""
    if name == "dali":
        from pipelines.data.engines.dali import DaliEngine

        return DaliEngine(split, image_size, micro_batch, device, threads, mean, std)
    from pipelines.data.engines.pillow import PillowEngine

    return PillowEngine(split, image_size, device, threads, mean, std)


def _dali_misfit() -> str | None:
    """What is wrong where DALI is built for another CUDA than PyTorch: Accelerate would start, and DALI crash later."""
    import nvidia.dali

    dali, ours = nvidia.dali.__cuda_version__ // 1000, int((torch.version.cuda or "0").split(".")[0])
    return None if dali == ours else f"DALI is built for CUDA {dali}, PyTorch for CUDA {ours}"
