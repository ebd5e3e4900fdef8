"""The only judge of a file, for both engines: its header, its size, its structure and its end. Nothing is decoded."""

import io
import os
import re
import stat
from hashlib import blake2b
from typing import BinaryIO

from pipelines.structure import EXIF, TOO_COSTLY, fault_of_structure, tags_are_bounded

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_SIDE = 65_535  # pixels, as in JPEG; beyond it sizes of 32 bits would wrap
_LONG_SIDE = f"a side of more than {MAX_SIDE:,} pixels"
FAULTS: tuple[str, ...] = (
    *("", "missing", "cannot be read", "not a regular file", "empty file", "not an image of a known format"),
    *("broken header", "truncated", "too many pixels", "damaged", TOO_COSTLY, _LONG_SIDE),
)
# Of files in folders, in lower case; the content says what a file is, whatever its ending.
ENDINGS: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's, in its order
    *(".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".dib", ".apng", ".pnm", ".pbm"),
)
# Pictures whose formats are not read, each with what can be done.
UNREAD_ENDINGS: dict[str, str] = dict.fromkeys(
    (
        *(".heic", ".heif", ".hif", ".avif", ".gif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".ico"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".dcm"),
    ),
    "save them as JPEG or PNG",
)
MAX_PIXELS = 178_956_970  # where Pillow refuses to decode: twice its Image.MAX_IMAGE_PIXELS
_LARGE_TILE = 1 << 22  # pixels
_SMALL_PICTURE, _MOST_PIXELS_A_BYTE = 1 << 23, 10_000  # a blank page of a scanner has some thousands
_EDGE = 4096  # bytes read at a file's start and at its end
_MAGIC = re.compile(  # the groups carry Pillow's names of the formats
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<BMP>BM)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<PPM>P[1-6]\s)",
    re.DOTALL,
)


def judge(path: bytes) -> tuple[str, tuple[int, int], int]:
    """Fault (one of FAULTS), upright height and width in pixels, signature of byte size and edges, of a file.

    No file raises an error; a faulty one has size (0, 0) and signature 0.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            return "not a regular file", (0, 0), 0
        with open(path, "rb") as file:
            byte_size = file.seek(0, os.SEEK_END)
            file.seek(max(byte_size - _EDGE, 0))
            tail = file.read(_EDGE)
            file.seek(0)
            head = file.read(_EDGE)
            fault, size = _judge_content(file, head, tail, byte_size)
    except Image.DecompressionBombError:
        fault = "too many pixels"
    except FileNotFoundError:
        fault = "missing"
    except Exception as error:
        # Pillow's parsers raise many kinds of error on broken data; OSError, too, but then without a number.
        fault = "cannot be read" if isinstance(error, OSError) and error.errno else "broken header"
    if fault:
        return fault, (0, 0), 0
    digest = blake2b(byte_size.to_bytes(8, "little") + head + tail, digest_size=8).digest()
    return "", size, int.from_bytes(digest, "little")


def _judge_content(file: BinaryIO, head: bytes, tail: bytes, byte_size: int) -> tuple[str, tuple[int, int]]:
    """Fault, height and width of an open file."""
    if not byte_size:
        return "empty file", (0, 0)
    match = _MAGIC.match(head)
    if not match:
        return "not an image of a known format", (0, 0)
    kind = str(match.lastgroup)
    if kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > byte_size:
        return "truncated", (0, 0)
    if fault := fault_of_structure(file, kind, head, byte_size):
        return fault, (0, 0)
    file.seek(0)
    # Image.open would go on to the further pictures in a phone's JPEG.
    photo = JpegImageFile(file) if kind == "JPEG" else Image.open(file, formats=[kind])
    width, height = photo.size
    if isinstance(photo, TiffImageFile):  # the stored size: photo.size may be the turned one
        width, height = photo.tag_v2[256], photo.tag_v2[257]
    if width * height > MAX_PIXELS:
        return "too many pixels", (0, 0)
    if max(width, height) > MAX_SIDE:
        return _LONG_SIDE, (0, 0)
    if kind != "JPEG" and not _is_whole(file, kind, photo, tail, byte_size):
        return "truncated", (0, 0)
    if not _is_affordable(photo, byte_size):
        return TOO_COSTLY, (0, 0)
    if kind == "PNG" and "exif" not in photo.info and (at := tail.find(b"eXIf")) >= 4:  # behind the pixels
        photo.info["exif"] = tail[at + 4 : at + 4 + int.from_bytes(tail[at - 4 : at], "big")]
    return "", (width, height) if exif_orientation(photo) >= 5 else (height, width)


def _is_affordable(photo: ImageFile.ImageFile, byte_size: int) -> bool:
    """Whether the opened photo's decoder keeps time and memory within what its file and its pixels are worth."""
    width, height = photo.size
    if photo.tile and photo.tile[0][0] == "bmp_rle":  # decoded in Python, pixel by pixel
        return False
    if isinstance(photo, TiffImageFile):
        tile = photo.tag_v2.get(322, 0) * photo.tag_v2.get(323, 0)  # libtiff makes room for a whole one
        if tile > width * height + _LARGE_TILE:
            return False
    return width * height <= _SMALL_PICTURE or width * height <= _MOST_PIXELS_A_BYTE * byte_size


def _is_whole(file: BinaryIO, kind: str, photo: ImageFile.ImageFile, tail: bytes, byte_size: int) -> bool:
    """Whether a file that is no JPEG reaches the end of its picture."""
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


def exif_orientation(photo: Image.Image) -> int:
    """How an opened photo's pixels are to be turned, 1 to 8 (EXIF 2.32, tag 0x0112); 1 where the EXIF data is broken.

    EXIF only, as DALI reads it: Pillow's `getexif` also believes XMP. Pillow turns a TIFF itself when it loads it, and
    reads what stands behind the pixels of a PNG only then: with pixels, call this after `photo.load()`.
    """
    try:
        if isinstance(photo, TiffImageFile):
            orientation = photo.tag_v2.get(0x0112)
        else:
            exif, content = Image.Exif(), photo.info.get("exif", b"")
            if not isinstance(photo, JpegImageFile):  # of a JPEG Pillow has read it as it opened the file
                tags = content.removeprefix(EXIF)
                if not tags_are_bounded(io.BytesIO(tags), len(tags)):
                    return 1
            exif.load(content)
            orientation = exif.get(0x0112)
    except Exception:  # Pillow's parsers raise many kinds of error on broken data
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
