"""The only check of a file, for all engines: its header, its size, its structure and its end. Nothing is decoded."""

import ctypes
import ctypes.util
import importlib.util
import io
import os
import re
import stat
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from pipelines.data.boxes import fault_of_boxes
from pipelines.data.structure import EXIF, TOO_COSTLY, fault_of_structure, jpeg_scans, tags_are_bounded

import numpy as np
from PIL import Image, ImageFile, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_SIDE = 65_535  # pixels, as in JPEG; beyond it sizes of 32 bits would wrap
_LONG_SIDE = f"a side of more than {MAX_SIDE:,} pixels"
_NO_HEIF, _ODD_PIXELS = "HEIC, which needs pillow-heif", "pixels of a kind or a range that cannot be told"
FAULTS: tuple[str, ...] = (
    *("", "missing", "cannot be read", "not a regular file", "empty file", "not an image of a known format"),
    *("broken header", "truncated", "too many pixels", "damaged", TOO_COSTLY, _LONG_SIDE),
    *(_NO_HEIF, _ODD_PIXELS),
)
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "HEIF")  # Pillow's names
# Of a byte: the position of a format, and what else is to be known.
FORMAT, TRANSPARENT = 0x1F, 0x80
SHRUNK = 0x40  # in a `Split`, never in a scan: what is read is a copy (`shrink`), an opaque JPEG
ODDLY_TURNED = 0x20  # EXIF orientation of another type than the standard's, several of them, or in broken data
# What only Pillow reads right. DALI composes nothing, turns by a number that it reads as if it were of the standard's
# type, knows no AVIF and no HEIC, scales no PPM by its largest value, and of a damaged TIFF takes the crops whose rows
# are sound.
_PILLOWS = {FORMATS.index(name) for name in ("TIFF", "PPM", "AVIF", "HEIF")}
_IS_FOR_PILLOW = np.array([byte & (TRANSPARENT | ODDLY_TURNED) > 0 or byte in _PILLOWS for byte in range(256)])
_UNCOMPRESSED = [FORMATS.index(name) for name in ("BMP", "TIFF", "PPM")]
HAS_AVIF, HAS_HEIF = features.check("avif"), importlib.util.find_spec("pillow_heif") is not None
if HAS_HEIF:
    importlib.import_module("pillow_heif").register_heif_opener()
# Of files in folders, in lower case; the content says what a file is, whatever its ending.
ENDINGS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's, in its order
    *(".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".dib", ".apng", ".pnm", ".pbm"),
    *((".avif", ".avifs") if HAS_AVIF else ()),
    *((".heic", ".heif", ".hif") if HAS_HEIF else ()),
)
# Pictures whose formats are not read, each with what can be done.
_HEIF_ADVICE = "HEIC is read with pillow-heif installed: pip install -e '.[heif]'"
_OTHERS = (
    *(".avif", ".avifs", ".gif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
UNREAD_ENDINGS: dict[str, str] = {
    ending: advice
    for ending, advice in (
        dict.fromkeys((".heic", ".heif", ".hif"), _HEIF_ADVICE) | dict.fromkeys(_OTHERS, "save them as JPEG or PNG")
    ).items()
    if ending not in ENDINGS
}
MAX_PIXELS = 178_956_970  # where Pillow refuses to decode: twice its Image.MAX_IMAGE_PIXELS
_LARGE_TILE = 1 << 22  # pixels
_MOST_LOOKED_AT = 1 << 24  # pixels of 4 bytes, which are decoded to judge them
_MOST_SCANS_A_STRIP = 4  # of a TIFF with JPEG in it: one for each colour
_SMALL_PICTURE, _MOST_PIXELS_A_BYTE = 1 << 23, 10_000  # a blank page of a scanner has some thousands
_ORIENTATION = 0x0112
EDGE = 4096  # bytes read at a file's start and at its end
_MAGIC = re.compile(  # the groups carry Pillow's names of the formats
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<BMP>BM)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<PPM>P[1-6]\s)"
    rb"|....ftyp(?:(?P<AVIF>avi[fs]|m[is]f1.{4}(?:.{4}){0,8}?avif)|(?P<HEIF>he[iv][cxms]|m[is]f1))",
    re.DOTALL,
)


# Modes that Pillow turns into RGB as they are meant; "I" and "F" are looked at.
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"}


def _silence_libtiff() -> None:
    """Pillow's libtiff writes what it finds wrong to stderr, itself; Pillow's error tells it too.

    No redirection of stderr would do: it is all threads'. Where the library is not found, its words stay.
    """
    folder = Path(Image.__file__).parent
    own = [*folder.parent.glob("pillow.libs/libtiff*"), *folder.glob(".dylibs/libtiff*")]
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(own[0]) if own else ctypes.util.find_library("tiff") or "libtiff.so.6")
        for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            set_handler.restype = ctypes.c_void_p
            set_handler(None)


_silence_libtiff()


