"""A proxy in front of a database that fails as networks do."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class Proxy:
    """Forwards connections to a database; can cut, refuse or stall them."""

    def __init__(self, dsn: str) -> None:
        self.direct = dsn
        self._port: int = urlsplit(dsn).port or 5432
        self._listening: int | None = None
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.deaf = False
        """Drop notifications, as a pooler in transaction mode does."""
        self.accepted = 0
        """The number of connections so far."""

    @property
    def dsn(self) -> str:
        """Return the address of the proxy."""
        return self.direct.replace(f":{self._port}/", f":{self._listening}/") + "?sslmode=disable"

    async def start(self) -> None:
        """Listen; a second time on the same port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._listening or 0)
        self._listening = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and cut all connections."""
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Cut all connections, on both sides."""
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[None]:
        """Cut connections and refuse new ones for as long as the context lasts."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    @asynccontextmanager
    async def swallowing(self) -> AsyncIterator[None]:
        """Deliver nothing while the context lasts, as if a cable were pulled; bytes arrive afterwards, no connection ends."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._server is not None
        if not self._server.is_serving():  # it was on its way in when the door closed
            writer.transport.abort()
            return
        self.accepted += 1
        pipe = asyncio.current_task()
        assert pipe is not None
        self._pipes.add(pipe)
        backend = None
        try:
            backend_reader, backend = await asyncio.open_connection("127.0.0.1", self._port)
            there = asyncio.create_task(self._forward(reader, backend))
            back = asyncio.create_task(self._forward_messages(backend_reader, writer))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        except asyncio.CancelledError:
            pass
        finally:
            for side in (writer, backend):
                if side is not None:
                    side.transport.abort()
            self._pipes.discard(pipe)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._open.wait()
            writer.write(data)
            await writer.drain()

    async def _forward_messages(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward Postgres messages one by one: a type, a length that counts itself, a body."""
        while True:
            kind = await reader.readexactly(1)
            size = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(size, "big") - 4)
            await self._open.wait()
            if self.deaf and kind == b"A":
                continue
            writer.write(kind + size + body)
            await writer.drain()


@asynccontextmanager
async def proxied(dsn: str) -> AsyncIterator[Proxy]:
    """Start a proxy in front of a database."""
    it = Proxy(dsn)
    await it.start()
    try:
        yield it
    finally:
        await it.stop()
