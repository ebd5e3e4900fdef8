"""The index: the same reading as torchvision's, the inspection of files, the cache, CSV files, the set-aside split."""

import io
import itertools
import os
import re
import shutil
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from pipelines.data import dataset as dataset_module
from pipelines.data.dataset import (
    Dataset,
    Split,
    _read_index,
    check_dataset,
    load_dataset,
    map_labels,
    scan_dataset,
)
from pipelines.data.headers import FAULTS, MAX_PIXELS, Inspection, exif_orientation
from pipelines.errors import MachineError, UserError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder


def encoded(kind: str = "JPEG", size: tuple[int, int] = (30, 20), seed: int = 0, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """ROOT/<split>/<class>/0.jpg ..., every photo another."""
    seed = 0
    for folder, count in counts.items():
        for number in range(count):
            seed += 1
            write(root / folder / f"{number}.jpg", encoded(seed=seed, size=(20 + number, 16)))
    return root


def scan(data: Path, tmp_path: Path, val_fraction: float = 0.2) -> Dataset:
    return load_dataset(scan_dataset(data, tmp_path / "cache", val_fraction))


def inspect_file(tmp_path: Path, content: bytes, name: str = "x.jpg") -> tuple[str, tuple[int, int]]:
    """What a scan says of one file: the reason and (height, width)."""
    root = tmp_path / "scanned"
    shutil.rmtree(root, ignore_errors=True)
    write(root / "train" / "a" / name, content)
    write(root / "val" / "a" / "fine.jpg", encoded())
    split = scan(root, tmp_path).splits["train"]
    return FAULTS[split.faults[0]], tuple(split.sizes[0].tolist())


def paths(split: Split) -> list[str]:
    return [split.path(index) for index in range(len(split))]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The paths of the files that scans open."""
    seen: list[bytes] = []
    real_inspect_file = dataset_module.inspect_file
    monkeypatch.setattr(dataset_module, "inspect_file", lambda path: (seen.append(path), real_inspect_file(path))[1])
    return seen


# The reading of a folder


def assert_like_image_folder(split: Split, folder: Path) -> None:
    theirs = ImageFolder(str(folder))
    assert list(split.classes) == theirs.classes
    assert paths(split) == [path for path, _ in theirs.samples]
    assert split.labels.tolist() == theirs.targets


def test_a_folder_is_read_as_image_folder_reads_it(tmp_path: Path) -> None:
    root = tmp_path / "data"
    names = ["b/z.JPG", "b/a.jpeg", "b/deep/er/2.PNG", "b/deep/10.png", "a/1.webp", "a/2.TIF", "B/é.bmp", "B/x y.pgm"]
    for split in ("train", "val"):
        for number, name in enumerate(names):
            write(root / split / name, encoded(seed=number))
        write(root / split / "a" / "imageNotFound.gif", b"GIF89a")
        write(root / split / "a" / "notes.txt", b"")
        write(root / split / "loose.jpg", encoded())
    (root / "train" / "linked").symlink_to(root / "val" / "b")
    dataset = scan(root, tmp_path)
    assert list(dataset.splits) == ["train", "val"]
    assert_like_image_folder(dataset.splits["train"], root / "train")
    assert_like_image_folder(dataset.splits["val"], root / "val")
    assert dataset.splits["train"].classes == ("B", "a", "b", "linked")
    assert dataset.splits["train"].class_counts() == {"B": 2, "a": 2, "b": 4, "linked": 4}


@pytest.mark.parametrize("is_absolute", [True, False])
def test_what_is_above_a_link_is_above_where_it_leads_to(tmp_path: Path, monkeypatch, is_absolute: bool) -> None:
    make_folder(tmp_path / "disk" / "photos" / "train", {"a": 2, "b": 2})
    (tmp_path / "disk" / "work").mkdir()
    make_folder(tmp_path / "home" / "photos" / "train", {"other": 2, "yet another": 2})
    (tmp_path / "home" / "link").symlink_to(tmp_path / "disk" / "work")
    monkeypatch.chdir(tmp_path / "home")
    given = Path("link", "..", "photos")
    dataset = scan(Path.cwd() / given if is_absolute else given, tmp_path)
    assert dataset.splits["train"].classes == ("a", "b")
    assert dataset.data == tmp_path.resolve() / "disk" / "photos"


@given(
    st.dictionaries(
        st.text(st.sampled_from("aAbZé0. _-"), min_size=1, max_size=4).filter(lambda name: name[0] != "."),  # hidden
        st.sets(
            st.from_regex(r"[abAB_]{1,3}(/[ab][ab.]?c)?\.(jpg|PNG|gif|TifF)", fullmatch=True), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=25)
def test_any_folder_is_read_as_image_folder_reads_it(tmp_path_factory: pytest.TempPathFactory, tree) -> None:
    tmp_path = tmp_path_factory.mktemp("tree")
    for name, files in tree.items():
        for file in files | {"sure.jpg"}:
            write(tmp_path / "data" / "val" / name / file, b"")
    split = scan(tmp_path / "data", tmp_path).splits["val"]
    assert_like_image_folder(split, tmp_path / "data" / "val")
    assert split.faults.tolist() == [FAULTS.index("empty file")] * len(split)


def test_the_ants_and_bees(tmp_path: Path) -> None:
    if not os.environ.get("DALITUNE_DATA"):
        pytest.skip("DALITUNE_DATA is not set: the folder of the ants-and-bees photos")
    root = Path(os.environ["DALITUNE_DATA"])
    dataset = scan(root, tmp_path)
    assert dataset.splits["train"].class_counts() == {"ants": 123, "bees": 121}
    assert dataset.splits["val"].class_counts() == {"ants": 70, "bees": 83}
    for name, split in dataset.splits.items():
        assert_like_image_folder(split, root / name)
        for index, (height, width) in enumerate(split.sizes):
            with Image.open(split.path(index)) as photo:
                assert ImageOps.exif_transpose(photo).size == (width, height)
    check_dataset(dataset, skip_bad_files=False)


def test_every_folder_beside_train_is_a_split_if_it_holds_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 2, "train/b": 2, "more/a": 1, "test/b": 1, "val/a": 1})
    write(root / "docs" / "figures" / "notes.txt", b"")
    write(root / "photos_without_class" / "1.jpg", encoded())
    assert list(scan(root, tmp_path).splits) == ["train", "val", "more", "test"]


def test_val_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    dataset = scan(make_folder(tmp_path / "data", {"val/a": 2, "val/b": 1}), tmp_path)
    assert list(dataset.splits) == ["val"]
    check_dataset(dataset, skip_bad_files=False, splits=("val",))
    with pytest.raises(UserError, match="no split 'train'"):
        check_dataset(dataset, skip_bad_files=False)


@pytest.mark.parametrize("layout", ["missing", "empty", "photos only", "empty train", "empty class", "unlistable"])
def test_a_folder_that_holds_no_classes_is_one_clear_line(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "da\nta"
    if layout != "missing":
        root.mkdir()
    if layout == "photos only":
        write(root / "1.jpg", encoded())
    if layout == "empty train":
        (root / "train").mkdir()
    if layout == "empty class":
        make_folder(root, {"train/bees": 1})
        write(root / "train" / "wasps" / "a.gif", b"GIF89a")
    if layout == "unlistable":
        if os.geteuid() == 0:
            pytest.skip("root may list every folder")
        root.chmod(0)
    with pytest.raises(UserError) as error:
        scan(root, tmp_path)
    message = str(error.value)
    assert "da?ta" in message
    assert "\n" not in message
    assert ("wasps" in message) == (layout == "empty class")


def test_names_that_are_not_unicode_survive(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/b": 1, "val/b": 1})
    strange = os.fsencode(root) + b"/train/cl\xe9ss/\xff\n.jpg"
    os.mkdir(os.path.dirname(strange))
    with open(strange, "wb") as file:
        file.write(b"not a photo")
    dataset = scan(root, tmp_path)
    split = dataset.splits["train"]
    assert split.path_bytes(1) == strange
    assert os.path.exists(split.path(1))
    assert split.classes == ("b", os.fsdecode(b"cl\xe9ss"))
    "\n".join(dataset.report()).encode()
    with pytest.raises(UserError, match=r"train/cl\\xe9ss/\\xff\?\.jpg \(not an image of a known format\)"):
        check_dataset(dataset, skip_bad_files=False)


# The share set aside


def test_without_val_a_share_of_each_class_is_set_aside(tmp_path: Path) -> None:
    counts = {"a": 10, "b": 25, "c": 3, "d": 1}
    root = make_folder(tmp_path / "data", {f"train/{name}": count for name, count in counts.items()})
    dataset = scan(root, tmp_path)
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert val.class_counts() == {"a": 2, "b": 5, "c": 1, "d": 0}
    assert train.class_counts() == {"a": 8, "b": 20, "c": 2, "d": 1}
    assert sorted(paths(train) + paths(val)) == sorted(path for path, _ in ImageFolder(str(root / "train")).samples)
    assert paths(train) == sorted(paths(train), key=lambda path: (Path(path).parent, Path(path).name))
    assert dataset.val_fraction == 0.2
    assert any("val was taken from train: 0.2" in line for line in dataset.report())
    check_dataset(dataset, skip_bad_files=False)


def test_the_share_depends_on_nothing_but_the_path(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 30, "b": 30})
    first = scan(root, tmp_path)
    names = {name: {os.path.relpath(path, root) for path in paths(split)} for name, split in first.splits.items()}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root, elsewhere)
    again = scan(elsewhere, tmp_path)
    assert {os.path.relpath(path, elsewhere) for path in paths(again.splits["val"])} == names["val"]
    # One photo more moves at most one other: the rest keep their side.
    write(root / "a" / "new.jpg", encoded(seed=99))
    more = {os.path.relpath(path, root) for path in paths(scan(root, tmp_path).splits["val"])}
    assert len(more ^ names["val"]) <= 2
    assert len(names["val"]) == 12
    larger = {os.path.relpath(path, root) for path in paths(scan(root, tmp_path, 0.5).splits["val"])}
    assert more < larger


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.001, 0.999))
def test_the_share_of_any_class_is_close_and_never_all(labels: list[int], fraction: float) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, len(labels)).astype(np.uint64)
    chosen = dataset_module._choose_val(np.array(labels), np.ones(len(labels), bool), hashes, fraction)
    for label in set(labels):
        rows = np.flatnonzero(np.array(labels) == label)
        took = np.isin(rows, chosen)
        if len(rows) == 1:
            assert not took.any()
        else:
            assert 1 <= took.sum() < len(rows)
            assert abs(took.sum() - fraction * len(rows)) <= 1
            assert hashes[rows[took]].max() < hashes[rows[~took]].min()


# The inspection of a file

SOUND = {
    "jpeg": encoded(),
    "progressive jpeg": encoded(progressive=True),
    "grey jpeg": encoded(mode="L"),
    "cmyk jpeg": encoded(mode="CMYK"),
    "jpeg with bytes behind its end": encoded() + b"\0" * 10_000,
    "jpeg with further pictures": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "png": encoded("PNG"),
    "palette png": encoded("PNG", mode="P"),
    "png with bytes behind its end": encoded("PNG") + b"\0" * 10_000,
    "webp": encoded("WEBP"),
    "bmp": encoded("BMP"),
    "palette bmp": encoded("BMP", mode="P"),
    "bitmap bmp": encoded("BMP", mode="1"),
    "tiff": encoded("TIFF"),
    "packed tiff": encoded("TIFF", compression="tiff_lzw"),
    "ppm": encoded("PPM"),
    "pgm": encoded("PPM", mode="L"),
    "plain ppm": b"P3\n30 20\n255\n" + b"1 2 3 " * 600,
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_is_found_sound(tmp_path: Path, name: str) -> None:
    assert inspect_file(tmp_path, SOUND[name]) == ("", (20, 30))


@pytest.mark.parametrize("name", sorted(set(SOUND) - {"plain ppm"}))
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_file_is_found_cut(tmp_path: Path, name: str, share: float) -> None:
    content = encoded("MPO", save_all=True) if "further" in name else SOUND[name].removesuffix(b"\0" * 10_000)
    reason, size = inspect_file(tmp_path, content[: int(len(content) * share)])
    assert reason in ("truncated", "broken header")
    assert size == (0, 0)
    if share == 0.9:
        assert reason == "truncated" or "tiff" in name  # Pillow's TIFFs have their header at the end


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_photo(tmp_path: Path) -> None:
    thumbnail = encoded(size=(8, 8))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    photo = encoded(size=(200, 200))
    photo = photo[:2] + segment + photo[2:]
    assert inspect_file(tmp_path, photo) == ("", (200, 200))
    start = len(segment) + 2
    for cut in (start, start + 300, start + 2000):
        assert inspect_file(tmp_path, photo[:cut])[0] in ("truncated", "broken header")
    # As long as the last bytes that are read, and longer: the marker is looked for behind the start of scan only.
    assert inspect_file(tmp_path, photo[: start + 2000] + b"\0" * 9000)[0] == "truncated"
    assert inspect_file(tmp_path, photo + b"\0" * 9000) == ("", (200, 200))


@pytest.mark.parametrize("name", [name for name in SOUND if name.endswith("jpeg")])
def test_a_marker_among_the_pixels_of_a_jpeg_is_damage(tmp_path: Path, name: str) -> None:
    content = SOUND[name]
    at = content.rindex(b"\xff\xda") + 20
    for marker, reason in ((b"\xff\x3c", "damaged"), (b"\xff\xc0", "damaged"), (b"\xff\xd3", ""), (b"\xff\x00", "")):
        assert inspect_file(tmp_path, content[:at] + marker + content[at + 2 :])[0] == reason
    comment = b"\xff\xfe\x00\x08" + b"\xff\x3c\xff\xd9\xff\x01"
    assert inspect_file(tmp_path, content[:-2] + comment + content[-2:]) == ("", (20, 30))
    assert inspect_file(tmp_path, content[:-2] + comment[:4] + b"\xff\xff" + content[-2:])[0] == "truncated"


def test_what_is_no_photo_is_named(tmp_path: Path) -> None:
    assert inspect_file(tmp_path, b"") == ("empty file", (0, 0))
    for content in (encoded("GIF"), b"<html>", b"\xff\xd8", b"RIFF\x10\0\0\0WAVE"):
        assert inspect_file(tmp_path, content) == ("not an image of a known format", (0, 0))
    assert inspect_file(tmp_path, b"BM, not a bitmap") == ("broken header", (0, 0))
    assert inspect_file(tmp_path, b"\xff\xd8\xff" + b"\0" * 500)[0] in ("broken header", "truncated")


def test_the_format_counts_and_not_the_name(tmp_path: Path) -> None:
    assert inspect_file(tmp_path, encoded("PNG"), "x.jpg") == ("", (20, 30))


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    # The bytes behind the end make the file as large as so many pixels may be packed.
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"") + bytes(18_000)


def test_a_photo_too_large_to_decode_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    assert MAX_PIXELS == 14_351 * 12_470
    assert inspect_file(tmp_path, huge_png(14_351, 12_471)) == ("too many pixels", (0, 0))
    assert inspect_file(tmp_path, huge_png(14_351, 12_470)) == ("", (12_470, 14_351))
    assert inspect_file(tmp_path, huge_png(1, 65_535)) == ("", (65_535, 1))
    assert inspect_file(tmp_path, huge_png(1, 65_536)) == ("a side of more than 65,535 pixels", (0, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert inspect_file(tmp_path, huge_png(2**31 - 1, 2**31 - 1)) == ("too many pixels", (0, 0))
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_upright_photo(tmp_path: Path, kind: str, orientation: int) -> None:
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
    content = encoded(kind, **options)
    with Image.open(io.BytesIO(content)) as photo:
        upright = ImageOps.exif_transpose(photo)
    assert inspect_file(tmp_path, content) == ("", (upright.height, upright.width))
    assert (upright.height > upright.width) == (5 <= orientation <= 8)


def test_orientation_is_exif_only_and_broken_exif_is_none(tmp_path: Path) -> None:
    png = encoded("PNG")
    turned = exif(6).removeprefix(b"Exif\0\0")
    behind = (
        png[:-12] + struct.pack(">I", len(turned)) + b"eXIf" + turned + struct.pack(">I", zlib.crc32(b"eXIf" + turned))
    )
    assert inspect_file(tmp_path, behind + png[-12:]) == ("", (30, 20))
    assert inspect_file(tmp_path, encoded(exif=b"Exif\0\0" + b"garbage" * 9)) == ("", (20, 30))
    assert inspect_file(tmp_path, encoded(exif=exif(6)[:20])) == ("", (20, 30))
    assert inspect_file(tmp_path, encoded(xmp=b'<x:xmpmeta tiff:Orientation="6"/>')) == ("", (20, 30))
    with Image.open(io.BytesIO(encoded("TIFF", tiffinfo={274: 6}))) as tiff:
        assert exif_orientation(tiff) == 6
        tiff.load()
        assert exif_orientation(tiff) == 1


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(sorted(SOUND)), st.data())
@settings(max_examples=150)
def test_no_damage_stops_a_scan(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    content = bytearray(SOUND[name].removesuffix(b"\0" * 10_000))
    for at in data.draw(st.lists(st.integers(0, min(len(content) - 1, 400)), max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    fault, (height, width), *_ = dataset_module.inspect_file(os.fsencode(path))
    assert fault in FAULTS
    assert (height > 0 and width > 0) if not fault else (height, width) == (0, 0)


def test_what_cannot_be_opened_is_a_fault_and_not_a_failure(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 1, "val/a": 1})
    (root / "train" / "a" / "1.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(root / "train" / "a" / "2.jpg")
    expected = ["", "missing", "not a regular file"]
    if os.geteuid() != 0:
        write(root / "train" / "a" / "3.jpg", encoded()).chmod(0)
        expected.append("cannot be read")
    assert [FAULTS[fault] for fault in scan(root, tmp_path).splits["train"].faults] == expected


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 2, "val/a": 1})
    with monkeypatch.context() as patched:
        patched.setattr(dataset_module, "inspect_file", lambda path: Inspection("cannot be read"))
        assert FAULTS[scan(root, tmp_path).splits["train"].faults[0]] == "cannot be read"
    assert not scan(root, tmp_path).splits["train"].faults.any()


# The cache


def test_an_unchanged_folder_is_not_opened_again(tmp_path: Path, opened: list[bytes]) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 70, "train/b": 70, "val/a": 3, "val/b": 3})
    index_file = scan_dataset(root, tmp_path / "cache", 0.2)
    assert index_file.parent == tmp_path / "cache" / "scan"
    assert len(opened) == 146
    before = index_file.stat()
    assert scan_dataset(root, tmp_path / "cache", 0.2) == index_file
    assert len(opened) == 146
    assert (index_file.stat().st_ino, index_file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert scan_dataset(root, tmp_path / "cache", 0.3) != index_file
    assert [path.name for path in index_file.parent.iterdir() if path.suffix != ".safetensors"] == []


def test_only_new_and_changed_files_are_opened(tmp_path: Path, opened: list[bytes]) -> None:
    root = make_folder(tmp_path / "data", {"train/b": 5, "train/c": 5, "val/b": 2})
    first = scan(root, tmp_path)
    opened.clear()
    write(root / "train" / "a" / "new.jpg", encoded(size=(50, 40)))  # a class in front: every label moves
    write(root / "train" / "b" / "2.jpg", encoded(size=(60, 40)))
    os.utime(root / "train" / "b" / "3.jpg", ns=(1, 1))
    (root / "train" / "b" / "0.jpg").unlink()
    second = scan(root, tmp_path)
    assert sorted(opened) == [os.fsencode(root / "train" / name) for name in ("a/new.jpg", "b/2.jpg", "b/3.jpg")]
    assert_like_image_folder(second.splits["train"], root / "train")
    sizes = dict(zip(paths(second.splits["train"]), second.splits["train"].sizes.tolist(), strict=True))
    assert sizes[str(root / "train" / "a" / "new.jpg")] == [40, 50]
    assert sizes[str(root / "train" / "b" / "2.jpg")] == [40, 60]
    fresh = load_dataset(scan_dataset(root, tmp_path / "another cache", 0.2))
    assert fresh.fingerprint == second.fingerprint != first.fingerprint
    for name, split in fresh.splits.items():
        np.testing.assert_array_equal(split.sizes, second.splits[name].sizes)
    assert first.splits["train"].sizes[0].tolist() == [16, 20]  # the index that is in use stays as it was


def test_a_file_that_could_not_be_used_is_looked_at_again(tmp_path: Path, monkeypatch) -> None:
    """As where what decodes it has been installed since."""
    root = make_folder(tmp_path / "data", {"train/b": 2, "train/c": 2, "val/b": 2})
    with monkeypatch.context() as patch:
        real = dataset_module.inspect_file
        patch.setattr(
            dataset_module,
            "inspect_file",
            lambda path: ("damaged", (0, 0), 0, 0) if path.endswith(b"train/b/1.jpg") else real(path),
        )
        assert scan(root, tmp_path).splits["train"].class_counts() == {"b": 1, "c": 2}
    assert scan(root, tmp_path).splits["train"].class_counts() == {"b": 2, "c": 2}


def test_what_nobody_uses_leaves_the_cache(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/b": 2, "train/c": 2, "val/b": 2})
    index_file = scan_dataset(root, tmp_path / "cache", 0.2)
    others = {name: index_file.with_name(name) for name in ("gone.safetensors", "gone.png", ".killed.tmp", "new.png")}
    for name, file in others.items():
        file.write_bytes(b"x")
        days = {"gone.safetensors": 31, "gone.png": 31, ".killed.tmp": 8, "new.png": 8}[name]
        os.utime(file, (time.time() - days * 86400,) * 2)
    os.utime(index_file, (time.time(), time.time() - 100 * 86400))  # old, and in use
    write(root / "train" / "b" / "new.jpg", encoded())
    scan_dataset(root, tmp_path / "cache", 0.2)
    assert {path.name for path in index_file.parent.iterdir()} == {index_file.name, "new.png"}


def test_a_slow_scan_says_so_and_a_quick_one_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 3, "val/a": 1})
    scan(root, tmp_path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(dataset_module.time, "monotonic", itertools.count(step=3).__next__)
    scan(root, tmp_path)
    start, end = capsys.readouterr().err.splitlines()
    assert start == f"scan of {root}: 4 photos ..."
    assert end.startswith(f"scan of {root}: done in ")


def test_an_index_is_never_trusted_blindly(tmp_path: Path, opened: list[bytes]) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 3, "val/a": 1})
    index_file = scan_dataset(root, tmp_path / "cache", 0.2)
    whole = index_file.read_bytes()
    for damaged in (b"", b"junk" * 100, whole[:50], whole[:-1], whole.replace(b"labels", b"lbaels")):
        index_file.write_bytes(damaged)
        with pytest.raises(MachineError, match="not a readable index"):
            load_dataset(index_file)
        opened.clear()
        assert scan_dataset(root, tmp_path / "cache", 0.2) == index_file
        assert index_file.read_bytes() == whole
        assert len(opened) == 4


def test_scans_at_once_do_no_harm(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 20, "val/a": 20})
    results: list[int] = []

    def work() -> None:
        for number in range(5):
            write(root / "train" / "a" / "x.jpg", encoded(size=(20 + number, 20)))
            results.append(len(scan(root, tmp_path).splits["val"]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [20] * 15
    assert len(list((tmp_path / "cache" / "scan").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 2})
    write(tmp_path / "file", b"")
    with pytest.raises(MachineError, match="the index cannot be written"):
        scan_dataset(root, tmp_path / "file", 0.2)


def test_the_index_is_mapped_and_not_copied(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    index_file = scan_dataset(make_folder(tmp_path / "data", {"train/a": 4, "val/a": 1}), tmp_path / "cache", 0.2)
    split = load_dataset(index_file).splits["train"]
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(index_file) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    for array in (split.labels, split.sizes, split.faults, split.path_blob, split.path_offsets):
        address = array.__array_interface__["data"][0]
        assert any(start <= address < end for start, end in ranges)
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    types = {
        "labels": np.int32,
        "sizes": np.int32,
        "faults": np.uint8,
        "path_blob": np.uint8,
        "path_offsets": np.uint64,
    }
    assert {name: getattr(split, name).dtype for name in types} == types


def test_the_fingerprint_of_a_plain_folder_stays(tmp_path: Path) -> None:
    """A run's photos are known by it: it may not change with the code."""
    for number, name in enumerate(
        ["train/a/1.jpg", "train/b/2.png", "train/b/deep/3.jpg", "val/a/4.jpg", "val/b/5.bmp"]
    ):
        write(tmp_path / "data" / name, bytes(number))
    assert scan(tmp_path / "data", tmp_path).fingerprint == "9eea47e5498caca34782242124b1a7a8"


def test_the_fingerprint_is_of_the_data_alone(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1})
    fingerprint = scan(root, tmp_path).fingerprint
    int(fingerprint, 16)

    def changed(change: Callable[[Path], object]) -> bool:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        change(copy)
        return scan(copy, tmp_path).fingerprint != fingerprint

    assert not changed(lambda copy: [os.utime(path, (1, 1)) for path in copy.rglob("*.jpg")])
    assert changed(lambda copy: (copy / "train/a/0.jpg").write_bytes(b"x"))
    assert changed(lambda copy: (copy / "train/a/0.jpg").rename(copy / "train/a/00.jpg"))
    assert changed(lambda copy: (copy / "train/a/0.jpg").rename(copy / "train/b/0x.jpg"))
    assert changed(lambda copy: (copy / "train/a").rename(copy / "train/A"))
    assert changed(lambda copy: (copy / "val/a/0.jpg").unlink() or (copy / "val/a").rmdir())