class Inspection(NamedTuple):
    """fault: one of FAULTS. size: upright height and width in pixels. signature: of byte size and edges. kind: position
    in FORMATS, TRANSPARENT where pixels may be that, and ODDLY_TURNED. A faulty file has size (0, 0), signature 0 and
    kind 0.
    """

    fault: str
    size: tuple[int, int] = (0, 0)
    signature: int = 0
    kind: int = 0


def inspect_file(path: bytes) -> Inspection:
    """What is to be known of a file before it is decoded. No file raises an error."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return Inspection("not a regular file")
        with open(path, "rb") as file:
            byte_size = file.seek(0, os.SEEK_END)
            file.seek(max(byte_size - EDGE, 0))
            tail = file.read(EDGE)
            file.seek(0)
            head = file.read(EDGE)
            inspection = _inspect_content(file, head, tail, byte_size)
    except Image.DecompressionBombError:
        inspection = Inspection("too many pixels")
    except FileNotFoundError:
        inspection = Inspection("missing")
    except Exception as error:
        # Pillow's parsers raise many kinds of error on broken data; OSError, too, but then without a number.
        inspection = Inspection("cannot be read" if isinstance(error, OSError) and error.errno else "broken header")
    if inspection.fault:
        return inspection
    digest = blake2b(byte_size.to_bytes(8, "little") + head + tail, digest_size=8).digest()
    return inspection._replace(signature=int.from_bytes(digest, "little"))


def _inspect_content(file: BinaryIO, head: bytes, tail: bytes, byte_size: int) -> Inspection:
    """All but the signature, of an open file."""
    if not byte_size:
        return Inspection("empty file")
    match = _MAGIC.match(head)
    kind = str(match.lastgroup) if match else ""
    if not match or (kind == "AVIF" and not HAS_AVIF):
        return Inspection("not an image of a known format")
    if kind == "HEIF" and not HAS_HEIF:
        return Inspection(_NO_HEIF)
    if kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > byte_size:
        return Inspection("truncated")
    fault = fault_of_structure(file, kind, head, byte_size)
    if not fault and kind in ("AVIF", "HEIF"):
        fault = fault_of_boxes(file, byte_size)
    if fault:
        return Inspection(fault)
    file.seek(0)
    # Image.open would go on to the further pictures in a phone's JPEG.
    photo = JpegImageFile(file) if kind == "JPEG" else Image.open(file, formats=[kind])
    width, height = photo.size
    if isinstance(photo, TiffImageFile):  # the stored size: photo.size may be the turned one
        width, height = photo.tag_v2[256], photo.tag_v2[257]
    if width * height > MAX_PIXELS:
        return Inspection("too many pixels")
    if max(width, height) > MAX_SIDE:
        return Inspection(_LONG_SIDE)
    if kind not in ("JPEG", "AVIF", "HEIF") and not _is_whole(file, kind, photo, tail, byte_size):
        return Inspection("truncated")
    if not _is_affordable(file, photo, byte_size):
        return Inspection(TOO_COSTLY)
    if kind == "PNG" and "exif" not in photo.info and (at := tail.find(b"eXIf")) >= 4:  # behind the pixels
        photo.info["exif"] = tail[at + 4 : at + 4 + int.from_bytes(tail[at - 4 : at], "big")]
    size = (width, height) if exif_orientation(photo) >= 5 else (height, width)
    number = FORMATS.index(kind) | (TRANSPARENT if kind != "JPEG" and photo.has_transparency_data else 0)
    number |= 0 if _is_plainly_turned(photo) else ODDLY_TURNED
    if photo.mode not in _MODES or (photo.mode in ("I", "F") and not white_level(photo)):
        return Inspection(_ODD_PIXELS)
    return Inspection("", size, 0, number)


def for_pillow(kinds: np.ndarray) -> np.ndarray:
    """bool, of `Inspection.kind`: which photos only Pillow reads as they are meant."""
    return _IS_FOR_PILLOW[kinds]


def may_be_uncompressed(kinds: np.ndarray) -> np.ndarray:
    """bool, of `Inspection.kind`: photos of one size and with the same edges may differ between them."""
    return np.isin(kinds & FORMAT, _UNCOMPRESSED)


def white_level(photo: Image.Image) -> int | None:
    """What stands for white in a grey photo of 16 or 32 bits; None where that cannot be told. Decodes 32 bits."""
    if photo.mode.startswith("I;16") or photo.format == "PPM":
        return 65_535
    tops = range(0, photo.height, 64)  # in bands: numpy copies what it is given, twice
    bands = (np.asarray(photo.crop((0, top, photo.width, min(top + 64, photo.height)))) for top in tops)
    lows, highs = zip(*((band.min(), band.max()) for band in bands), strict=True)
    low, high = np.min(lows), np.max(highs)  # NaN stays NaN, and is no level
    return next((white for white in (1, 255, 65_535) if low >= 0 and high <= white), None)


def _is_affordable(file: BinaryIO, photo: ImageFile.ImageFile, byte_size: int) -> bool:
    """Whether the opened photo's decoder keeps time and memory within what its file and its pixels are worth."""
    width, height = photo.size
    if photo.mode in ("I", "F") and photo.format != "PPM" and width * height > _MOST_LOOKED_AT:
        return False
    if photo.tile and photo.tile[0][0] == "bmp_rle":  # decoded in Python, pixel by pixel
        return False
    if isinstance(photo, TiffImageFile):
        tile = photo.tag_v2.get(322, 0) * photo.tag_v2.get(323, 0)  # libtiff makes room for a whole one
        if tile > width * height + _LARGE_TILE:
            return False
        strips = max(len(photo.tag_v2.get(tag, ())) for tag in (273, 324))
        if photo.tag_v2.get(259) in (6, 7) and jpeg_scans(file) > _MOST_SCANS_A_STRIP * (1 + strips):
            return False
    return width * height <= _SMALL_PICTURE or width * height <= _MOST_PIXELS_A_BYTE * byte_size


