"""A pooler between daemon and Postgres, which refuses connections and statements with any SQLSTATE, as Supavisor does.

It reads the wire protocol: the start-up packet of a connection, and every statement, before Postgres sees them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from urllib.parse import urlsplit

SSL_REQUEST, GSS_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
READY = b"Z\x00\x00\x00\x05I"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An ErrorResponse. `FATAL` ends the connection."""

    sqlstate: str
    message: str = "refused by the pooler of these tests"
    severity: str = "FATAL"

    def to_bytes(self) -> bytes:
        """The message on the wire."""
        fields = {"S": self.severity, "V": self.severity, "C": self.sqlstate, "M": self.message}
        body = b"".join(f"{name}{value}".encode() + b"\x00" for name, value in fields.items()) + b"\x00"
        return b"E" + (len(body) + 4).to_bytes(4, "big") + body


SUPAVISOR = (
    Refusal(
        "XX000", "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited to pool_size"
    ),
    Refusal("XX000", "Unable to check out process from the pool due to checkout timeout"),
    Refusal("XX000", "Tenant or user not found"),
    Refusal("XX000", "Circuit breaker open for operation: auth_error"),
)
"""Nearly every error of Supabase's pooler has this SQLSTATE."""


class Pooler:
    """Forwards sessions to a database, except those it refuses."""

    def __init__(self, dsn: str) -> None:
        self._direct = dsn
        self._port: int = urlsplit(dsn).port or 5432
        self._listening = 0
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self.refuse_session: Callable[[], Refusal | None] = lambda: None
        """Asked at each new connection."""
        self.refuse_statement: Callable[[str], Refusal | None] = lambda sql: None
        """Asked at each statement, with its SQL."""
        self.silent = False
        """Whether new sessions begin, and no statement of theirs is ever answered: the network is dark from then on."""
        self.refused: list[Refusal] = []
        """All that was said, to connections and statements."""
        self.sessions = 0
        """How many sessions were begun."""
        self.statements: list[str] = []
        """The SQL of all statements."""

    @property
    def dsn(self) -> str:
        """Where to connect."""
        return self._direct.replace(f":{self._port}/", f":{self._listening}/") + "?sslmode=disable"

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._listening = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Accept nothing more, and cut what there is."""
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """End all sessions, as seen from both sides."""
        sessions = list(self._sessions)
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    @asynccontextmanager
    async def refusing(self, *refusals: Refusal) -> AsyncIterator[None]:
        """Cut all sessions and refuse new ones, in these words by turns."""
        sayings = cycle(refusals)
        self.refuse_session = lambda: next(sayings)
        await self.cut()
        try:
            yield
        finally:
            self.refuse_session = lambda: None

    @contextmanager
    def refusing_statements(self, part: str, *refusals: Refusal) -> Iterator[asyncio.Event]:
        """Refuse the next statements whose SQL has `part` in it, once in the words of each refusal. Yields an event that is set
        by the first one after these."""
        sayings = iter(refusals)
        passed = asyncio.Event()
        before = self.refuse_statement

        def refuse(sql: str) -> Refusal | None:
            if part not in sql:
                return before(sql)
            saying = next(sayings, None)
            if saying is None:
                passed.set()
            return saying

        self.refuse_statement = refuse
        try:
            yield passed
        finally:
            self.refuse_statement = before

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = asyncio.current_task()
        assert session is not None
        self._sessions.add(session)
        backend = None
        try:
            startup, code = await self._startup(reader, writer)
            if code != CANCEL_REQUEST and (refusal := self.refuse_session()):
                self.refused.append(refusal)
                writer.write(refusal.to_bytes())
                await writer.drain()
                writer.close()
                return
            self.sessions += code != CANCEL_REQUEST
            backend_reader, backend = await asyncio.open_connection("127.0.0.1", self._port)
            backend.write(startup)
            there = asyncio.create_task(self._forward(reader, writer, backend))
            back = asyncio.create_task(self._return(backend_reader, writer))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, OSError):
            writer.transport.abort()
        finally:
            if not writer.transport.is_closing():
                writer.close()
            if backend is not None:
                backend.transport.abort()
            self._sessions.discard(session)

    async def _startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, int]:
        while True:
            size = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(size, "big") - 4)
            code = int.from_bytes(body[:4], "big")
            if code not in (SSL_REQUEST, GSS_REQUEST):
                return size + body, code
            writer.write(b"N")

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, backend: asyncio.StreamWriter
    ) -> None:
        """From the client, message by message: a type, a length that counts itself, a body."""
        prepared: dict[bytes, str] = {}
        skipping = False
        while True:
            kind = await reader.readexactly(1)
            size = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(size, "big") - 4)
            if self.silent and kind != b"p":
                await asyncio.Event().wait()
            if skipping:
                if kind == b"S":
                    writer.write(READY)
                    skipping = False
                continue
            sql = _statement(kind, body, prepared)
            if sql is not None:
                self.statements.append(sql)
            if sql is not None and (refusal := self.refuse_statement(sql)):
                self.refused.append(refusal)
                writer.write(refusal.to_bytes())
                if refusal.severity == "FATAL":
                    await writer.drain()
                    return
                if kind == b"Q":
                    writer.write(READY)
                skipping = kind != b"Q"
                continue
            backend.write(kind + size + body)
            await backend.drain()

    async def _return(self, backend_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await backend_reader.read(65536):
            writer.write(data)
            await writer.drain()


def _statement(kind: bytes, body: bytes, prepared: dict[bytes, str]) -> str | None:
    """The SQL that a message executes or prepares; None for every other message."""
    match kind:
        case b"Q":
            return body[:-1].decode()
        case b"P":
            name, sql, _ = body.split(b"\x00", 2)
            prepared[name] = sql.decode()
            return prepared[name]
        case b"B":
            _, name, _ = body.split(b"\x00", 2)
            return prepared.get(name)
        case _:
            return None


@asynccontextmanager
async def pooled(dsn: str) -> AsyncIterator[Pooler]:
    """A pooler in front of a database."""
    it = Pooler(dsn)
    await it.start()
    try:
        yield it
    finally:
        await it.stop()
