"""notify: hears "look again" and "you no longer hold this", and notices when it can no longer hear.

The table is the truth; a notification only says "look again". So a lost one costs at most the next look, and the
listener's work is to be honest about whether it hears. A half-open socket reports `is_closed() == False` for ever, so
it pings; a pooler in transaction mode swallows LISTEN without an error, so it notifies itself once connected.
"""

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from uuid import UUID

import asyncpg
import structlog

from daemon.queue import UNAVAILABLE

log = structlog.stdlib.get_logger()

WAKE = "image_jobs_wake"
DROP = "image_jobs_drop"
LONGEST_PAUSE = 5.0
"""Seconds between two tries to reach a database that is away."""


class Listener:
    """Keeps one connection that does nothing but listen.

    While it listens, its session holds the daemon's advisory lock, so that others notice a dead process at once.

    Args:
        dsn: Where to listen: a direct connection or a session pooler.
        daemon: Answers the daemon's present id, which the lock is about.
        wake: Called on every "look again".
        connected: Called after each (re)connect, as anything may have been missed.
        drop: Called with the claims that this daemon no longer holds; with none if only orders are to be cancelled.
        ping: How often to make sure that the connection is alive.
        answer_timeout: How long to wait for an answer.
    """

    def __init__(
        self,
        dsn: str,
        *,
        daemon: Callable[[], UUID],
        wake: Callable[[], None],
        connected: Callable[[], None],
        drop: Callable[[set[int]], None],
        ping: timedelta = timedelta(seconds=10),
        answer_timeout: timedelta = timedelta(seconds=5),
    ) -> None:
        self._dsn = dsn
        self._daemon = daemon
        self._wake = wake
        self._connected = connected
        self._drop = drop
        self._ping = ping.total_seconds()
        self._answer_timeout = answer_timeout.total_seconds()
        self._locked: UUID | None = None
        self._failures = 0
        self.hears = False

    @property
    def session_lock(self) -> bool:
        """Whether the session holds the lock of the present daemon."""
        return self._locked == self._daemon()

    async def run(self) -> None:
        """Listens until cancelled, over as many connections as it takes."""
        while True:
            try:
                await self._listen()
            except UNAVAILABLE as error:
                self._failures += 1
                log.warning("listener.disconnected", error=type(error).__name__, failures=self._failures)
            finally:
                self.hears = False
                self._locked = None
            wait = min(0.1 * 2 ** min(self._failures, 6), LONGEST_PAUSE)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter

    async def _listen(self) -> None:
        """One connection, from the first LISTEN to its end."""
        gone = asyncio.Event()
        heard = asyncio.Event()
        connection = await asyncio.wait_for(
            asyncpg.connect(self._dsn, server_settings={"application_name": "image-jobs listener"}),
            self._answer_timeout,
        )
        try:
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(WAKE, self._on_wake)
            await connection.add_listener(DROP, self._on_drop)
            probe = f"image_jobs_probe_{self._daemon().hex}"
            await connection.add_listener(probe, partial(_on_probe, heard))
            await self._find_out(connection, probe, heard)
            log.info("listener.connected", hears=self.hears)
            self._failures = 0
            self._connected()
            while True:
                await self._lock(connection)
                try:
                    await asyncio.wait_for(gone.wait(), self._ping)
                except TimeoutError:
                    await connection.fetchval("select 1", timeout=self._answer_timeout)
                else:
                    raise ConnectionResetError("the listening connection was closed")
        finally:
            connection.terminate()

    async def _find_out(
        self, connection: "asyncpg.Connection[asyncpg.Record]", probe: str, heard: asyncio.Event
    ) -> None:
        """Notifies itself: a pooler in between would swallow LISTEN without an error."""
        await connection.execute("select pg_notify($1, '')", probe, timeout=self._answer_timeout)
        try:
            await asyncio.wait_for(heard.wait(), 2)
        except TimeoutError:
            log.warning(
                "listener.deaf",
                consequence="looking once a second instead of at once",
                cure="point DATABASE_URL at the direct connection or the session pooler (port 5432)",
            )
        self.hears = heard.is_set()

    async def _lock(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Holds the lock of the daemon's present id; only a session of our own can hold one.

        Does not wait for it: the server may not have noticed yet that the session before this one is gone.
        """
        daemon = self._daemon()
        if self.hears and self._locked != daemon:
            free: bool = await connection.fetchval(
                "select pg_try_advisory_lock(private.session_lock_key($1))", daemon, timeout=self._answer_timeout
            )
            self._locked = daemon if free else None

    def _on_wake(self, _connection: object, _pid: int, _channel: str, _payload: object) -> None:
        self._wake()

    def _on_drop(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._drop({int(claim) for claim in str(payload).split(",") if claim})


def _on_probe(heard: asyncio.Event, _connection: object, _pid: int, _channel: str, _payload: object) -> None:
    heard.set()
