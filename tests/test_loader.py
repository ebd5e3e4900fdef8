"""Both engines execute the same plan to the same pixels, torchvision's; the loader keeps every position where it is."""

import dataclasses
import gc
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.engines.factory import choose_engine, make_engine
from pipelines.data.loader import Loader
from pipelines.data.plan import EvalPlan, Plan, TrainPlan, Views
from pipelines.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from pipelines.errors import MachineError, UserError

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional as F

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
NO_DALI = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed here: its wheels are for Linux only")
ENGINES = ["pillow", pytest.param("dali", marks=NO_DALI)]
CPU = torch.device("cpu")
LEVELS, MEAN_LEVELS = 1, 0.2  # grey levels of 255 by which the engines and torchvision may differ at most, on average
# DALI's filter repeats a window's last pixel, Pillow's leaves the outside out. That touches the outermost rows and
# columns only, by at most 1/8 of the contrast there and in a corner by 15/64. The largest that these photos have:
EDGE_LEVELS = {"pillow": LEVELS, "dali": 16}


def write_photo(path: Path, height: int, width: int, seed: int, **options) -> None:
    """A photo-like picture: smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-20, 20, (height, width, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **options)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """23 JPEGs of many sizes, two of them turned by EXIF, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(23):
        exif = Image.Exif()
        if number in (3, 4):
            exif[0x0112] = (6, 3)[number - 3]
        name = root / "train" / ("ant", "bee")[number % 2] / f"{number:02}.jpg"
        write_photo(name, 60 + 37 * number % 400, 80 + 53 * number % 400, number, quality=92, exif=exif)
    return load_dataset(scan_dataset(root, root / "cache", 0.0001)).splits["train"]


def train_plan(split: Split, image_size: int = 64) -> TrainPlan:
    return TrainPlan(split.sizes, seed=3, image_size=image_size, crop_scale_min=0.08, flip_probability=0.5)


def make_loader(split: Split, engine: str, plan: Plan | None = None, **options) -> Loader:
    plan = plan or train_plan(split)
    settings = {"batch_size": 8, "micro_batch": 8, "prefetch": 2, "device": CPU, **options}
    executor = make_engine(
        engine, split, image_size=plan.image_size, micro_batch=settings["micro_batch"], device=CPU, threads=2
    )
    return Loader(plan, split, split.labels.astype(np.int64), executor, **settings)


