"""What a launch is refused for, and what it leaves unused and is told."""

import os
import re
from types import SimpleNamespace

from pipelines.config import Config
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.errors import UserError
from tests.helpers.launches import hints

import pytest
import torch
from accelerate import PartialState


@pytest.fixture(autouse=True)
def unknown_machine(monkeypatch, tmp_path):
    """Whether bf16 pays here is not known from a run before."""
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))


def test_half_precision_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=re.escape("fp16 needs a GPU: start with accelerate launch --mixed_precision")):
        start_accelerator(Config(), PartialState(cpu=True), None)


def test_what_no_gpu_can_repeat_is_refused_as_deterministic():
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(UserError, match="PyTorch has no such backward pass for vgg11's pooling on a GPU"):
        start_accelerator(Config(arch="vgg11", deterministic=True), gpu, None, steps=5)


def test_the_accelerator_scales_nothing_and_makes_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    config = Config(runs=str(tmp_path / "runs"), seed=5)
    accelerator = start_accelerator(config, PartialState(cpu=True), None)
    drawn = torch.rand(3)
    assert accelerator.gradient_accumulation_steps == 1
    loss = torch.ones((), requires_grad=True)
    accelerator.backward(loss * 3)
    assert loss.grad == 3
    assert not (tmp_path / "runs").exists()
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_what_the_launcher_leaves_unused_is_said_with_the_flag(monkeypatch):
    """GPUs and their number are stand-ins: none is here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("pipelines.distributed.launch.cpu_cores", lambda: 16)
    lines = hints("cuda")
    assert ["--num_processes 4" in lines[0], "--mixed_precision bf16" in lines[1]] == [True, True]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hints("cuda", "bf16") == []
    monkeypatch.setattr("pipelines.distributed.launch.cpu_cores", lambda: 15)
    assert hints("cuda", "bf16") == ["3 CPU cores for each GPU, which wants 4 or more to be fed"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert hints("cuda", "bf16")[0].endswith("to be fed: sbatch --cpus-per-task=32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert hints("cuda", "bf16")[0].endswith("emulates bf16, slowly: accelerate launch --mixed_precision fp16")


def test_processes_without_a_photo_are_reported(monkeypatch):
    assert hints(processes=8, batch_size=8) == []
    (line,) = hints(processes=32, batch_size=8, lr=0.006, lr_body=0.00003)
    assert line.startswith("batch_size 8 is over all 32 processes: 24 of them have nothing to do; --num_processes 8 ")
    assert "--batch_size 32 --lr 0.024 --lr_body 0.00012, or more" in line
    (line,) = hints(processes=32, batch_size=8, lr=0.006, optimizer="adamw")
    assert "--batch_size 32 --lr 0.012, or more" in line
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert hints() == [
        "the launcher was asked for several processes and has started one: accelerate launch --multi_gpu"
    ]


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "FSDP and a model split over"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "the dynamo backend inductor (here it is --compile)"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "4 gradient accumulation steps (here it is --batch_size"),
    ],
)
def test_an_accelerate_config_of_another_project_is_refused(monkeypatch, capsys, variables, what):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_script(lambda arguments: start_processes(), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the launcher's configuration asks for {what}")
    assert line.endswith("accelerate launch --config_file accelerate_config.yaml train.py ... leaves it out")


def test_what_a_usual_launch_sets_is_accepted(monkeypatch):
    usual = {"USE_CPU": "true", "MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "NO", "USE_FSDP": "false"}
    for name, value in usual.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert start_processes().num_processes == 1


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, [6]),
        ({"OMP_NUM_THREADS": "1"}, []),  # as a person has asked for
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, [6]),  # as Accelerate's launcher has set it
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2"}, [3]),
    ],
)
def test_all_cores_compute_unless_a_person_says_otherwise(monkeypatch, variables, threads):
    made = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", made.append)
    monkeypatch.setattr("pipelines.distributed.launch.cpu_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start_processes()
    assert made == threads


def test_more_processes_than_devices_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)  # a stand-in: no GPU is here
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "4")
    assert run_script(lambda arguments: start_processes(), []) == 2
    line = "error: 4 processes on this machine, and PyTorch sees 2 GPUs: --num_processes 2, or ACCELERATE_USE_CPU=true"
    assert capsys.readouterr().err.startswith(line)


def test_a_precision_that_accelerate_refuses_is_one_line(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("bf16 mixed precision requires a supported device.")

    monkeypatch.setattr("pipelines.distributed.launch.Accelerator", refuse)
    with pytest.raises(UserError, match="Accelerate does not start: bf16 mixed precision requires a supported device"):
        start_accelerator(Config(), PartialState(cpu=True), None)


@pytest.mark.parametrize(("steps", "searches"), [(0, False), (496, False), (450_000, True)])
def test_cudnn_searches_only_where_a_long_run_repays_it(steps, searches, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    start_accelerator(Config(runs=str(tmp_path)), PartialState(cpu=True), None, steps=steps)
    assert torch.backends.cudnn.benchmark == searches


def test_deterministic_asks_pytorch_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        start_accelerator(Config(deterministic=True), PartialState(cpu=True), None)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
