"""Serve HTTP in tests: an app behind uvicorn in the test's own loop, or a script that misbehaves."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

from tests.support.postgres import wait_until

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the test runner."""
        yield


def listening_socket() -> socket.socket:
    """Listen on a free port. With its protocol named, asyncio sends at once, and no body waits for a delayed ACK."""
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    return listening


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """Serve `app` on a free port; yield its URL."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=2)
    server = _Server(config)
    with listening_socket() as listening:
        # Not in a TaskGroup: that would cancel it when a test fails, and a uvicorn that is cancelled leaves the socket,
        # closed, in the loop's selector, where the next socket of its number is then said to be (FileNotFoundError).
        serving = asyncio.create_task(server.serve([listening]))
        try:
            await wait_until(lambda: server.started or serving.done())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """Run `script` for each connection to a free port; yield the URL. Connections that are open at the end are cut."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await script(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        else:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections)
        await server.wait_closed()
