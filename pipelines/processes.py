"""What several processes of one run must agree on before any of them trains."""

import errno
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config import Config
from pipelines.dataset import Dataset, load_dataset, scan_dataset
from pipelines.errors import MachineError, Stopped, UserError
from pipelines.files import file_digest
from pipelines.hardware import bf16_gain, cpu_cores, has_bf16, nvidia_hint
from pipelines.photos import cache_folder, locate
from pipelines.text import counted, lasting_streams, printable

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin

Result = TypeVar("Result")
# What ends a script, or asks a training to stop.
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
_POLL_SECONDS = 0.2
_BLOCK = 1 << 24  # bytes of a file in memory at once
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
_FAILED = "dalitune/failed"  # where a process that fails alone leaves its line
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_LOST = re.compile(r"Connection (closed|reset) by peer|gloo/transport")
_keys = itertools.count()  # every process asks for the same tasks in the same order


def speaks() -> bool:
    """Whether this process prints for all. Known from the launcher's environment, before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


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
    if state.device.type == "cpu":
        # The launcher sets OMP_NUM_THREADS to 1 unless it is told otherwise, which leaves all other cores idle.
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


def local_world_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def main_first(state: PartialState, task: Callable[[], Any]) -> Any:
    """Runs `task` on the main process and gives its result, which JSON must be able to carry, to all.

    The others wait outside any collective, since a scan of millions of photos outlasts every collective's timeout. An
    error of the main process ends the others silently, with the same exit code: one process speaks.
    """
    if state.num_processes == 1:
        return task()
    store, key = default_store(), f"dalitune/{next(_keys)}"
    if state.is_main_process:
        try:
            result = task()
        except BaseException as error:
            store.set(key, json.dumps({"exit": getattr(error, "exit_code", MachineError.exit_code)}))
            _wait_for_readers(store, key, state.num_processes - 1)
            raise
        store.set(key, json.dumps({"result": result}))
        return result
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    answer = json.loads(store.get(key))
    store.add(f"{key}/read", 1)
    if "exit" in answer:
        raise SystemExit(answer["exit"])
    return answer["result"]


def _wait_for_readers(store: dist.Store, key: str, readers: int) -> None:
    """The store may live in the main process, which is about to end."""
    give_up = time.monotonic() + 10 * _POLL_SECONDS
    while store.add(f"{key}/read", 0) < readers and time.monotonic() < give_up:
        time.sleep(_POLL_SECONDS / 10)


def open_dataset(
    state: PartialState, config: Config, arrange: Callable[[Path], Path] = lambda index_file: index_file
) -> Dataset:
    """The photos that the setting `data` means, found and scanned by the main process, once for all.

    arrange: what is done to the index on the main process, for a run that goes on.
    """

    def scan() -> str:
        cache = cache_folder()
        index_file = scan_dataset(locate(config.data, cache), cache, config.val_fraction, config.class_names)
        return str(arrange(index_file))

    index = Path(main_first(state, scan))
    share_file(state, index)
    return load_dataset(index, config.transparency)


def main_then_others(state: PartialState, task: Callable[[], Result]) -> Result:
    """Runs `task` on the main process and then on the others, which find what it downloaded."""
    results: list[Result] = []
    main_first(state, lambda: results.append(task()))
    if not results:
        try:
            results.append(task())
        except (UserError, MachineError) as error:
            error.on_one_process = True
            raise
    return results[0]


def share_file(state: PartialState, path: Path) -> None:
    """Gives every node the main process's file `path` under the same name, where it is not on a shared file system."""
    if state.num_processes == 1:
        return
    own = file_digest(path) if state.is_local_main_process and path.exists() else ""
    digest, anywhere = [own], [False] * state.num_processes
    dist.broadcast_object_list(digest, src=0)
    missing = state.is_local_main_process and own != digest[0]
    dist.all_gather_object(anywhere, missing)
    if not any(anywhere):
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with ExitStack() as files:
        source = files.enter_context(open(path, "rb")) if state.is_main_process else None
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        target = files.enter_context(open(partial, "wb")) if missing else None
        # Block by block: the index of 14 million photos is a gigabyte, which every process would hold.
        block = [b"more"]
        while block[0]:
            block = [source.read(_BLOCK) if source else b""]
            dist.broadcast_object_list(block, src=0)
            if target:
                target.write(block[0])
    if missing:
        os.replace(partial, path)
    dist.barrier()


