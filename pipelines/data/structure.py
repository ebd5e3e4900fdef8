"""What a photo's file would make a decoder do, known from its segments, chunks and tags before any decoder opens it.

A file of a few bytes can ask for minutes or gigabytes. What no camera or program writes is refused here, so that both
engines, the scan and the page are asked for no more than a bounded time for each byte and memory for each pixel.
"""

import io
import math
import re
from typing import BinaryIO, Literal

import numpy as np
from PIL.JpegImagePlugin import MARKER, JpegImageFile

TOO_COSTLY = "too costly to decode"
# Real photos have about 10 scans. Each is a pass over the whole picture, however short it is.
_FEW_SCANS, _MOST_SCANS = 10, 64
_MOST_PASSES = 1 << 31  # pixels in all scans of a JPEG with more than a few
_MOST_AT_ONCE = 1 << 28  # bytes of a file that Pillow holds in memory as a whole
_BLOCK = 1 << 18  # bytes of a file in memory at once
_PADDING = 1 << 16  # bytes that belong to no segment
_SMALL = 1 << 20  # bytes; of a smaller PNG the chunks behind the first one with pixels are not worth a walk
_MOST_HEADER = 1 << 26  # bytes of a PNG before its pixels: Pillow holds them all
_MOST_STRIPS = 1 << 20  # of a TIFF; Pillow makes a Python number of each
# JPEG's markers (ITU-T T.81, B.1), each behind a byte of 0xff.
_END, _SCAN = 0xD9, 0xDA
_NO_MARKERS = {0, 0xFF, *range(0xD0, 0xD8)}
# Between the scans of a picture: Huffman and quantisation tables, number of lines, restart interval, comments, APPn.
_SEGMENTS = {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
EXIF, _APP1 = b"Exif\0\0", 0xE1
_FEW_TAGS = 64  # of 64 kB each at most, as in one segment
_PPM = re.compile(rb"P(?:[14](?:(?:\s|#[^\r\n]*[\r\n])+\d{1,9}){2}|[2356](?:(?:\s|#[^\r\n]*[\r\n])+\d{1,9}){3})\s")
_TYPE_SIZES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8], np.uint64)  # TIFF 6.0, BigTIFF


def fault_of_structure(file: BinaryIO, kind: str, head: bytes, byte_size: int) -> str:
    """TOO_COSTLY, or what else is wrong, or "", of an open file; kind: Pillow's name of the format."""
    if kind == "JPEG":
        return _fault_of_jpeg(file, head, byte_size)
    if kind == "PNG":
        return _fault_of_png(file, byte_size)
    if kind == "TIFF":
        return "" if tags_are_bounded(file, byte_size) else TOO_COSTLY
    if kind == "PPM":  # Pillow reads its header byte by byte, comments of any length too
        return _fault_of_ppm(file, head, byte_size)
    return TOO_COSTLY if kind in ("WEBP", "AVIF", "HEIF") and byte_size > _MOST_AT_ONCE else ""


def _most_parts(byte_size: int) -> int:
    """How many segments or chunks a file may have; decoders need microseconds for each, of no matter how few bytes."""
    return 1000 + byte_size // 1000


