"""A file as Pillow reads it: some pieces of another one, without the data between them."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import BinaryIO

BUFFER = 1 << 16

Piece = tuple[int, int] | bytes
"""Start and length in the file, or bytes that are put in between."""


class Pieces(io.RawIOBase):
    """Pieces of a file, one behind the other. Nothing is copied, and the file stays open when this is closed."""

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._file = file
        self._pieces = _joined(pieces)
        self._starts = [0, *accumulate(map(_length, self._pieces))]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence]
        self._at = max(origin + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - Buffer is 3.12's
        number = bisect_right(self._starts, self._at) - 1
        if number >= len(self._pieces):
            return 0
        piece, within = self._pieces[number], self._at - self._starts[number]
        wanted = min(len(buffer), _length(piece) - within)
        if isinstance(piece, bytes):
            found = piece[within : within + wanted]
        else:
            self._file.seek(piece[0] + within)
            found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def reader(file: BinaryIO, pieces: Sequence[Piece]) -> io.BufferedReader:
    """Return pieces of a file as a file."""
    return io.BufferedReader(Pieces(file, pieces), BUFFER)


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with neighbours made one; empty ones are left out."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, tuple) and isinstance(last, tuple) and sum(last) == piece[0]:
            joined[-1] = (last[0], last[1] + piece[1])
        elif _length(piece):
            joined.append(piece)
    return joined
