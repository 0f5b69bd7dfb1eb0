"""A server that returns images in every form of the real APIs, without their work: the bytes are made beforehand.

It sends all images at once: the first response starts when the last request has come.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.fakes.server import picture
from tests.support.servers import scripted

_CHUNK = 1 << 16
_TASK = {"id": "1", "status": "SUCCESS", "progress": "100%"}
_AROUND = {
    "json": ('{"created": 1, "data": [{"b64_json": "', '"}]}'),
    "stream": (
        'event: image_generation.completed\ndata: {"type": "image_generation.completed", "b64_json": "',
        '"}\n\n',
    ),
    "inline": (
        '{"candidates": [{"content": {"role": "model", "parts": [{"inlineData": {"mimeType": "image/png", "data": "',
        '"}}]}, "finishReason": "STOP", "index": 0}], "responseId": "1"}',
    ),
    "background": (
        '{"id": "resp_1", "status": "completed", "output": [{"type": "image_generation_call", "status": "completed", "result": "',
        '"}]}',
    ),
    "raw-in-json": ('{"finish_reason": "SUCCESS", "seed": 1, "image": "', '"}'),
}


class HeavyAPI:
    """The server.

    Args:
        large: The image. Only the first response after `expect` has a small one, so that a client can warm up.
    """

    def __init__(self, large: bytes) -> None:
        self.url = ""
        self._images = [(image, base64.b64encode(image)) for image in (picture(), large)]
        self.expect(1)

    def expect(self, count: int) -> None:
        """Expect one request for a small image, and then so many for large ones."""
        self._warm = False
        self._all_requested = asyncio.Barrier(count)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["HeavyAPI"]:
        """Serve at `url`; the first part of a path names the form of the response."""
        async with scripted(self._respond) as self.url:
            yield self

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        await reader.readexactly(length)
        kind = head.split(" ")[1].split("/")[1]
        if kind in ("url", "midjourney"):
            address = f"{self.url}/raw/picture.png"
            document = {"created": 1, "data": [{"url": address}]} if kind == "url" else {**_TASK, "imageUrl": address}
            return await _send(writer, "application/json", json.dumps(document).encode())
        if kind == "raw" and "accept: application/json" in head:
            kind = "raw-in-json"
        image, encoded = self._images[self._warm]
        if self._warm:
            await self._all_requested.wait()
        self._warm = True
        if kind == "raw":
            return await _send(writer, "image/png", image)
        before, after = (text.encode() for text in _AROUND[kind])
        content_type = "text/event-stream" if kind == "stream" else "application/json"
        return await _send(writer, content_type, before, encoded, after)


async def _send(writer: asyncio.StreamWriter, content_type: str, *parts: bytes) -> None:
    length = sum(len(part) for part in parts)
    writer.write(
        f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n".encode()
    )
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _CHUNK):
            writer.write(view[start : start + _CHUNK])
            await writer.drain()
