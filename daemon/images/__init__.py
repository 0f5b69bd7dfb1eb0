"""Decode image files: type, size, thumbnail. Files in, files out, in child processes that can be killed.

The daemon (`decoder.py`) sends jobs to children (`child.py`), which import this room and Pillow alone: paths cross, bytes do
not. The type of a file is read from its bytes, never from its name or a Content-Type, and what a browser shows is an image:
data beside the pixels decides nothing.
"""

from dataclasses import dataclass

TYPES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "image/avif": "avif",
}
"""Content type → extension."""
EXTENSIONS = tuple(TYPES.values())

MOST_PIXELS = 20_000_000
"""Width times height of the largest image that is decoded: a little more than the catalogue's largest, 4K of Google."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image file. `width` and `height` are as it is seen, its EXIF orientation applied; `sha256` is hexadecimal."""

    content_type: str
    extension: str
    width: int
    height: int
    bytes: int
    sha256: str
