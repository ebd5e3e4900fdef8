"""Shrunk copies of large photos: their pixels, what becomes of lost ones, and the pass that makes them."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from pipelines.config import Config
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.decode import central_views, shrunk_jpeg, window_of
from pipelines.data.headers import SHRUNK
from pipelines.data.plan import EvalPlan
from pipelines.data.shrink import JPEG, ShrunkCopies, keep_copy, shrunk_sizes
from pipelines.data.shrink_pass import check_room, make_copies, shrink_advice, shrink_report
from pipelines.errors import MachineError, StopAgreed, UserError
from pipelines.files import atomic_write
from tests.helpers.corpus import SOUND, ZOO, break_unseen, write_zoo
from tests.helpers.engines import EDGE_LEVELS, ENGINES, MEAN_LEVELS, levels, make_loader, train_plan, write_photo
from tests.helpers.paths import ROOT

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

WITHIN = 1.5  # levels of 255, on average: a JPEG that is decoded scaled and one that is decoded whole, each saved


@pytest.fixture
def large(tmp_path, monkeypatch) -> Split:
    """Six photos read from copies of 64 pixels, and one of 60 that is read as it lies."""
    monkeypatch.setenv("DALITUNE_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        write_photo(tmp_path / f"photos/train/a/{number}.jpg", 300 + 20 * number, 400, number, quality=95)
    for split in ("train", "val"):
        write_photo(tmp_path / f"photos/{split}/b/small.jpg", 60, 90, 7)
    split = load_dataset(scan_dataset(tmp_path / "photos", tmp_path / "cache", 0.2)).splits["train"]
    return split.shrunk(ShrunkCopies(64, tmp_path / "cache"))


@pytest.fixture
def config(large) -> Config:
    return Config(image_size=64, resize=64, shrink=64, loader_threads=2)


def copies(cache: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in cache.rglob("*.jpg")}


def whole_views(split: Split) -> list[np.ndarray]:
    return central_views(split, np.arange(len(split)), EvalPlan(split.sizes, image_size=56, resize=64))


# Sizes and pixels


def test_the_shorter_side_becomes_shrink_and_small_photos_stay():
    sizes = np.array([(3024, 4032), (4032, 3024), (512, 9000), (513, 513), (0, 0), (1000, 65_535), (1, 7)])
    expected = [[512, 683], [683, 512], [512, 9000], [512, 512], [0, 0], [512, 33_554], [1, 7]]
    assert shrunk_sizes(sizes, 512).tolist() == expected


def test_copies_of_every_kind_are_what_the_whole_photo_would_be(tmp_path):
    """Upright, composed, of 8 bits: as a view of the photo has it, shrunk and saved once."""
    write_zoo(tmp_path / "photos/train/a", SOUND)
    split = load_dataset(scan_dataset(tmp_path / "photos", tmp_path, 0.2), "black").undivided().splits["all"]
    shrunk = split.shrunk(ShrunkCopies(32))
    large = np.flatnonzero(shrunk.kinds & SHRUNK)
    assert len(large) == sum(min(ZOO[name].size) > 32 for name in SOUND)
    views = EvalPlan(split.sizes, image_size=16, resize=16).views(0, np.arange(len(split)))
    views.windows[:, :2], views.windows[:, 2:] = 0, split.sizes
    for index in large.tolist():
        content, height, width = shrunk_jpeg(shrunk, index), *shrunk.sizes[index].tolist()
        with Image.open(io.BytesIO(content)) as copy:
            assert (copy.format, copy.mode, copy.size) == ("JPEG", "RGB", (width, height))
            assert not {"exif", "comment", "icc_profile"} & copy.info.keys()
            found = np.asarray(copy).astype(int)
        saved = io.BytesIO()
        window_of(split, views, index).resize((width, height), Image.Resampling.BICUBIC).save(saved, **JPEG)
        name, expected = Path(split.path(index)).name, np.asarray(Image.open(saved)).astype(int)
        difference = np.abs(found - expected).mean()
        is_jpeg = Path(split.path(index)).read_bytes().startswith(b"\xff\xd8")
        assert difference <= (3 if is_jpeg else 0), (name, difference)  # of noise, where every pixel is an edge


def test_a_scaled_decode_differs_little(large, tmp_path):
    for index in range(6):
        with Image.open(large.path(index)) as photo:
            photo.save(tmp_path / "whole.png")
        whole = replace(large, root=b"", path_blob=np.frombuffer(os.fsencode(tmp_path / "whole.png"), np.uint8))
        whole = replace(whole, path_offsets=np.array([0, len(whole.path_blob)]), sizes=large.sizes[index:][:1])
        scaled, unscaled = (
            np.asarray(Image.open(io.BytesIO(shrunk_jpeg(*each)))).astype(int) for each in ((large, index), (whole, 0))
        )
        assert np.abs(scaled - unscaled).mean() <= WITHIN


def test_views_are_nearly_those_of_the_photos(large):
    split = load_dataset(scan_dataset(Path(os.fsdecode(large.root)), large.copies.cache, 0.2)).splits["train"]
    for shrunk, whole in zip(whole_views(large), whole_views(split), strict=True):
        assert np.abs(shrunk.astype(int) - whole).mean() <= 2.5


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_give_the_pixels_of_the_copies(large, config, engine):
    make_copies([large], config, PartialState())
    for plan in (train_plan(large), EvalPlan(large.sizes, image_size=56, resize=64)):
        images = {}
        for name in ("pillow", engine):
            loader = make_loader(large, name, plan)
            images[name] = levels(next(next(loader.epoch(0)).batches).images)
            loader.close()
        difference = (images[engine] - images["pillow"]).abs()
        assert difference.max() <= EDGE_LEVELS[engine] + 0.01
        assert difference.mean() <= MEAN_LEVELS


# What is lost is made anew


def test_a_lost_or_damaged_copy_is_made_anew_with_the_same_bytes(large, config):
    make_copies([large], config, PartialState())
    made, views = copies(large.copies.cache), whole_views(large)
    assert len(made) == 6
    with Image.open(io.BytesIO(next(iter(made.values())))) as other:
        other.resize((10, 10)).save(another := io.BytesIO(), "JPEG")
    damages = (b"", b"\xff\xd8", another.getvalue(), b"\xff\xd8" + b"x" * 999 + b"\xff\xd9")
    for file, damage in zip(made, damages, strict=False):
        file.write_bytes(damage)
    list(made)[4].unlink()
    assert all(np.array_equal(*pair) for pair in zip(views, whole_views(large), strict=True))
    assert copies(large.copies.cache) == made
    in_memory = replace(large, copies=ShrunkCopies(64))
    assert all(np.array_equal(*pair) for pair in zip(views, whole_views(in_memory), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_goes_on_where_copies_are_removed(large, config, engine):
    make_copies([large], config, PartialState())
    loader, seen = make_loader(large, engine), []
    for epoch in range(3):
        batch = next(next(loader.epoch(0)).batches)
        seen.append(levels(batch.images))
        if epoch == 0:
            for file in copies(large.copies.cache):
                file.unlink()
    loader.close()
    assert not loader.bad
    assert len(copies(large.copies.cache)) == 6
    assert (seen[0] - seen[1]).abs().max() <= EDGE_LEVELS[engine] + 0.01
    assert (seen[0] - seen[2]).abs().max() == 0


def test_a_full_disk_ends_the_pass_and_no_training(large, config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = whole_views(large)
    for file in copies(large.copies.cache):
        file.unlink()
    monkeypatch.setattr("pipelines.data.decode.keep_copy", full)
    assert all(np.array_equal(*pair) for pair in zip(expected, whole_views(large), strict=True))
    with pytest.raises(MachineError, match=r"a shrunk photo cannot be kept there \(No space left on device\)"):
        make_copies([large], config, PartialState())
    assert not copies(large.copies.cache)


def test_what_has_changed_since_the_scan_is_kept_under_no_name(large):
    """The same photo with another time is, as one that was copied to another node's disk."""
    os.utime(large.path(0), (0, 0))
    Image.new("RGB", (500, 300)).save(large.path(1))
    views = EvalPlan(large.sizes, image_size=56, resize=64).views(0, np.arange(2))
    window_of(large, views, 0)
    with pytest.raises(ValueError, match="its size has changed since the scan"):
        window_of(large, views, 1)
    assert list(copies(large.copies.cache)) == [large.copy_file(0)]


