"""Two real processes agree, share and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from pipelines.config import Config
from pipelines.distributed.exits import run_script
from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.launch import launcher_hints, start_accelerator, start_processes
from pipelines.distributed.sync import is_global_rank_zero, main_first, share_file
from pipelines.errors import MachineError, Stopped, UserError

import numpy as np
import pytest
import torch
from accelerate import PartialState

ROOT = Path(__file__).resolve().parent.parent

# What each of the two processes does; its findings go to rank<N>.json.
TOGETHER = """
import json, sys, time
from datetime import timedelta
from pathlib import Path

import numpy as np
from pipelines.config import Config
from pipelines.data.dataset import load_dataset
from pipelines.training.evaluation import predict
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.data.loader import eval_loader
from pipelines.model.network import TransferModel, average_batchnorm_statistics, batchnorms
from pipelines.data.open import open_dataset
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.sync import main_first, share_file
from pipelines.run.folder import RunFolder
from pipelines.tracking.session import Tracking

import torch
import torch.distributed as dist
from torchvision.models import resnet18


def main(arguments):
    folder, photos = Path(arguments[0]), arguments[1]
    state = start_processes()
    assert state.num_processes == 2, state.num_processes
    rank, found = state.process_index, {"threads": torch.get_num_threads(), "device": state.device.type}
    config = Config(
        data=photos, runs=str(folder / "runs"), image_size=64, resize=72, eval_batch_per_device=2, loader="pillow",
        tracker="wandb",
    )
    dataset = open_dataset(state, config)
    found["fingerprint"] = dataset.fingerprint

    # The main process takes longer than any collective may last.
    default_group = dist.distributed_c10d._get_default_group()
    default_group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))
    found["shared"] = main_first(state, lambda: [time.sleep(3), rank, "word"])
    default_group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(minutes=1))
    found["again"] = main_first(state, lambda: {"from": rank})

    # As if each process ran on a node of its own, with a cache folder of its own.
    state.local_process_index = 0
    mine = folder / f"cache{rank}" / "scan" / "index"
    for content in (b"first" * 1000, b"second"):
        if rank == 0:
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_bytes(content)
        share_file(state, mine)
        found.setdefault("files", []).append([mine.read_bytes() == content, len(list(mine.parent.iterdir()))])
    before = mine.stat().st_mtime_ns
    share_file(state, mine)
    found["untouched"] = mine.stat().st_mtime_ns == before
    state.local_process_index = rank

    accelerator = start_accelerator(config, state, "wandb")
    torch.manual_seed(0)
    network = TransferModel(resnet18(num_classes=3), frozen_stages=0, batchnorm="train")
    for number, module in enumerate(batchnorms(network)):
        module.running_mean += rank + number
        module.num_batches_tracked += 1 + 2 * rank  # so the mean of the two is weighted 1 to 3
    average_batchnorm_statistics(network, 2)
    found["averaged"] = all(
        torch.allclose(module.running_mean, torch.full_like(module.running_mean, number + 0.75))
        and module.num_batches_tracked == 3
        for number, module in enumerate(batchnorms(network))
    )
    if rank == 0:  # alone: nothing that is frozen goes through a collective
        average_batchnorm_statistics(TransferModel(network.network, frozen_stages=0, batchnorm="frozen"), 2)

    # One process has no photo: forward and backward all the same, and DDP gives both the same gradient.
    model = accelerator.prepare(network).train()
    images = torch.randn(2 if rank == 0 else 0, 3, 64, 64)
    model(network.frozen_part(images)).sum().backward()
    found["gradient"] = [network.network.conv1.weight.grad.norm().item(), network.network.fc.bias.grad.tolist()]
    run = RunFolder(folder / "runs" / "one", writes=state.is_main_process)
    main_first(state, lambda: run.create(config))
    run.save_best(network.network, {})

    tracking = Tracking(accelerator, config, run, dataset, {})
    tracking.log({"global_step": 1})
    tracking.finish({})

    split = dataset.splits["val"]
    loader = eval_loader(config, split, split.labels.astype(np.int64), state, "pillow")
    model = TransferModel(resnet18(num_classes=3), frozen_stages=5, batchnorm="frozen", test_flips=True)
    model.network.load_state_dict(main_first(state, lambda: None) or network.network.state_dict())
    store = FeatureStore(folder / "features", 10**9) if state.is_main_process else None
    kept = {"views_per_photo": 1, "epochs": 2, "micro_batch": 2, "mirrored": True, "store": store}
    records = predict(model, loader, accelerator)
    caches = [FrozenFeatures(model, loader, accelerator, **kept) for _ in range(2)]  # the second finds the first one's
    found["in_store"], found["cached_is_same"] = [], True
    for cache in caches:
        found["in_store"].append(cache.in_store())
        found["cached_is_same"] &= all((predict(model, loader, accelerator, cache) == records).all() for _ in range(2))
    np.save(folder / f"records{rank}.npy", records)
    loader.close()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


