"""What the boxes of an AVIF or HEIC file would make a decoder do: the size that is coded, not the one that is promised.

A file says in a box how large its picture is, and again in the data for the decoder, which makes room for what stands
there. Here both are read, of the picture that is shown, its tiles and its transparency (ISO/IEC 14496-12 and 23008-12;
AV1 bitstream 5.5 and 5.9; ITU-T H.265 7.3); nothing is decoded.
"""

import io
import math
import struct
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.data.structure import EXIF, TOO_COSTLY, tags_are_bounded

_MOST_META = 1 << 24  # bytes of boxes that describe
_ROOM = 1 << 20  # pixels that may be coded beside those that are shown: tiles reach over the edge
_BLOCK = 64  # pixels; HEVC codes whole blocks
_MOST_FRAMES = 4  # coded for one picture: layers of AV1
_MOST_PARTS = 10_000  # of coded data
_DERIVED = (b"grid", b"iden", b"iovl")


class _Unbounded(Exception):
    """Much more would be decoded than is shown."""


class _Bits:
    """Reads numbers from bits, the highest first. IndexError behind the end."""

    def __init__(self, content: bytes) -> None:
        self._value, self._left = int.from_bytes(content, "big"), 8 * len(content)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & ((1 << count) - 1)

    def exponential(self) -> int:
        """ue(v) of H.265, uvlc() of AV1."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def fault_of_boxes(file: BinaryIO, byte_size: int) -> str:
    """TOO_COSTLY, "truncated" or ""; errors of many kinds where what is read is broken."""
    at = 0
    metas: list[bytes] = []
    tracks: list[bytes] = []
    for _ in range(1000):
        file.seek(at)
        head = file.read(16)
        long = head[:4] == b"\0\0\0\1"
        size = int.from_bytes(head[8:] if long else head[:4], "big")
        if at >= byte_size or (size < 8 and head[:4] != bytes(4)):  # bytes behind the picture
            break
        end = at + size if size else byte_size
        if end > byte_size:
            return "truncated"
        if head[4:8] in (b"meta", b"moov"):
            if end - at > _MOST_META:
                return TOO_COSTLY
            file.seek(at + (16 if long else 8))
            (metas if head[4:8] == b"meta" else tracks).append(file.read(end - file.tell()))
        at = end
    if len(metas) > 1 or len(tracks) > 1:
        return TOO_COSTLY
    try:
        for content in metas:
            if not tracks or any(kind == b"pitm" for kind, _ in _boxes(content[4:])):
                _Meta(file, content[4:], byte_size).check()
        for content in tracks:
            _check_tracks(file, content)
    except _Unbounded:
        return TOO_COSTLY
    return ""


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each."""
    at = 0
    while at + 8 <= len(content):
        start, size = 8, int.from_bytes(content[at : at + 4], "big")
        if size == 1:
            start, size = 16, int.from_bytes(content[at + 8 : at + 16], "big")
        size = size or len(content) - at
        if size < start or at + size > len(content):
            raise ValueError("a box reaches over the one that it is in")
        yield content[at + 4 : at + 8], content[at + start : at + size]
        at += size


def _only(boxes: list[tuple[bytes, bytes]], kind: bytes) -> bytes:
    """Readers do not agree on which of several counts."""
    (content,) = (content for name, content in boxes if name == kind)
    return content


