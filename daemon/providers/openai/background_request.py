"""Build the request of a background job for the Responses API. Its image is encoded while it is sent."""

import json
import re
from base64 import b64encode
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from daemon.providers.openai.models import MAINLINE
from daemon.providers.openai.request import Drawing

INSTRUCTIONS = "Draw one picture of what the user describes. Give the user's words to the image tool as they are."
"""For the model in between: without them it rewrites the prompt, and with them it still may."""
_RUN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_TICKET = re.compile(r"[0-9]{1,18}")
"""Fits into a bigint: the metadata of other applications' responses may hold anything."""
_CHUNK = 3 * 16_384
"""Bytes of the image that are encoded at once: divisible by three, so that the pieces join without padding."""


@dataclass(frozen=True, slots=True)
class BackgroundRequest:
    """The request of one job.

    Args:
        drawing: The image to generate.
        run_id, ticket: Returned in the response's metadata: they name the run of a job whose id was never saved.
    """

    drawing: Drawing
    run_id: str
    ticket: int

    def described(self) -> dict[str, Any]:
        """Return the exact request for the audit trail; the image by its type and size."""
        return {"endpoint": "responses", **self._fields(self.drawing.image_described)}

    def body(self) -> "Body":
        """Return the request to send."""
        placeholder = uuid4().hex
        fields = json.dumps(self._fields(f"data:{self.drawing.image_type};base64,{placeholder}")).encode()
        head, _, tail = fields.partition(placeholder.encode())
        return Body(head, self.drawing.image, tail)

    def _fields(self, image_url: str) -> dict[str, Any]:
        drawing = self.drawing
        content: list[dict[str, Any]] = [{"type": "input_text", "text": drawing.text}]
        if drawing.image is not None:
            content.append({"type": "input_image", "image_url": image_url, "detail": "auto"})
        tool = {
            "type": "image_generation",
            "model": drawing.model,
            "action": "generate" if drawing.image is None else "edit",
            **drawing.options,
        }
        return {
            "model": MAINLINE,
            "instructions": INSTRUCTIONS,
            "input": [{"role": "user", "content": content}],
            "tools": [tool],
            "tool_choice": {"type": "image_generation"},
            "max_tool_calls": 1,  # each picture is paid for
            "background": True,
            "store": True,  # else it is gone after ten minutes
            "metadata": {"run_id": self.run_id, "ticket": str(self.ticket)},
        }


class Body(AsyncIterable[bytes]):
    """A text with a file in it, which is encoded as base64 while it is read."""

    def __init__(self, head: bytes, file: Path | None, tail: bytes) -> None:
        self._head = head
        self._file = file
        self._tail = tail

    def __len__(self) -> int:
        size = 0 if self._file is None else self._file.stat().st_size
        return len(self._head) + (size + 2) // 3 * 4 + len(self._tail)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._head
        if self._file is not None:
            with self._file.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield b64encode(chunk)
        yield self._tail


def read_owner(metadata: object) -> tuple[str, int] | None:
    """Read run id and ticket from the metadata of a response; None if it is not ours."""
    match metadata:
        case {"run_id": str(run_id), "ticket": str(ticket)} if _RUN.fullmatch(run_id) and _TICKET.fullmatch(ticket):
            return run_id, int(ticket)
        case _:
            return None
