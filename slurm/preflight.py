"""Before a training on a cluster: names the nodes, tries what they must share, and then trains in the same processes.

    accelerate launch --config_file accelerate_config.yaml -m slurm.preflight ARGUMENTS OF train.py

`slurm/train.sbatch` starts it on every node. A start of its own would load the libraries twice on each of them.
"""

import os
import secrets
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from socket import gethostname

import train
from pipelines.config import parse_config
from pipelines.distributed.exits import run_script
from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.launch import cores_hint, cpu_is_asked_for, start_processes
from pipelines.distributed.sync import is_global_rank_zero, local_world_size, on_main_process
from pipelines.errors import MachineError, Stopped, UserError
from pipelines.run.folder import new_run_name
from pipelines.text import counted

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

_PATIENCE = 300  # seconds for all nodes to meet and for their first all-reduce; PyTorch itself would wait half an hour
_SIGHT = 15  # seconds until a new file is to be seen on every node; NFS may remember for some that there was none


def main(arguments: list[str]) -> None:
    """Checks, then `train.main`. Raises UserError or MachineError."""
    config, recipe = parse_config(arguments)
    _check_gpus()
    waiting = threading.Timer(_PATIENCE, _give_up)
    waiting.daemon = True
    waiting.start()
    state = start_processes()
    _name_the_nodes(state)
    name = config.run or on_main_process(state, lambda: new_run_name(recipe, config.runs))
    _check_run_folder(state, Path(os.path.abspath(config.runs)) / name)
    waiting.cancel()
    try:
        train.main(arguments if config.run else [*arguments, f"--run={name}"])
    except Stopped:
        # A launcher that was told to end fails whatever its processes do, and srun ends all other nodes with it.
        on_main_process(state, lambda: None)
        raise


def _check_gpus() -> None:
    """Without its GPUs the launcher would start as many trainings of one process each, in silence."""
    wanted, seen = local_world_size(), torch.cuda.device_count()
    if cpu_is_asked_for() or seen >= wanted:
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise SystemExit(MachineError.exit_code)
    raise MachineError(
        f"{gethostname()}: {counted(wanted, 'process')}, and PyTorch sees {counted(seen, 'GPU')}: its "
        "driver, or a build of PyTorch for CPUs (nodes without GPUs: sbatch --gpus-per-node=0)",
        on_one_process=True,
    )


def _give_up() -> None:
    """Nothing but an exit ends a process that waits in a collective."""
    print(
        f"error: {gethostname()}, process {os.environ.get('RANK', '0')}: not all processes have met within "
        f"{_PATIENCE} s: the nodes do not reach each other (NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO help)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(MachineError.exit_code)


def _name_the_nodes(state: PartialState) -> None:
    """A line for every node, and the first all-reduce."""
    cuda = state.device.type == "cuda"
    device = torch.cuda.get_device_name(state.device) if cuda else f"CPU, {counted(cpu_cores(), 'core')}"
    hint = "".join(cores_hint()) if cuda else ""
    processes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    started = time.perf_counter()
    total = torch.ones(1, device=state.device)
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    count, seconds = int(total.item()), time.perf_counter() - started
    for node, number, its_device, its_hint in gather_object([(gethostname(), state.process_index, device, hint)]):
        processes[node, its_device, its_hint].append(number)
    if is_global_rank_zero():
        for (node, its_device, its_hint), numbers in processes.items():
            print(f"preflight: {node}: processes {', '.join(map(str, numbers))}; {its_device}")
            if its_hint:
                print(f"preflight: {node}: {its_hint}")
        print(
            f"preflight: the first all-reduce of {counted(count, 'process')} took {seconds:.2f} s",
            flush=True,
        )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if not count == state.num_processes == expected:
        raise MachineError(
            f"{counted(expected, 'process was', 'processes were')} started, and {counted(count, 'has', 'have')} met"
        )


def _check_run_folder(state: PartialState, folder: Path) -> None:
    """Has every node read what the main process writes there, and gives the batch script a link to the folder."""
    token, link = folder / ".preflight", os.environ.get("DALITUNE_JOB_FOLDER")

    def write() -> str:
        word = secrets.token_hex(8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text(word, encoding="utf-8")
            if link:
                Path(link, "run").unlink(missing_ok=True)
                Path(link, "run").symlink_to(folder)
        except OSError as error:
            raise UserError(f"run folder {folder}: {error.strerror}: give --runs DIR on a shared file system") from None
        return word

    word = on_main_process(state, write)
    blind = gather_object([gethostname()] if state.is_local_main_process and not _is_there(token, word) else [])
    on_main_process(state, partial(_remove, token))
    if blind:
        raise UserError(
            f"run folder {folder}: what the main process writes there is not seen on {', '.join(blind)}: "
            "give --runs DIR on a file system that all nodes share"
        )


def _is_there(token: Path, word: str) -> bool:
    give_up = time.monotonic() + _SIGHT
    while time.monotonic() < give_up:
        with suppress(OSError):
            if token.read_text(encoding="utf-8") == word:
                return True
        time.sleep(0.2)
    return False


def _remove(token: Path) -> None:
    token.unlink(missing_ok=True)
    with suppress(OSError):  # a run that never starts leaves no folder; that of a run that goes on is not empty
        token.parent.rmdir()


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
