"""Responses of a Storage that is scripted byte by byte, and the settings of a client that does not wait for it."""

import asyncio
import json
from datetime import timedelta

QUICK = {"timeout": timedelta(seconds=0.3), "first_wait": timedelta(milliseconds=1)}
OK = b'{"Key":"images/a.png","Id":"1"}'
DOWN = b"<html>503 Service Temporarily Unavailable</html>"


def response(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """A whole request; answers with its head, in lower case."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    await reader.readexactly(length)
    return head


def of_storage(status: str, word: str) -> bytes:
    return json.dumps({"statusCode": status, "error": word, "message": word, "code": word}).encode()
