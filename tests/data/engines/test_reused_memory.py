"""The memory of batches is used again, and never while somebody still looks at one."""

import gc
import threading
import weakref

from pipelines.data.engines.factory import make_engine
from pipelines.data.engines.pillow import PillowEngine, normalised, scale_and_shift
from pipelines.data.engines.reused_memory import ReusedMemory
from pipelines.data.plan import Views
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.engines import CPU, FAULTS, make_loader, train_plan

import numpy as np
import pytest
import torch

EIGHT = np.arange(8)
REUSING = [name for name in ("pillow", "nvimgcodec") if not FAULTS[name]]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_handed_out_again_once_no_tensor_is_left_of_it():
    memory = ReusedMemory()
    taken = memory.take((2, 3))
    place, tensor = address(taken), torch.from_numpy(taken)
    seen = tensor.view(6)[2:4]
    del taken, tensor
    assert address(memory.take((2, 3))) != place, "a part of the tensor is still there"
    del seen
    assert address(memory.take((2, 3))) == place


def test_smaller_and_larger_batches_share_it():
    memory = ReusedMemory()
    place = address(memory.take((4, 3)))
    smaller = memory.take((3, 3))
    assert address(smaller) == place
    assert smaller.shape == (3, 3)
    del smaller
    larger = memory.take((5, 3))
    assert larger.shape == (5, 3)
    assert larger.dtype == np.float32
    place = address(larger)
    del larger
    assert address(memory.take((4, 3))) == place, "what was too small is replaced"


def test_what_is_held_beyond_a_few_batches_is_not_kept():
    memory = ReusedMemory()
    held = [memory.take((2,)) for _ in range(20)]
    assert len({address(each) for each in held}) == 20
    arrays = [weakref.ref(each.base) for each in held if each.base is not None]
    held.clear()
    gc.collect()
    assert sum(array() is not None for array in arrays) <= 4


@pytest.mark.parametrize("name", REUSING)
def test_batches_that_are_kept_stay_as_they_are(split, name):
    loader = make_loader(split, name, micro_batch=4)
    batches = [batch for step in loader.epoch(0) for batch in step.batches]
    once = [batch.images.clone() for batch in batches]
    again = [batch.images.clone() for step in loader.epoch(0) for batch in step.batches]
    loader.close()
    for kept, first, second in zip(batches, once, again, strict=True):
        assert torch.equal(kept.images, first)
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", REUSING)
@pytest.mark.parametrize("largest", [0, ReusedMemory.LARGEST])
def test_threads_normalise_to_the_bits_that_a_device_does(split, name, largest, monkeypatch):
    monkeypatch.setattr(ReusedMemory, "LARGEST", largest)
    engine, views = make_engine(name, split, micro_batch=8, device=CPU, threads=2), train_plan(split).views(0, EIGHT)
    assert isinstance(engine, PillowEngine)
    engine.submit(views)
    found = engine.fetch().images
    squares = np.stack([engine._pixels(views, position) for position in range(8)])
    engine.close()
    expected = normalised(torch.from_numpy(squares), *scale_and_shift(IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", REUSING)
def test_a_photo_still_being_decoded_when_its_batch_is_forgotten_reaches_no_other(split, name, monkeypatch):
    engine, plan = make_engine(name, split, micro_batch=8, device=CPU, threads=2), train_plan(split)
    assert isinstance(engine, PillowEngine)
    of_photo, at_work, go_on = type(engine)._pixels, threading.Semaphore(0), threading.Event()

    def slowly(self: PillowEngine, views: Views, position: int) -> np.ndarray:
        at_work.release()
        go_on.wait(10)
        return of_photo(self, views, position)

    monkeypatch.setattr(type(engine), "_pixels", slowly)
    engine.submit(plan.views(0, EIGHT))
    assert at_work.acquire(timeout=10)
    assert at_work.acquire(timeout=10)
    engine.cancel()  # while both threads have begun
    monkeypatch.setattr(type(engine), "_pixels", lambda self, views, position: np.zeros((64, 64, 3), np.uint8))
    engine.submit(plan.views(1, EIGHT))
    go_on.set()
    images = engine.fetch().images
    engine.close()
    assert len(images.unique()) == 3, "those of a black photo"