def levels(images: torch.Tensor) -> torch.Tensor:
    """Normalised images back as pixel values, 0 to 255."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean) * 255


def torchvisions(split: Split, views: Views, plan: Plan) -> torch.Tensor:
    """What torchvision's own transforms make of the views' photos and windows, as pixel values."""
    pictures, image_size = [], plan.image_size
    for index, window, flip in zip(views.indices, views.windows, views.flips, strict=True):
        photo = ImageOps.exif_transpose(Image.open(split.path(int(index)))).convert("RGB")
        if isinstance(plan, TrainPlan):
            top, left, height, width = (int(value) for value in window)
            photo = F.resized_crop(photo, top, left, height, width, [image_size, image_size])
            photo = F.hflip(photo) if flip else photo
        elif isinstance(plan, EvalPlan) and plan.squash:
            photo = F.resize(photo, [image_size, image_size])
        else:
            photo = F.center_crop(F.resize(photo, image_size * 256 // 224), image_size)
        pictures.append(F.pil_to_tensor(photo).float())
    return torch.stack(pictures)


def assert_torchvisions_pixels(split: Split, engine: str, plan: Plan) -> None:
    loader = make_loader(split, engine, plan, batch_size=64, micro_batch=64)
    largest, edge, total, count = 0.0, 0.0, 0.0, 0
    for number, step in enumerate(loader.epoch(0)):
        batch = next(step.batches)
        views = plan.views(0, np.arange(number * 64, number * 64 + step.size))
        expected = torchvisions(split, views, plan)
        difference = (levels(batch.images) - expected).abs()
        largest = max(largest, difference[..., 1:-1, 1:-1].max().item())
        edge = max(edge, difference.max().item())
        total, count = total + difference.sum().item(), count + difference.numel()
    loader.close()
    print(f"{engine} {type(plan).__name__}: {largest:.3f}, edge {edge:.3f}, mean {total / count:.4f} grey levels")
    assert largest <= LEVELS + 0.01  # normalising and back costs a little
    assert edge <= EDGE_LEVELS[engine] + 0.01
    assert total / count <= MEAN_LEVELS


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_are_torchvisions(split, engine):
    assert_torchvisions_pixels(split, engine, train_plan(split))
    assert_torchvisions_pixels(split, engine, EvalPlan(split.sizes, image_size=56, resize=64))
    assert_torchvisions_pixels(split, engine, EvalPlan(split.sizes, image_size=56, resize=64, squash=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_are_torchvisions_on_the_real_photos(engine, tmp_path):
    if not os.environ.get("DALITUNE_DATA"):
        pytest.skip("needs the ants-and-bees photos: set DALITUNE_DATA to the folder that holds train/ and val/")
    photos = load_dataset(scan_dataset(Path(os.environ["DALITUNE_DATA"]), tmp_path, 0.2)).splits["val"]
    assert len(photos) == 153
    assert_torchvisions_pixels(photos, engine, EvalPlan(photos.sizes, image_size=224, resize=256))
    assert_torchvisions_pixels(photos, engine, train_plan(photos, image_size=224))


FORMATS = {
    "progressive.jpg": ("RGB", {"progressive": True, "quality": 90}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "rgba.png": ("RGBA", {}),
    "palette.png": ("P", {}),
    "one_bit.png": ("1", {}),
    "grey.png": ("L", {}),
    "grey_alpha.png": ("LA", {}),
    "grey_16_bit.png": ("I;16", {}),
    "photo.webp": ("RGB", {"lossless": True}),
    "photo.bmp": ("RGB", {}),
    "photo.tiff": ("RGB", {}),
    "photo.ppm": ("RGB", {}),
} | {f"orientation_{value}.jpg": ("RGB", {"exif": value}) for value in range(1, 9)}


def test_engines_agree_on_every_format_and_orientation(tmp_path):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    for number, (name, (mode, options)) in enumerate(FORMATS.items()):
        path = tmp_path / "train" / ("a", "b")[number % 2] / name
        write_photo(path.with_suffix(".png"), 130, 97, number)
        picture = Image.open(path.with_suffix(".png"))
        picture.load()
        path.with_suffix(".png").unlink()
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        else:
            picture = picture.convert(mode)
        if "exif" in options:
            exif = Image.Exif()
            exif[0x0112] = options["exif"]
            options = {"exif": exif, "quality": 92}
        picture.save(path, **options)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.0001))
    photos = photos.splits["train"]
    assert len(photos) + 2 >= len(FORMATS)  # val takes one of each class
    assert not photos.faults.any(), photos.faulty_files()
    images = {}
    for engine in ("pillow", "dali"):
        loader = make_loader(photos, engine, batch_size=len(photos), micro_batch=len(photos))
        images[engine] = next(next(loader.epoch(0)).batches)
        loader.close()
    assert torch.equal(images["pillow"].indices, images["dali"].indices)
    difference = (levels(images["pillow"].images) - levels(images["dali"].images)).abs()
    assert difference.max() <= EDGE_LEVELS["dali"] + 0.01
    difference = difference[..., 1:-1, 1:-1].amax(dim=(1, 2, 3))
    names = [Path(photos.path(index)).name for index in images["pillow"].indices.tolist()]
    worst = dict(zip(names, difference.tolist(), strict=True))
    assert max(worst.values()) <= LEVELS + 0.01, worst


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
def test_fewer_photos_than_places(split, engine, photos):
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
def test_a_skipped_photo_leaves_its_place_empty_and_moves_nobody(broken, engine, capsys):
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


def test_auto_says_which_engine_and_why():
    name, why = choose_engine("auto", CPU)
    assert name == "pillow"
    assert "no GPU" in why
    assert choose_engine("pillow", torch.device("cuda", 0)) == ("pillow", "as asked")


def test_dali_of_another_cuda_is_refused_before_it_crashes(monkeypatch):
    """PyTorch's version is a stand-in: no GPU is needed to read two version numbers."""
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(UserError, match=r"DALI is built for CUDA 1\d, PyTorch for CUDA 11: .*--loader pillow"):
        choose_engine("dali", gpu)
    name, why = choose_engine("auto", gpu)
    assert name == "pillow"
    assert "CUDA 11" in why


