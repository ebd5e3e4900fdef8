"""The memory of batches is used again, and never while somebody still looks at one."""

import threading

from pipelines.data.engines import reused_memory
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


def taken(memory: ReusedMemory, *shape: int) -> np.ndarray:
    array = memory.take(shape)
    assert array is not None
    assert array.shape == shape
    assert array.dtype == np.float32
    return array


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_handed_out_again_once_no_tensor_is_left_of_it():
    memory = ReusedMemory()
    array = taken(memory, 2, 3)
    place, tensor = address(array), torch.from_numpy(array)
    seen = tensor.view(6)[2:4]
    del array, tensor
    assert address(taken(memory, 2, 3)) != place, "a part of the tensor is still there"
    del seen
    assert place in {address(array) for array in [taken(memory, 2, 3), taken(memory, 2, 3)]}


def test_smaller_and_larger_batches_share_it():
    memory = ReusedMemory()
    place = address(taken(memory, 4, 3))
    assert address(taken(memory, 3, 3)) == place
    larger = taken(memory, 5, 3)
    place = address(larger)
    del larger
    assert address(taken(memory, 4, 3)) == place
    assert len(memory._arrays) == 1, "what was too small has gone"


def test_so_much_is_handed_out_and_no_more(monkeypatch):
    monkeypatch.setattr(reused_memory, "_MOST_BYTES", 4 * 10)
    memory = ReusedMemory()
    assert memory.take((11,)) is None
    held = [taken(memory, 5), taken(memory, 5)]
    assert memory.take((1,)) is None
    del held[0]
    held.append(taken(memory, 4))
    assert memory.take((1,)) is None
    held.clear()
    assert len(taken(memory, 10)) == 10, "in place of the two"


@pytest.mark.parametrize("name", REUSING)
def test_batches_that_are_kept_stay_as_they_are(split, name):
    """Of several epochs, every third one, so that the memory of the others is used again beside them."""
    loader = make_loader(split, name, batch_size=4, micro_batch=4)
    kept, once, places = [], [], set()
    for epoch in (0, 0, 1, 0):
        for number, step in enumerate(loader.epoch(epoch)):
            images = next(step.batches).images
            places.add(images.data_ptr())
            if number % 3 == 0:
                kept.append(images)
                once.append(images.clone())
            del images, step
    loader.close()
    assert len(kept) == 8
    assert len(places) < 4 * 6, "some memory was used again"
    assert all(torch.equal(images, copy) for images, copy in zip(kept, once, strict=True))
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(kept[1], kept[7])


@pytest.mark.parametrize("name", REUSING)
@pytest.mark.parametrize("most", [0, 1 << 28])
def test_threads_normalise_to_the_bits_that_a_device_does(split, name, most, monkeypatch):
    monkeypatch.setattr(reused_memory, "_MOST_BYTES", most)
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
