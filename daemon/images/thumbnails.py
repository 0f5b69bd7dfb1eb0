"""Make small, upright sRGB pictures of decoded images. Memory grows by a band of the large one, not by a copy of it."""

import io
from pathlib import Path

from PIL import Image

EDGE = 512
"""Pixels of the longer edge: sharp on a node of a canvas, also at twice the density."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METHOD = 2
"""Of WebP's encoder: half the time of the usual 4, for files that are 5 % larger."""
_BAND = 128
"""Rows that are made smaller at once."""


def write(image: Image.Image, out: Path, *, profile: bytes | None, orientation: int, edge: int = EDGE) -> None:
    """Write a small WebP of an image.

    Args:
        image: Decoded; smaller ones keep their size.
        out: The file; metadata of the image (EXIF, GPS) does not go along.
        profile: The ICC profile of its colours; None for sRGB.
        orientation: As EXIF has it.
        edge: Pixels of the longer edge.
    """
    small = _shrunk(image, edge)
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    small = _in_srgb(small, profile)
    if (rotation := _UPRIGHT.get(orientation)) is not None:
        small = small.transpose(rotation)
    small.info = {}
    # By hand: Pillow's own way writes all of EXIF anew, and fails on what it read without complaint.
    small.save(out, "WEBP", quality=80, method=_METHOD)


def _shrunk(image: Image.Image, edge: int) -> Image.Image:
    """Return the image in a plain mode, reduced by whole numbers to twice the edge or more.

    Where a whole number leads to the edge itself, as for all usual sizes, to that: the mean of the pixels needs no filter,
    which takes ten times as long.
    """
    longer = max(image.size)
    factor = longer // edge if longer % edge == 0 else longer // (2 * edge)
    if factor < 2:
        return _plain(image)
    small: Image.Image | None = None
    for top in range(0, image.height, _BAND * factor):
        band = image.crop((0, top, image.width, min(top + _BAND * factor, image.height)))
        reduced = _plain(band).reduce(factor)
        if small is None:
            small = Image.new(reduced.mode, (-(-image.width // factor), -(-image.height // factor)))
        small.paste(reduced, (0, top // factor))
    assert small is not None
    return small


def _plain(image: Image.Image) -> Image.Image:
    """Return the image in a mode that can be made smaller: grey, colour or print, with transparency where it has any."""
    if image.mode.startswith("I;16"):
        # Converting alone makes everything above 255 white.
        return image.point(lambda value: value / 256).convert("L")  # pyright: ignore[reportUnknownMemberType]
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the image with the colours that its profile means; a profile that cannot be used means none."""
    wanted = "RGBA" if image.mode in ("LA", "RGBA") else "RGB"
    if profile is None:
        return image.convert(wanted)
    from PIL import ImageCms  # few images have a profile
    from PIL.ImageCms import core as colours

    alpha = image.getchannel("A") if wanted == "RGBA" else None
    opaque = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    try:
        source, target = (ImageCms.ImageCmsProfile(it) for it in (io.BytesIO(profile), colours.createProfile("sRGB")))
        # Not in place: the result is an image.
        meant = ImageCms.profileToProfile(opaque, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert(wanted)
    assert meant is not None
    if alpha is not None:
        meant.putalpha(alpha)
    return meant
