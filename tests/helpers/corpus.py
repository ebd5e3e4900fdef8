"""The zoo: every kind of file that a folder of photos may hold, made from code, each with what the scan must say of it.

The same library versions make the same bytes; nothing is read from a disk.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.headers import HAS_AVIF, HAS_HEIF, MAX_PIXELS

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 90, 120
NO_SIZE = (0, 0)
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Specimen:
    """One file. fault: what the scan says, one of headers.FAULTS, "" for a sound file. size: height and width of the
    upright photo in pixels. decodes: whether decoders make a picture of it; False of a sound file means that what is
    wrong lies between its header and its end, where no scan looks."""

    content: bytes
    fault: str = ""
    size: tuple[int, int] = (HEIGHT, WIDTH)
    decodes: bool = True


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """An RGB photo's like: a smooth ground with some noise, so that no corner looks like another."""
    rng = np.random.default_rng(seed)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    pixels = 200 * (rng.random(3) * x + rng.random(3) * y) / 2 + rng.integers(0, 50, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(kind: str = "JPEG", mode: str = "RGB", photo: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (photo or picture()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _others() -> list[Image.Image]:
    return [picture(seed=1), picture(seed=2)]  # new each time: saving leaves a trace on what is saved


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[EXIF_ORIENTATION] = orientation
    return data.tobytes()


def png(header: bytes, pixels: bytes, level: int = 6) -> bytes:
    """A PNG of an IHDR's 13 bytes and uncompressed rows, for what Pillow cannot write."""
    parts = {b"IHDR": header, b"IDAT": zlib.compress(pixels, level), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _sound() -> dict[str, Specimen]:
    photo = picture()
    rgba, palette = photo.convert("RGBA"), photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    rgba.putalpha(photo.convert("L"))
    rows_16_bit = np.asarray(photo).astype(">u2") * 257
    grey_16_bit = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    thumbnail = encoded(photo=picture(8, 8))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    jpeg = encoded(quality=90)
    files = {
        "baseline.jpg": jpeg,
        "progressive.jpg": encoded(progressive=True),
        "grey.jpg": encoded(mode="L"),
        "cmyk.jpg": encoded(mode="CMYK"),
        "4-4-4.jpg": encoded(subsampling=0),
        "restart markers.jpg": encoded(restart_marker_blocks=4),
        "bytes behind the end.jpg": jpeg + b"trailing" * 2000,
        "thumbnail.jpg": jpeg[:2] + segment + jpeg[2:],
        "several pictures.jpg": encoded("MPO", save_all=True, append_images=_others()),
        "flipped byte.jpg": jpeg[:-400] + bytes([jpeg[-400] ^ 1]) + jpeg[-399:],
        "exif is garbage.jpg": encoded(exif=b"Exif\0\0garbage" * 9),
        "exif is cut.jpg": encoded(exif=exif(6)[:20]),
        "exif says 0.jpg": encoded(exif=exif(0)),
        "exif says 9.jpg": encoded(exif=exif(9)),
        "exif says six.jpg": encoded(exif=exif(6).replace(b"\x01\x12\0\3", b"\x01\x12\0\2")),  # of type text
        "rgb.png": encoded("PNG"),
        "rgba.png": encoded("PNG", "RGBA", rgba),
        "grey.png": encoded("PNG", "L"),
        "grey-alpha.png": encoded("PNG", "LA", rgba),
        "palette.png": encoded("PNG", "P", palette),
        "palette with transparency.png": encoded("PNG", "P", palette, transparency=bytes(range(0, 256, 4))),
        "1-bit.png": encoded("PNG", "1"),
        "16-bit grey.png": encoded("PNG", "I;16", grey_16_bit),
        "16-bit rgb.png": png(
            struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0),
            b"".join(b"\0" + row.tobytes() for row in rows_16_bit),
        ),
        "bytes behind the end.png": encoded("PNG") + b"\0" * 10_000,
        "animated.png": encoded("PNG", save_all=True, append_images=_others()),
        "png named.jpg": encoded("PNG"),
        "jpeg named.png": jpeg,
        "lossy.webp": encoded("WEBP"),
        "lossless.webp": encoded("WEBP", lossless=True),
        "alpha.webp": encoded("WEBP", "RGBA", rgba),
        "animated.webp": encoded("WEBP", save_all=True, append_images=_others(), duration=50),
        "rgb.bmp": encoded("BMP"),
        "palette.bmp": encoded("BMP", "P", palette),
        "1-bit.bmp": encoded("BMP", "1"),
        "rgb.tif": encoded("TIFF"),
        "packed.tif": encoded("TIFF", compression="tiff_lzw"),
        "several pages.tif": encoded("TIFF", save_all=True, append_images=_others()),
        "rgb.ppm": encoded("PPM"),
        "grey.pgm": encoded("PPM", "L"),
    }
    zoo = {name: Specimen(content) for name, content in files.items()}
    for orientation in range(1, 9):
        size = (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)
        zoo[f"exif {orientation}.jpg"] = Specimen(encoded(exif=exif(orientation)), size=size)
    for height, width in ((1, 1), (1, 5000), (5000, 1)):
        for ending, kind in (("jpg", "JPEG"), ("png", "PNG")):
            thin = encoded(kind, photo=picture(height, width))
            zoo[f"{height} x {width}.{ending}"] = Specimen(thin, size=(height, width))
    return zoo


def _below_0() -> Image.Image:
    return Image.fromarray(np.linspace(-1, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH))


def _faulty() -> dict[str, Specimen]:
    whole = {
        "jpg": encoded(quality=90),
        "progressive.jpg": encoded(progressive=True),
        "png": encoded("PNG"),
        "webp": encoded("WEBP"),
        "bmp": encoded("BMP"),
        "ppm": encoded("PPM"),
    }
    cut = {
        f"cut at {percent} %.{name}": content[: len(content) * percent // 100]
        for name, content in whole.items()
        for percent in (40, 70, 99)
    }
    jpeg = whole["jpg"]
    thumbnail = encoded(photo=picture(8, 8))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    cut |= {
        "end marker missing.jpg": jpeg[:-2],
        "zeros for the second half.jpg": jpeg[: len(jpeg) // 2].ljust(len(jpeg), b"\0"),
        "zeros for the second half.png": whole["png"][:9000].ljust(len(whole["png"]), b"\0"),
        "cut, thumbnail whole.jpg": (jpeg[:2] + segment + jpeg[2:])[: len(segment) + len(jpeg) // 2],
        "cut strips.tif": _header_first_tiff()[:-1000],
    }
    no_image = {
        "text.jpg": b"This is not a photo.\n",
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "gif.jpg": encoded("GIF"),
        "zeros.jpg": b"\0" * 5000,
        "start marker alone.jpg": b"\xff\xd8",
        "apple double.jpg": b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\0" * 200,
    }
    broken = {
        "bmp in name only.bmp": b"BM, not a bitmap",
        "png without header.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        "no pixels.png": png(struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0), b""),
        "no pixels.jpg": _with_size(jpeg, 0, 0),
        "12-bit.jpg": jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    }
    side = 60_000
    bombs = {
        "bomb.jpg": _with_size(jpeg, side, side),
        "bomb.png": png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"\0" * 100_000),
        "bomb.bmp": whole["bmp"][:18] + struct.pack("<ii", side, side) + whole["bmp"][26:],
        "bomb.ppm": b"P6\n%d %d\n255\n" % (side, side) + b"\0" * 1000,
        "bomb, barely.png": png(struct.pack(">IIBBBBB", MAX_PIXELS // 2 + 1, 2, 8, 0, 0, 0, 0), b""),
    }
    heif = {"heic.jpg": (HAS_HEIF, b"heic\0\0\0\0mif1heic"), "avif.jpg": (HAS_AVIF, b"avif\0\0\0\0avifmif1")}
    for name, (is_read, brands) in heif.items():
        content = b"\0\0\0\x18ftyp" + brands + b"\0" * 500
        (broken if is_read else no_image)[name] = content
    without_plugin = {"heic.jpg": no_image.pop("heic.jpg")} if not HAS_HEIF else {}
    coded = jpeg.index(b"\xff\xda") + 20
    kinds = {
        "truncated": cut,
        "damaged": {"stray marker.jpg": jpeg[:coded] + b"\xff\x3c" + jpeg[coded + 2 :]},
        "empty file": {"empty.jpg": b"", "empty.png": b""},
        "not an image of a known format": no_image,
        "broken header": broken,
        "HEIC, which needs pillow-heif": without_plugin,
        "pixels of a kind or a range that cannot be told": {"below 0.tif": encoded("TIFF", "F", _below_0())},
        "too many pixels": bombs,
    }
    return {
        name: Specimen(content, fault, NO_SIZE, decodes=False)
        for fault, files in kinds.items()
        for name, content in files.items()
    }


def _broken_inside() -> dict[str, Specimen]:
    """Header and end are sound, the scan passes them; no decoder makes a picture of them."""
    jpeg, lossless = encoded(quality=90), encoded("PNG")
    table = jpeg.index(b"\xff\xdb")
    length = int.from_bytes(jpeg[table + 2 : table + 4], "big")
    stream = lossless.index(b"IDAT") + 4
    files = {
        "no quantisation table.jpg": jpeg[:table] + jpeg[table + 2 + length :].replace(b"\xff\xdb", b"\xff\xe5"),
        "broken stream.png": lossless[: stream + 2] + b"\xff" * 2000 + lossless[stream + 2002 :],
    }
    return {name: Specimen(content, decodes=False) for name, content in files.items()}


def _with_size(jpeg: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG whose header states another size (ITU-T T.81, B.2.2)."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _header_first_tiff() -> bytes:
    """An RGB TIFF whose one strip stands behind its directory; Pillow writes it before."""
    pixels = np.asarray(picture()).tobytes()
    start = 8 + 2 + 9 * 12 + 4
    tags = [(256, 4, WIDTH), (257, 4, HEIGHT), (258, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, start)]
    tags += [(277, 3, 3), (278, 4, HEIGHT), (279, 4, len(pixels))]
    # Three values of 8 bits each would not fit into the entry; readers take one for all.
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + pixels


SOUND: dict[str, Specimen] = _sound()
FAULTY: dict[str, Specimen] = _faulty()
BROKEN_INSIDE: dict[str, Specimen] = _broken_inside()
ZOO: dict[str, Specimen] = SOUND | FAULTY | BROKEN_INSIDE

# What systems leave behind in folders, and other files: none is taken for a photo.
LITTER = (".DS_Store", "._0.jpg", "Thumbs.db", ".hidden", ".nomedia", "notes.txt", "clip.mp4", "photo.jxl")

# Names that are allowed, for classes and, with ".jpg" behind them, for photos. Linux allows 255 bytes.
ODD_NAMES: tuple[bytes, ...] = (
    b"two  spaces ",
    b'it\'s "quoted" `so`',
    b"line\nbreak\tand tab",
    b"latin-1 \xe9t\xe9",
    "🐝 emoji".encode(),
    b"--lr=1; $HOME $x^2_3$ %s {0} \\n",
    b"[a-z]*?",
    b"x" * 251,
)


def write_zoo(folder: Path, names: Iterable[str]) -> list[Path]:
    """Writes the specimens of these names into a folder, each under its own name; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(ZOO[path.name].content)
    return paths


def break_unseen(photo: Path) -> None:
    """Replaces the picture's data, so that no decoder can read it, without a trace in size and time."""
    before, data = photo.stat(), photo.read_bytes()
    start = data.index(b"\xff\xda")
    photo.write_bytes(data[:2] + b"\xff\xd9" + bytes(start - 4) + data[start:])
    os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))


def break_openly(photo: Path) -> None:
    """What the scan finds: a file cut off."""
    photo.write_bytes(photo.read_bytes()[:-400])