def test_a_folder_that_another_run_has_removed_is_made_again(tmp_path, monkeypatch):
    copy, tried = tmp_path / "kind" / "copy.jpg", []

    def removed(*arguments, **options):
        tried.append(arguments)
        if len(tried) == 1:
            copy.parent.rmdir()
        return atomic_write(*arguments, **options)

    monkeypatch.setattr("pipelines.data.shrink.atomic_write", removed)
    keep_copy(copy, b"content")
    assert (copy.read_bytes(), len(tried)) == (b"content", 2)


# The pass


def test_the_pass_makes_what_is_missing_and_leaves_the_photos_alone(large, config):
    photos = {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path(large.path(0)).parents[2].rglob("*.*")
    }
    make_copies([large], config, PartialState())
    made = copies(large.copies.cache)
    first, *others = made
    first.unlink()
    before = {file: file.stat().st_ino for file in others}
    make_copies([large], config, PartialState())
    assert copies(large.copies.cache) == made
    assert {file: file.stat().st_ino for file in others} == before, "what is there is not made again"
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in photos} == photos
    assert shrink_report([large], config)[0].startswith("shrink: 6 of 7 photos are read from copies of 64 pixels")


def test_room_is_made_of_what_others_have_left(large, config):
    (folder := large.copies.cache / "shrunk/others").mkdir(parents=True)
    for number in range(3):
        (file := folder / f"{number}.jpg").write_bytes(b"x" * 40_000)
        os.utime(file, (number, number))
    make_copies([large], replace(config, cache_gb=0.7e-4), PartialState())
    assert [file.name for file in folder.iterdir()] == ["2.jpg"]
    make_copies([large], replace(config, cache_gb=1e-9), PartialState())  # check_room has not been asked
    assert len(copies(large.copies.cache)) == 6, "its own stay"
    with pytest.raises(UserError, match=r"copies of 64 pixels take about 1\.\d+e-05 GB, and --cache-gb is 1e-05"):
        check_room([large], replace(config, cache_gb=1e-5))
    check_room([large], config)