sys.exit(run_script(main, sys.argv[1:]))
"""

# The main process fails while the other one waits for it.
FAILING = """
import sys, time
from pipelines.distributed import sync
from pipelines.errors import UserError
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_processes
from pipelines.distributed.sync import main_first


def fail():
    time.sleep(1.5)
    raise UserError("photos: none there")


def main(arguments):
    state = start_processes()
    assert state.num_processes == 2, state.num_processes
    main_first(state, lambda: None)
    sync._POLL_SECONDS = (0.2, 1.0)[state.process_index]  # the other one looks half a second after the failure
    main_first(state, fail)
    print("not reached")


sys.exit(run_script(main, sys.argv[1:]))
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    return {**kept, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.slow
def test_two_processes_agree_share_and_count_each_photo_once(tmp_path, photo_folder):
    photos = photo_folder({"train": {"a": 1, "b": 1, "c": 1}, "val": {"a": 3, "b": 1, "c": 3}})
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    variables = {"HOME": str(tmp_path / "home"), "DALITUNE_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "offline"}
    port = ["--main_process_port", str(free_port())]
    done = subprocess.run(
        [*launch, *port, script, tmp_path, photos],
        env=environment(**variables),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["shared"] == [None, 0, "word"]
        assert found["again"] == {"from": 0}
        assert found["files"] == [[True, 1], [True, 1]]
        assert found["untouched"]
        assert found["averaged"]
        assert found["cached_is_same"]
        assert (found["device"], found["threads"]) == ("cpu", max(1, cpu_cores() // 2))
    assert first["fingerprint"] == second["fingerprint"]
    assert first["gradient"] == second["gradient"]
    assert first["gradient"][0] > 0
    assert first["gradient"][1] == [1.0, 1.0, 1.0]  # 2 photos on one process of two
    assert (first["in_store"], second["in_store"]) == (["", "1 view of 7 val photos"], ["", ""])
    records = [np.load(tmp_path / f"records{rank}.npy") for rank in (0, 1)]
    assert (records[0] == records[1]).all()
    assert records[0]["index"].tolist() == list(range(7))
    assert records[0]["label"].tolist() == [0, 0, 0, 1, 2, 2, 2]

    run = tmp_path / "runs" / "one"
    state = torch.load(run / "best.pt", weights_only=True)
    assert not [name for name in state if name.startswith(("module.", "network.", "_orig_mod."))]
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    assert done.stderr.count("wandb: offline") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_an_error_of_the_main_process_ends_the_other_silently(tmp_path):
    """Started as Slurm's srun does, without a launcher: the main process holds the store that the other one reads."""
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, script],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert [worker.communicate(timeout=60) for worker in workers] == [("", "error: photos: none there\n"), ("", "")]
    assert [worker.returncode for worker in workers] == [2, 2]


# One process


def test_one_process_asks_nobody(tmp_path):
    state = PartialState(cpu=True)
    thing = object()
    assert main_first(state, lambda: thing) is thing
    share_file(state, tmp_path / "not there")


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


def test_of_several_processes_the_first_speaks_for_all(capsys, monkeypatch):
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


def test_half_precision_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=re.escape("fp16 needs a GPU: start with accelerate launch --mixed_precision")):
        start_accelerator(Config(), PartialState(cpu=True), None)


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


def hints(device: str = "cpu", precision: str = "no", processes: int = 1, photos: int = 10, **settings) -> list[str]:
    launched = SimpleNamespace(device=torch.device(device), mixed_precision=precision, num_processes=processes)
    return launcher_hints(launched, Config(**settings), photos)


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


def test_processes_without_a_photo_are_said_with_the_numbers_to_use(monkeypatch):
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


def test_more_processes_than_devices_are_refused_and_not_so_many_trainings(monkeypatch, capsys):
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
