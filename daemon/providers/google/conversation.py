"""The turn before: what was asked and answered when a picture was made. Google's models refine it better when they hear
that again, with the signatures of their thoughts.

Signatures look like base64 and may never stand in the database. So a turn is a file, which is kept in storage where
nobody else reads it. One turn is enough for a picture; what came before that is not told again.
"""

import hashlib
import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.genai.types import Part

LARGEST = 10_000_000
"""Bytes of signatures in one turn; more are not kept."""
LARGEST_FILE = 16_000_000
"""Bytes: they are a third larger in the file, and the texts go along."""


@dataclass(frozen=True, slots=True)
class Said:
    """One part of an answer; without `text` it is the picture. `signature` goes back as it came."""

    text: str | None
    signature: bytes | None


@dataclass(frozen=True, slots=True)
class Turn:
    """The prompt of a picture, and the answer with it."""

    asked: str
    answered: tuple[Said, ...]

    @property
    def bytes(self) -> int:
        """How large its signatures are."""
        return sum(len(said.signature or b"") for said in self.answered)


class TooLargeError(Exception):
    """The signatures are larger than can be kept."""


def keep(parts: Sequence[Part], *, model: str, asked: str, picture: Path, to: Path) -> Path | None:
    """Writes a turn down; None where it has no signature, or more pictures than the one that is kept.

    Args:
        parts: The answer's, without thoughts.
        model: Who answered; signatures are for the same model's eyes.
        asked: The prompt.
        picture: The answer's picture, by whose bytes the turn is recognised.
        to: The file to write.

    Raises:
        TooLargeError: If it cannot be kept.
        OSError: If it cannot be written.
    """
    pictures = sum(part.inline_data is not None for part in parts)
    if pictures != 1 or not any(part.thought_signature for part in parts):
        return None
    if sum(len(part.thought_signature or b"") for part in parts) > LARGEST:
        raise TooLargeError
    answered = [
        {
            "text": None if part.inline_data is not None else part.text,
            "signature": b64encode(part.thought_signature).decode() if part.thought_signature else None,
        }
        for part in parts
        if part.inline_data is not None or part.text is not None
    ]
    document = {"model": model, "asked": asked, "picture": _sha256(picture), "answered": answered}
    with to.open("w") as file:
        json.dump(document, file)
    return to


def recall(file: Path, *, model: str, picture: Path) -> Turn | None:
    """Reads a turn; None if it is another model's or another picture's (the run was requeued), or no turn at all."""
    try:
        document: Any = json.loads(file.read_bytes())
        if (document["model"], document["picture"]) != (model, _sha256(picture)):
            return None
        return Turn(str(document["asked"]), tuple(_said(part) for part in document["answered"]))
    except (ValueError, TypeError, KeyError):
        return None


def _said(part: Any) -> Said:
    text, signature = part["text"], part["signature"]
    return Said(None if text is None else str(text), None if signature is None else b64decode(signature, validate=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