def test_a_stop_ends_the_pass_and_the_next_one_goes_on(large, config):
    answers = iter([False] * 2)
    with pytest.raises(StopAgreed):
        make_copies([large], replace(config, loader_threads=1), PartialState(), lambda: next(answers, True))
    assert len(copies(large.copies.cache)) == 2
    make_copies([large], config, PartialState())
    assert len(copies(large.copies.cache)) == 6


def test_a_photo_that_cannot_be_decoded_is_told_or_left_to_the_loader(large, config, capsys):
    break_unseen(Path(large.path(3)))
    with pytest.raises(UserError, match=r"3.jpg: cannot be decoded .*--skip-bad-files"):
        make_copies([large], config, PartialState())
    make_copies([large], replace(config, skip_bad_files=True), PartialState())
    loader = make_loader(large, "pillow", skip_bad_files=True)
    list(next(loader.epoch(0)).batches)
    loader.close()
    assert loader.bad == {3}
    assert "left out: " in capsys.readouterr().err


PASS = """
import json, sys
from pathlib import Path
from pipelines.config import Config
from pipelines.data.open import open_dataset
from pipelines.data.shrink_pass import make_copies
from pipelines.distributed.exits import run_script
from pipelines.distributed.launch import start_processes
import pipelines.data.shrink_pass as shrink_pass

def main(arguments):
    state, made = start_processes(), []
    config = Config(data=arguments[0], image_size=64, resize=64, shrink=64, loader_threads=2)
    make = shrink_pass._make
    shrink_pass._make = lambda split, index, config: (made.append(index), make(split, index, config))
    make_copies([open_dataset(state, config).splits["train"]], config, state)
    Path(arguments[1], f"{state.process_index}.json").write_text(json.dumps(made))

if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
"""


@pytest.mark.slow
def test_runs_and_processes_make_the_same_copies_at_once(large, config, tmp_path):
    """Two runs of two processes each, into one cache folder."""
    make_copies([large], config, PartialState())
    expected = {file.name: content for file, content in copies(large.copies.cache).items()}
    (script := tmp_path / "script.py").write_text(PASS)
    environment = {**os.environ, "DALITUNE_CACHE": str(tmp_path / "other"), "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    runs = []
    for number in range(2):
        (found := tmp_path / f"run{number}").mkdir()
        runs.append(subprocess.Popen([*command, str(tmp_path / "photos"), str(found)], env=environment))
    assert [run.wait(timeout=200) for run in runs] == [0, 0]
    assert {file.name: content for file, content in copies(tmp_path / "other").items()} == expected
    assert not [*(tmp_path / "other").rglob("*.tmp")]
    for number in range(2):
        made = [set(json.loads(file.read_text())) for file in (tmp_path / f"run{number}").iterdir()]
        assert len(made) == 2
        assert not made[0] & made[1], "a photo is the work of one process of a run"


# Advice


def test_shrink_is_recommended_where_it_pays(tmp_path):
    for name, side in (("large", 1500), ("small", 300)):
        for number in range(2):
            write_photo(tmp_path / name / f"train/a/{number}.jpg", side, side, number)
        split = load_dataset(scan_dataset(tmp_path / name, tmp_path, 0.2)).splits["train"]
        advice = shrink_advice(split, resize=72, image_size=64)
        if name == "small":
            assert len(advice) <= 1
            assert not shrink_advice(split, resize=256, image_size=224)
        else:
            assert advice[0].startswith("shrink: with --shrink 144 these photos, whose shorter sides are 1500 pixels (")
    assert shrink_report([split], Config(shrink=512)) == [
        "shrink: plays no part, as no photo has a shorter side of more than 512 pixels"
    ]
