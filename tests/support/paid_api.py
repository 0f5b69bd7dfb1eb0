"""A paid Images API at its socket: a ledger of the requests it accepted and what it charges for each, and faults.

It knows nothing of claims, calls or tickets. A request stands in the ledger once its last byte has arrived, whatever
becomes of its response; the n-th costs n + 3 cents, if it is charged.
"""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from io import BytesIO
from random import Random
from typing import Any

from PIL import Image

from tests.support.paid_jobs import ENDED, Job, PaidJobs, shown
from tests.support.servers import scripted

EDGE = 64
TEXT_TOKENS_PER_CENT, OUTPUT_TOKENS = 2000, 1000
"""By the rates of `daemon.providers.openai.models`: one cent, and three."""
EXACT = {"drawn": 50, "slow": 14, "document": 6, "empty": 3, "odd": 4}
"""Fates whose response says what is charged, and their weights."""
LOST = {"broken": 4, "gateway": 3, "swallowed": 2, "garbage": 2}
"""Charged, and the response does not say so."""
FREE = {"limited": 3, "failing": 4, "moderated": 3, "overloaded": 2}
"""Not charged."""
UNHEARD = {"reset": 3}
"""Broken off before the request was read: it is not accepted."""
WEIGHTS = EXACT | LOST | FREE | UNHEARD
JOB = "job"
"""The fate of a request in background mode: charged, unless it is cancelled before it has drawn."""
UNDERSTOOD = {*EXACT, JOB, "limited", "failing", "moderated"}
"""Fates whose response says whether it is charged."""


@dataclass
class Entry:
    """An accepted request. `price`: USD, 0 if it is free. `delivered`: the client stayed for the whole response."""

    number: int
    run: str
    fate: str
    delivered: bool = False
    cancelled: bool = False

    @property
    def price(self) -> Decimal:
        return Decimal(0) if self.fate in FREE or self.cancelled else Decimal(self.number + 3) / 100


def seal(run: str) -> bytes:
    """Return the bytes that every picture of a run begins with."""
    return hashlib.sha256(run.encode()).digest()


def sealed(image: bytes) -> tuple[bytes, int]:
    """Read the seal of a picture, and the number of the request it was drawn for."""
    with Image.open(BytesIO(image)) as opened:
        pixels = opened.convert("RGB").tobytes()
    return pixels[:32], int.from_bytes(pixels[32:36], "big")


@dataclass
class _Visit:
    """An accepted request whose response is due."""

    entry: Entry
    writer: asyncio.StreamWriter
    left: asyncio.Task[bytes]
    """Done as soon as the client closes the connection."""

    async def pause(self, seconds: float | None) -> None:
        """Wait, for ever if `seconds` is None, but no longer than the client does."""
        await asyncio.wait({self.left}, timeout=seconds)
        if self.left.done():
            raise ConnectionResetError

    async def respond(self, status: int, body: bytes, kind: str = "application/json", *, cut: bool = False) -> None:
        headers = {"content-type": kind, "content-length": len(body) + 1000 * cut, "connection": "close"}
        headers |= {"retry-after": 1} if status == 429 else {}
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()
        if cut:
            raise ConnectionResetError
        self.entry.delivered = True

    async def error(self, status: int, code: str, kind: str = "server_error") -> None:
        document = {"error": {"message": f"It is {code}.", "type": kind, "param": None, "code": code}}
        await self.respond(status, json.dumps(document).encode())