def _fault_of_jpeg(file: BinaryIO, head: bytes, byte_size: int) -> str:
    """Walks over a JPEG from marker to marker, to its end marker.

    Up to the first scan it is as tolerant as Pillow, which judges the header. From there on every decoder gives up at
    a marker that has no business there, but only where it comes by: DALI, which decodes a window, takes a photo with
    one crop that it refuses with another. In all other damage decoders see a photo.
    """
    at, coded, scans, most_scans, padding, exif = 2, False, 0, 0, 0, b""
    for _ in range(_most_parts(byte_size)):
        start = head[at : at + 4]
        if len(start) == 4 and start[0] == 0xFF and start[1] not in _NO_MARKERS:  # as behind every segment
            marker, code, length = at, start[1], start[2] << 8 | start[3]
        else:
            marker, code, length = _next_marker(file, at)
        between = (byte_size if marker < 0 else marker) - at
        if between and not scans:
            padding += between
            if padding > _PADDING:
                return "broken header"
        elif marker >= 0 and not coded and between and not _is_fill(file, at, between):
            return "damaged"
        if marker < 0:
            if not scans:
                return ""  # Pillow knows what is missing
            return "truncated" if coded or at + 1 >= byte_size else "damaged"
        if not scans and code != _SCAN:
            has_length = MARKER.get(0xFF00 | code, ("", "", None))[2] is not None
        else:
            if code == _END:
                return ""
            if code != _SCAN and code not in _SEGMENTS:
                return "damaged"
            coded, has_length = code == _SCAN, True
            if coded and not scans and not _exif_is_bounded(exif):
                return TOO_COSTLY
            scans += coded
            if coded and scans > _FEW_SCANS:
                file.seek(0)
                most_scans = most_scans or min(_MOST_SCANS, _MOST_PASSES // math.prod(JpegImageFile(file).size))
                if scans > max(_FEW_SCANS, most_scans):
                    return TOO_COSTLY
        at = marker + 2
        if has_length:
            if code == _APP1 and not scans:
                file.seek(at + 2)
                content = file.read(max(0, length - 2))
                exif += content[len(EXIF) :] if content.startswith(EXIF) else b""  # Pillow, too, joins several
            at += length
    return TOO_COSTLY


def _exif_is_bounded(exif: bytes) -> bool:
    """As `tags_are_bounded`, without a closer look at what a camera writes."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    first = int.from_bytes(exif[4:8], order)
    is_usual = len(exif) < 1 << 16 and int.from_bytes(exif[first : first + 2], order) <= _FEW_TAGS
    return is_usual or tags_are_bounded(io.BytesIO(exif), len(exif))


def _next_marker(file: BinaryIO, at: int) -> tuple[int, int, int]:
    """Position, code and the length behind it of the first marker from `at` on; a position of -1 where there is none.

    In coded data 0xff is followed by 0 or is a restart marker; before a marker there may be several.
    """
    file.seek(at)
    start = file.read(4)
    if len(start) == 4 and start[0] == 0xFF and start[1] not in _NO_MARKERS:
        return at, start[1], int.from_bytes(start[2:], "big")
    file.seek(at)
    last = b""
    while block := file.read(_BLOCK):
        values = np.frombuffer(last + block, np.uint8)
        before = np.flatnonzero(values[:-1] == 0xFF)
        codes = values[before + 1]
        is_marker = (codes != 0) & (codes != 0xFF) & ((codes < 0xD0) | (codes > 0xD7))
        if is_marker.any():
            first = int(np.argmax(is_marker))
            marker = at - len(last) + int(before[first])
            if codes[first] == _END:
                return marker, _END, 0
            file.seek(marker + 2)
            return marker, int(codes[first]), int.from_bytes(file.read(2), "big")
        at += len(block)
        last = block[-1:]
    return -1, 0, 0


def _is_fill(file: BinaryIO, at: int, length: int) -> bool:
    file.seek(at)
    return length <= _PADDING and not file.read(length).strip(b"\xff")


def _fault_of_png(file: BinaryIO, byte_size: int) -> str:
    """Walks over a PNG's chunks (W3C PNG, 5.3), of a small file to its first pixels only."""
    at, has_pixels = 8, False
    for _ in range(_most_parts(byte_size)):
        file.seek(at)
        chunk = file.read(8)
        if len(chunk) < 8 or chunk[4:] == b"IEND" or (has_pixels and byte_size < _SMALL):
            return ""
        has_pixels = has_pixels or chunk[4:] == b"IDAT"
        at += 12 + int.from_bytes(chunk[:4], "big")
        if at > byte_size:  # Pillow would ask for as much memory
            return "truncated"
        if not has_pixels and at > _MOST_HEADER:
            return TOO_COSTLY
    return TOO_COSTLY


def _fault_of_ppm(file: BinaryIO, head: bytes, byte_size: int) -> str:
    """Of one written in digits Pillow copies a megabyte for each comment between them."""
    if not _PPM.match(head):
        return "broken header"
    if head[1:2] in b"123":
        file.seek(0)
        comments = sum(block.count(b"#") for block in iter(lambda: file.read(_BLOCK), b""))
        return TOO_COSTLY if comments > _most_parts(byte_size) else ""
    return ""


def jpeg_scans(file: BinaryIO) -> int:
    """How many scans may begin in a file that holds JPEG streams anywhere; their coded data holds no such marker."""
    file.seek(0)
    scans, last = 0, b""
    while block := file.read(_BLOCK):
        scans += (last + block).count(b"\xff\xda")
        last = block[-1:]
    return scans


def tags_are_bounded(file: BinaryIO, byte_size: int) -> bool:
    """Whether the values in a TIFF's first directory (TIFF 6.0, section 2) take no more memory than the file is large.

    Thousands of tags may all point at the same bytes, and Pillow keeps a copy for each. EXIF data is such a file.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = head[2:4] in (b"+\0", b"\0+")
    word, entry_size = (8, 20) if is_big else (4, 12)
    endian: Literal["little", "big"] = "little" if order == "<" else "big"
    file.seek(min(int.from_bytes(head[8:16] if is_big else head[4:8], endian), byte_size))
    count = int.from_bytes(file.read(8 if is_big else 2), endian)
    content = file.read(entry_size * min(count, byte_size // entry_size))
    fields = [("tag", f"{order}u2"), ("type", f"{order}u2"), ("count", f"{order}u{word}"), ("value", f"V{word}")]
    entries = np.frombuffer(content[: len(content) // entry_size * entry_size], np.dtype(fields))
    sizes = _TYPE_SIZES[np.minimum(entries["type"], len(_TYPE_SIZES) - 1)] * entries["count"].astype(np.float64)
    strips = np.isin(entries["tag"], (273, 279, 324, 325))
    few_strips = entries["count"][strips] <= _MOST_STRIPS
    return bool(sizes[sizes > word].sum() <= 2 * byte_size and few_strips.all())
