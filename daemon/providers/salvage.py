"""Find the picture of a response whose fields are none that we know: it is paid for, so it is taken, or kept, wherever it is."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.providers.lenient import texts_in
from daemon.providers.pictures import NotAPicture, has_beginning, is_url, save_picture
from daemon.providers.spool import Spool

_LONG = 1000
"""Characters of a text without a blank that is no identifier and no address, and so may be a picture that we cannot read."""
_MOST_TEXTS = 1000
_BLANK = re.compile(r"\s")
_NO_PICTURE = {
    *("error", "errors", "detail", "details", "message", "usage", "metadata"),  # an error may quote what was sent
    *("input", "inputs", "prompt", "request", "instructions", "tools", "parameters", "messages"),  # what was sent
    *("encrypted_content", "thoughtSignature", "thought_signature", "signature"),
}
"""Names of fields in which a picture is that of somebody else, and a long text is none."""
_ADDRESSES = {
    *("data", "image", "images", "image_url", "imageUrl", "image_urls", "imageUrls", "url", "urls", "uri", "fileUri"),
    *("output", "outputs", "result", "results", "src", "href", "link", "download_url", "file", "files"),
}
"""Names of fields in which an address is that of the picture."""


@dataclass(frozen=True, slots=True)
class Salvaged:
    """A picture in a file, or its address, or a file with what may be one."""

    image: Path | None = None
    url: str | None = None
    undecodable: Path | None = None


async def salvage(document: object, spool: Spool) -> Salvaged | None:
    """Find the first picture in any text of a response, else the first address, else a long text that may be one.

    Args:
        document: The response.
        spool: Its long texts.

    Raises:
        ImageTooLarge: If the picture is too large.
        OSError: For trouble with the disk.
    """
    url = undecodable = None
    for name, text in _texts(document):
        if is_url(text):
            url = url or (text.strip() if name in _ADDRESSES else None)
        elif (long := _is_long(text, spool)) or has_beginning(text):
            try:
                return Salvaged(await save_picture(text, spool))
            except NotAPicture as error:
                undecodable = undecodable or (error.path if long else None)
    if url is None and undecodable is None:
        return None
    return Salvaged(url=url, undecodable=None if url else undecodable)


def _is_long(text: str, spool: Spool) -> bool:
    return text in spool or (len(text) > _LONG and not _BLANK.search(text.strip()))


def _texts(document: object) -> Iterator[tuple[str, str]]:
    for count, found in enumerate(texts_in(document, skip=_NO_PICTURE)):
        if count == _MOST_TEXTS:
            return
        yield found