@dataclass
class PaidAPI:
    """The server. Calm, it draws every picture at once; while it is `holding`, it keeps every response back."""

    random: Random
    calm: bool = False
    holding: asyncio.Event | None = None
    ledger: list[Entry] = field(default_factory=list)
    resets: int = 0
    waiting: int = 0
    """How many accepted requests have no response yet."""
    url: str = ""
    jobs: PaidJobs = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = PaidJobs(self.random)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the one request of a connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        fate = "drawn" if self.calm else self.random.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        if fate == "reset":
            self.resets += 1
            raise ConnectionResetError
        line = head.partition(b"\r\n")[0].decode()
        if (job := self.jobs.find(line)) is not None:
            await self._asked(job, line, reader, writer)
            return
        if "/responses" in line:
            fate = JOB
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        fields = json.loads(await reader.readexactly(int(length[1])))
        run = re.search(r"storm-\d+", fields.get("prompt") or json.dumps(fields["input"]))
        assert run is not None
        entry = Entry(len(self.ledger) + 1, run[0], fate)
        self.ledger.append(entry)
        visit = _Visit(entry, writer, asyncio.create_task(reader.read(1)))
        self.waiting += 1
        try:
            if self.holding is not None:
                held = asyncio.create_task(self.holding.wait())
                await asyncio.wait({held, visit.left}, return_when=asyncio.FIRST_COMPLETED)
                held.cancel()
            await getattr(self, f"_{fate}")(visit, fields)
        finally:
            self.waiting -= 1
            visit.left.cancel()
            await asyncio.gather(visit.left, return_exceptions=True)

    async def _asked(self, job: Job, line: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Check or cancel a job."""
        entry = self.ledger[job.number - 1]
        visit = _Visit(Entry(0, entry.run, JOB), writer, asyncio.create_task(reader.read(0)))
        if line.split(" ")[1].endswith("/cancel"):
            entry.cancelled |= self.jobs.cancel(job)
            if not entry.cancelled:
                await visit.error(409, "conflict", "invalid_request_error")
                return
        elif (trouble := self.jobs.check(job, calm=self.calm)) is not None:
            await visit.respond(*trouble)
            return
        await visit.respond(200, self._shown(job, entry))
        entry.delivered |= job.status in ENDED

    def _shown(self, job: Job, entry: Entry) -> bytes:
        return json.dumps(shown(job, _picture(entry), _usage(entry))).encode()

    async def _job(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.pause(0.05)
        job = self.jobs.submit(visit.entry.number, fields.get("metadata"))
        await visit.respond(200, self._shown(job, visit.entry))
        visit.entry.delivered = False

    async def _odd(self, visit: _Visit, fields: dict[str, Any]) -> None:
        odd = base64.b64encode(b"\xff\n no picture " * 30).decode()
        document = {"created": 1, "data": [{"b64_json": odd}], "usage": _usage(visit.entry)}
        await visit.respond(200, json.dumps(document).encode())

    async def _drawn(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.pause(0.05 if self.calm else self.random.uniform(0.05, 0.6))
        await self._draw(visit, fields)

    async def _slow(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.pause(self.random.uniform(1, 5))
        await self._draw(visit, fields)

    async def _draw(self, visit: _Visit, fields: dict[str, Any]) -> None:
        if not fields.get("stream"):
            await self._document(visit, fields)
            return
        picture = {"b64_json": _picture(visit.entry), "size": fields.get("size"), "output_format": "png"}
        partial = {"type": "image_generation.partial_image", "partial_image_index": 0, **picture}
        completed = {"type": "image_generation.completed", "usage": _usage(visit.entry), **picture}
        body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in (partial, completed))
        await visit.respond(200, body.encode(), "text/event-stream")

    async def _document(self, visit: _Visit, fields: dict[str, Any]) -> None:
        document = {"created": 1, "data": [{"b64_json": _picture(visit.entry)}], "usage": _usage(visit.entry)}
        await visit.respond(200, json.dumps(document).encode())

    async def _empty(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.respond(200, json.dumps({"created": 1, "data": [{}], "usage": _usage(visit.entry)}).encode())

    async def _broken(self, visit: _Visit, fields: dict[str, Any]) -> None:
        event = {"type": "image_generation.partial_image", "b64_json": _picture(visit.entry), "partial_image_index": 0}
        await visit.respond(200, f"data: {json.dumps(event)}\n\n".encode(), "text/event-stream", cut=True)

    async def _gateway(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.respond(self.random.choice((502, 504, 524)), b"<html>bad gateway</html>", "text/html")

    async def _swallowed(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.pause(None)

    async def _garbage(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.respond(200, self.random.choice((b'{"data": 5}', b"[]", b'"words"', b"{", b"")))

    async def _limited(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.error(429, "rate_limit_exceeded", "requests")

    async def _failing(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.error(500, "server_error")

    async def _moderated(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.error(400, "moderation_blocked", "image_generation_user_error")

    async def _overloaded(self, visit: _Visit, fields: dict[str, Any]) -> None:
        await visit.respond(503, b"<html>overloaded</html>", "text/html")


def _picture(entry: Entry) -> str:
    pixels = (seal(entry.run) + entry.number.to_bytes(4, "big")).ljust(3 * EDGE * EDGE, b"\x7f")
    file = BytesIO()
    Image.frombytes("RGB", (EDGE, EDGE), pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _usage(entry: Entry) -> dict[str, Any]:
    text = TEXT_TOKENS_PER_CENT * entry.number
    details = {"image_tokens": 0, "text_tokens": text}
    return {"input_tokens": text, "input_tokens_details": details, "output_tokens": OUTPUT_TOKENS}


@asynccontextmanager
async def paid_api(random: Random) -> AsyncIterator[PaidAPI]:
    """Serve the API on a free port."""
    api = PaidAPI(random)
    async with scripted(api.serve) as url:
        api.url = f"{url}/v1"
        yield api
