"""What frozen stages made of photos is found again in later runs, and a cache that is lost or damaged harms nobody."""

import os
import subprocess
import sys
from pathlib import Path

from pipelines.model.feature_store import FeatureStore
from tests.helpers.paths import ROOT

import numpy as np
import pytest
import torch

MAKER, OTHER = "a" * 32, "b" * 32
PHOTOS = np.array([7, -3, 2**62, 7, 0])
ROWS = torch.arange(15.0).view(5, 3)
ROWS[3] = ROWS[0]  # the same photo
TABLE = 1200  # bytes and more take a file of 1000


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "features", 10**6)


def only_file(store: FeatureStore) -> Path:
    (file,) = store._folder.iterdir()
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_found_again_by_photo_and_maker(store, dtype):
    assert store.read(MAKER, PHOTOS) is None
    store.keep(MAKER, PHOTOS, ROWS.to(dtype))
    for photos in (PHOTOS, PHOTOS[::-1].copy(), PHOTOS[1:3]):
        assert store.has(MAKER, photos)
        found = store.read(MAKER, photos)
        expected = ROWS[[PHOTOS.tolist().index(photo) for photo in photos]].to(dtype)
        assert torch.equal(found, expected)
        assert found.dtype == dtype
    for maker, photos in ((OTHER, PHOTOS), (MAKER, np.array([7, 8]))):
        assert not store.has(maker, photos)
        assert store.read(maker, photos) is None


def test_folds_find_their_photos_in_the_tables_of_others(store):
    store.keep(MAKER, PHOTOS[:2], ROWS[:2])
    store.keep(MAKER, PHOTOS[2:], ROWS[2:])
    order = np.array([4, 0, 2, 1])
    assert torch.equal(store.read(MAKER, PHOTOS[order]), ROWS[torch.from_numpy(order)])
    assert store._file(MAKER, PHOTOS[order]).exists(), "for a resume, which is to find the same"


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "photos", "text", "one"])
def test_a_damaged_file_is_as_good_as_none(store, damage, capfd):
    store.keep(MAKER, PHOTOS, ROWS)
    file = only_file(store)
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-1 if content.endswith(ROWS[-1].numpy().tobytes()) else -41] ^= 1
    file.write_bytes(
        {"cut": content[:-8], "empty": b"", "photos": b"\0" * len(content), "text": b"{}"}.get(damage, content)
    )
    if damage == "one":
        from safetensors.torch import save_file

        save_file({"photos": torch.from_numpy(PHOTOS), "rows": ROWS[0]}, file)
    assert store.read(MAKER, PHOTOS) is None
    assert not store.has(MAKER, PHOTOS)
    store.keep(MAKER, PHOTOS, ROWS)
    assert torch.equal(store.read(MAKER, PHOTOS), ROWS)
    assert capfd.readouterr().err == ""


def test_the_longest_unused_go_first(tmp_path):
    rows = torch.zeros(5, 50)
    store = FeatureStore(tmp_path, 3 * TABLE + 100)
    makers = [letter * 32 for letter in "0123"]
    for index, maker in enumerate(makers):
        if index == 3:
            assert store.read(makers[0], PHOTOS) is not None  # it is used, and the next one is the oldest now
        store.keep(maker, PHOTOS, rows)
        file = store._file(maker, PHOTOS)
        os.utime(file, (index, index))
    assert [store.has(maker, PHOTOS) for maker in makers] == [True, False, True, True]
    store.keep(OTHER, PHOTOS, torch.zeros(5, 500))
    assert not store.has(OTHER, PHOTOS), "more than all that may be kept"
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * TABLE + 600
    FeatureStore(tmp_path / "none", 0).keep(MAKER, PHOTOS, rows)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_killed_while_it_writes_leaves_no_table(tmp_path):
    script = f"""
import os, signal, numpy as np, torch
from pathlib import Path
from pipelines.model.feature_store import FeatureStore
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
FeatureStore(Path({str(tmp_path)!r}), 10**6).keep({MAKER!r}, np.arange(5), torch.zeros(5, 50))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -9
    store = FeatureStore(tmp_path, TABLE + 100)
    assert not store.has(MAKER, np.arange(5))
    (rest,) = tmp_path.iterdir()
    store.keep(MAKER, np.arange(5), torch.zeros(5, 50))
    assert not rest.exists()
    assert only_file(store).suffix == ".safetensors"


def test_a_disk_that_takes_nothing_is_said_once(small_disk, capfd):
    folder = small_disk("size=64k")
    store = FeatureStore(folder / "features", 10**6)
    for _ in range(2):
        store.keep(MAKER, PHOTOS, torch.zeros(5, 5000))
    assert store.read(MAKER, PHOTOS) is None
    assert capfd.readouterr().err.count("features are not kept for later runs") == 1
    assert [*(folder / "features").iterdir()] == []