def _is_whole(file: BinaryIO, kind: str, photo: ImageFile.ImageFile, tail: bytes, byte_size: int) -> bool:
    """Whether a file that is no JPEG and has no boxes reaches the end of its picture."""
    tile = photo.tile[0] if photo.tile else None
    end = 0
    if kind == "PNG":
        return _holds(file, b"IEND\xaeB`\x82", tail, byte_size)
    if isinstance(photo, TiffImageFile):
        for offsets, lengths in ((273, 279), (324, 325)):  # of strips, of tiles
            pairs = zip(photo.tag_v2.get(offsets, ()), photo.tag_v2.get(lengths, ()), strict=False)
            end = max([end, *(offset + length for offset, length in pairs)])
    elif tile and tile[0] == "raw":  # BMP or PPM, not compressed
        stride = tile[3][1] if isinstance(tile[3], tuple) else 0
        bits = {"1": 1, "RGB": 24}.get(photo.mode, 8)
        end = tile[2] + photo.height * (stride or (photo.width * bits + 7) // 8)
    return end <= byte_size


def _holds(file: BinaryIO, marker: bytes, tail: bytes, byte_size: int) -> bool:
    """Whether the marker stands behind the file's position: most often in the tail, else anywhere."""
    at = tail.rfind(marker)
    if at >= 0 and byte_size - len(tail) + at >= file.tell():
        return True
    rest = b""
    while block := file.read(1 << 20):
        if marker in rest + block:
            return True
        rest = block[1 - len(marker) :]
    return False


def _is_plainly_turned(photo: Image.Image) -> bool:
    """Whether every reader of an opened photo's EXIF data finds one orientation, or none (EXIF 2.32, section 4.6.4)."""
    if photo.format not in ("JPEG", "PNG", "WEBP"):  # of others only Pillow reads it
        return True
    if isinstance(photo, JpegImageFile) and sum(content.startswith(EXIF) for _, content in photo.applist) > 1:
        return False
    tags: bytes = photo.info.get("exif", b"").removeprefix(EXIF)
    if not tags:
        return True
    if tags[:4] not in (b"II*\0", b"MM\0*"):
        return False
    order: Literal["little", "big"] = "little" if tags[:2] == b"II" else "big"
    first = int.from_bytes(tags[4:8], order)
    count = int.from_bytes(tags[first : first + 2], order)
    end = first + 2 + 12 * count
    if len(tags) < end:
        return False
    entries = [tags[at : at + 12] for at in range(first + 2, end, 12)]
    found = [entry for entry in entries if int.from_bytes(entry[:2], order) == _ORIENTATION]
    is_short = all(entry[2:8] == (3).to_bytes(2, order) + (1).to_bytes(4, order) for entry in found)
    return len(found) <= 1 and is_short


def exif_orientation(photo: Image.Image) -> int:
    """How an opened photo's pixels are to be turned, 1 to 8 (EXIF 2.32, tag 0x0112); 1 where the EXIF data is broken.

    EXIF only, as DALI reads it: Pillow's `getexif` also believes XMP. Pillow turns a TIFF itself when it loads it, and
    reads what stands behind the pixels of a PNG only then: with pixels, call this after `photo.load()`.
    """
    try:
        if isinstance(photo, TiffImageFile):
            orientation = photo.tag_v2.get(_ORIENTATION)
        else:
            exif, content = Image.Exif(), photo.info.get("exif", b"")
            if not isinstance(photo, JpegImageFile):  # of a JPEG Pillow has read it as it opened the file
                tags = content.removeprefix(EXIF)
                if not tags_are_bounded(io.BytesIO(tags), len(tags)):
                    return 1
            exif.load(content)
            orientation = exif.get(_ORIENTATION)
    except Exception:  # Pillow's parsers raise many kinds of error on broken data
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
