"""An answer of OpenAI's, read while it comes: its pictures go to disk, and what is left is small."""

import json
from collections.abc import AsyncIterator
from typing import Any, cast

from daemon.providers.base64_stream import Base64Stream
from daemon.providers.openai_errors import OPENAI

_MAX_REST = 1_000_000
"""Bytes of an answer that are not image: usage, a revised prompt. With more it is no answer of OpenAI's."""


async def read_document(chunks: AsyncIterator[bytes], images: Base64Stream) -> dict[str, Any]:
    """Reads a JSON document; in it, numbers stand for its pictures.

    Raises:
        OutcomeUnknown: If it is none.
        BrokenImage: As `images` does.
    """
    rest = bytearray()
    async for chunk in chunks:
        rest += images.feed(chunk)
        if len(rest) > _MAX_REST:
            raise OPENAI.unknown("OpenAI's answer is larger than one of OpenAI's can be.")
    rest += images.finish()
    return parse(bytes(rest))


def parse(text: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        OutcomeUnknown: If it is none.
    """
    try:
        return expect_object(json.loads(text))
    except ValueError as error:
        raise OPENAI.unknown("OpenAI's answer cannot be read.") from error


def expect_object(value: object) -> dict[str, Any]:
    """What has to be an object in an answer.

    Raises:
        OutcomeUnknown: If it is something else.
    """
    if not isinstance(value, dict):
        raise OPENAI.unknown("OpenAI's answer has another shape than it should.")
    return cast("dict[str, Any]", value)