ENCODINGS = [
    ("jpg", {}),
    ("jpg", {"progressive": True}),
    ("png", {}),
    ("webp", {}),
    ("tiff", {"compression": "tiff_lzw"}),
]


def test_damaged_photos_are_the_same_photos_for_both_engines_and_any_crop(tmp_path):
    """200 files with bytes changed behind their header: each is decoded, or named and left out, by both alike."""
    rng = np.random.default_rng(11)
    for number in range(200):
        ending, options = ENCODINGS[number % len(ENCODINGS)]
        photo = tmp_path / "train" / "ab"[number // 5 % 2] / f"{number:03}.{ending}"
        write_photo(photo, 160, 170, number, **options)
        data = bytearray(photo.read_bytes())
        start = data.index(b"\xff\xda") + 14 if ending == "jpg" else 60
        for at in rng.integers(start, len(data) - 12, (1, 2, 5, 30)[number // 5 % 4]):
            data[at] = rng.integers(256)
        photo.write_bytes(data)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.01)).splits["train"]
    bad = []
    for engine, epoch in [("pillow", 0), ("pillow", 1), *([("dali", 0), ("dali", 1)] if HAS_DALI else [])]:
        loader = make_loader(photos, engine, batch_size=16, micro_batch=16, skip_bad_files=True)
        seen = [index for step in loader.epoch(epoch) for batch in step.batches for index in batch.indices.tolist()]
        loader.close()
        assert sorted([*seen, *loader.bad, *np.flatnonzero(photos.faults)]) == list(range(len(photos)))
        bad.append(sorted(loader.bad))
    assert all(each == bad[0] for each in bad)
    assert 0 < len(bad[0]) < len(photos) // 2
    assert (photos.faults > 0).any()


def test_the_gpu_graph_can_be_made_without_a_gpu():
    """DALI checks operators and arguments when the graph is made; only building it needs a driver."""
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    from pipelines.data.engines.dali import image_pipeline

    settings = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "largest": (3000, 4000)}
    graph = image_pipeline(device="gpu", batch_size=8, num_threads=2, device_id=0, prefetch_queue_depth=1, **settings)
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


def test_a_batch_that_a_gpu_still_reads_is_not_given_back_to_dali(split, monkeypatch):
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


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 20_000)])
def test_of_a_strip_only_the_square_that_is_kept_is_computed(tmp_path, shape):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    for label in "ab":
        write_photo(tmp_path / "train" / label / "strip.png", *shape, seed=0)
        write_photo(tmp_path / "train" / label / "photo.png", 90, 120, seed=1)
    photos = load_dataset(scan_dataset(tmp_path, tmp_path / "cache", 0.01)).splits["train"]
    assert_torchvisions_pixels(photos, "dali", EvalPlan(photos.sizes, image_size=224, resize=256))


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
def test_a_decoder_that_fails_for_every_photo_ends_the_run_in_a_line(split, first_batch):
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    loader = make_loader(split, "dali", batch_size=4, micro_batch=4)
    DaliWhoseDecoderFailsStandIn(loader.engine, first_batch)
    batches = (batch for epoch in range(9) for step in loader.epoch(epoch) for batch in step.batches)
    with pytest.raises(MachineError, match=r"^DALI cannot decode photos that are sound \(.*\): give --loader pillow$"):
        list(batches)
