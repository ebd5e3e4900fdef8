"""What PyTorch leaves unused of a machine is said. The machines are stand-ins: files that look like theirs."""

import json

from pipelines.distributed import hardware
from pipelines.distributed.hardware import bf16_gain, has_bf16, nvidia_hint
from tests.helpers.launches import hints

import pytest
import torch

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\nGCC version:  12\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Files of a machine, by the name of the constant that says where they are."""

    def has(**contents: str) -> None:
        for name in ("_CPU_INFO", "_NVIDIA_DRIVER", "_NVIDIA_DEVICE"):
            monkeypatch.setattr(hardware, name, tmp_path / name)
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in contents.items():
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    has()
    return has


def test_an_nvidia_gpu_that_pytorch_cannot_use_is_reported(machine, monkeypatch):
    assert (nvidia_hint(), hints()) == ("", [])
    machine(_NVIDIA_DRIVER=DRIVER, _NVIDIA_DEVICE="")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver 535.54.03 may be too old for CUDA 13.0: a newer driver, or a build of PyTorch" in nvidia_hint()
    assert hints() == [nvidia_hint()]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA: install one from https://pytorch.org" in nvidia_hint()
    machine(_NVIDIA_DRIVER=DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "docker --gpus all" in nvidia_hint()
    machine(_NVIDIA_DEVICE="")
    assert nvidia_hint()
    # Where the person wants the CPU, nothing is said.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert hints() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia_hint() == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nvidia_hint() == ""


def test_bf16_is_measured_once_and_only_where_it_may_pay(machine, monkeypatch):
    measured: list[float | None] = []
    answers = iter([None, 1.8])  # None: the machine was busy
    monkeypatch.setattr(hardware, "_measured_gain", lambda: measured.append(next(answers)) or measured[-1])
    long = {"photos": 1000, "epochs": 10}
    machine(_CPU_INFO="model name : An Old One\nflags : fpu avx2\n")
    assert (has_bf16(), hints(**long), measured) == (False, [], [])
    assert hints(precision="bf16", **long) == [
        "this processor only emulates bf16, slowly: accelerate launch --mixed_precision no"
    ]
    machine(_CPU_INFO="model name : A New One\nflags : fpu avx512_bf16\n")
    assert hints(photos=50, epochs=10) == hints(processes=2, **long) == hints(precision="bf16", **long) == []
    assert hints(photos=1000, epochs=10, max_steps=5) == measured == []
    assert hints(**long) == []
    said = ["this processor trains 1.8 times as fast in bf16: accelerate launch --mixed_precision bf16"]
    assert hints(**long) == hints(**long) == hints(processes=2, **long) == hints(photos=1) == said
    assert measured == [None, 1.8]
    (file,) = (hardware.cache_folder() / "bf16").iterdir()
    assert json.loads(file.read_text())["processor, threads, torch"].startswith("A New One, ")
    file.write_text('{"gain": 0.7}')
    assert hints(**long) == []
    file.write_text("damaged")
    assert bf16_gain(measure=False) is None


def test_measuring_ends_in_time_and_draws_no_random_number(monkeypatch):
    monkeypatch.setattr(hardware, "_MEASURING_SECONDS", 0.1)
    monkeypatch.setattr(hardware.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(hardware, "_LEAST_ROUNDS", 1)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gain = hardware._measured_gain()
    assert gain is not None
    assert gain > 0
    assert torch.equal(torch.rand(4), expected)
    monkeypatch.setattr(hardware.os, "getloadavg", lambda: (9999.0, 0.0, 0.0))
    assert hardware._measured_gain() is None