# CSV files


def write_csv(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    make_folder(tmp_path / "csv", {"photos": 6})
    return write(tmp_path / "csv" / "list.csv", text.encode(encoding))


def test_a_csv_file_is_read_in_its_order(tmp_path: Path) -> None:
    absolute = tmp_path / "csv" / "photos" / "3.jpg"
    rows = ["path,label,split", "photos/1.jpg,wasp,train", '"photos/0.jpg","bee, wild",train', "photos/2.jpg,wasp,val"]
    rows += [f"{absolute},bee,train", "", "photos/../photos/4.jpg, bee ,test", "photos/gone.jpg,wasp,train"]
    file = write_csv(tmp_path, "\r\n".join(rows), "utf-8-sig")
    dataset = scan(file, tmp_path)
    assert list(dataset.splits) == ["train", "val", "test"]
    train = dataset.splits["train"]
    folder = str(tmp_path / "csv" / "photos")
    assert paths(train) == [f"{folder}/{name}.jpg" for name in ("1", "0", "3", "gone")]
    assert train.classes == ("bee", "bee, wild", "wasp")
    assert train.labels.tolist() == [2, 1, 0, 2]
    assert [FAULTS[fault] for fault in train.faults] == ["", "", "", "missing"]
    assert dataset.splits["val"].classes == ("wasp",)
    assert paths(dataset.splits["test"]) == [f"{folder}/4.jpg"]
    assert dataset.val_fraction is None


def test_a_csv_file_without_splits_has_a_share_set_aside(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "label,path\n" + "".join(f"{'ab'[n % 2]},photos/{n}.jpg\n" for n in range(6)))
    dataset = scan(file, tmp_path)
    assert dataset.splits["train"].class_counts() == {"a": 2, "b": 2}
    assert dataset.splits["val"].class_counts() == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "line 1: no column path"),
        ("", "line 1: no column"),
        ("path,label\n", "no photos"),
        ("path,label\nphotos/0.jpg,\n", "line 2: the label is empty"),
        ("path,label\nphotos/0.jpg,a\n,b\n", "line 3: the path is empty"),
        ("path,label,split\nphotos/0.jpg,a\n", "line 2: the split is empty"),
        ("path,label\nphotos/0.jpg,a\n../csv2/0.jpg,b\n", "line 3: ../csv2/0.jpg is not in the folder"),
        ("path,label\n/etc/0.jpg,b\n", "line 2: /etc/0.jpg is not in the folder"),
        ("path,label\nphotos/..,b\n", "line 2: photos/.. is not in the folder"),
        ("path,label\nphotos/0.jpg,a\nphotos//0.jpg,b\n", "line 3: photos//0.jpg stands in an earlier line"),
    ],
)
def test_a_wrong_csv_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        scan(write_csv(tmp_path, text), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_csv_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        scan(write(tmp_path / "photos.zip", b"PK\x03\x04\xff\xfe\n" * 9), tmp_path)


# Duplicates, labels, checks, report


def test_a_photo_of_val_that_is_in_train_too_is_found(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 5, "train/b": 5, "val/a": 2, "val/b": 2})
    shutil.copy(root / "train" / "b" / "3.jpg", root / "val" / "a" / "copy.jpg")
    shutil.copy(root / "train" / "b" / "3.jpg", root / "val" / "b" / "copy.jpg")
    large = bytearray(encoded("BMP", size=(100, 100)))
    write(root / "train" / "a" / "large.bmp", large)
    large[15_000] ^= 1  # beyond the edges, on which the two agree
    write(root / "val" / "a" / "large.bmp", large)
    for folder in ("train/a", "val/a"):
        write(root / folder / "empty.jpg", b"")
    expected = [("train/b/3.jpg", "val/a/copy.jpg"), ("train/b/3.jpg", "val/b/copy.jpg")]
    dataset = scan(root, tmp_path)
    assert dataset.duplicates == {("train", "val"): expected}
    assert "  train/b/3.jpg = val/a/copy.jpg" in dataset.report()
    assert scan(root, tmp_path).duplicates == {("train", "val"): expected}


