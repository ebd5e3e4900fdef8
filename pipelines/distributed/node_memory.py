"""Memory that the processes of a node share, and how much there may be of it."""

import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pipelines.distributed.sync import local_world_size
from pipelines.errors import MachineError, UserError

from accelerate import PartialState
from accelerate.utils import gather_object

_SHARE = 0.8  # of what a node may use, that decoded photos may take
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """What the processes of a node may use: the machine's memory, or less where a control group has a limit, as Slurm's
    and a container's do (cgroups(7))."""
    known = [sys.maxsize]
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            inner = PurePosixPath(path.lstrip("/"))
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # where there is no limit it says "max"
                    known.append(int((top / folder / name).read_text()))
    return min(known)


def check_node_memory(state: PartialState, size: int) -> None:
    """UserError, on all processes alike, where a node may not use `size` bytes with room to spare, or its processes
    cannot share them."""
    own = (memory_bytes(), local_world_size() == 1 or hasattr(os, "memfd_create"))
    facts = gather_object([own]) if state.num_processes > 1 else [own]
    there = min(available for available, _ in facts)
    if size > _SHARE * there:
        raise UserError(
            f"memory_gb: {size / 1e9:.3g} GB of decoded photos, and a node may use {there / 1e9:.3g} GB of memory: "
            f"give --memory_gb {_SHARE * there / 1e9:.2g} at most"
        )
    if not all(can_share for _, can_share in facts):
        raise UserError("memory_gb: several processes share decoded photos on Linux only: leave it out")


def node_memory(state: PartialState, size: int) -> mmap.mmap:
    """Zeros, the same for all processes of a node: a file without a name, of which nothing is left after a kill. A page
    takes memory once it is written. MachineError where the system gives none."""
    try:
        return _node_memory(state, max(1, size))
    except OSError as error:
        line = f"memory_gb: no memory for {size / 1e9:.3g} GB of decoded photos ({error.strerror or error})"
        raise MachineError(f"{line}: give less, or leave it out", on_one_process=True) from None


def _node_memory(state: PartialState, size: int) -> mmap.mmap:
    if local_world_size() == 1:
        return mmap.mmap(-1, size)
    path, file = "", -1
    if state.is_local_main_process:
        file = os.memfd_create("photos", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        path = f"/proc/{os.getpid()}/fd/{file}"
    paths = gather_object([path])
    if not state.is_local_main_process:
        file = os.open(paths[state.process_index - state.local_process_index], os.O_RDWR)
    memory = mmap.mmap(file, size)
    state.wait_for_everyone()
    os.close(file)
    return memory