def start_accelerator(config: Config, state: PartialState, trackers: str | None, steps: int = 0) -> Accelerator:
    """Accelerate with the launcher's precision and devices. UserError where the two do not go together.

    steps: that will be trained. In a long run cuDNN tries its algorithms and takes the fastest.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16" and state.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU: start with accelerate launch --mixed_precision bf16, or no")
    torch.manual_seed(config.seed)
    if config.deterministic:
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


@dataclass(frozen=True)
class Ending:
    """How a run ends before its end: one line and the exit code.

    bad_photo: split and position of the photo that it is about, where it is about one.
    is_said: another process has said the line. needs_trace: the line does not say all, as with an error of our own.
    """

    line: str
    exit_code: int
    bad_photo: tuple[str, int] | None = None
    is_said: bool = False
    needs_trace: bool = False


class Terminated(BaseException):
    """SIGTERM outside the training loop; the launcher sends it, too, when another process has failed."""


@lasting_streams()
def run_script(script: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a script's main function and turns its errors into one line on stderr and the exit code of the design."""
    before = {number: signal.signal(number, _terminate) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        script(arguments)
    except SystemExit:
        raise
    except BaseException as error:
        ending = ending_of(error)
        is_alone = getattr(error, "on_one_process", False) or isinstance(error, torch.OutOfMemoryError)
        if is_alone and dist.is_initialized():
            default_store().set(_FAILED, json.dumps([ending.line, ending.exit_code, ending.bad_photo]))
        if ending.needs_trace:
            traceback.print_exc()
        elif (speaks() or is_alone) and not ending.is_said:
            label = "" if isinstance(error, (KeyboardInterrupt, Stopped, Terminated)) else "error: "
            print(f"{label}{ending.line}", file=sys.stderr, flush=True)
        # A launcher of several processes takes any code but 0 for a failure, and prints its trace.
        several = dist.is_initialized() and dist.get_world_size() > 1
        return 0 if ending.exit_code == Stopped.exit_code and several else ending.exit_code
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def ending_of(error: BaseException) -> Ending:
    """The line and the exit code for what ended a run: the same for stderr, for the exit and for status.json."""
    if not hasattr(error, "ending"):  # the store is asked once
        error.ending = _ending_of(error)  # type: ignore[attr-defined]
    return error.ending  # type: ignore[attr-defined]


def _ending_of(error: BaseException) -> Ending:
    if isinstance(error, (UserError, MachineError, Stopped)):
        return Ending(printable(str(error)), error.exit_code, error.bad_photo)
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", 130)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return Ending(f"{error.filename or 'disk'}: {error.strerror}", MachineError.exit_code)
    if isinstance(error, torch.OutOfMemoryError):
        line = "the GPU's memory is full: add --max-batch-per-device auto, or lower --eval-batch-per-device"
        return Ending(line, MachineError.exit_code)
    if isinstance(error, Terminated):
        asked = Ending("stopped on request outside the training loop: the same command begins again", Stopped.exit_code)
        return _failure_of_another_process() or asked
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
        lost = Ending("another process has ended; its own message says why", MachineError.exit_code)
        return _failure_of_another_process() or lost
    return Ending(repr(error), MachineError.exit_code, needs_trace=True)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough, and the ending must not be cut off
    raise Terminated


def _failure_of_another_process() -> Ending | None:
    """What a process that failed alone has left for the others before it ended."""
    try:
        store = default_store()
        give_up = time.monotonic() + 10 * _POLL_SECONDS
        while not store.check([_FAILED]) and time.monotonic() < give_up:
            time.sleep(_POLL_SECONDS)
        line, exit_code, photo = json.loads(store.get(_FAILED)) if store.check([_FAILED]) else (None, 0, None)
    except (RuntimeError, ValueError):  # the store has gone with its process
        return None
    return Ending(line, exit_code, tuple(photo) if photo else None, is_said=True) if line else None


def default_store() -> dist.Store:
    """The process group's store, which asks nobody to wait. RuntimeError where there is no group."""
    return dist.distributed_c10d._get_default_store()


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
    seen = min(config.epochs * photos, (config.max_steps or sys.maxsize) * config.batch_size)
    is_long = seen * (config.image_size / 224) ** 2 >= _BF16_MATTERS
    # Several processes would disturb each other; what is known of the machine is said all the same.
    gain = bf16_gain(measure=is_long and accelerator.num_processes == 1)
    if gain is None or gain < _BF16_PAYS:
        return []
    return [f"this processor trains {gain:.1f} times as fast in bf16: accelerate launch --mixed_precision bf16"]
