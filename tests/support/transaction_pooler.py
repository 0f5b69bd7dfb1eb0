"""A pooler in transaction mode: a client has a backend from its first statement to the end of its transaction, and no longer.

What a backend sends by itself (notifications) reaches whoever has it then, or nobody: that is how LISTEN is swallowed.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104

Backend = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one message: its type, and all of its bytes."""
    kind, size = await reader.readexactly(1), await reader.readexactly(4)
    return kind, kind + size + await reader.readexactly(int.from_bytes(size, "big") - 4)


class TransactionPooler:
    """Forwards statements to backends that all its clients share; the one that was let go last is taken first."""

    def __init__(self, dsn: str) -> None:
        self._direct = dsn
        self._port: int = urlsplit(dsn).port or 5432
        self._idle: list[Backend] = []
        self._all: list[Backend] = []
        self._clients: list[asyncio.StreamWriter] = []
        self._leases: list[_Lease] = []
        self._startup = self._welcome = b""

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[str, None]:
        """Yield where to connect."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield self._direct.replace(f":{self._port}/", f":{port}/") + "?sslmode=disable"
        finally:
            server.close()
            for lease in self._leases:
                lease.back.cancel()
            await asyncio.gather(*(lease.back for lease in self._leases), return_exceptions=True)
            for writer in (*self._clients, *(writer for _, writer in self._all)):
                writer.transport.abort()
            await asyncio.sleep(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        try:
            self._startup = await self._read_startup(reader, writer)
            self._idle.append(await self._take())
            writer.write(self._welcome)
            await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            writer.transport.abort()

    async def _read_startup(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        while True:
            size = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(size, "big") - 4)
            if int.from_bytes(body[:4], "big") not in (SSL_REQUEST, GSS_REQUEST):
                return size + body
            writer.write(b"N")

    async def _take(self) -> Backend:
        if self._idle:
            return self._idle.pop()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._all.append((reader, writer))
        writer.write(self._startup)
        self._welcome, kind = b"", b""
        while kind != b"Z":
            kind, whole = await message(reader)
            self._welcome += whole
        return reader, writer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lease: _Lease | None = None
        while True:
            kind, whole = await message(reader)
            if kind == b"X":
                writer.close()
                return
            if lease is None or lease.ended:
                lease = _Lease(await self._take(), writer, self._idle)
                self._leases.append(lease)
            lease.send(kind, whole)


class _Lease:
    """One transaction of one client on one backend."""

    def __init__(self, backend: Backend, client: asyncio.StreamWriter, idle: list[Backend]) -> None:
        self._backend, self._client, self._idle = backend, client, idle
        self._unanswered = 0
        self.ended = False
        self.back = asyncio.create_task(self._return())

    def send(self, kind: bytes, whole: bytes) -> None:
        self._unanswered += kind in b"QS"
        self._backend[1].write(whole)

    async def _return(self) -> None:
        while not self.ended:
            kind, whole = await message(self._backend[0])
            if kind != b"A":  # a notification
                self._client.write(whole)
            self._unanswered -= kind == b"Z"
            if kind == b"Z" and whole[-1:] == b"I" and not self._unanswered:
                self.ended = True
                self._idle.append(self._backend)