class _Meta:
    """The items of a `meta` box (ISO/IEC 23008-12, 6 and 9)."""

    def __init__(self, file: BinaryIO, content: bytes, byte_size: int) -> None:
        boxes = list(_boxes(content))
        self._file = file
        self._idat = next((inner for kind, inner in boxes if kind == b"idat"), b"")
        primary = _only(boxes, b"pitm")
        self._primary = int.from_bytes(primary[4 : 8 if primary[0] else 6], "big")
        self._kinds = dict(_kinds(_only(boxes, b"iinf")))
        self._places = dict(_places(_only(boxes, b"iloc")))
        # Readers put an item together from its parts, which may overlap.
        read = sum(length or byte_size for _, parts in self._places.values() for _, length in parts)
        if read > 2 * byte_size + _ROOM:
            raise _Unbounded
        properties = list(_boxes(_only(boxes, b"iprp")))
        self._properties = list(_boxes(_only(properties, b"ipco")))
        self._of_item: dict[int, list[int]] = {}
        for kind, inner in properties:
            for number, position in _associations(inner) if kind == b"ipma" else ():
                self._of_item.setdefault(number, []).append(position)
        self._references = [one for kind, inner in boxes if kind == b"iref" for one in _references(inner)]
        self._sizes: dict[int, tuple[int, int]] = {}

    def check(self) -> None:
        """Raises _Unbounded, or errors of many kinds."""
        for number in (number for number, kind in self._kinds.items() if kind == b"Exif"):
            tags = self._data(number)[4:].removeprefix(EXIF)
            if not tags_are_bounded(io.BytesIO(tags), len(tags)):
                raise _Unbounded
        shown = math.prod(self._size(self._primary))
        numbers = [self._primary]
        for number in numbers:  # and what is found on the way
            if math.prod(self._size(number)) > 2 * shown + _ROOM:
                raise _Unbounded
            found = self._parts_of(number) if self._kinds[number] in _DERIVED else []
            found += [source for kind, source, of in self._references if kind == b"auxl" and number in of]
            numbers += [one for one in dict.fromkeys(found) if one not in self._sizes]

    def _parts_of(self, number: int) -> list[int]:
        """The pictures that a derived one is made of; it may be of coded ones only."""
        (parts,) = (targets for kind, source, targets in self._references if (kind, source) == (b"dimg", number))
        width, height = self._size(number)
        kind, data = self._kinds[number], self._data(number)
        if kind in (b"grid", b"iovl"):
            at, word = (4 if kind == b"grid" else 10), (4 if data[1] & 1 else 2)
            given = tuple(int.from_bytes(data[start : start + word], "big") for start in (at, at + word))
            if given != (width, height) or (kind == b"grid" and len(parts) != (data[2] + 1) * (data[3] + 1)):
                raise ValueError("it makes a picture of another size than its box says")
        if any(self._kinds[part] in _DERIVED for part in parts):
            raise _Unbounded
        promised = sum(math.prod(self._size_of_box(part)) for part in parts)
        if promised > 2 * width * height + _ROOM:
            raise _Unbounded
        return parts

    def _size(self, number: int) -> tuple[int, int]:
        """Width and height that an item promises; _Unbounded where more is coded."""
        if number not in self._sizes:
            kind, size = self._kinds[number], self._size_of_box(number)
            configurations = [box for name, box in self._boxes_of(number) if name in (b"av1C", b"hvcC")]
            if kind == b"av01":
                _check_av1([configuration[4:] for configuration in configurations], self._data(number), size)
            elif kind in (b"hvc1", b"hev1"):
                _check_hevc(configurations, self._data(number), size)
            elif kind not in _DERIVED:
                raise ValueError("a picture of another kind")
            self._sizes[number] = size
        return self._sizes[number]

    def _size_of_box(self, number: int) -> tuple[int, int]:
        sizes = [struct.unpack(">II", box[4:12]) for name, box in self._boxes_of(number) if name == b"ispe"]
        width, height = min(sizes, key=math.prod)
        return width, height

    def _boxes_of(self, number: int) -> list[tuple[bytes, bytes]]:
        return [self._properties[position - 1] for position in self._of_item.get(number, []) if position]

    def _data(self, number: int) -> bytes:
        method, parts = self._places[number]
        if method not in (0, 1):
            raise ValueError("data that stand in another item")
        content = []
        for offset, length in parts:
            if method:
                content.append(self._idat[offset : offset + length if length else None])
            else:
                self._file.seek(offset)
                content.append(self._file.read(length or -1))
        return b"".join(content)


