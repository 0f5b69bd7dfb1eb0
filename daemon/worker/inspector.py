"""Inspects image files in child processes, and words what is wrong with them."""

from dataclasses import dataclass
from pathlib import Path

from daemon.errors import Refused, Retryable, Undecodable
from daemon.images import MOST_PIXELS, ImageInfo
from daemon.images.decoder import Decoder, DecoderKilled
from daemon.images.jobs import Decoded, Job, NoImage, TooLarge

_PAID_CPU, _UNPAID_CPU = 20, 5
"""Seconds of processor time for one image. The largest of the catalogue takes one and a half, a grid of Midjourney's three."""
_PAID_WALL, _UNPAID_WALL = 180, 60
"""Seconds in a child, for systems without limits of processor time, and for disks that hang."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """An image file that was decoded.

    `thumbnail` is its thumbnail's file; None if none was asked for, or if none could be made: then `flaw` is a sentence that
    says why. `quarters` are the pictures of a grid.
    """

    info: ImageInfo
    thumbnail: Path | None = None
    flaw: str | None = None
    quarters: tuple[tuple[Path, ImageInfo], ...] = ()


@dataclass(frozen=True, slots=True)
class Inspector:
    """Inspects images. Files of more than `max_bytes` and images of more than `max_pixels` are refused."""

    decoder: Decoder
    max_bytes: int
    max_pixels: int

    async def inspect(self, image: Path, *, thumbnail: Path | None = None, quarters: Path | None = None) -> Inspection:
        """Return format, size and hash of an image that was paid for.

        It is decoded once, with all that is made of it. Of one that is larger than any of the catalogue, the header alone is
        read: it is no less a picture, but gets no thumbnail.

        Args:
            image: The file.
            thumbnail: The file to write a thumbnail to.
            quarters: The folder to write the pictures of a grid to.

        Raises:
            Undecodable: If no browser would show it, or half of it.
            Refused: `image_too_large`.
            OSError: For trouble with the disk.
        """
        job = self._job(image, self.max_pixels, _PAID_CPU, thumbnail=thumbnail, quarters=quarters)
        try:
            result = await self.decoder.decode(job, wall_seconds=_PAID_WALL, paid=True)
        except DecoderKilled:
            raise Undecodable("The processes that were to decode the image were killed.", image) from None
        match result:
            case Decoded(info, flaw, made):
                pictures = tuple((Path(quarter.path), quarter.info) for quarter in made)
                return Inspection(info, thumbnail if flaw is None else None, flaw, pictures)
            case NoImage(message, reason):
                raise Undecodable(message, image, data={"reason": reason} if reason else None)
            case TooLarge(message, data):
                raise Refused(
                    message, code="image_too_large", hint="Ask for a smaller size, or raise the limit.", data=data
                )

    async def inspect_source(self, image: Path) -> ImageInfo:
        """Return format, size and hash of an image that somebody wants to have refined.

        It may have as many pixels as the largest of the catalogue.

        Raises:
            Refused: `input_image_invalid`.
            Retryable: If its decoder was killed; that says nothing about it.
            OSError: For trouble with the disk.
        """
        job = self._job(image, min(self.max_pixels, MOST_PIXELS), _UNPAID_CPU)
        try:
            result = await self.decoder.decode(job, wall_seconds=_UNPAID_WALL)
        except DecoderKilled:
            raise Retryable(
                "The processes that were to decode the image were killed.",
                code="decoder_killed",
                hint="If it stays so, the daemon's machine has too little memory.",
            ) from None
        if isinstance(result, Decoded):
            return result.info
        raise Refused(
            f"promptSpec.previousImage cannot be used: {result.message}",
            code="input_image_invalid",
            hint="Give the URL of a PNG, JPEG or WebP image.",
        )

    async def shrink(self, image: Path, thumbnail: Path) -> bool:
        """Write the thumbnail of an image that nothing else is wanted of; return whether there is one.

        Raises:
            OSError: For trouble with the disk.
        """
        job = self._job(image, min(self.max_pixels, MOST_PIXELS), _UNPAID_CPU, thumbnail=thumbnail)
        try:
            result = await self.decoder.decode(job, wall_seconds=_UNPAID_WALL)
        except DecoderKilled:
            return False
        return isinstance(result, Decoded) and result.flaw is None

    def _job(
        self,
        image: Path,
        max_pixels: int,
        cpu_seconds: int,
        *,
        thumbnail: Path | None = None,
        quarters: Path | None = None,
    ) -> Job:
        """Return the job of a child, whose working directory is its own business."""
        return Job(
            str(image.absolute()),
            self.max_bytes,
            max_pixels,
            cpu_seconds,
            None if thumbnail is None else str(thumbnail.absolute()),
            None if quarters is None else str(quarters.absolute()),
        )
