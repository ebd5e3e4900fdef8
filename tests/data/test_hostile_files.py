"""Files of a few bytes that would cost a decoder minutes or gigabytes: refused by the scan, in little time."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from pipelines.data.decode import view_of_file
from pipelines.data.headers import HAS_AVIF, HAS_HEIF, inspect_file
from pipelines.data.preprocess import Preprocess
from pipelines.data.structure import TOO_COSTLY
from tests.helpers.corpus import encoded, picture

import numpy as np
import pytest
from PIL import Image

MEGABYTES_32 = 32 << 20


def segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = encoded(progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (scans - 9) + b"\xff\xd9"


def large_arithmetic(scans: int, side: int = 13_000) -> bytes:
    """An arithmetic-coded progressive JPEG whose scans have no data: the decoder makes up zeros."""
    header = struct.pack(">BHHB", 8, side, side, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    tables = segment(0xDB, bytes([0] + [1] * 64)) + segment(0xFE, bytes(20_000))
    last = segment(0xDA, bytes([1, 1, 0, 1, 63, 0]))
    return b"\xff\xd8" + tables + segment(0xCA, header) + last * scans + b"\xff\xd9"


def many_tags(order: str = ">") -> bytes:
    """A TIFF's directory of 5,000 tags of 60 kB each, which all are the same bytes."""
    tags = b"".join(struct.pack(f"{order}HHII", number, 7, 60_000, 8) for number in range(1000, 6000))
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(f"{order}IH", 8, 5000) + tags + bytes(4)


def large_tile() -> bytes:
    """A TIFF of 16 x 16 pixels in a tile of 65,520 x 65,520."""
    values = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 65_520, 323: 65_520, 324: 8, 325: 100}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + tags + bytes(200)


def jpeg_in_tiff(scans: int) -> bytes:
    """A TIFF whose only strip is a JPEG of so many scans."""
    jpeg, values = many_scans(scans), {256: 120, 257: 90, 258: 8, 259: 7, 262: 6, 277: 3, 278: 90}
    offset = 8 + 2 + 12 * (len(values) + 2) + 4
    values |= {273: offset, 279: len(jpeg)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + tags + bytes(4) + jpeg


def run_length_bmp() -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 2_000, 1, 8, 1, 1000, 0, 0, 256, 0)
    deltas = b"\0\2\xff\xff" * 250
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + 1000, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + deltas


def png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(31 * 20)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def solid(kind: str, side: int, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()


def with_size(kind: str, coded: int, promised: int, **options: object) -> bytes:
    """An AVIF or a HEIC whose boxes tell of a smaller picture than the decoder gets."""
    content, size = solid(kind, coded, **options), struct.pack(">II", coded, coded)
    assert size in content
    return content.replace(b"ispe" + bytes(4) + size, b"ispe" + bytes(4) + struct.pack(">II", promised, promised))


def box(kind: bytes, content: bytes, version: int | None = None) -> bytes:
    start = b"" if version is None else bytes([version, 0, 0, 0])
    return struct.pack(">I", 8 + len(start) + len(content)) + kind + start + content


def grid(columns: int, rows: int, width: int, height: int, tile: int = 128, parts: int = 1) -> bytes:
    """A HEIC in which one tile stands everywhere, put together from so many copies of its bytes."""
    content = solid("HEIF", tile)
    start, configuration = content.index(b"mdat") + 4, content.index(b"hvcC") - 4
    length = int.from_bytes(content[configuration : configuration + 4], "big")
    data, configuration_box = content[start:], content[configuration : configuration + length]
    sizes = [box(b"ispe", struct.pack(">II", *size), 0) for size in ((width, height), (tile, tile))]
    entries = [
        box(b"infe", struct.pack(">HH4sx", number + 1, 0, kind), 2) for number, kind in enumerate((b"grid", b"hvc1"))
    ]
    layout = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)
    tiles = columns * rows

    def meta(offset: int) -> bytes:
        extents = struct.pack(">HHHHHHII", 0x4400, 2, 1, 1, 0, 1, 0, len(layout))
        extents += struct.pack(">HHHH", 2, 0, 0, parts) + struct.pack(">II", offset, len(data)) * parts
        inner = box(b"pitm", struct.pack(">H", 1), 0) + box(b"iloc", extents, 1)
        inner += box(b"hdlr", struct.pack(">I4s13x", 0, b"pict"), 0)
        inner += box(b"iinf", struct.pack(">H", 2) + b"".join(entries), 0) + box(b"idat", layout)
        reference = struct.pack(">HH", 1, tiles) + struct.pack(">H", 2) * tiles
        inner += box(b"iref", box(b"dimg", reference), 0)
        associations = struct.pack(">I", 2) + struct.pack(">HBB", 1, 1, 1) + struct.pack(">HBBB", 2, 2, 2, 0x83)
        properties = box(b"ipco", b"".join(sizes) + configuration_box) + box(b"ipma", associations, 0)
        return box(b"meta", inner + box(b"iprp", properties), 0)

    before = box(b"ftyp", b"heic" + bytes(4) + b"mif1heic")
    return before + meta(len(before) + len(meta(0)) + 8) + box(b"mdat", data)


