"""How scripts end: each way has its exit code and one line."""

import os
import re
import signal

from pipelines.distributed.exits import run_script
from pipelines.distributed.sync import is_global_rank_zero
from pipelines.errors import MachineError, Stopped, UserError

import pytest
import torch


def fill_the_disk(arguments: list[str]) -> None:
    with open("/dev/full", "w") as file:
        file.write("a" * 100_000)


def raising(error: BaseException):
    def script(arguments: list[str]) -> None:
        raise error

    return script


OUTSIDE = "stopped on request outside the training loop: the same command begins again"
FULL = "the GPU's memory is full: add --max-batch-per-device auto, or lower --eval-batch-per-device"


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        (lambda arguments: None, 0, ""),
        (raising(UserError("data: a\n  b")), 2, "error: data: a b\n"),
        (raising(MachineError("no network")), 3, "error: no network\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (raising(Stopped("stopped at step 3")), 75, "stopped at step 3\n"),
        (lambda arguments: os.kill(os.getpid(), signal.SIGTERM), 75, f"{OUTSIDE}\n"),
        (lambda arguments: os.kill(os.getpid(), signal.SIGUSR1), 75, f"{OUTSIDE}\n"),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), 3, f"error: {FULL}\n"),  # a stand-in: a CPU has none
        pytest.param(
            fill_the_disk,
            3,
            "error: disk: No space left on device\n",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's"),
        ),
    ],
)
def test_every_ending_has_its_code_and_one_line(capsys, script, code, line):
    assert run_script(script, []) == code
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_the_program_keeps_its_trace(capsys):
    for error in (ValueError("a fault"), FileNotFoundError(2, "gone")):
        assert run_script(raising(error), []) == 3
        assert re.search(rf"Traceback .*{type(error).__name__}", capsys.readouterr().err, re.DOTALL)


def test_only_the_first_process_prints_an_error_of_all(capsys, monkeypatch):
    assert is_global_rank_zero()
    monkeypatch.setenv("RANK", "1")
    assert not is_global_rank_zero()
    assert run_script(raising(UserError("everybody's")), []) == 2
    assert run_script(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == ""
    assert run_script(raising(UserError("its own", on_one_process=True)), []) == 2
    assert capsys.readouterr().err == "error: its own\n"


def test_arguments_reach_the_script():
    seen: list[str] = []
    assert run_script(seen.extend, ["--epochs", "3"]) == 0
    assert seen == ["--epochs", "3"]
