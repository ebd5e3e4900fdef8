"""Photos that stay decoded in memory: the same pixels, within the limit, and shared."""

import mmap
import os

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import engine_module
from pipelines.data.memory import PhotoMemory
from pipelines.distributed import node_memory
from pipelines.distributed.node_memory import check_node_memory, memory_bytes
from pipelines.errors import UserError
from tests.helpers.corpus import SOUND, write_zoo
from tests.helpers.engines import HERE, make_loader

import numpy as np
import pytest
import torch
from accelerate import PartialState


def private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def images(split: Split, engine: str) -> list[torch.Tensor]:
    """Of three epochs, each with the photos that it is of."""
    loader = make_loader(split, engine, skip_bad_files=True)
    batches = [batch for epoch in range(3) for step in loader.epoch(epoch) for batch in step.batches]
    loader.close()
    return [each for batch in batches for each in (batch.images, batch.indices)]


@pytest.mark.parametrize("engine", [name for name in HERE if engine_module(name).USES_MEMORY])
def test_pixels_are_the_same_with_and_without(engine, tmp_path):
    """Every kind of sound photo; a half of them fits."""
    small = {name: specimen for name, specimen in SOUND.items() if "5000" not in name}
    for label in "ab":
        write_zoo(tmp_path / "train" / label, small)
        write_zoo(tmp_path / "val" / label, dict(list(small.items())[:1]))
    dataset = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.2))
    split = dataset.splits["train"]
    half = int(3 * split.sizes.prod(axis=1).sum()) // 2
    remembered = dataset.remembered(half, private).splits["train"]
    assert remembered.memory
    assert 0 < remembered.memory.fits.sum() < len(split)
    for found, expected in zip(images(remembered, engine), images(split, engine), strict=True):
        assert torch.equal(found, expected)
    there = [index for index in range(len(split)) if remembered.memory.get(index) is not None]
    assert there == np.flatnonzero(remembered.memory.fits).tolist()


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(UserError, match=r"memory_gb: \S+ GB of decoded photos, and a node may use \S+ GB of memory"):
        check_node_memory(PartialState(cpu=True), 1 << 60)


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/job/step", {"job/memory.max": "5000000", "job/step/memory.max": "max"}, 5_000_000),
        ("0::/job", {"job/memory.max": "max"}, None),
        ("4:cpu,memory:/job\n1:cpuset:/", {"memory/job/memory.limit_in_bytes": "6000000"}, 6_000_000),
        ("", {}, None),
    ],
)
def test_a_control_groups_limit_counts(own, files, limit, tmp_path, monkeypatch):
    """Stand-ins for the files of Slurm's and a container's control groups."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(node_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(node_memory, "_OWN_CGROUPS", tmp_path / "own")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes() == (limit or machine)


def test_the_limit_is_shared_by_train_and_val_and_one_writes_for_all():
    sizes = np.array([[2, 3], [0, 0], [4, 4], [1, 1]], np.int32)
    area = private(1 << 10)
    one, other = (PhotoMemory(sizes, 3 * 22, lambda _: area) for _ in range(2))
    assert one.fits.tolist() == [True, False, True, False]
    assert one.bytes == 3 * 22
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert other.get(2) is None
    one.keep(2, pixels)
    assert np.array_equal(other.get(2), pixels)
    assert other.get(0) is None
    assert not PhotoMemory(sizes, 5, private).fits.any()
