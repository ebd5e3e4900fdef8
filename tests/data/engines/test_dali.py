"""DALI's graph, its memory, and its failures."""

import dataclasses
import gc
from types import SimpleNamespace

from pipelines.data.engines.dali import image_pipeline
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import MachineError
from tests.helpers.engines import make_loader

import numpy as np
import pytest
import torch


def test_the_gpu_graph_can_be_made_without_a_gpu():
    """DALI checks operators and arguments when the graph is made; only building it needs a driver."""
    pipeline_def = pytest.importorskip("nvidia.dali", reason="needs DALI").pipeline_def
    settings = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "largest": (3000, 4000)}
    settings |= {"batch_size": 8, "num_threads": 2, "device_id": 0, "prefetch_queue_depth": 1}
    graph = pipeline_def(image_pipeline)(device="gpu", **settings)
    assert graph.device_id == 0


def test_a_batch_that_is_kept_stays_as_it_was(split):
    """DALI's own memory is handed over: it is not used again while a batch lives, nor freed with the pipeline."""
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    loader = make_loader(split, "dali", batch_size=8, micro_batch=8)
    batches = [batch.images for epoch in range(3) for step in loader.epoch(epoch) for batch in step.batches]
    again = make_loader(split, "dali", batch_size=8, micro_batch=8)
    for kept, batch in zip(
        batches, (batch for epoch in range(3) for step in again.epoch(epoch) for batch in step.batches), strict=True
    ):
        assert torch.equal(kept, batch.images)
        assert kept.is_contiguous(memory_format=torch.channels_last)
    loader.close()
    again.close()
    del loader, again
    gc.collect()
    assert all(batch.isfinite().all() for batch in batches)


class EventOfABusyGpuStandIn:
    """An event of a GPU that has done its work when the test says so."""

    made: list["EventOfABusyGpuStandIn"]

    def __init__(self) -> None:
        self.recorded = self.done = False
        self.made.append(self)

    def record(self, stream: None) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded, "an event that was never recorded counts as done"
        return self.done


def test_dali_gets_no_batch_back_that_a_gpu_still_reads(split, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    events = EventOfABusyGpuStandIn.made = []
    monkeypatch.setattr(torch.cuda, "Event", EventOfABusyGpuStandIn)
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(True))  # stands for the GPU's
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    loader = make_loader(split, "dali")
    engine, batches = loader.engine, [torch.empty(1) for _ in range(5)]

    def held() -> list[bool]:
        return [any(batch is one for one, _ in engine._held) for batch in batches]

    for batch in batches[:3]:
        engine._hold(batch)
    assert held() == [True, True, True, False, False]
    events[0].done = True
    engine._hold(batches[3])
    assert held() == [False, True, True, True, False]
    events[1].done = events[2].done = events[3].done = True
    engine._hold(batches[4])
    assert held() == [False, False, False, False, True]
    loader.close()
    assert held() == [False] * 5
    assert waited == [True]


class DaliWhoseDecoderFailsStandIn:
    """Makes an engine's DALI look for every photo where there is none, from the batch of a number on."""

    def __init__(self, engine, first_batch: int) -> None:
        self._schedule, self._left, self._split = engine._schedule, first_batch, engine._split
        engine._schedule = self.schedule

    def schedule(self, pipeline, views) -> None:
        self._left -= 1
        if self._left < 0:
            views = dataclasses.replace(views, windows=np.full_like(views.windows, 10**6))
        self._schedule(pipeline, views)


@pytest.mark.parametrize("first_batch", [0, 2])
def test_a_decoder_that_fails_for_every_photo_ends_the_run(split, first_batch):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    loader = make_loader(split, "dali", batch_size=4, micro_batch=4)
    DaliWhoseDecoderFailsStandIn(loader.engine, first_batch)
    batches = (batch for epoch in range(9) for step in loader.epoch(epoch) for batch in step.batches)
    with pytest.raises(MachineError, match=r"^DALI cannot decode photos that are sound \(.*\): give --loader pillow$"):
        list(batches)
