"""Image files of every kind, and what may be wrong with them."""

import io
import random
import struct
import zlib

from PIL import Image

KINDS = {
    "image/png": ("PNG", "png"),
    "image/jpeg": ("JPEG", "jpg"),
    "image/webp": ("WEBP", "webp"),
    "image/gif": ("GIF", "gif"),
    "image/avif": ("AVIF", "avif"),
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def noise(kind: str = "PNG", size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: object) -> bytes:
    """Noise, which no format can compress away: cutting it off anywhere cuts pixels off."""
    picture = Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    size: tuple[int, int] = (60, 40),
    *,
    depth: int = 8,
    colour: int = 2,
    pixels: bytes | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG made by hand; by default of noise. `pixels` are compressed; `before` and `after` are chunks around them."""
    width, height = size
    if pixels is None:
        rows = random.Random(1)
        pixels = zlib.compress(b"".join(b"\0" + rows.randbytes(width * 3) for _ in range(height)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_SIGNATURE + header + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def png_of_black(size: tuple[int, int]) -> bytes:
    """A small PNG of many black pixels."""
    width, height = size
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(size, pixels=pixels)


def jpeg_of_scans(scans: int, size: tuple[int, int] = (4096, 4096)) -> bytes:
    """A progressive JPEG with so many empty scans behind its first: each makes a decoder walk over all blocks."""
    buffer = io.BytesIO()
    Image.new("L", size, 128).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    # A refinement of the last bit of the first coefficients, of which nothing is there: a header, and one byte.
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10" + bytes(40)
    return whole[:-2] + empty * scans + b"\xff\xd9"
