"""Copies, dark, bright and blurred photos, planted among others."""

from pathlib import Path

from pipelines.data.appearance import alike, copies, likeness, look_at, thumbnail
from pipelines.data.dataset import Split, load_dataset, scan_dataset

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps


def picture(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Soft blobs and sharp edges, as in a photo."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 12, (height, width, 1))
    return Image.fromarray((np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture
def planted(tmp_path) -> Split:
    folder = tmp_path / "photos" / "train" / "a"
    folder.mkdir(parents=True)
    for seed in range(12):
        picture(seed).save(folder / f"{seed:02}.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, changed, options in (
        ("coded.jpg", picture(0), {"quality": 30}),
        ("half.png", picture(1).resize((160, 120)), {}),
        ("mirrored.jpg", ImageOps.mirror(picture(2)), {}),
        ("turned.jpg", picture(3).transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        ("dark.jpg", picture(4).point(lambda level: level // 8), {}),
        ("bright.jpg", picture(5).point(lambda level: 220 + level // 8), {}),
        ("blurred.jpg", picture(20).filter(ImageFilter.GaussianBlur(4)), {}),
        ("white.png", Image.new("RGB", (80, 80), "white"), {}),
        ("black.png", Image.new("RGB", (80, 80)), {}),
        ("line.png", Image.new("RGB", (1, 900), "red"), {}),
        ("large.jpg", picture(6).resize((2000, 1500), Image.BICUBIC), {}),
    ):
        changed.save(folder / name, **options)
    (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:900])
    (tmp_path / "photos" / "val" / "a").mkdir(parents=True)
    picture(30).save(tmp_path / "photos" / "val" / "a" / "0.jpg")
    return load_dataset(scan_dataset(tmp_path / "photos", tmp_path / "cache", 0.2)).splits["train"]


def names_of(split: Split) -> list[str]:
    return [Path(split.path(index)).name for index in range(len(split))]


def test_planted_photos_are_told_from_the_others(planted):
    names, seen = names_of(planted), look_at(planted, "looking")
    found = {(names[one], names[other]) for one, other in alike(seen.prints, 0.985)}
    assert found == {
        ("00.jpg", "coded.jpg"),
        ("01.jpg", "half.png"),
        ("02.jpg", "mirrored.jpg"),
        ("03.jpg", "turned.jpg"),
        ("04.jpg", "dark.jpg"),
        ("05.jpg", "bright.jpg"),
        ("06.jpg", "large.jpg"),
    }
    assert 0.985 < likeness(seen.prints[:1], seen.prints[names.index("coded.jpg")][None])[0, 0] <= 1.001
    dark, bright, blurred = seen.lightest < 0.25, seen.darkest > 0.75, seen.sharpness < 30
    assert [names[at] for at in np.flatnonzero(dark)] == ["black.png", "dark.jpg"]
    assert [names[at] for at in np.flatnonzero(bright)] == ["bright.jpg", "white.png"]
    assert "blurred.jpg" in [names[at] for at in np.flatnonzero(blurred)]
    assert not any(names[at][0].isdigit() for at in np.flatnonzero(blurred))
    assert np.isnan(seen.sharpness[names.index("broken.jpg")])
    assert not seen.prints[[names.index(name) for name in ("white.png", "black.png", "line.png", "broken.jpg")]].any()
    assert not seen.errors, "the scan has found the broken one, which is not opened"


def test_all_pairs_are_compared_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr("pipelines.data.appearance._BLOCK", 3)
    prints = np.random.default_rng(0).normal(size=(10, 195)).astype(np.float32)
    prints[9], prints[4] = prints[0], prints[3]
    prints /= np.linalg.norm(prints, axis=1, keepdims=True)
    assert sorted(map(tuple, alike(prints, 0.985).tolist())) == [(0, 9), (3, 4)]
    assert alike(prints[:0], 0.985).shape == (0, 2)


def test_frames_of_a_film_are_linked_and_not_all_paired(monkeypatch):
    monkeypatch.setattr("pipelines.data.appearance._BLOCK", 8)
    monkeypatch.setattr("pipelines.data.appearance._MOST_LINKS", 1)
    prints = np.zeros((20, 195), np.float32)
    prints[:, 3] = 1
    prints[7] = np.roll(prints[7], 2)
    pairs = alike(prints, 0.985)
    assert len(pairs) < 60
    assert copies(pairs, [0] * 20) == {photo: 0 for photo in range(1, 20) if photo != 7}


def test_of_a_group_the_first_of_the_preferred_split_stays():
    pairs = np.array([[0, 1], [1, 5], [2, 3], [3, 4]])
    assert copies(pairs, [1, 1, 1, 1, 1, 0]) == {0: 5, 1: 5, 3: 2, 4: 2}
    assert copies(pairs[:0], [0]) == {}


def test_a_thumbnail_is_the_whole_photo(planted):
    names = names_of(planted)
    whole = thumbnail(planted, names.index("turned.jpg"), 64)
    assert whole.shape == (64, 64, 3)
    assert (whole[:6] == 255).all()
    assert (whole[8:56] != 255).any()
    assert (thumbnail(planted, names.index("broken.jpg"), 64) == 200).all()
