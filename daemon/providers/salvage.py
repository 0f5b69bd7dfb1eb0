"""Find the picture of a response whose fields are none that we know: it is paid for, so it is taken, or kept, wherever it is."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from daemon.providers.lenient import as_count, texts_in
from daemon.providers.pictures import NotAPicture, has_beginning, is_url, save_picture
from daemon.providers.spool import Spool

_LONG = 1000
"""Characters of a text without a blank that is no identifier and no address, and so may be a picture that we cannot read."""
_MOST_TEXTS = 1000
_BLANK = re.compile(r"\s")
_NO_PICTURE = {
    *("error", "errors", "detail", "details", "message", "usage", "metadata"),  # an error may quote what was sent
    *("input", "inputs", "prompt", "request", "instructions", "tools", "parameters", "messages"),  # what was sent
    *("input_image", "inputImage", "input_images", "inputImages", "source", "source_image", "sourceImage"),
    *("init_image", "initImage", "init_images", "initImages", "image_prompt", "imagePrompt", "control_image"),
    *("mask", "mask_image", "maskImage", "original", "original_image", "originalImage"),
    *("reference_image", "referenceImage", "reference_images", "referenceImages", "previous_image", "previousImage"),
    *("encrypted_content", "thoughtSignature", "thought_signature", "signature"),
}
"""Names of fields in which a picture is that of somebody else, and a long text is none."""
_ADDRESSES = {
    *("data", "image", "images", "image_url", "imageUrl", "image_urls", "imageUrls", "url", "urls", "uri", "fileUri"),
    *("output", "outputs", "result", "results", "src", "href", "link", "download_url", "file", "files"),
}
"""Names of fields in which an address is that of the picture."""
_ERRORS = ("error", "errors")
_STATES = ("status", "state", "task_status", "taskStatus")
_CODES = ("code", "status", "status_code", "statusCode")
_FAILED = {
    *("failed", "failure", "fail", "error", "errored", "aborted", "cancelled", "canceled", "expired", "timeout"),
    *(
        "rejected",
        "refused",
        "denied",
        "blocked",
        "filtered",
        "content_filter",
        "content_filtered",
        "moderated",
        "nsfw",
    ),
}


@dataclass(frozen=True, slots=True)
class Salvaged:
    """A picture in a file, or its address, or a file with what may be one."""

    image: Path | None = None
    url: str | None = None
    undecodable: Path | None = None


async def salvage(document: object, spool: Spool) -> Salvaged | None:
    """Find the first picture in any text of a response, else the first address, else a long text that may be one.

    An object that says that it failed has none: it may quote what was sent.

    Args:
        document: The response.
        spool: Its long texts.

    Raises:
        ImageTooLarge: If the picture is too large.
        OSError: For trouble with the disk.
    """
    url = undecodable = None
    for name, text in likely_texts(document):
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


def likely_texts(document: object) -> Iterator[tuple[str, str]]:
    """Yield the texts of a response that may be its picture, with the names of their fields."""
    for count, found in enumerate(texts_in(document, skip=_NO_PICTURE, leave=is_failed)):
        if count == _MOST_TEXTS:
            return
        yield found


def is_failed(document: object) -> bool:
    """Return whether an object says itself that it failed: by an error, its state, or the status of an HTTP error."""
    if not isinstance(document, dict):
        return False
    fields = cast("dict[str, object]", document)
    states = (fields.get(name) for name in _STATES)
    return (
        any(fields.get(name) for name in _ERRORS)
        or fields.get("success") is False
        or any(isinstance(state, str) and state.strip().lower() in _FAILED for state in states)
        or any(400 <= (as_count(fields.get(name)) or 0) < 600 for name in _CODES)
    )