def _kinds(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and kind of each item, of `iinf`."""
    for kind, entry in _boxes(content[8 if content[0] else 6 :]):
        if kind == b"infe":
            word = 4 if entry[0] == 3 else 2
            yield int.from_bytes(entry[4 : 4 + word], "big"), entry[6 + word : 10 + word]


def _places(content: bytes) -> Iterator[tuple[int, tuple[int, list[tuple[int, int]]]]]:
    """Number of each item, and how and where its parts lie (offset, length), of `iloc`."""
    version, file = content[0], io.BytesIO(content)
    file.seek(4)

    def number(size: int) -> int:
        part = file.read(size)
        if len(part) < size:
            raise ValueError("the places of items are cut off")
        return int.from_bytes(part, "big")

    sizes = number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    for _ in range(number(4 if version == 2 else 2)):
        item = number(4 if version == 2 else 2)
        method = number(2) & 15 if version else 0
        number(2)  # which file
        base, parts = number(base_size), []
        for _ in range(number(2)):
            number(index_size if version else 0)
            offset = base + number(offset_size)
            parts.append((offset, number(length_size)))
        yield item, (method, parts)


def _associations(content: bytes) -> Iterator[tuple[int, int]]:
    """Item and position of each of its properties, from 1 on, of `ipma`."""
    word, size, at = (4 if content[0] else 2), (2 if content[3] & 1 else 1), 8
    for _ in range(int.from_bytes(content[4:8], "big")):
        item, count = int.from_bytes(content[at : at + word], "big"), content[at + word]
        at += word + 1
        for _ in range(count):
            yield item, int.from_bytes(content[at : at + size], "big") & ((1 << (8 * size - 1)) - 1)
            at += size


def _references(content: bytes) -> Iterator[tuple[bytes, int, list[int]]]:
    """Kind, source and targets of each, of `iref`."""
    word = 4 if content[0] else 2
    for kind, inner in _boxes(content[4:]):
        source, count = int.from_bytes(inner[:word], "big"), int.from_bytes(inner[word : word + 2], "big")
        starts = range(word + 2, word + 2 + word * count, word)
        yield kind, source, [int.from_bytes(inner[start : start + word], "big") for start in starts]


def _check_tracks(file: BinaryIO, content: bytes) -> None:
    """The first picture of each track of a `moov` box (ISO/IEC 14496-12, 8.3 to 8.7): Pillow reads no other."""
    for track in (dict(_boxes(inner)) for kind, inner in _boxes(content) if kind == b"trak"):
        width, height = struct.unpack(">II", track[b"tkhd"][-8:])
        table = track[b"mdia"]
        for name in (b"minf", b"stbl"):
            table = _only(list(_boxes(table)), name)
        found = list(_boxes(table))
        entries = list(_boxes(_only(found, b"stsd")[8:]))
        sizes = _only(found, b"stsz")
        size = struct.unpack(">I", sizes[4:8])[0] or struct.unpack(">I", sizes[12:16])[0]
        (places,) = (inner for kind, inner in found if kind in (b"stco", b"co64"))
        word = 8 if any(kind == b"co64" for kind, _ in found) else 4
        file.seek(int.from_bytes(places[8 : 8 + word], "big"))
        data = file.read(size)
        for kind, entry in entries:
            promised = min((width >> 16, height >> 16), struct.unpack(">HH", entry[24:28]), key=math.prod)
            configurations = [inner for name, inner in _boxes(entry[78:]) if name in (b"av1C", b"hvcC")]
            if kind == b"av01":
                _check_av1([configuration[4:] for configuration in configurations], data, promised)
            else:
                _check_hevc(configurations, data, promised)


def _check_coded(width: int, height: int, promised: tuple[int, int]) -> None:
    if width > promised[0] + _BLOCK or height > promised[1] + _BLOCK:
        raise _Unbounded


def _check_av1(configurations: list[bytes], data: bytes, promised: tuple[int, int]) -> None:
    """Every sequence header, and the start of every frame's header (AV1 5.3, 5.5.1, 5.9.2)."""
    frames = parts = 0
    for content in (*configurations, data):
        at, sequence = 0, None
        while at < len(content):
            first, at = content[at], at + 1
            kind, at = first >> 3 & 15, at + (first >> 2 & 1)
            size = len(content) - at
            if first & 2:
                size = shift = 0
                while True:  # leb128()
                    byte, at = content[at], at + 1
                    size |= (byte & 127) << shift
                    shift += 7
                    if byte < 128 or shift > 56:
                        break
            part, at = content[at : at + min(size, 64)], at + size
            parts += 1
            if kind == 1:
                sequence = _Sequence(part)
                _check_coded(sequence.width, sequence.height, promised)
            elif kind in (3, 6):  # a frame's header, and a frame
                frames += 1
                if sequence is None or sequence.size_is_changed(part):
                    raise _Unbounded
            if frames > _MOST_FRAMES or parts > _MOST_PARTS:
                raise _Unbounded


class _Sequence:
    """A sequence header of AV1 (5.5.1): width and height of its largest frame."""

    def __init__(self, content: bytes) -> None:
        bits = _Bits(content)
        read = bits.read
        read(3 + 1)
        self._is_reduced = bool(read(1))
        self._has_interval = self._has_model = False
        delay_bits = removal_bits = 0
        self._presentation_bits = 0
        if self._is_reduced:
            read(5)
        else:
            if read(1):  # timing_info_present_flag
                read(32 + 32)
                self._has_interval = bool(read(1))
                if self._has_interval:
                    bits.exponential()
                self._has_model = bool(read(1))
                if self._has_model:
                    delay_bits = read(5) + 1
                    read(32)
                    removal_bits, self._presentation_bits = read(5) + 1, read(5) + 1
            has_delays = read(1)
            for _ in range(read(5) + 1):  # operating points
                read(12)
                if read(5) > 7:
                    read(1)
                if self._has_model and read(1):
                    read(2 * delay_bits + 1)
                if has_delays and read(1):
                    read(4)
        del removal_bits
        width_bits, height_bits = read(4) + 1, read(4) + 1
        self.width, self.height = read(width_bits) + 1, read(height_bits) + 1
        self._number_bits = 0
        if not self._is_reduced and read(1):  # frame_id_numbers_present_flag
            delta = read(4) + 2
            self._number_bits = delta + read(3) + 1
        read(3)
        self._tools = self._vectors = 2
        if not self._is_reduced:
            read(4)
            if read(1):  # enable_order_hint
                read(2)
            self._tools = 2 if read(1) else read(1)
            if self._tools:
                self._vectors = 2 if read(1) else read(1)

    def size_is_changed(self, frame: bytes) -> bool:
        """Whether a frame's header (5.9.2) gives a size of its own, which may be any."""
        if self._is_reduced:
            return False
        bits = _Bits(frame)
        read = bits.read
        if read(1):  # show_existing_frame
            return False
        kind, is_shown = read(2), read(1)
        if is_shown and self._has_model and not self._has_interval:
            read(self._presentation_bits)
        if not is_shown:
            read(1)
        if not (kind == 3 or (kind == 0 and is_shown)):
            read(1)  # error_resilient_mode
        read(1)
        tools = read(1) if self._tools == 2 else self._tools
        if tools and self._vectors == 2:
            read(1)
        read(self._number_bits)
        return kind == 3 or bool(read(1))


def _check_hevc(configurations: list[bytes], data: bytes, promised: tuple[int, int]) -> None:
    """Every sequence parameter set (H.265, 7.3.2.2), in the configuration or in the data; one picture."""
    if any(configuration[21] & 3 != 3 for configuration in configurations):
        raise ValueError("lengths of fewer than four bytes")  # which libheif does not read either
    pictures = 0
    for unit in (*(unit for one in configurations for unit in _units_of_configuration(one)), *_units(data)):
        kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
        if layer:
            continue
        if kind == 33:
            _check_coded(*_size_of_sequence(unit), promised)
        pictures += kind < 32 and unit[2] >> 7  # first_slice_segment_in_pic_flag
        if pictures > 1:
            raise _Unbounded


def _units_of_configuration(content: bytes) -> Iterator[bytes]:
    """Of `hvcC` (ISO/IEC 14496-15, 8.3.3)."""
    at = 23
    for _ in range(content[22]):
        count, at = int.from_bytes(content[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(content[at : at + 2], "big")
            yield content[at + 2 : at + 2 + size]
            at += 2 + size


def _units(data: bytes) -> Iterator[bytes]:
    at, count = 0, 0
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + min(size, 1024)]
        at += 4 + size
        count += 1
        if count > _MOST_PARTS:
            raise _Unbounded


def _size_of_sequence(unit: bytes) -> tuple[int, int]:
    bits = _Bits(unit[2:1024].replace(b"\0\0\3", b"\0\0"))
    bits.read(4)
    layers = bits.read(3)
    bits.read(1 + 88 + 8)
    has = [(bits.read(1), bits.read(1)) for _ in range(layers)]
    bits.read(2 * (8 - layers) if layers else 0)
    for has_profile, has_level in has:
        bits.read(88 * has_profile + 8 * has_level)
    bits.exponential()
    if bits.exponential() == 3:
        bits.read(1)
    return bits.exponential(), bits.exponential()
