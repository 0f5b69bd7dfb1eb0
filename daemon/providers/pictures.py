"""Read a picture from a text of a response, however it is spelled there. Its first bytes decide whether it is one."""

import asyncio
import re
from pathlib import Path

from daemon.magic import ENOUGH, image_type
from daemon.providers.base64_stream import Base64Decoder, NotBase64, unescaped
from daemon.providers.spool import Spool

_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,20}://")
"""Of any scheme: which of them are fetched is not decided here. A colon is not base64."""


class NotAPicture(Exception):
    """A text stands for no picture that we take.

    Args:
        path: What came: the bytes that it stands for, or the text itself if that is not base64.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path


def is_url(value: str) -> bool:
    """Return whether a text is the address of a picture, and not the picture itself."""
    return _URL.match(value) is not None


async def save_picture(value: str, spool: Spool) -> Path:
    """Write the picture that a text stands for into a file.

    Args:
        value: The text, or what stands for it in a document of the spool.
        spool: Of the response.

    Raises:
        NotAPicture: If it is none.
        ImageTooLarge: If it is too large.
        OSError: For trouble with the disk.
    """
    if spool.path(value) is None:
        return _save(value, spool)
    return await asyncio.to_thread(_save, value, spool)


def _save(value: str, spool: Spool) -> Path:
    source, target = spool.path(value), spool.new_path()
    try:
        with target.open("wb") as file:
            decoder = Base64Decoder(file, max_bytes=spool.max_bytes)
            if source is None:
                decoder.feed(value.encode("utf-8", "replace"))
            else:
                with source.open("rb") as text:
                    for block in unescaped(text):
                        decoder.feed(block)
            decoder.finish()
    except NotBase64:
        if source is None:
            target.write_text(value, "utf-8", "replace")
        else:
            source.replace(target)  # out of the spool: it drops its texts with the next document of a stream
        raise NotAPicture(target) from None
    if not is_picture(target):
        raise NotAPicture(target)
    if source is not None:
        source.unlink(missing_ok=True)
    return target


def is_picture(path: Path) -> bool:
    """Return whether a file begins as a picture that we take."""
    with path.open("rb") as file:
        return image_type(file.read(ENOUGH)) is not None