JPEG = encoded()
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "1,800 scans": (lambda: many_scans(1800), TOO_COSTLY),
    "65 scans": (lambda: many_scans(65), TOO_COSTLY),
    "64 scans": (lambda: many_scans(64), ""),
    "13 scans of 169 megapixels": (lambda: large_arithmetic(13), TOO_COSTLY),
    "10 scans of 169 megapixels": (lambda: large_arithmetic(10), ""),
    "empty comments before the picture": (lambda: JPEG[:2] + segment(0xFE, b"") * 8_000_000 + JPEG[2:], TOO_COSTLY),
    "empty comments between the scans": (lambda: JPEG[:-2] + segment(0xFE, b"") * 8_000_000 + JPEG[-2:], TOO_COSTLY),
    "a JPEG that goes on with 0xff": (lambda: JPEG[:2] + b"\xff" * MEGABYTES_32 + JPEG[2:], "broken header"),
    "a JPEG whose pixels are 0xff": (lambda: JPEG[:-2] + b"\xff" * MEGABYTES_32 + JPEG[-2:], ""),
    "a JPEG of 0xff": (lambda: b"\xff\xd8\xff" + b"\xff" * MEGABYTES_32, "broken header"),
    "a JPEG of zeros": (lambda: b"\xff\xd8\xff" + bytes(MEGABYTES_32), "broken header"),
    "a JPEG's fill between segments": (lambda: JPEG[:-2] + segment(0xFE, b"") + b"\xff" * MEGABYTES_32, "damaged"),
    "EXIF data of 300 MB in 60 kB": (
        lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0" + many_tags()) + JPEG[2:],
        TOO_COSTLY,
    ),
    "the same, in a PNG": (lambda: png(chunk(b"eXIf", many_tags())), ""),
    "the same, in a WebP": (lambda: encoded("WEBP", exif=many_tags("<")), ""),
    "a TIFF of such tags": (lambda: many_tags("<"), TOO_COSTLY),
    "a TIFF in one tile": (large_tile, TOO_COSTLY),
    "a TIFF of 60 scans": (lambda: jpeg_in_tiff(60), TOO_COSTLY),
    "grey of 32 bits": (lambda: solid("TIFF", 3_000, mode="F", compression="tiff_lzw"), ""),
    "much grey of 32 bits": (lambda: solid("TIFF", 4_100, mode="F", compression="tiff_lzw"), TOO_COSTLY),
    "empty chunks before the pixels": (lambda: png(chunk(b"teXt", b"") * 2_000_000), TOO_COSTLY),
    "empty chunks of pixels": (lambda: png(chunk(b"IDAT", b"") * 2_000_000), TOO_COSTLY),
    "a long text before the pixels": (lambda: png(chunk(b"teXt", bytes(70 << 20))), TOO_COSTLY),
    "pixels in a chunk of 4 GB": (lambda: png(struct.pack(">I4s", 0xFFFFFFFF, b"IDAT")), "truncated"),
    "a WebP of one colour": (lambda: solid("WEBP", 8_000, lossless=True), TOO_COSTLY),
    "a small WebP of one colour": (lambda: solid("WEBP", 1_000, lossless=True), ""),
    "a BMP with run lengths": (run_length_bmp, TOO_COSTLY),
    **{
        f"{kind}: {name}": case
        for kind, is_read in (("AVIF", HAS_AVIF), ("HEIF", HAS_HEIF))
        for name, case in {
            "25 megapixels, 1 in its box": (lambda kind=kind: with_size(kind, 5000, 1000), TOO_COSTLY),
            "the same with transparency": (lambda kind=kind: with_size(kind, 5000, 1000, mode="RGBA"), TOO_COSTLY),
            "as large as its box": (lambda kind=kind: with_size(kind, 1000, 1000), ""),
            "such EXIF data": (lambda kind=kind: encoded(kind, exif=b"Exif\0\0" + many_tags("<")), TOO_COSTLY),
        }.items()
        if is_read
    },
    **{
        name: case
        for name, case in {
            "HEIF: 12 tiles": (lambda: grid(4, 3, 500, 380), ""),
            "HEIF: 65,280 tiles for a small picture": (lambda: grid(256, 255, 500, 380), TOO_COSTLY),
            "HEIF: a grid of gigapixels": (lambda: grid(256, 255, 32_768, 32_640), "broken header"),
            "HEIF: a tile of 65,535 parts": (lambda: grid(1, 1, 128, 128, parts=65_535), TOO_COSTLY),
        }.items()
        if HAS_HEIF
    },
    "a PPM with a long comment": (
        lambda: b"P6 #" + b"x" * MEGABYTES_32 + b"\n30 20 255\n" + bytes(1800),
        "broken header",
    ),
    "a PPM of comments": (lambda: b"P2 30 20 255\n" + b"#\n" * (1 << 22), TOO_COSTLY),
}


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this process, and MiB that its memory was larger than before while it worked."""

    def memory(kind: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux, proc(5))
    except OSError:
        pytest.skip("only Linux tells what memory a process took in between")
    before, start = memory("VmRSS"), time.process_time()
    work()
    return time.process_time() - start, memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Image size", "ignore:Tag data")
@pytest.mark.parametrize("name", FILES)
def test_the_scan_of_a_file_takes_seconds_and_64_megabytes(tmp_path: Path, name: str) -> None:
    make, expected = FILES[name]
    path = tmp_path / "photo"
    path.write_bytes(make())
    inspect_file(os.fsencode(path))  # the libraries take some memory once
    found = []
    seconds, megabytes = cost(lambda: found.append(inspect_file(os.fsencode(path))[0]))
    assert found == [expected]
    assert seconds < 3  # of a processor; less than 0.5 on an idle machine, and minutes without the limit
    assert megabytes < 64


@pytest.mark.skipif(not HAS_AVIF, reason="Pillow reads no AVIF here")
def test_a_frame_of_av1_with_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    """Only a sequence's frames may have one: the bit that says so is among the first of the frame's header."""
    content = bytearray(encoded("AVIF", save_all=True, append_images=[picture(seed=1)]))
    path, verdicts = tmp_path / "photo", []
    start = content.index(b"\x12\0\n")  # a temporal delimiter and a sequence header, each with its length
    frame = start + 4 + content[start + 3] + 3
    for bit in range(16):
        content[frame + bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        verdicts.append(inspect_file(os.fsencode(path)).fault)
        content[frame + bit // 8] ^= 1 << bit % 8
    assert TOO_COSTLY in verdicts


@pytest.mark.parametrize("kind", [kind for kind in ("WEBP", "AVIF") if kind != "AVIF" or HAS_AVIF])
def test_a_file_of_gigabytes_is_not_read_as_a_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(kind))
    os.truncate(path, 3 << 30)  # of holes
    assert inspect_file(os.fsencode(path)).fault == TOO_COSTLY


def many_tables(side: int) -> bytes:
    """A lossless WebP with 20 bits of Huffman codes for each block of 4 x 4 pixels, of which its decoder makes 5 kB."""
    bits: list[int] = []

    def put(value: int, count: int) -> None:
        bits.extend(value >> bit & 1 for bit in range(count))

    def codes_of_256(has_more: bool) -> None:
        put(0, 1)
        put(8, 4)
        for symbol in (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8):
            put(symbol in (8, 18), 3)
        put(0, 257)
        if has_more:
            put(1, 1)
            put(24 - 11, 7)

    for value, count in ((0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 4), (0, 2), (1, 1), (0, 3), (0, 1)):
        put(value, count)
    codes_of_256(True)
    codes_of_256(False)
    put(0b000100010001, 12)
    blocks = (-(-side // 4)) ** 2
    for block in range(blocks):
        for byte in (min(block, 65_535) & 255, min(block, 65_535) >> 8):
            put(int(f"{byte:08b}"[::-1], 2), 8)
    bits += [1, 0, 0, 0] * 5 * min(blocks, 65_536)
    data = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
    data += bytes(len(data) & 1)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("side", [1024, 2048])
def test_a_lossless_webp_takes_at_most_400_megabytes_for_its_tables(tmp_path: Path, side: int) -> None:
    path = tmp_path / "photo"
    path.write_bytes(many_tables(side))
    preprocess = Preprocess(resize=256, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    seconds, megabytes = cost(lambda: view_of_file(str(path), preprocess))
    assert seconds < 4
    assert megabytes < 400 + 32 * side**2 / 2**20


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_libtiff_says_nothing_itself(tmp_path: Path, capfd, compression: str) -> None:
    content = bytearray(encoded("TIFF", compression=compression))
    content[200:600] = bytes(byte ^ 0x55 for byte in content[200:600])
    (tmp_path / "photo").write_bytes(content)
    preprocess = Preprocess(resize=256, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(OSError, match="decoder error"):
        view_of_file(str(tmp_path / "photo"), preprocess)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_what_lies_above_a_link_is_above_its_target(tmp_path: Path, monkeypatch) -> None:
    preprocess = Preprocess(resize=256, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    for folder, grey in ((tmp_path, 0), (tmp_path / "far", 200)):
        Image.new("RGB", (20, 20), (grey,) * 3).save(folder / "photo.png")
    monkeypatch.chdir(tmp_path)
    for path in ("link/../photo.png", str(tmp_path / "link" / ".." / "photo.png")):
        assert view_of_file(path, preprocess).min() == 200


SIDE = 2_896  # pixels: as large as a photo may be whose bytes are hardly any
ACCEPTED: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: solid("JPEG", SIDE, progressive=True),
    "png": lambda: solid("PNG", SIDE),
    "png with transparency": lambda: solid("PNG", SIDE, mode="RGBA"),
    "16-bit png": lambda: solid("PNG", SIDE, mode="I;16"),
    "webp": lambda: solid("WEBP", SIDE, lossless=True),
    "webp with transparency": lambda: solid("WEBP", SIDE, mode="RGBA", lossless=True),
    "tiff": lambda: solid("TIFF", SIDE, compression="tiff_lzw"),
    "bmp": lambda: solid("BMP", SIDE),
    "ppm": lambda: solid("PPM", SIDE),
    **{
        f"{kind} {mode}": lambda kind=kind, mode=mode: encoded(kind, mode, picture(362, 362).resize((SIDE, SIDE)))
        for kind, is_read in (("AVIF", HAS_AVIF), ("HEIF", HAS_HEIF))
        for mode in ("RGB", "RGBA")
        if is_read
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted_files_take_bounded_time_and_32_bytes_a_pixel(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(ACCEPTED[kind]())
    assert inspect_file(os.fsencode(path))[:2] == ("", (SIDE, SIDE))
    preprocess = Preprocess(resize=256, image_size=224, mean=(0, 0, 0), std=(1, 1, 1))
    seconds, megabytes = cost(lambda: view_of_file(str(path), preprocess))
    assert seconds < 4  # of a processor; less than 1 on an idle machine
    assert megabytes * 2**20 / SIDE**2 < 32