@pytest.mark.parametrize("kind", ["JPEG", "BMP"])  # below and above two edges
def test_copies_across_splits_and_classes_are_found(tmp_path: Path, kind: str) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 2, "train/b": 2, "val/a": 1, "test/b": 1})
    content = encoded(kind, size=(120, 100), seed=99)
    for name in ("train/a/x.jpg", "train/b/y.jpg", "train/b/z.jpg", "val/a/x.jpg", "test/a/x.jpg", "test/a/z.jpg"):
        write(root / name, content)
    for number in range(3):  # of one split and one class: no harm to any score
        write(root / "train" / "a" / f"copy{number}.jpg", encoded(kind, size=(120, 100), seed=98))
    dataset = scan(root, tmp_path)
    assert dataset.duplicates == {
        ("train", "val"): [("train/a/x.jpg", "val/a/x.jpg")],
        ("train", "test"): [("train/a/x.jpg", f"test/a/{name}.jpg") for name in "xz"],
        ("val", "test"): [("val/a/x.jpg", f"test/a/{name}.jpg") for name in "xz"],
    }
    assert dataset.contradictions == [("train/a/x.jpg", f"train/b/{name}.jpg") for name in "yz"]
    assert "2 photos of test are in val too:" in dataset.report()
    assert "2 photos stand under another class too, with the same bytes:" in dataset.report()


