"""Decode one image file, once: check that it is whole, and write its thumbnail and its quarters on the way.

Pillow's plugins are opened by themselves: the bytes say which, and none is tried after another. Over arbitrary bytes they
raise anything (RuntimeError, struct.error, AttributeError, …): all of it is the bytes' fault, but for trouble with the disk.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import AvifImagePlugin, Image, ImageChops, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from daemon.images import TYPES, ImageInfo, jpeg, png, thumbnails
from daemon.images.containers import Container, NotAnImage, content_type
from daemon.images.jobs import Crashed, Decoded, DiskError, Job, NoImage, Quarter, Result, TooLarge
from daemon.images.pieces import Piece, reader

T = TypeVar("T")

MEMORY = 140_000_000
"""Bytes that decoding one image may take, above what a child has at rest."""

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "image/png": PngImageFile,
    "image/jpeg": JpegImageFile,
    "image/webp": WebPImageFile,
    "image/gif": GifImageFile,
    "image/avif": AvifImageFile,
}
_CONTAINERS: dict[str, Callable[[BinaryIO], Container]] = {"image/png": png.take_apart, "image/jpeg": jpeg.take_apart}
_PER_PIXEL = {"image/png": 6, "image/webp": 17, "image/gif": 7, "image/avif": 12}
"""Bytes of memory that a pixel takes at most: Pillow's four, and the decoder's own (WebP's canvases)."""

_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
_GREY = range(126, 131)
"""Of a JPEG's pixels that were never decoded."""
_DAMAGED = "The image is damaged or cut off."

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each has a stack


class _TooLarge(Exception):
    """More than the job allows."""


def work(job: Job) -> Result:
    """Do a job; never raises but for bugs."""
    try:
        return _decode(Path(job.path), job)
    except NotAnImage as error:
        return NoImage(error.message, error.reason[:200])
    except _TooLarge as error:
        message, data = error.args
        return TooLarge(message, data)
    except OSError as error:
        if error.errno is None:
            raise
        return DiskError(error.errno, error.strerror or "")


def _decode(path: Path, job: Job) -> Decoded:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size > job.max_bytes:
            raise _TooLarge(
                f"The image has {size / 1e6:.1f} MB; the limit is {job.max_bytes / 1e6:.1f} MB.", {"bytes": size}
            )
        kind = content_type(file)
        container = _guarded(lambda: _CONTAINERS.get(kind, lambda _: Container())(file))
        picture = _Picture(file, kind, container, job)
        flaw, quarters = picture.decode()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    info = ImageInfo(kind, TYPES[kind], *picture.seen, size, sha256)
    return Decoded(info, flaw, quarters)


class _Picture:
    """An image file that is open.

    Raises:
        NotAnImage, _TooLarge: By its header.
    """

    def __init__(self, file: BinaryIO, kind: str, container: Container, job: Job) -> None:
        self._file = file
        self._kind = kind
        self._container = container
        self._job = job
        Image.MAX_IMAGE_PIXELS = job.max_pixels  # for frames that are larger than the header says
        self._image = self._open()
        self._width, self._height = self._image.size
        if self._width * self._height > job.max_pixels:
            raise _TooLarge(
                f"The image has {self._width}x{self._height} pixels; the limit is {job.max_pixels / 1e6:.1f} million.",
                {"width": self._width, "height": self._height},
            )
        self._orientation = self._read_orientation()

    @property
    def seen(self) -> tuple[int, int]:
        """Width and height as they are seen."""
        on_its_side = self._orientation in _ON_ITS_SIDE
        return (self._height, self._width) if on_its_side else (self._width, self._height)

    def decode(self) -> tuple[str | None, tuple[Quarter, ...]]:
        """Decode the pixels; return what is missing of what was asked for, and the quarters."""
        job = self._job
        if self._width * self._height * self._per_pixel() > MEMORY:
            return f"An image of {self._width}x{self._height} pixels is not decoded here.", ()
        try:
            self._load()
            return self._write_thumbnail(), self._cut(Path(job.quarters)) if job.quarters is not None else ()
        except MemoryError:
            return "Decoding the image takes too much memory.", ()

    def _per_pixel(self) -> int:
        """Return the bytes of memory that a pixel takes at most; a JPEG's are its coefficients, and a smaller picture."""
        return _PER_PIXEL.get(self._kind) or 2 + 2 * len(self._image.getbands())

    def _open(self, pieces: tuple[Piece, ...] | None = None) -> ImageFile.ImageFile:
        pieces = pieces or self._container.pieces
        self._file.seek(0)
        source = self._file if pieces is None else reader(self._file, pieces)
        return _guarded(lambda: _PLUGINS[self._kind](source))

    def _load(self) -> None:
        """Decode all pixels.

        Raises:
            NotAnImage: If some are missing.
        """
        try:
            self._draft(self._image)
            _guarded(self._image.load)
        except NotAnImage:
            # A wrong checksum at the end, say: browsers show it.
            if self._container.rows_missing is None or self._container.rows_missing():
                raise
            self._image = self._open()
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                _guarded(self._image.load)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            return
        if self._is_incomplete():
            raise NotAnImage(_DAMAGED, "rows are missing")

    def _draft(self, image: ImageFile.ImageFile) -> None:
        """Let a JPEG be decoded smaller: a large one in a tenth of the time."""
        if self._job.quarters is None:
            image.draft(None, (2 * thumbnails.EDGE, 2 * thumbnails.EDGE))

    def _is_incomplete(self) -> bool:
        """Return whether pixels are missing for which the decoder put its own: black in a PNG, grey in a JPEG."""
        image = self._image
        if self._kind == "image/png":
            rows_missing = self._container.rows_missing
            last = image.crop((0, image.height - 1, image.width, image.height))
            suspicious = "interlace" in image.info or not any(high for _, high in _extrema(last))
            return suspicious and rows_missing is not None and rows_missing()
        if self._kind == "image/jpeg":
            corner = image.crop((image.width - 1, image.height - 1, image.width, image.height))
            if not all(low == high and low in _GREY for low, high in _extrema(corner)):
                return False
            again = self._open(jpeg.with_more(self._container))
            self._draft(again)
            _guarded(again.load)
            return any(high for _, high in _extrema(ImageChops.difference(image, again)))
        return False

    def _read_orientation(self) -> int:
        """Return the orientation that EXIF has; 1 where it has none that can be read."""
        try:
            if self._container.pieces is None:
                return int(self._image.getexif().get(_ORIENTATION, 1))
            exif = Image.Exif()
            if self._container.exif is not None:
                exif.load(self._container.exif)
            return int(exif.get(_ORIENTATION, 1))
        except Exception:  # noqa: BLE001 - what lies beside the pixels decides nothing
            return 1

    def _profile(self) -> bytes | None:
        if self._container.pieces is not None:
            return self._container.profile
        profile = self._image.info.get("icc_profile")
        return profile if isinstance(profile, bytes) and profile else None

    def _write_thumbnail(self) -> str | None:
        """Write the thumbnail that was asked for; return a sentence where it cannot be made."""
        if self._job.thumbnail is None:
            return None
        try:
            thumbnails.write(
                self._image, Path(self._job.thumbnail), profile=self._profile(), orientation=self._orientation
            )
        except MemoryError:
            raise
        except OSError as error:
            if error.errno is not None:
                return f"The daemon cannot use its disk: {error.strerror}."
            return f"Pillow cannot make one: {str(error)[:200]}"
        except Exception as error:  # noqa: BLE001 - the picture itself is whole
            return f"Pillow cannot make one: {str(error)[:200]}"
        return None

    def _cut(self, folder: Path) -> tuple[Quarter, ...]:
        """Write the quarters of a grid of two by two as PNGs, by rows."""
        image, made = self._image, list[Quarter]()
        middle, centre = image.width // 2, image.height // 2
        if not middle or not centre:
            raise NotAnImage("The image is too small for a grid.")
        for top, bottom in ((0, centre), (centre, 2 * centre)):
            for left, right in ((0, middle), (middle, 2 * middle)):
                out = folder / f"quarter.{len(made) + 1}.png"
                piece = image.crop((left, top, right, bottom))
                if piece.mode == "CMYK":
                    piece = piece.convert("RGB")
                piece.save(out, "PNG", icc_profile=self._profile() if piece.mode == image.mode else None)
                with out.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                info = ImageInfo("image/png", "png", middle, centre, out.stat().st_size, sha256)
                made.append(Quarter(str(out), info))
        return tuple(made)


def _extrema(image: Image.Image) -> tuple[tuple[int, int], ...]:
    """Return the least and the greatest value of each band."""
    found = image.getextrema()
    return found if isinstance(found[0], tuple) else (found,)  # pyright: ignore[reportReturnType] - a pair for one band


def _guarded(step: Callable[[], T]) -> T:
    """Take a step of Pillow's; its errors become ours, but for those of the disk and of memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return step()
    except (NotAnImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLarge("The image is much larger than its header says.", {}) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise NotAnImage(_DAMAGED, str(error)) from error
    except Exception as error:
        raise NotAnImage(_DAMAGED, f"{type(error).__name__}: {error}") from error


def crashed(error: BaseException) -> Crashed:
    """Return the result of a job that met a bug of ours."""
    import traceback

    return Crashed("".join(traceback.format_exception(error))[-4000:])
