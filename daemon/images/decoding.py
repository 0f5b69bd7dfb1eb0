"""What came back from a provider: sniffed, measured, bounded, thumbnailed. Files in, files out.

Everything here is plain, blocking code for `asyncio.to_thread`. Nobody's word is taken for what a file is: not its
name's, not a Content-Type's. Pillow's plugins are opened by themselves, since `Image.open` has the pixel limit in a
global variable, which would be shared by all threads and with whoever else uses Pillow.
"""

import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from daemon.disk import is_disk
from daemon.errors import Refused, Retryable, RunError

THUMBNAIL_EDGE = 512
"""Pixels of the longer edge: sharp on a node of a canvas, also at twice the density."""

_PLUGINS: dict[str, tuple[str, type[ImageFile]]] = {
    "image/png": ("png", PngImageFile),
    "image/jpeg": ("jpg", JpegImageFile),
    "image/webp": ("webp", WebPImageFile),
    "image/gif": ("gif", GifImageFile),
    "image/avif": ("avif", AvifImageFile),
}
EXTENSIONS = tuple(extension for extension, _ in _PLUGINS.values())

_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A picture takes four bytes a pixel while it is decoded, whatever its file's size: so only so many at once.
_decoding = threading.BoundedSemaphore(2)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What a file is. `width` and `height` are as it is seen, its EXIF orientation applied; `sha256` is hexadecimal."""

    content_type: str
    extension: str
    width: int
    height: int
    bytes: int
    sha256: str


def inspect(path: Path, *, max_bytes: int, max_pixels: int) -> ImageInfo:
    """Reads the whole file once, decodes it, and keeps nothing in memory.

    Args:
        path: Any file.
        max_bytes: Size of the largest file to accept.
        max_pixels: Width times height of the largest picture to decode; a larger one is refused by its header.

    Raises:
        Retryable: Code `invalid_image`: empty, cut off, damaged, or nothing we take for an image.
        Refused: Code `image_too_large`.
        OSError: The disk's trouble, as everywhere here.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise _too_large(f"The image has {size / 1e6:.1f} MB; the limit is {max_bytes / 1e6:.1f} MB.", bytes=size)
    content_type = _content_type(path)
    with _opened(path, content_type) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise _too_large(
                f"The image has {width}x{height} pixels; the limit is {max_pixels / 1e6:.1f} million.",
                width=width,
                height=height,
            )
        with _decoding:
            image.load()
        if image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
            width, height = height, width
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ImageInfo(content_type, _PLUGINS[content_type][0], width, height, size, sha256)


def thumbnail(path: Path, out: Path, *, edge: int = THUMBNAIL_EDGE) -> None:
    """Writes a small WebP of an image that `inspect` has accepted: upright, of animations the first frame.

    Args:
        path: The image.
        out: The file to write; metadata of the image (EXIF, GPS) does not go along.
        edge: Pixels of the longer edge; smaller images keep their size.

    Raises:
        Retryable: Code `invalid_image`.
    """
    with _decoding, _opened(path, _content_type(path)) as image:
        image.draft("RGB", (2 * edge, 2 * edge))  # JPEG alone can be decoded smaller: a big one in a tenth of the time
        image.load()
        small = image.convert("RGBA" if image.has_transparency_data else "RGB")
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        # By hand: Pillow's own way writes all of EXIF anew, and fails on what it read without complaint.
        if (turn := _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))) is not None:
            small = small.transpose(turn)
        small.save(out, "WEBP", quality=80)


def quarters(path: Path, folder: Path) -> tuple[Path, ...]:
    """Cuts an image that `inspect` has accepted, a grid of two by two, into four PNGs in `folder`: by rows.

    Raises:
        Retryable: Code `invalid_image`.
    """
    made: list[Path] = []
    with _decoding, _opened(path, _content_type(path)) as image:
        middle, centre = image.width // 2, image.height // 2
        if not middle or not centre:
            raise _invalid("The image is too small for a grid.")
        for top, bottom in ((0, centre), (centre, 2 * centre)):
            for left, right in ((0, middle), (middle, 2 * middle)):
                out = folder / f"quarter.{len(made) + 1}.png"
                image.crop((left, top, right, bottom)).save(out, "PNG")
                made.append(out)
    return tuple(made)


def _content_type(path: Path) -> str:
    """What the first bytes say."""
    with path.open("rb") as file:
        head = file.read(64)
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
    raise _invalid("The file is empty." if not head else "The file is not a PNG, JPEG, WebP, GIF or AVIF image.")


@contextmanager
def _opened(path: Path, content_type: str) -> Generator[ImageFile]:
    """The image with its header read and no pixel decoded; what Pillow finds wrong, also later, as an error of ours.

    Over a stranger's bytes its plugins raise anything (RuntimeError, struct.error, AttributeError, …): all of it is the
    bytes' fault, but for trouble with the disk, which stays an OSError.
    """
    try:
        with path.open("rb") as file, _PLUGINS[content_type][1](file) as image:
            yield image
    except RunError:
        raise
    except Image.DecompressionBombError as error:  # a frame of a GIF may be larger than its header said
        raise _too_large("The image is much larger than its header says.") from error
    except Exception as error:
        if is_disk(error):
            raise
        raise _invalid("The image is damaged or cut off.", reason=str(error)[:200]) from error


def _invalid(message: str, **data: str) -> Retryable:
    return Retryable(
        message, code="invalid_image", hint="Try again. If it stays so, try another model or size.", data=data
    )


def _too_large(message: str, **data: int) -> Refused:
    return Refused(message, code="image_too_large", hint="Ask for a smaller size, or raise the limit.", data=data)
