"""Which engine decodes here, and why; and one of them, made.

An engine is a module of this package (`base.EngineModule`) and a value of the setting `loader`. Nothing here knows
one of them.
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import cast

from pipelines.config import SCHEMA
from pipelines.data.dataset import Split
from pipelines.data.engines.base import Engine, EngineModule, EngineSettings
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import MachineError, UserError

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

ENGINES = tuple(name for name in SCHEMA["loader"]["enum"] if name != "auto")  # by preference; the last runs everywhere


def engine_module(name: str) -> EngineModule:
    return cast(EngineModule, import_module(f"{__package__}.{name}"))


def choose_engine(wanted: str, device: torch.device, among: Sequence[str] = ENGINES) -> tuple[str, str]:
    """Which engine runs on `device` for the setting `loader`, and why: ("dali", "a GPU").

    auto: the first of `among` that it takes on such a device and that has no fault there. Raises UserError where an
    engine is asked for that is not installed, MachineError where one is asked for that does not work.
    """
    if wanted != "auto":
        if fault := engine_module(wanted).fault(device):
            remedy = f"{fault.remedy}, or " if fault.remedy else ""
            kind = UserError if fault.remedy else MachineError
            raise kind(f"loader: {fault.reason}: {remedy}use --loader {ENGINES[-1]}")
        return wanted, "as asked"
    kind_of_device = "a GPU" if device.type == "cuda" else "no GPU"
    faults = []
    for name in among:
        if kind_of_device not in engine_module(name).AUTO_WITH:
            continue
        if not (fault := engine_module(name).fault(device)):
            break
        faults.append(fault.reason)
    return name, "; ".join([kind_of_device, *faults])


def agree_on_engine(wanted: str, state: PartialState, kept: str | None = None) -> tuple[str, str]:
    """`choose_engine` for all processes of a run: one process of each node tries, and all take the same engine.

    kept: what the run had before; auto is that again where it runs.
    """
    if kept is not None and kept in ENGINES and wanted == "auto":
        with suppress(UserError, MachineError):
            return _agreed(kept, state)[0], "as before"
        name, why = _agreed(wanted, state)
        return name, f"{why}; before it was {kept}"
    return _agreed(wanted, state)


def _agreed(wanted: str, state: PartialState, among: Sequence[str] = ENGINES) -> tuple[str, str]:
    if state.num_processes == 1:
        return choose_engine(wanted, state.device, among)
    chosen, error = None, None
    if state.is_local_main_process:
        try:
            chosen = choose_engine(wanted, state.device, among)
        except (UserError, MachineError) as failure:
            error = failure
    answers = gather_object([(chosen, error and (type(error), str(error)))])
    for _, failed in answers:
        if failed:
            raise failed[0](failed[1])
    choices = [answer for answer, _ in answers if answer]
    last = max(choices, key=lambda answer: ENGINES.index(answer[0]))
    if all(name == last[0] for name, _ in choices):
        return last
    # What one node must take the others have not tried.
    again = _agreed(wanted, state, ENGINES[ENGINES.index(last[0]) :])
    return last if again[0] == last[0] else again


def make_engine(
    name: str,
    split: Split,
    *,
    micro_batch: int,
    device: torch.device,
    threads: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Engine:
    """The engine `name` for the photos of a split, with `threads` threads on the CPU."""
    settings = EngineSettings(split, micro_batch, device, threads, mean, std)
    return engine_module(name).ENGINE(settings)


def libraries() -> list[str]:
    """Those on whose versions the pixels of any engine depend, as pip names them."""
    return list(dict.fromkeys(library for name in ENGINES for library in engine_module(name).ENGINE.LIBRARIES))
