"""Save the conversation that made an image, and load it when the image is refined.

A conversation is the prompt and the model's response, with the signatures of the model's thoughts. Google's models refine an
image better with it. Signatures look like base64, which the database refuses, so a conversation is a file in a bucket that
is not public. It holds the latest prompt and response alone; one is enough for an image.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SIGNATURE_BYTES = 10_000_000
"""Of all signatures of a conversation; with more it is not saved."""
MAX_FILE_BYTES = 16_000_000
"""Signatures are a third larger in the file, and the texts are in it, too."""


@dataclass(frozen=True, slots=True)
class ConversationPart:
    """One part of a response; without `text` it is the image. `signature` is sent back byte for byte."""

    text: str | None
    signature: bytes | None


@dataclass(frozen=True, slots=True)
class ResponsePart:
    """One part of a response that has just come."""

    text: str | None
    is_image: bool
    signature: bytes | None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The prompt of an image, and the response that it is part of."""

    prompt: str
    response: tuple[ConversationPart, ...]

    @property
    def signature_bytes(self) -> int:
        """The size of its signatures."""
        return sum(len(part.signature or b"") for part in self.response)


class TooLargeError(Exception):
    """The signatures have more than `MAX_SIGNATURE_BYTES`."""


def save(parts: Sequence[ResponsePart], *, model: str, prompt: str, image: Path, to: Path) -> Path | None:
    """Write a conversation to a file. None for a response without a signature, or with more than one image.

    Args:
        parts: The response's, without thoughts.
        model: The model that responded; signatures are valid for the same model alone.
        prompt: The prompt.
        image: The response's image; its hash tells whose conversation it is.
        to: The file to write.

    Raises:
        TooLargeError: If the signatures are too large.
        OSError: If the file cannot be written.
    """
    images = sum(part.is_image for part in parts)
    if images != 1 or not any(part.signature for part in parts):
        return None
    if sum(len(part.signature or b"") for part in parts) > MAX_SIGNATURE_BYTES:
        raise TooLargeError
    response = [
        {
            "text": None if part.is_image else part.text,
            "signature": b64encode(part.signature).decode() if part.signature else None,
        }
        for part in parts
        if part.is_image or part.text is not None
    ]
    document = {"model": model, "prompt": prompt, "image": _sha256(image), "response": response}
    with to.open("w") as file:
        json.dump(document, file)
    return to


def load(file: Path, *, model: str, image: Path) -> Conversation | None:
    """Read a conversation; None for one of another model or another image (the run was requeued), and for a broken file."""
    try:
        document: Any = json.loads(file.read_bytes())
        if (document["model"], document["image"]) != (model, _sha256(image)):
            return None
        return Conversation(str(document["prompt"]), tuple(_part(part) for part in document["response"]))
    except (ValueError, TypeError, KeyError):
        return None


def _part(part: Any) -> ConversationPart:
    text, signature = part["text"], part["signature"]
    return ConversationPart(
        None if text is None else str(text), None if signature is None else b64decode(signature, validate=True)
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
