"""What this machine has, and what of it PyTorch does not use: an NVIDIA GPU, or bf16 on a processor fast with it."""

import json
import os
import platform
import re
import time
from contextlib import nullcontext, suppress
from hashlib import blake2b
from pathlib import Path

import pipelines.vision  # noqa: F401 (torchvision comes with it)
from pipelines.cache import cache_folder
from pipelines.files import keep_json

import torch
from torchvision.models import resnet18

_CPU_INFO = Path("/proc/cpuinfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_NVIDIA_DEVICE = Path("/dev/nvidia0")
_MEASURING_SECONDS = 1.5
_LEAST_ROUNDS = 5  # of each precision; the first is to warm up
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def nvidia_hint() -> str:
    """What keeps PyTorch from an NVIDIA GPU that is here, and what to do; "" where there is none, or it is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or not (_NVIDIA_DRIVER.exists() or _NVIDIA_DEVICE.exists()) or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            f"an NVIDIA GPU is here, and PyTorch {torch.__version__} is a build without CUDA: install one from "
            "https://pytorch.org/get-started/locally"
        )
    if not _NVIDIA_DEVICE.exists():
        return (
            "an NVIDIA driver is here, and no GPU can be reached: a container needs docker --gpus all, apptainer --nv"
        )
    number = ""
    with suppress(OSError):
        number = (re.search(r"\d+\.\d[\d.]*", _NVIDIA_DRIVER.read_text(errors="replace")) or [""])[0]
    return (
        f"an NVIDIA GPU is here, and PyTorch cannot use it: its driver {number} may be too old for CUDA "
        f"{torch.version.cuda}: a newer driver, or a build of PyTorch for an older CUDA (docs/distributed.md)"
    )


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """The processor with its usable cores, and the GPUs, for a benchmark's figures."""
    lines: list[str] = []
    with suppress(OSError):
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    processor = models[0] if models else platform.processor() or platform.machine()
    return ", ".join([f"{processor}, {cpu_cores()} cores", *gpus])


def has_bf16() -> bool:
    """Whether the processor says that it computes in bf16. Others emulate it, slowly."""
    with suppress(OSError):
        return bool(_BF16_FLAGS & set(_CPU_INFO.read_text(errors="replace").split()))
    return False


def bf16_gain(*, measure: bool) -> float | None:
    """How many times faster than in fp32 this processor trains a ResNet-18 in bf16; None where it is not known.

    It is measured once, in about a second, and then known by processor, number of threads and version of PyTorch.
    measure: False only looks it up.
    """
    if not has_bf16():
        return None
    processor = re.search(r"model name\s*:\s*(.*)", _CPU_INFO.read_text(errors="replace"))
    name = f"{processor[1] if processor else platform.machine()}, {torch.get_num_threads()}, {torch.__version__}"
    file = cache_folder() / "bf16" / f"{blake2b(name.encode(), digest_size=8).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return float(json.loads(file.read_text(encoding="utf-8"))["gain"])
    if not measure:
        return None
    if (gain := _measured_gain()) is None:
        return None
    keep_json(file, {"processor, threads, torch": name, "gain": gain})
    return gain


def _measured_gain() -> float | None:
    """Forward and backward of 2 photos of 112 pixels, the two precisions in turn; the fastest round of each counts.

    None where the machine is too busy to tell within the time that this may take.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads():
        return None
    with torch.random.fork_rng(devices=[]):
        network = resnet18().to(memory_format=torch.channels_last).train()
        images = torch.randn(2, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    give_up = time.perf_counter() + _MEASURING_SECONDS
    while time.perf_counter() < give_up:
        for in_bf16, times in seconds.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16) if in_bf16 else nullcontext():
                loss = network(images).float().sum()
            loss.backward()
            times.append(time.perf_counter() - started)
    if len(seconds[True]) < _LEAST_ROUNDS:
        return None
    return min(seconds[False]) / min(seconds[True])
