"""Two real processes agree, share and end together."""

import json
import os
import socket
import subprocess
import sys

from pipelines.distributed.hardware import cpu_cores
from pipelines.distributed.sync import on_main_process, share_file
from tests.helpers.paths import ROOT

import numpy as np
import pytest
import torch
from accelerate import PartialState

# What each of the two processes does; its findings go to rank<N>.json.
TOGETHER = """
import json, sys, time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
from pipelines.config import Config
from pipelines.data.dataset import load_dataset
from pipelines.training.evaluation import predict
from pipelines.model.feature_store import FeatureStore
from pipelines.model.features import FrozenFeatures
from pipelines.data.loader import eval_loader
from pipelines.model.network import TrainedPart, TransferModel, average_batchnorm_statistics, batchnorms
from pipelines.data.open import open_dataset
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_accelerator, start_processes
from pipelines.distributed.node_memory import node_memory
from pipelines.distributed.sync import on_main_process, share_file
from pipelines.run.folder import RunFolder
from pipelines.tracking.tracking import Tracking
from pipelines.training.build import trained_together

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
    found["shared"] = on_main_process(state, lambda: [time.sleep(3), rank, "word"])
    default_group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(minutes=1))
    found["again"] = on_main_process(state, lambda: {"from": rank})

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
    first = TransferModel(resnet18(num_classes=3), frozen_stages=0, batchnorm="train")
    for module in batchnorms(first):  # of weights whose batches nobody has counted
        module.running_mean += 0.1
    average_batchnorm_statistics(first, 2)
    found["first"] = all(
        torch.equal(module.running_mean, torch.full_like(module.running_mean, 0.1))
        and torch.equal(module.running_var, torch.ones_like(module.running_var))
        for module in batchnorms(first)
    )
    if rank == 0:  # alone: nothing that is frozen goes through a collective
        average_batchnorm_statistics(TransferModel(network.network, frozen_stages=0, batchnorm="frozen"), 2)

    # One process has no photo: forward and backward all the same, and DDP gives both the same gradient.
    model = accelerator.prepare(TrainedPart(network)).train()
    images = torch.randn(2 if rank == 0 else 0, 3, 64, 64)
    model(network.forward_frozen(images)).sum().backward()
    found["gradient"] = [network.network.conv1.weight.grad.norm().item(), network.network.fc.bias.grad.tolist()]
    # DDP, made anew, waits for no gradient of what rests, in a second step either.
    found["learning"] = []
    for stages in (5, 4, 0):
        network.rest(stages)
        model = trained_together(network, accelerator, config)
        for _ in range(2):
            network.zero_grad()
            model(images).sum().backward()
        learning = [name for name, each in network.network.named_parameters() if each.grad is not None]
        found["learning"].append(sorted({name.partition(".")[0] for name in learning} - {"bn1", "layer1", "layer2"}))
        found["learning"].append(network.network.fc.bias.grad.tolist())
    run = RunFolder(folder / "runs" / "one", writes=state.is_main_process)
    on_main_process(state, lambda: run.create(config))
    run.save_best(network.network, {})

    tracking = Tracking(accelerator, config, run, dataset, {})
    tracking.log({"global_step": 1})
    tracking.finish({})

    split = dataset.remembered(10**9, partial(node_memory, state)).splits["val"]
    loader = eval_loader(config, split, split.labels.astype(np.int64), state, "pillow")
    model = TransferModel(resnet18(num_classes=3), frozen_stages=5, batchnorm="frozen", test_flips=True)
    model.network.load_state_dict(on_main_process(state, lambda: None) or network.network.state_dict())
    store = FeatureStore(folder / "features", 10**9) if state.is_main_process else None
    kept = {"views_per_photo": 1, "epochs": 2, "micro_batch": 2, "mirrored": True, "store": store}
    records = predict(model, loader, accelerator)
    caches = [FrozenFeatures(model, loader, accelerator, **kept) for _ in range(2)]  # the second finds the first one's
    found["in_store"], found["cached_is_same"] = [], True
    for cache in caches:
        found["in_store"].append(cache.in_store())
        found["cached_is_same"] &= all((predict(model, loader, accelerator, cache) == records).all() for _ in range(2))
    np.save(folder / f"records{rank}.npy", records)
    found["in_memory"] = [split.memory.get(index) is not None for index in range(len(split))]
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
from pipelines.distributed.sync import on_main_process


def fail():
    time.sleep(1.5)
    raise UserError("photos: none there")


def main(arguments):
    state = start_processes()
    assert state.num_processes == 2, state.num_processes
    on_main_process(state, lambda: None)
    sync._POLL_SECONDS = (0.2, 1.0)[state.process_index]  # the other one looks half a second after the failure
    on_main_process(state, fail)
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
        assert found["first"], "statistics of the first weights stay"
        assert found["cached_is_same"]
        assert found["learning"][::2] == [["fc"], ["fc", "layer4"], ["conv1", "fc", "layer3", "layer4"]]
        assert found["learning"][1::2] == [[1.0, 1.0, 1.0]] * 3
        assert found["in_memory"] == [True] * 7, "each of the two has what the other has decoded"
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
    assert [worker.communicate(timeout=200) for worker in workers] == [("", "error: photos: none there\n"), ("", "")]
    assert [worker.returncode for worker in workers] == [2, 2]


# One process


def test_one_process_asks_nobody(tmp_path):
    state = PartialState(cpu=True)
    thing = object()
    assert on_main_process(state, lambda: thing) is thing
    share_file(state, tmp_path / "not there")
