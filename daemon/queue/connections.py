"""The connections over which the SQL functions are called: a kept one each for syncs and beats, and a small pool beside them.

No function of ours changes anything of its session, but the application's triggers may (`request.jwt.claims`, say). Calls
beside leave none of it. After a sync it would be a round trip between a claim and the start of the work: see `Kept.reset`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeAlias

import asyncpg

from daemon.database import CONNECTIONS
from daemon.dsn import address

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

BESIDE = CONNECTIONS - 3
"""Of a daemon's connections, those in the pool: neither the listener's nor the kept ones."""
BEAT_TIMEOUT = 5.0
"""Seconds for a beat: one that takes longer is worth less than the next."""


class Connections:
    """An async context manager. Connects when a connection is first used.

    Args:
        dsn: Direct connection or session pooler.
        timeout: Seconds after which a call is given up as `TimeoutError`.
    """

    def __init__(self, dsn: str, timeout: float) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self.first = Kept(dsn, timeout)
        """For the sync, for what the daemon does before, between and after its syncs, and to be registered meanwhile."""
        self.beats = Kept(dsn, BEAT_TIMEOUT)

    async def __aenter__(self) -> Self:
        self._pool = await asyncpg.create_pool(
            **_options(self._dsn, self._timeout),
            min_size=0,
            max_size=BESIDE,
            max_inactive_connection_lifetime=0,
            reset=_reset,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for kept in (self.first, self.beats):
            kept.close()
        if self._pool is not None:
            self._pool.terminate()

    @asynccontextmanager
    async def beside(self) -> AsyncGenerator[PooledConnection, None]:
        """Yield a connection for a call that may wait without keeping the sync waiting."""
        if self._pool is None:
            raise RuntimeError("the queue is not open")
        async with self._pool.acquire(timeout=self._timeout) as connection:
            try:
                yield connection
            except asyncpg.PostgresError:
                raise
            except BaseException:
                connection.terminate()
                raise


class Kept:
    """One connection that is kept between calls, which wait for each other.

    A call that is given up has its connection cut: asyncpg would wait on for its cancel request to arrive, which takes
    longest when the network is gone (measured: 25 s for a call with a timeout of 5).
    """

    def __init__(self, dsn: str, timeout: float) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._free = asyncio.Lock()
        self._connection: Connection | None = None
        self._closed = False

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[Connection, None]:
        """Yield the connection, for one call."""
        async with asyncio.timeout(self._timeout):
            await self._free.acquire()
        try:
            connection = await self._connected()
            try:
                yield connection
            except asyncpg.PostgresError:
                raise
            except BaseException:
                connection.terminate()
                raise
        finally:
            self._free.release()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._free.locked()

    async def reset(self) -> None:
        """Undo what triggers have set for the session. What was set on connecting stays."""
        async with self.use() as connection:
            await _reset(connection)

    def close(self) -> None:
        """Cut the connection, now and for ever."""
        self._closed = True
        if self._connection is not None:
            self._connection.terminate()

    async def _connected(self) -> Connection:
        if self._closed:
            raise RuntimeError("the queue is not open")
        if self._connection is None or self._connection.is_closed():
            connection = await asyncpg.connect(**_options(self._dsn, self._timeout))
            if self._closed:
                connection.terminate()
                raise RuntimeError("the queue is not open")
            self._connection = connection
        return self._connection


def _options(dsn: str, timeout: float) -> dict[str, Any]:
    return {
        "dsn": address(dsn),
        "timeout": min(10, timeout),
        "command_timeout": timeout,
        "server_settings": {"application_name": "image-jobs", "idle_in_transaction_session_timeout": "60000"},
    }


async def _reset(connection: Connection) -> None:
    await connection.execute("reset all")
