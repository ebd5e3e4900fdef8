"""Pixels of odd kinds: transparency, 16 and 32 bits, colour spaces and formats; the same on both engines."""

import io
import struct
import zlib
from pathlib import Path

from pipelines.config import Config, dump_yaml
from pipelines.data import headers
from pipelines.data.dataset import Split, load_dataset, scan_dataset
from pipelines.data.decode import view_of_file
from pipelines.data.engines.factory import make_engine
from pipelines.data.headers import FAULTS
from pipelines.data.plan import EvalPlan
from pipelines.inference import PictureClassifier, find_photos, read_preprocess
from pipelines.run.folder import RunFolder
from pipelines.run.resume import other_result
from tests.helpers.corpus import encoded, picture, png
from tests.helpers.engines import ENGINES

import numpy as np
import pytest
import torch
from PIL import Image

SIZE = 64
SHADE = np.tile(np.linspace(0, 1, 90), (90, 1))  # black to white, from left to right


def tiff(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def scanned(tmp_path: Path, content: bytes, transparency: str = "white") -> Split:
    for name in ("a", "b"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "val" / name / "x.png").write_bytes(content)
    return load_dataset(scan_dataset(tmp_path / "data", tmp_path / "cache", 0.2), transparency).splits["val"]


def seen(split: Split, engine_name: str) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3], what the network sees of the first photo."""
    assert not split.faults.any(), split.faulty_files()
    chosen = {"micro_batch": 1, "device": torch.device("cpu"), "threads": 1}
    engine = make_engine(engine_name, split, **chosen, mean=(0.0,) * 3, std=(1.0,) * 3)
    try:
        engine.submit(EvalPlan(split.sizes, image_size=SIZE, resize=SIZE).views(0, np.array([0])))
        pixels = engine.fetch()
    finally:
        engine.close()
    assert not pixels.failed
    return (pixels.images[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def keyed(depth: int, values: list[int]) -> bytes:
    """A grey PNG of `depth` bits whose first value is transparent: its left half, and the right one of the second."""
    per_byte = max(8 // depth, 1)
    packed = [
        sum(value << (8 - depth * (at + 1)) for at in range(per_byte)) if depth < 8 else value for value in values
    ]
    cells = [struct.pack(">B" if depth <= 8 else ">H", value) for value in packed]
    row = b"\0" + cells[0] * (64 // per_byte) + cells[1] * (64 // per_byte)
    whole = png(struct.pack(">IIBBBBB", 128, 128, depth, 0, 0, 0, 0), row * 128)
    data = b"tRNS" + struct.pack(">H", values[0])
    return whole[:33] + struct.pack(">I", 2) + data + struct.pack(">I", zlib.crc32(data)) + whole[33:]


def half_transparent(mode: str, kind: str) -> bytes:
    """Left half transparent over black, right half an opaque middle grey."""
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[:, 64:] = (128, 128, 128, 255)
    photo = Image.fromarray(pixels, "RGBA")
    buffer = io.BytesIO()
    if mode == "P":
        photo = photo.quantize(16)
    photo.convert(mode).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


TRANSPARENT = {
    **{f"{mode} {kind}": half_transparent(mode, kind) for mode, kind in [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG")]},
    **{f"{mode} {kind}": half_transparent(mode, kind) for mode, kind in [("RGBA", "WEBP"), ("RGBA", "TIFF")]},
    **{f"key of {depth} bits": keyed(depth, [0, 2 ** (depth - 1)]) for depth in (1, 2, 4, 8, 16)},
    **{f"white key of {depth} bits": keyed(depth, [1, 2 ** (depth - 1)]) for depth in (2, 4, 8, 16)},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_composed_on_the_set_colour(tmp_path: Path, name: str, engine: str) -> None:
    for ground, shade in (("white", 255), ("black", 0)):
        pixels = seen(scanned(tmp_path, TRANSPARENT[name], ground), engine)
        assert (pixels[:, :28] == shade).all(), ground
        assert (pixels[:, 36:] >= 126).all(), ground
        assert len(np.unique(pixels[:, 36:])) == 1
    if "white" not in name:
        assert (seen(scanned(tmp_path, TRANSPARENT[name], "ignored"), engine)[:, :28] == 0).all()


def test_predict_composes_transparency_as_the_run_did(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(TRANSPARENT["RGBA PNG"])
    facts = {"resize": SIZE, "image_size": SIZE, "mean": [0, 0, 0], "std": [1, 1, 1]}
    shades = {}
    for name in ("white", "black", None):
        chosen = read_preprocess(facts | ({"transparency": name} if name else {}), "model.json")
        shades[chosen.transparency] = int(view_of_file(str(tmp_path / "x.png"), chosen)[5, 5, 0])
        classifier = PictureClassifier(("a",), chosen, lambda pictures: pictures[:, 5, 5, :1])
        answers = classifier.classify([str(tmp_path / "x.png")])
        assert next(answers).logits == shades[chosen.transparency], "what an ONNX graph is given"
    assert shades == {"white": 255, "black": 0, "ignored": 0}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "content",
    [
        tiff(SHADE.astype(np.float32)),
        tiff((SHADE * 255).astype(np.float32)),
        tiff((SHADE * 255).astype(np.int32)),
        tiff((SHADE * 65535).astype(np.int32)),
        tiff((SHADE * 65535).astype(np.uint16)),
        encoded("PNG", "I;16", Image.fromarray((SHADE * 65535).astype(np.uint16))),
        b"P5 90 90 65535\n" + (SHADE * 65535).astype(">u2").tobytes(),
        b"P5 90 90 1023\n" + (SHADE * 1023).astype(">u2").tobytes(),
    ],
    ids=["float 1", "float 255", "int 255", "int 65535", "uint16", "png 16", "pgm 16", "pgm 10"],
)
def test_grey_of_many_bits_is_scaled_where_its_range_is_plain(tmp_path: Path, content: bytes, engine: str) -> None:
    pixels = seen(scanned(tmp_path, content), engine).astype(int)
    expected = np.linspace(0, 255, 90 + 1)[1:][np.linspace(0, 89, SIZE).astype(int)]
    assert abs(pixels[10, :, 0] - expected).max() < 8
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize(
    "values",
    [
        (SHADE * 70_000).astype(np.int32),
        (SHADE - 0.5).astype(np.float32),
        np.full((90, 90), np.nan, np.float32),
        np.where(SHADE > 0.9, np.inf, SHADE).astype(np.float32),
        np.full((90, 90), -1, np.int32),
    ],
)
def test_a_range_that_cannot_be_told_is_refused_by_the_scan(tmp_path: Path, values: np.ndarray) -> None:
    split = scanned(tmp_path, tiff(values))
    assert [FAULTS[fault] for fault in split.faults] == ["pixels of a kind or a range that cannot be told"] * 2


def test_the_scan_refuses_a_colour_space_that_pillow_does_not_convert(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("LAB", (90, 90)).save(buffer, "TIFF")
    assert scanned(tmp_path, buffer.getvalue()).faults.all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_are_used_where_pillow_reads_them(tmp_path: Path, kind: str, engine: str) -> None:
    if not {"AVIF": headers.HAS_AVIF, "HEIF": headers.HAS_HEIF}[kind]:
        pytest.skip(f"Pillow reads no {kind} here")
    content = encoded(kind, quality=95)
    split = scanned(tmp_path, content)
    assert split.sizes.tolist() == [[90, 120]] * 2
    near = seen(split, engine).astype(int) - seen(scanned(tmp_path, encoded("PNG")), "pillow")
    assert abs(near).mean() < 12
    turned = Image.Exif()
    turned[0x0112] = 6
    assert scanned(tmp_path, encoded(kind, exif=turned.tobytes())).sizes.tolist() == [[120, 90]] * 2
    for share in (0.3, 0.7, 0.99):
        faults = scanned(tmp_path, content[: int(len(content) * share)]).faults
        assert {FAULTS[fault] for fault in faults} <= {"truncated", "broken header"}


def test_heic_without_the_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "HAS_HEIF", False)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500)
    assert headers.inspect_file(bytes(tmp_path / "x.heic")).fault == "HEIC, which needs pillow-heif"


def test_what_only_pillow_reads_right_is_marked(tmp_path: Path) -> None:
    marked = [
        TRANSPARENT["RGBA PNG"],
        TRANSPARENT["RGBA WEBP"],
        encoded("TIFF"),
        *([encoded("AVIF")] * headers.HAS_AVIF),
    ]
    for number, content in enumerate([encoded(), encoded("PNG"), encoded("WEBP"), encoded("BMP"), *marked]):
        (tmp_path / "x").write_bytes(content)
        kind = headers.inspect_file(bytes(tmp_path / "x")).kind
        assert bool(headers.for_pillow(np.array([kind]))[0]) == (number >= 4)
    assert picture().mode == "RGB"


def test_a_run_older_than_transparency_keeps_it_ignored(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    before = dump_yaml(Config(transparency="ignored")).replace("transparency: ignored\n", "")
    (tmp_path / "r" / "config.yaml").write_text(before)
    config = RunFolder(tmp_path / "r").settings_before()
    assert config is not None
    assert other_result(config, Config()) == ["transparency"]
    assert other_result(config, Config(transparency="ignored")) == []


def test_unreadable_formats_are_found_so_that_they_are_named(tmp_path: Path) -> None:
    for name in ("1.jfif", "2.jpe", "3.cr3", "4.JXL", "notes.txt", "._5.jpg"):
        (tmp_path / name).write_bytes(encoded())
    found = find_photos([str(tmp_path)])
    assert [Path(path).name for path in found] == ["1.jfif", "2.jpe", "3.cr3", "4.JXL"]