def test_labels_are_mapped_by_name(tmp_path: Path) -> None:
    split = scan(make_folder(tmp_path / "data", {"val/bee": 2, "val/ant": 1}), tmp_path).splits["val"]
    mapped = map_labels(split, ["wasp", "bee", "ant"])
    assert mapped.tolist() == [2, 1, 1]
    assert mapped.dtype == np.int32
    assert map_labels(split, ["ant", "bee", "wasp"]) is split.labels
    with pytest.raises(UserError, match="lacks: ant; it knows bee, wasp"):
        map_labels(split, ["bee", "wasp"])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/a": 3, "val/a": 1}, "one class only, a"),
        ({"train/a": 3, "train/b": 1, "val/a": 1, "val/c": 1}, "'val' has classes without a photo in 'train': c"),
        ({"test/a": 1}, "no split 'train'; it has test"),
        ({"train/a": 1, "train/b": 1}, "split 'val' has no photo"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_clear_line(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    dataset = scan(make_folder(tmp_path / "data", counts), tmp_path)
    with pytest.raises(UserError) as error:
        check_dataset(dataset, skip_bad_files=False)
    assert message in str(error.value)


def test_a_class_that_has_nothing_to_learn_from_but_bad_files_is_told_so(tmp_path: Path) -> None:
    """Which of two photos is set aside to validate is decided before they are looked at."""
    root = make_folder(tmp_path / "data", {"a": 4, "b": 4, "c": 2})
    learned = paths(scan(root, tmp_path).splits["train"])
    (bad,) = (path for path in learned if "/c/" in path)
    Path(bad).write_bytes(b"")
    with pytest.raises(UserError, match=r"without a photo in 'train': c: of so few, .* cannot be read; mend these"):
        check_dataset(scan(root, tmp_path), skip_bad_files=True)


NFC, NFD = "K\u00e4fer", "Ka\u0308fer"


def test_two_spellings_of_one_class_are_one_and_that_is_said(tmp_path: Path) -> None:
    counts = {f"train/{NFC}": 2, "train/Biene": 1, f"val/{NFD}": 1, "val/Biene": 2}
    dataset = scan(make_folder(tmp_path / "data", counts), tmp_path)
    check_dataset(dataset, skip_bad_files=False)
    classes = dataset.splits["train"].classes
    assert map_labels(dataset.splits["val"], classes).tolist() == [0, 0, 1]
    report = dataset.report()
    assert f"val: {NFD}: matched, though spelled in another Unicode normalisation" in report
    assert not [line for line in report if "has no photo of" in line]
    assert map_labels(dataset.splits["val"], [NFD, "Biene", NFC]).tolist() == [
        1,
        1,
        0,
    ]  # the exact one before the other


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/Bees": 1, "train/ants": 1, "val/bees": 1}, "bees (bees and Bees differ in case only: rename one"),
        ({f"train/{NFC}": 1, f"train/{NFD}": 1, "val/ants": 1}, f"'train' has {NFC} twice, in two Unicode norm"),
    ],
)
def test_class_names_that_look_alike_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    root = make_folder(tmp_path / "data", counts)
    if len(os.listdir(root / "train")) < 2:
        pytest.skip("a file system that takes them for one")
    dataset = scan(root, tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        check_dataset(dataset, skip_bad_files=False, splits=("val", "train") if "train/ants" in counts else ("train",))


def test_class_names_that_differ_in_case_only_are_reported(tmp_path: Path) -> None:
    dataset = scan(make_folder(tmp_path / "data", {"train/A": 3, "train/a": 1, "val/A": 3, "val/a": 1}), tmp_path)
    report = dataset.report()
    assert "A and a are two classes: they differ in case or blanks only" in report
    assert "always answering A, the commonest class of val: top1 0.7500, balanced 0.5000" in report
    with pytest.raises(UserError, match=r"lacks: a; it knows A, b \(a and A differ in case only: rename one of them\)"):
        map_labels(dataset.splits["val"], ["A", "b"])


def test_what_has_no_splits_can_be_had_as_a_whole(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 10, "b": 5})
    dataset = scan(root, tmp_path)
    whole = dataset.undivided().splits["all"]
    assert list(dataset.undivided().splits) == ["all"]
    both = [split.path(index) for split in dataset.splits.values() for index in range(len(split))]
    assert [whole.path(index) for index in range(len(whole))] == both
    assert sorted(both) == sorted(map(str, root.glob("*/*.jpg")))
    assert [Path(path).parent.name for path in both] == [whole.classes[label] for label in whole.labels]
    assert (whole.sizes > 0).all()
    shutil.copytree(root, tmp_path / "two" / "train")
    shutil.copytree(root, tmp_path / "two" / "test")
    two = scan(tmp_path / "two", tmp_path)
    assert two.undivided() is two


def test_faulty_files_stop_a_run_unless_they_may_be_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"train/a": 2, "train/b": 2, "val/a": 1, "test/a": 1})
    for number in range(12):
        write(root / "train" / "b" / f"bad{number:02}.jpg", b"")
    dataset = scan(root, tmp_path)
    with pytest.raises(UserError, match=r"12 files .* train/b/bad00.jpg \(empty file\).*\.\.\.\..*--skip-bad-files"):
        check_dataset(dataset, skip_bad_files=False)
    check_dataset(dataset, skip_bad_files=True)
    check_dataset(dataset, skip_bad_files=False, splits=("test",))
    report = dataset.report()
    assert "train: 4 photos, 2 classes: a 2, b 2" in report
    assert "12 files cannot be used:" in report
    assert sum("(empty file)" in line for line in report) == 12, "each is named"
    for photo in (root / "train" / "b").iterdir():
        photo.write_bytes(b"")
    with pytest.raises(UserError, match="one class only"):
        check_dataset(scan(root, tmp_path), skip_bad_files=True)


