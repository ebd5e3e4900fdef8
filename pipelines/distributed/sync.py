"""What the processes of a run tell each other outside the training's own exchanges, and who prints for all."""

import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from pipelines.errors import MachineError, UserError
from pipelines.files import atomic_write, file_digest

import torch.distributed as dist
from accelerate import PartialState

Result = TypeVar("Result")
_POLL_SECONDS = 0.2
_BLOCK = 1 << 24  # bytes of a file in memory at once
_keys = itertools.count()  # every process asks for the same tasks in the same order


def is_global_rank_zero() -> bool:
    """Whether this process prints for all. Known from the launcher's environment, before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def local_world_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_main_process(state: PartialState, task: Callable[[], Any]) -> Any:
    """Runs `task` on the main process and gives its result, which JSON must be able to carry, to all.

    The others wait outside any collective, since a scan of millions of photos outlasts every collective's timeout. An
    error of the main process ends the others silently, with the same exit code: one process prints.
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


def main_then_others(state: PartialState, task: Callable[[], Result]) -> Result:
    """Runs `task` on the main process and then on the others, which find what it downloaded."""
    results: list[Result] = []
    on_main_process(state, lambda: results.append(task()))
    if not results:
        try:
            results.append(task())
        except (UserError, MachineError) as error:
            error.on_one_process = True
            raise
    return results[0]


def wait_for_all(state: PartialState, stop: Callable[[], bool]) -> bool:
    """Waits until all processes are here, outside any collective, as shares of work may differ by hours.

    Returns True where `stop`, asked again and again, has said yes before.
    """
    if state.num_processes == 1:
        return False
    store, key = default_store(), f"dalitune/{next(_keys)}"
    here = store.add(key, 1)
    while here < state.num_processes:
        if stop():
            return True
        time.sleep(_POLL_SECONDS)
        here = store.add(key, 0)
    return False


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
    with ExitStack() as files:
        source = files.enter_context(open(path, "rb")) if state.is_main_process else None
        target = None
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = files.enter_context(open(files.enter_context(atomic_write(path, shared=True)), "wb"))
        # Block by block: the index of 14 million photos is a gigabyte, which every process would hold.
        block = [b"more"]
        while block[0]:
            block = [source.read(_BLOCK) if source else b""]
            dist.broadcast_object_list(block, src=0)
            if target:
                target.write(block[0])
    dist.barrier()


def default_store() -> dist.Store:
    """The process group's store, which asks nobody to wait. RuntimeError where there is no group."""
    return dist.distributed_c10d._get_default_store()
