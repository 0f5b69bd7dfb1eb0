"""JPEG files: the segments that make the picture, how many scans it has, and whether rows are missing."""

import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from daemon.images.containers import MOST_METADATA, Container, NotAnImage
from daemon.images.pieces import Piece

MOST_SCANS = 100
"""As Chromium has it. A progressive file has about ten; each empty one makes the decoder walk over the whole picture."""
_MOST_SEGMENTS = 100_000

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_BARE = (0x01, 0xD8)
"""Markers without a length: TEM, and the start of an image."""
_END, _SCAN, _COMMENT = 0xD9, 0xDA, 0xFE
_FIRST_APP, _EXIF, _ICC, _ADOBE, _LAST_APP = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF
_ICC_NAME = b"ICC_PROFILE\0"
_EOI = b"\xff\xd9"

# Bytes that a decoder takes for more pixels, with every restart marker it may wait for.
_NOISE = bytes((197 * number * number + 31 * number) % 251 for number in range(4096))
_MORE = _NOISE + b"".join(bytes((0xFF, 0xD0 + number % 8)) + _NOISE[:256] for number in range(16))


@dataclass(frozen=True, slots=True)
class Segment:
    """A marker and what belongs to it; `payload` is where its data starts, behind marker and length."""

    marker: int
    start: int
    payload: int
    end: int


def take_apart(file: BinaryIO) -> Container:
    """Return what decodes a JPEG; its end is added, which files often lack.

    Raises:
        NotAnImage: If it has more scans, or more segments, than any picture.
    """
    pieces: list[Piece] = []
    exif: bytes | None = None
    profile: list[bytes] = []
    scans = kept = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data)
        for segment in _segments(data):
            if segment.marker == _END:
                end = segment.start
                break
            if segment.marker == _SCAN:
                scans += 1
                if scans > MOST_SCANS:
                    raise NotAnImage(f"The image has more than {MOST_SCANS} scans; no browser shows such a JPEG.")
            if not _is_needed(data, segment):
                pieces.append((kept, segment.start - kept))
                kept = min(segment.end, end)
            if segment.marker == _EXIF and exif is None and data[segment.payload : segment.payload + 6] == b"Exif\0\0":
                exif = data[segment.payload : segment.end]
            elif segment.marker == _ICC and data[segment.payload : segment.payload + 12] == _ICC_NAME:
                profile.append(data[segment.payload + 12 : segment.end])
    pieces.append((kept, end - kept))
    return Container((*pieces, _EOI), _joined(profile), exif)


def with_more(container: Container) -> tuple[Piece, ...]:
    """Return the pieces of a JPEG with noise behind its pixels: a decoder that has all of them never looks at it.

    Where rows are missing, libjpeg makes them grey without a word, so they pass as whole; with this they change.
    """
    return (*(container.pieces or ())[:-1], _MORE, _EOI)


def _segments(data: mmap.mmap) -> Iterator[Segment]:
    """Yield the segments up to the end of the image, or of the file; what lies between them is skipped."""
    at = count = 0
    while (found := _MARKER.search(data, at)) is not None:
        count += 1
        if count > _MOST_SEGMENTS:
            raise NotAnImage("The image is damaged or cut off.", "too many segments")
        marker, start = data[found.start() + 1], found.start()
        if marker in _BARE or marker == _END:
            at = start + 2
            yield Segment(marker, start, at, at)
            continue
        size = max(int.from_bytes(data[start + 2 : start + 4], "big"), 2)
        at = min(start + 2 + size, len(data))
        yield Segment(marker, start, start + 4, at)


def _is_needed(data: mmap.mmap, segment: Segment) -> bool:
    """Return whether a decoder needs a segment: of those of applications only two, which tell about colours."""
    if segment.marker == _COMMENT:
        return False
    size = segment.end - segment.payload
    if segment.marker == _FIRST_APP:
        return size >= 14 and data[segment.payload : segment.payload + 5] == b"JFIF\0"
    if segment.marker == _ADOBE:
        return size >= 12 and data[segment.payload : segment.payload + 5] == b"Adobe"
    return not _FIRST_APP < segment.marker <= _LAST_APP


def _joined(parts: Sequence[bytes]) -> bytes | None:
    """Return the colour profile of its parts, each of which begins with its number and how many there are."""
    ordered = sorted((part for part in parts if len(part) > 2), key=lambda part: part[0])
    profile = b"".join(part[2:] for part in ordered)
    return profile if ordered and len(ordered) == ordered[0][1] and len(profile) <= MOST_METADATA else None
