"""PNG files: the chunks that make the picture, and whether all rows are there.

Pillow refuses a file for what lies beside the pixels: a megabyte of workflow in `zTXt`, a large or broken colour profile, a
checksum of a text. Browsers do not, so it gets to see the critical chunks and a sound `tRNS` alone.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from daemon.images.containers import MOST_METADATA, Container, NotAnImage
from daemon.images.pieces import Piece

SIGNATURE = 8
_FRAME = 12
"""Bytes of a chunk besides its data: length, name, checksum."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type → samples a pixel."""
_TRANSPARENT = {0: 2, 2: 6}
"""Colour type → bytes of the one transparent colour."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of the passes of an interlaced image."""
_STEP = 1 << 16
_ZLIB_HEADER = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's name, and its place in the file; `size` is that of its data, as far as the file goes."""

    name: bytes
    start: int
    size: int


def take_apart(file: BinaryIO) -> Container:
    """Return what decodes a PNG.

    Raises:
        NotAnImage: If it does not begin with a header.
    """
    pieces: list[Piece] = [(0, SIGNATURE)]
    pixels: list[tuple[int, int]] = []
    profile = exif = None
    header = b""
    for chunk in _chunks(file):
        match chunk.name:
            case b"IHDR" if not header:
                header = _data(file, chunk)
            case b"IDAT":
                pixels.append((chunk.start + 8, chunk.size))
            case b"PLTE" | b"IEND":
                pass
            case b"tRNS" if _is_sound(file, chunk) and _fits(chunk, header):
                pass
            case b"iCCP" if profile is None and _is_sound(file, chunk):
                profile = _profile(_data(file, chunk))
                continue
            case b"eXIf" if exif is None and _is_sound(file, chunk):
                exif = _data(file, chunk)
                continue
            case _:
                continue
        pieces.append((chunk.start, chunk.size + _FRAME))
    if len(header) != 13:
        raise NotAnImage("The image is damaged or cut off.", "no IHDR")
    return Container(tuple(pieces), profile, exif, partial(_rows_missing, file, header, tuple(pixels)))


def _chunks(file: BinaryIO) -> Iterator[Chunk]:
    """Yield the chunks up to the end of the image, or of the file."""
    end = file.seek(0, 2)
    at = SIGNATURE
    while at + 8 <= end:
        file.seek(at)
        size, name = struct.unpack(">I4s", file.read(8))
        yield Chunk(name, at, min(size, end - at - 8))
        if name == b"IEND":
            return
        at += size + _FRAME


def _data(file: BinaryIO, chunk: Chunk) -> bytes:
    file.seek(chunk.start + 8)
    return file.read(chunk.size)


def _is_sound(file: BinaryIO, chunk: Chunk) -> bool:
    """Return whether a chunk beside the pixels is of a likely size, and its checksum right."""
    if chunk.size > MOST_METADATA:
        return False
    checksum = zlib.crc32(_data(file, chunk), zlib.crc32(chunk.name))
    return file.read(4) == checksum.to_bytes(4, "big")


def _fits(chunk: Chunk, header: bytes) -> bool:
    """Return whether a `tRNS` is as long as the colour type wants it."""
    colour = header[9] if len(header) == 13 else -1
    return chunk.size == _TRANSPARENT[colour] if colour in _TRANSPARENT else colour == 3 and 0 < chunk.size <= 256


def _profile(data: bytes) -> bytes | None:
    """Return the colour profile of an `iCCP` chunk; None where it is damaged or huge."""
    _, _, packed = data.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(packed[1:], MOST_METADATA)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def _rows_missing(file: BinaryIO, header: bytes, pixels: Sequence[tuple[int, int]]) -> bool:
    """Return whether the compressed pixels hold less than the header announces; Pillow leaves what is missing black."""
    missing = _announced(header)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)  # without the checksum at its end
    skip = _ZLIB_HEADER
    try:
        for start, size in pixels:
            for at in range(start, start + size, _STEP):
                file.seek(at)
                packed = file.read(min(_STEP, start + size - at))
                skip, packed = max(skip - len(packed), 0), packed[skip:]
                while packed:
                    missing -= len(inflate.decompress(packed, _STEP))
                    if missing <= 0:
                        return False
                    packed = inflate.unconsumed_tail
                if inflate.eof:
                    return True
    except zlib.error:
        pass
    return True


def _announced(header: bytes) -> int:
    """Return the bytes of the uncompressed pixels, with a byte for each row's filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS.get(colour, 1)
    total = 0
    for column, row, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((column - width) // across), -((row - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
