"""The loader hands out what the plan says, each photo in its position, on either engine, on any number of processes."""

import copy
from dataclasses import replace
from pathlib import Path

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.loader import Loader
from pipelines.data.plan import EvalPlan, TrainPlan
from pipelines.errors import UserError
from tests.helpers.engines import ENGINES, make_loader, train_plan, write_photo

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_have_the_contracts_shapes(split, engine):
    loader = make_loader(split, engine, batch_size=10, micro_batch=4)
    assert loader.steps_per_epoch == -(-len(split) // 10)
    steps = [(step.size, step.rounds, list(step.batches)) for step in loader.epoch(2)]
    loader.close()
    assert (
        [positions for positions, _, _ in steps] == [10, len(split) - 10]
        if len(split) < 20
        else [10, 10, len(split) - 20]
    )
    for positions, rounds, batches in steps:
        assert len(batches) == rounds
        assert [len(batch) for batch in batches] == [4] * (positions // 4) + [positions % 4] * (positions % 4 > 0)
        for batch in batches:
            assert batch.images.shape == (len(batch), 3, 64, 64)
            assert batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.labels.tolist() == split.labels[batch.indices.numpy()].tolist()
    indices = torch.cat([batch.indices for _, _, batches in steps for batch in batches])
    assert indices.tolist() == train_plan(split).indices(2, np.arange(len(split))).tolist()
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [2, 4, 5])
def test_processes_together_see_the_one_process_epoch(split, engine, world_size):
    """Photos, crops and flips alike: the pixels are compared. 23 or so photos in steps of 7 leave a short last step."""
    alone = make_loader(split, engine, batch_size=7, micro_batch=7)
    expected = [next(step.batches) for step in alone.epoch(1)]
    alone.close()
    loaders = [
        make_loader(split, engine, batch_size=7, micro_batch=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for steps, batch in zip(zip(*(loader.epoch(1) for loader in loaders), strict=True), expected, strict=True):
        shares = [part for step in steps for part in step.batches]
        assert {step.size for step in steps} == {len(batch)}
        assert torch.equal(torch.cat([part.indices for part in shares]), batch.indices)
        assert torch.equal(torch.cat([part.images for part in shares]), batch.images)
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("photos", [1, 7])
def test_a_short_batch_is_short_and_an_empty_share_is_empty(split, engine, photos):
    """7 photos on 4 processes, and one: empty shares are empty, nothing is padded or doubled."""
    few = replace(split, labels=split.labels[:photos], sizes=split.sizes[:photos], faults=split.faults[:photos])
    seen = []
    for rank in range(4):
        loader = make_loader(few, engine, batch_size=7, micro_batch=7, rank=rank, world_size=4)
        for step in loader.epoch(0):
            assert step.size == photos
            batches = list(step.batches)
            assert len(batches) <= step.rounds == 1
            seen += [index for batch in batches for index in batch.indices.tolist()]
        empty = loader.empty_batch()
        assert empty.images.shape == (0, 3, 64, 64)
        assert len(empty) == len(empty.labels) == 0
        loader.close()
    assert sorted(seen) == list(range(photos))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_epoch_can_be_abandoned_and_begun_in_the_middle(split, engine):
    loader = make_loader(split, engine, batch_size=5, micro_batch=2)
    whole = [torch.cat([batch.images for batch in step.batches]) for step in loader.epoch(4)]
    for number, step in enumerate(loader.epoch(0)):
        next(step.batches)  # and not even the whole step
        if number == 1:
            break
    rest = [torch.cat([batch.images for batch in step.batches]) for step in loader.epoch(4, start_step=2)]
    again = [torch.cat([batch.images for batch in step.batches]) for step in loader.epoch(4)]
    loader.close()
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], rest, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_each_epoch_has_the_size_that_it_should_whatever_came_before(split, engine):
    """A square grows from 64 pixels to 96 after two epochs. One epoch is abandoned for one of another size, with
    batches in the making, and another begun in the middle, as a resume does."""
    settings = {"seed": 3, "crop_scale_min": 0.08, "flip_probability": 0.5}
    growing = TrainPlan(split.sizes, image_size=96, first_image_size=64, grow_epochs=2, **settings)
    fixed = {size: TrainPlan(split.sizes, image_size=size, **settings) for size in (64, 96)}

    def seen(loader: Loader, epoch: int, start_step: int = 0) -> list[torch.Tensor]:
        steps = loader.epoch(epoch, start_step)
        return [torch.cat([batch.images for batch in step.batches]) for step in steps]

    expected = {}
    for epoch, size in ((1, 64), (2, 96)):
        alone = make_loader(split, engine, fixed[size], batch_size=5, micro_batch=2)
        expected[epoch] = seen(alone, epoch)
        alone.close()
    loader = make_loader(split, engine, growing, batch_size=5, micro_batch=2)
    for epoch, start_step in ((1, 0), (2, 0), (1, 2), (2, 3)):
        for images, wanted in zip(seen(loader, epoch, start_step), expected[epoch][start_step:], strict=True):
            assert torch.equal(images, wanted)
        next(next(loader.epoch(3 - epoch)).batches)
    central = copy.copy(loader)
    central.plan = EvalPlan(split.sizes, image_size=72, resize=80)  # with the same engine, as `central` has it
    assert next(next(central.epoch(0)).batches).images.shape[2:] == (72, 72)
    loader.close()


@pytest.fixture
def broken(tmp_path) -> Split:
    """12 photos, one of which the scan knows to be bad and one of which breaks after the scan."""
    for number in range(12):
        write_photo(tmp_path / "train" / "ab"[number % 2] / f"{number:02}.jpg", 90, 120, number)
        write_photo(tmp_path / "val" / "ab"[number % 2] / f"{number:02}.jpg", 90, 120, number + 100)
    (tmp_path / "train" / "a" / "04.jpg").write_bytes(b"not a photo")
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.2)).splits["train"]
    assert photos.faults.astype(bool).sum() == 1
    broken = tmp_path / "train" / "b" / "07.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    return photos


@pytest.mark.parametrize("engine", ENGINES)
def test_a_photo_that_breaks_in_the_run_is_named(broken, engine):
    loader = make_loader(broken, engine, batch_size=4, micro_batch=4)
    with pytest.raises(UserError, match=r"07\.jpg: cannot be decoded .*--skip-bad-files") as error:
        [list(step.batches) for step in loader.epoch(0)]
    loader.close()
    assert "\n" not in str(error.value)
    assert error.value.on_one_process


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_photo_moves_no_other(broken, engine, capsys):
    loader = make_loader(broken, engine, batch_size=4, micro_batch=4, skip_bad_files=True)
    bad = {index for index in range(12) if Path(broken.path(index)).name in ("04.jpg", "07.jpg")}
    for epoch in range(2):
        order = train_plan(broken).indices(epoch, np.arange(len(broken)))
        for number, step in enumerate(loader.epoch(epoch)):
            planned = order[number * 4 : number * 4 + 4]
            assert step.size == 4
            assert [i for batch in step.batches for i in batch.indices.tolist()] == [i for i in planned if i not in bad]
    loader.close()
    said = capsys.readouterr().err
    assert said.count("07.jpg") == 1, "said once, in the first epoch"
    assert set(loader.bad) < bad
