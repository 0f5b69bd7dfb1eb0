"""Reads `image_jobs.dashboard`, once for all who look at the same time."""

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Self

import asyncpg

from daemon.database import Connection, connected
from daemon.errors import ImageJobsError

PERIODS = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "24h": timedelta(days=1),
    "7d": timedelta(days=7),
}
FRESH = 1.0
"""Seconds that figures are shown to others who look."""
TIMEOUT = 30.0
"""Seconds for a look: a week of many runs takes some."""
LOST = (
    *(ConnectionError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError),
    *(asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.InternalClientError),
)
"""Errors of a connection that has ended, by the network, a restart or an operator; the last where the next statement meets its end.

A look that takes too long is none of them: once more would take as long.
"""


class Figures:
    """The figures of each period, by one connection that is kept until the context ends."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._one_at_a_time = asyncio.Lock()
        self._kept: dict[str, tuple[float, str]] = {}
        self._stack = AsyncExitStack()
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connection = None
        await self._stack.aclose()

    async def look(self, period: str) -> str:
        """Return the figures of a period (a key of `PERIODS`) as JSON.

        Raises:
            ImageJobsError: With a sentence about the database. Nothing is kept of it: the next look connects anew.
        """
        async with self._one_at_a_time:
            at, board = self._kept.get(period, (float("-inf"), ""))
            if time.monotonic() - at < FRESH:
                return board
            reused = self._connection is not None
            try:
                board = await self._fetch(period)
            except Exception as error:
                cause = error.__cause__ if isinstance(error, ImageJobsError) else error
                if not reused or not isinstance(cause, LOST):
                    raise
                board = await self._fetch(period)  # the connection may have been lost long ago
            self._kept[period] = (time.monotonic(), board)
            return board

    async def _fetch(self, period: str) -> str:
        try:
            if self._connection is None:
                self._connection = await self._stack.enter_async_context(connected(self._dsn, timeout=TIMEOUT))
            board: str = await self._connection.fetchval("select image_jobs.dashboard($1)::text", PERIODS[period])
        except BaseException as error:
            self._connection = None
            await self._stack.__aexit__(type(error), error, error.__traceback__)  # raises its sentence
            raise
        return board
