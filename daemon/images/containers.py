"""Tell image files apart by their first bytes, and open them without what lies beside the pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from daemon.images.pieces import Piece

HEAD = 64
"""Bytes of a file that tell what it is."""
MOST_METADATA = 4_000_000
"""Bytes of a colour profile or of EXIF that are looked at; larger ones are left out."""


class NotAnImage(Exception):
    """The file is not an image that can be shown.

    Args:
        message: A sentence.
        reason: What Pillow said.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Container:
    """An image file taken apart.

    Args:
        pieces: What a decoder needs; None for the whole file.
        profile: The ICC colour profile.
        exif: EXIF, as Pillow reads it.
        rows_missing: Returns whether rows of pixels are missing that the decoder would not miss; None where it always does.
    """

    pieces: tuple[Piece, ...] | None = None
    profile: bytes | None = None
    exif: bytes | None = None
    rows_missing: Callable[[], bool] | None = None


def content_type(file: BinaryIO) -> str:
    """Return the content type that the first bytes of a file announce.

    Raises:
        NotAnImage: If it is none of ours.
    """
    file.seek(0)
    head = file.read(HEAD)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    # An ISO media file names its brand, then the compatible ones. HEIC is of that family too, and not taken.
    if head[4:8] == b"ftyp" and any(brand in head[8 : int.from_bytes(head[:4], "big")] for brand in (b"avif", b"avis")):
        return "image/avif"
    raise NotAnImage("The file is empty." if not head else "The file is not a PNG, JPEG, WebP, GIF or AVIF image.")
