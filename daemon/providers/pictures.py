"""Read a picture from a text of a response, however it is spelled there. Its first bytes decide whether it is one."""

import asyncio
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from daemon.magic import ENOUGH, image_type
from daemon.providers.base64_stream import Base64Decoder, NotBase64, unescaped
from daemon.providers.spool import Spool

_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]{0,20}://")
"""Of any scheme: which of them are fetched is not decided here. A colon is not base64."""
_BEGINNING = re.compile(rb"iVBORw0KGgo|\\?/9j\\?/|_9j_|R0lGOD|UklGR|AAAA[A-Za-z0-9+/_-]{2}Z0eXBhdm")
"""How the base64 of a picture begins (PNG, JPEG, GIF, WebP, AVIF); a JSON string has escapes."""
_WITHIN = re.compile(rb"(?<!\\)[nrt]|[A-Za-mo-qsu-z0-9+/_=-]")
"""Characters before it by which it is the middle of something else. Apart from the pattern above, which is found ten times faster so."""
_RUN = re.compile(
    rb"(?:[A-Za-z0-9+/_=%\s-]+|\\(?:[nrt/]|u00(?:2[bBdDfF]|3[dD]|5[fF]|0[aAdD9]))){1,5000}",
)
"""How it goes on, with escapes, which may be all of it. It is bounded, for each of its repetitions takes memory."""
_FOREIGN = re.compile(
    rb"<(?:!doctype|html|head|body|title|script|style|link|meta|h1)\b"
    rb"""|["']errors?\\*["']\s*:(?!\s*(?:null|false|0|\\*"\\*"|\[\s*\]|\{\s*\}))""",
    re.IGNORECASE,
)
"""A page, or an error, behind which a picture is that of somebody else."""
_MOST_BEGINNINGS = 200


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
        if (found := find_picture(target, spool)) is None:
            raise NotAPicture(target) from None
        return found
    if not is_picture(target):
        if source is not None and (found := find_picture(source, spool)) is not None:
            return found
        raise NotAPicture(target)
    if source is not None:
        source.unlink(missing_ok=True)
    return target


def has_beginning(text: str) -> bool:
    """Return whether a picture may begin in a text."""
    return next(beginnings(text.encode("utf-8", "replace")), None) is not None


def find_picture(text: Path, spool: Spool) -> Path | None:
    """Write the last picture in a text, whatever words are around it, into a file: Markdown, JSON within a text.

    That of a page, or behind an error, is none.

    Args:
        text: A file.
        spool: Of the response.

    Returns:
        The file; None if there is none.

    Raises:
        ImageTooLarge: If it is too large.
    """
    if not text.is_file() or not text.stat().st_size:
        return None
    with text.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            spans = [*_spans(mapped)]
            if spans and (foreign := _FOREIGN.search(mapped, 0, spans[-1][0])) is not None:
                spans = [span for span in spans if span[0] < foreign.start()]
        for start, end in reversed(spans):
            target = spool.new_path()
            file.seek(start)
            try:
                with target.open("wb") as to:
                    decoder = Base64Decoder(to, max_bytes=spool.max_bytes)
                    for block in unescaped(file, end - start):
                        decoder.feed(block)
                    decoder.finish()
            except NotBase64:
                continue
            if is_picture(target):
                return target
    return None


def _spans(text: mmap.mmap) -> Iterator[tuple[int, int]]:
    end = 0
    for _ in range(_MOST_BEGINNINGS):
        if (begins := next(beginnings(text, end), None)) is None:
            return
        end = begins
        while (run := _RUN.match(text, end)) is not None:
            end = run.end()
        yield begins, end


def beginnings(text: mmap.mmap | bytes, start: int = 0) -> Iterator[int]:
    """Yield the places at which a picture may begin in a text."""
    for found in _BEGINNING.finditer(text, start):
        begins = found.start()
        if not begins or _WITHIN.match(text, begins - 1) is None:
            yield begins


def is_picture(path: Path) -> bool:
    """Return whether a file begins as a picture that we take."""
    with path.open("rb") as file:
        return image_type(file.read(ENOUGH)) is not None