def test_the_report_of_many_classes_is_short(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {f"train/{n}": 1 + n % 3 for n in range(40)} | {"val/1": 1})
    line = next(line for line in scan(root, tmp_path).report() if line.startswith("train"))
    assert line == "train: 79 photos, 40 classes: 1 to 3 photos in a class"


def test_an_index_that_was_damaged_is_made_again_in_silence(tmp_path: Path, photos: Path, capsys) -> None:
    index_file = scan_dataset(photos, tmp_path, val_fraction=0.2)
    good, rng = index_file.read_bytes(), np.random.default_rng(0)
    _read_index(index_file, is_checked=True)
    fingerprint = load_dataset(index_file).fingerprint
    start = 8 + int.from_bytes(good[:8], "little")
    for at in (*rng.integers(8, start, 20).tolist(), *rng.integers(start, len(good), 40).tolist()):
        content = bytearray(good)
        content[at] ^= 1 << rng.integers(8)
        index_file.write_bytes(content)
        assert scan_dataset(photos, tmp_path, val_fraction=0.2) == index_file
        assert load_dataset(index_file).fingerprint == fingerprint
        assert index_file.read_bytes()[start:] == good[start:]
    assert capsys.readouterr() == ("", "")


def test_an_error_in_one_of_many_rows_ends_the_others_at_once():
    seen: list[int] = []

    def look(row: int) -> None:
        if row == 0:
            raise UserError("bad")
        seen.append(row)
        time.sleep(0.01)

    with pytest.raises(UserError, match="bad"):
        dataset_module.in_threads(look, 1 << 16, "", threads=2)
    assert len(seen) < 200, "a thread has 256 rows at a time"
