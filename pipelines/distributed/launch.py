"""The start of a run's processes: the launcher's settings checked, the device taken, and what it leaves unused said."""

import math
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

from pipelines.config import Config
from pipelines.distributed.hardware import bf16_gain, cpu_cores, has_bf16, nvidia_hint
from pipelines.distributed.sync import local_world_size
from pipelines.errors import UserError
from pipelines.text import counted

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin

_CORES_OF_A_GPU = 4  # with fewer, decoding and launching wait for each other
_STEPS_WORTH_A_SEARCH = 5000  # a second or more for each shape of a batch, to make a step some per cent faster
_YES = ("1", "true", "yes", "y", "on", "t")
_OTHER_PROJECTS = {  # what the launcher sets for them
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a model split over devices",
}
_BF16_PAYS = 1.15  # times as fast as fp32
_BF16_MATTERS = 2000  # photos of 224 pixels in all epochs: about a minute on two cores


def start_processes() -> PartialState:
    """Joins the process group that the launcher describes (a single process without one) and picks the device.

    UserError where the launcher's configuration asks for what is not done here, or for more devices than there are.
    """
    _check_launcher()
    threads = max(1, cpu_cores() // local_world_size())
    group: dict[str, Any] = {}
    if "RANK" in os.environ:
        group = InitProcessGroupKwargs(timeout=timedelta(minutes=30)).to_kwargs()
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or each process would warn that it is not set
    # Accelerator() asks for the CPU by the same variable; the group that is opened here is the one it finds.
    state = PartialState(cpu=cpu_is_asked_for(), **group)
    # Without a launcher OMP_NUM_THREADS is a person's. A launcher sets it to 1 unless it is told otherwise, and all
    # other cores would be idle.
    is_launched = "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if state.device.type == "cpu" and (is_launched or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(threads)
    return state


def _check_launcher() -> None:
    """Before anything reads the launcher's variables: Accelerate would look for what is not installed, or obey."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    asked = [what for name, what in _OTHER_PROJECTS.items() if os.environ.get(name, "").lower() in _YES]
    asked += [f"mixed precision {precision}"] if precision not in ("no", "fp16", "bf16", "") else []
    asked += [f"the dynamo backend {backend} (here it is --compile)"] if backend not in ("no", "") else []
    if accumulation not in ("1", ""):
        asked.append(f"{accumulation} gradient accumulation steps (here it is --batch_size and --max-batch-per-device)")
    if asked:
        raise UserError(
            f"the launcher's configuration asks for {' and '.join(asked)}, as that of another project: "
            "accelerate launch --config_file accelerate_config.yaml train.py ... leaves it out"
        )
    processes, devices = local_world_size(), torch.accelerator.device_count()
    # Without Accelerate's launcher, as under srun, each process may see but one, its own.
    wanted = processes if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if os.environ.get("WORLD_SIZE", "1") != "1" and not cpu_is_asked_for() and devices < wanted:
        # Without devices each process would train a run of its own, in silence.
        raise UserError(
            f"{counted(processes, 'process')} on this machine, and PyTorch sees {counted(devices, 'GPU')}: "
            + (nvidia_hint() or f"--num_processes {max(1, devices)}, or ACCELERATE_USE_CPU=true in front for the CPU"),
            on_one_process=os.environ.get("LOCAL_RANK", "0") == "0",
        )


def start_accelerator(config: Config, state: PartialState, trackers: str | None, steps: int = 0) -> Accelerator:
    """Accelerate with the launcher's precision and devices. UserError where the two do not go together.

    steps: that will be trained. In a long run cuDNN tries its algorithms and takes the fastest.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16" and state.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU: start with accelerate launch --mixed_precision bf16, or no")
    torch.manual_seed(config.seed)
    if config.deterministic:
        pools = config.arch.startswith(("alexnet", "vgg")) and config.mode == "finetune" and steps
        if pools and state.device.type == "cuda":
            raise UserError(
                f"deterministic: PyTorch has no such backward pass for {config.arch}'s pooling on a GPU: take another "
                "--arch, --mode feature_extract, or leave it out"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = steps >= _STEPS_WORTH_A_SEARCH
    # Accelerate knows only the older name of DDP's setting.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    if state.distributed_type == DistributedType.XLA:
        raise UserError("TPUs are not supported: start on GPUs, or with ACCELERATE_USE_CPU=true on the CPU")
    try:
        return Accelerator(
            cpu=cpu_is_asked_for(),
            # Micro-batches are the loop's own. A launcher's setting would scale the gradient twice, and would win over
            # gradient_accumulation_steps=1.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=trackers,
            project_dir=config.runs,
            # BatchNorm's statistics are made equal before each evaluation; DDP need not send them at every step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, ImportError) as error:  # such as a precision that the device does not have
        raise UserError(f"Accelerate does not start: {error}") from error


def cpu_is_asked_for() -> bool:
    """Whether the launcher's environment rules the GPUs out."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES


def cores_hint() -> list[str]:
    """A line where the GPUs of this machine have fewer than four CPU cores each, or []."""
    processes = local_world_size()
    if (cores := cpu_cores() // processes) >= _CORES_OF_A_GPU:
        return []
    add = f": sbatch --cpus-per-task={2 * _CORES_OF_A_GPU * processes}" if "SLURM_JOB_ID" in os.environ else ""
    return [f"{cores} CPU cores for each GPU, which wants {_CORES_OF_A_GPU} or more to be fed{add}"]


def launcher_hints(accelerator: Accelerator, config: Config, photos: int) -> list[str]:
    """Lines on what the launcher leaves unused of this machine, each with the flag to add; [] where it uses all.

    photos: to train on, in an epoch.
    """
    hints = _batch_hint(config, accelerator.num_processes)
    if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
        hints.append("the launcher was asked for several processes and has started one: accelerate launch --multi_gpu")
    if accelerator.device.type == "cuda":
        gpus, used = torch.cuda.device_count(), local_world_size()
        if gpus > used:
            hints.append(
                f"{gpus} GPUs here, {used} used: accelerate launch --multi_gpu --num_processes {gpus} uses all"
            )
        if accelerator.mixed_precision == "no" and torch.cuda.is_bf16_supported(including_emulation=False):
            hints.append("this GPU is faster in bf16: accelerate launch --mixed_precision bf16")
        if accelerator.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            hints.append("this GPU only emulates bf16, slowly: accelerate launch --mixed_precision fp16")
        hints += cores_hint()
    elif accelerator.device.type == "cpu":
        if not cpu_is_asked_for() and (hint := nvidia_hint()):
            hints.append(hint)
        hints += _cpu_precision_hint(accelerator, config, photos)
    return hints


def _batch_hint(config: Config, processes: int) -> list[str]:
    """A line where some processes have no photo in a step, with settings that give each of them one."""
    if config.batch_size >= processes:
        return []
    times = processes / config.batch_size
    factor = times if config.optimizer == "sgd" else math.sqrt(times)
    rates = {"lr": config.lr, "lr_body": config.lr_body}
    flags = [f"--{name} {rate * factor:.2g}" for name, rate in rates.items() if rate is not None]
    idle = counted(processes - config.batch_size, "of them has", "of them have")
    return [
        f"batch_size {config.batch_size} is over all {processes} processes: {idle} nothing to do; "
        f"--num_processes {config.batch_size} is as fast, and --batch_size {processes} {' '.join(flags)}, or more, "
        "gives each of them photos"
    ]


def _cpu_precision_hint(accelerator: Accelerator, config: Config, photos: int) -> list[str]:
    if accelerator.mixed_precision == "bf16" and not has_bf16():
        return ["this processor only emulates bf16, slowly: accelerate launch --mixed_precision no"]
    if accelerator.mixed_precision != "no":
        return []
    assert config.epochs != "auto"
    seen = min(config.epochs * photos, (config.max_steps or sys.maxsize) * config.batch_size)
    is_long = seen * (config.image_size / 224) ** 2 >= _BF16_MATTERS
    # Several processes would disturb each other; what is known of the machine is said all the same.
    gain = bf16_gain(measure=is_long and accelerator.num_processes == 1)
    if gain is None or gain < _BF16_PAYS:
        return []
    return [f"this processor trains {gain:.1f} times as fast in bf16: accelerate launch --mixed_precision bf16"]
