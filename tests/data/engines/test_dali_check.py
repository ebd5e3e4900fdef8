"""DALI is tried in a child process before a GPU's training depends on it; what the child does is said, and kept."""

import sys
from types import SimpleNamespace

from pipelines.data.engines import dali, dali_check, factory
from pipelines.data.engines.dali_check import fault_of_dali
from pipelines.errors import MachineError

import pytest
import torch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dali"


def stand_in(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Stand-ins for the child on a GPU, by what they do: what is told, and whether it is kept.
CHILDREN = {
    "segmentation fault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends with SIGSEGV", True),
    "killed for memory": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ends with SIGKILL", False),
    "hang": ("import time; time.sleep(60)", "no answer within 1 seconds; --loader pillow does not wait for one", False),
    "wrong pixels": ("print([31.5, 0.8])", "not Pillow's: 31.5 of 255 levels apart", True),
    "wrong in a few places": ("print([1.5, 0.1])", "not Pillow's", True),
    "not a number": ("print('[NaN, NaN]')", "not Pillow's", True),
    "failure": ("raise RuntimeError('nvImageCodec failure: #8')", "RuntimeError: nvImageCodec failure: #8", True),
    "no memory": ("raise RuntimeError('CUDA out of memory')", "CUDA out of memory", False),
    "silence": ("pass", "gives no answer", False),
    "another exit code": ("raise SystemExit(7)", "ends with code 7", True),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_what_happens_to_the_child_is_one_line(name, cache, monkeypatch, capfd):
    code, told, is_kept = CHILDREN[name]
    monkeypatch.setattr(dali_check, "_SECONDS", 1 if name == "hang" else 60)
    fault = fault_of_dali(CPU, stand_in(code))
    assert fault.startswith("DALI does not work here: ")
    assert told in fault
    assert "driver" in fault
    assert "nvidia-nvimgcodec" in fault
    assert "\n" not in fault
    assert capfd.readouterr() == ("", ""), "the child's own words are not the user's"
    assert cache.exists() == is_kept == (f"it is tried again without {cache}" in fault)
    assert fault_of_dali(CPU, stand_in("print([0, 0])")) == (fault if is_kept else "")


def test_an_answer_counts_for_its_hardware_and_versions_only(cache, monkeypatch):
    assert fault_of_dali(CPU, stand_in("print([0.5, 0.001])")) == ""
    assert fault_of_dali(CPU, stand_in("print([99, 1])")) == ""
    monkeypatch.setattr(dali_check, "_hardware_and_versions", lambda device: "another GPU")
    assert "another GPU" in fault_of_dali(CPU, stand_in("print([99, 1])"))
    assert len(list(cache.iterdir())) == 2
    for damaged in cache.iterdir():
        damaged.write_text("{")
    assert fault_of_dali(CPU, stand_in("print([0, 0])")) == ""


@pytest.mark.slow
def test_the_real_child_finds_dali_right_on_the_cpu(cache, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert fault_of_dali(CPU) == ""
    assert cache.exists()


def test_the_other_engine_goes_on_unless_dali_was_asked_for(monkeypatch):
    """No GPU here: the check's answer and PyTorch's CUDA are stand-ins."""
    nvidia_dali = pytest.importorskip("nvidia.dali", reason="needs DALI")
    monkeypatch.setattr(torch.version, "cuda", f"{nvidia_dali.__cuda_version__ // 1000}.0")
    monkeypatch.setattr(dali, "fault_of_dali", lambda device: "DALI does not work here: its decoder ends with SIGSEGV")
    name, why = factory.choose_engine("auto", GPU)
    assert name != "dali"
    assert why == "a GPU; DALI does not work here: its decoder ends with SIGSEGV"
    assert factory.choose_engine("pillow", GPU) == ("pillow", "as asked")
    with pytest.raises(MachineError, match="SIGSEGV: use --loader pillow"):
        factory.choose_engine("dali", GPU)
    monkeypatch.setattr(dali, "fault_of_dali", lambda device: "")
    assert factory.choose_engine("auto", GPU) == ("dali", "a GPU")


def test_all_processes_take_the_same_engine(monkeypatch):
    """Two nodes of two processes; what the others answer is a stand-in for their part of the gathering."""
    state = SimpleNamespace(num_processes=4, is_local_main_process=True, device=CPU)

    def choose(wanted, device, among=factory.ENGINES):
        return (wanted if wanted != "auto" else among[0], "it works")

    monkeypatch.setattr(factory, "choose_engine", choose)
    elsewhere: list[object] = [(None, None), (("pillow", "SIGSEGV on node2"), None), (None, None)]
    monkeypatch.setattr(factory, "gather_object", lambda own: [*own, *elsewhere])
    assert factory.agree_on_engine("auto", state) == ("pillow", "SIGSEGV on node2")
    elsewhere[1] = (("dali", "it works"), None)
    assert factory.agree_on_engine("auto", state) == ("dali", "it works")
    assert factory.agree_on_engine("auto", state, "dali") == ("dali", "as before")
    assert factory.agree_on_engine("auto", state, "of a later version") == ("dali", "it works")
    elsewhere[1] = (None, (MachineError, "SIGSEGV on node2"))
    with pytest.raises(MachineError, match="SIGSEGV on node2"):
        factory.agree_on_engine("dali", state)
