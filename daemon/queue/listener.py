"""Receives notifications: "look again" and "you no longer hold these claims". Notices when they cannot arrive.

The table is the truth; a notification only says "look again". So a lost one costs at most the next look, and the
listener's work is to be honest about whether they arrive. A half-open socket reports `is_closed() == False` for ever, so
it pings; a pooler in transaction mode swallows LISTEN without an error, so it notifies itself once connected.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NoReturn
from uuid import UUID

import asyncpg
import structlog

from daemon.dsn import address
from daemon.queue.identity import Identity
from daemon.queue.outage import Outage
from daemon.queue.signals import Signals

log = structlog.stdlib.get_logger()

WAKE = "image_jobs_wake"
DROP = "image_jobs_drop"
PROBE_TIMEOUT = 2.0
"""Seconds for a notification of its own to come back."""


class Listener:
    """Keeps one connection that does nothing but listen.

    While it listens, its session holds the daemon's advisory lock, so that others notice a dead process at once.

    Args:
        dsn: Where to listen: a direct connection or a session pooler.
        identity: The daemon's id, which the lock is about.
        signals: Set on every notification, and after each (re)connect, as anything may have been missed.
        drop: Called with the claims that this daemon no longer holds; with none if only provider jobs are to be cancelled
            or files removed.
        ping: How often to make sure that the connection is alive.
        reply_timeout: How long a reply of the database may take.
    """

    def __init__(
        self,
        dsn: str,
        identity: Identity,
        signals: Signals,
        *,
        drop: Callable[[set[int]], None],
        ping: timedelta = timedelta(seconds=10),
        reply_timeout: timedelta = timedelta(seconds=5),
    ) -> None:
        self._dsn = dsn
        self._identity = identity
        self._signals = signals
        self._drop = drop
        self._ping = ping.total_seconds()
        self._reply_timeout = reply_timeout.total_seconds()
        self._locked: UUID | None = None
        self._outage = Outage("listener.disconnected", "listener.reconnected")
        self.hears = False

    @property
    def session_lock(self) -> bool:
        """Whether the session holds the lock of the present daemon id."""
        return self._locked == self._identity.id

    async def run(self) -> None:
        """Listen until cancelled, over as many connections as it takes."""
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - whatever the database says, it is asked again
                pause = self._outage.failed(error)
            finally:
                self.hears = False
                self._locked = None
            await asyncio.sleep(pause)

    async def _listen(self) -> NoReturn:
        """Listen on one connection, until it ends."""
        closed = asyncio.Event()
        heard = asyncio.Event()
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        try:
            # One timeout around all of it: a network may go dark at any point, and LISTEN has no timeout of its own.
            async with asyncio.timeout(2 * self._reply_timeout):
                settings = {"application_name": "image-jobs listener"}
                connection = await asyncpg.connect(address(self._dsn), server_settings=settings)
                connection.add_termination_listener(lambda _: closed.set())
                await connection.add_listener(WAKE, self._on_wake)
                await connection.add_listener(DROP, self._on_drop)
                probe = f"image_jobs_probe_{self._identity.id.hex}"
                await connection.add_listener(probe, partial(_on_probe, heard))
                await connection.execute("select pg_notify($1, '')", probe)
            await self._await_probe(heard)
            log.info("listener.connected", hears=self.hears)
            self._outage.passed()
            self._signals.connected()
            while True:
                await self._lock(connection)
                try:
                    async with asyncio.timeout(self._ping):
                        await closed.wait()
                except TimeoutError:
                    await connection.fetchval("select 1", timeout=self._reply_timeout)
                else:
                    raise ConnectionResetError("the listening connection was closed")
        finally:
            if connection is not None:
                connection.terminate()

    async def _await_probe(self, heard: asyncio.Event) -> None:
        """Wait for the notification to itself: a pooler in between would swallow LISTEN without an error."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await heard.wait()
        except TimeoutError:
            log.warning(
                "listener.deaf",
                consequence="looking once a second instead of at once",
                cure="point DATABASE_URL at the direct connection or the session pooler (port 5432)",
            )
        self.hears = heard.is_set()

    async def _lock(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Take the lock of the daemon's present id; only a session of our own can hold one.

        Does not wait for it: the server may not have noticed yet that the session before this one is gone.
        """
        daemon = self._identity.id
        if self.hears and self._locked != daemon:
            free: bool = await connection.fetchval(
                "select pg_try_advisory_lock(image_jobs.session_lock_key($1))", daemon, timeout=self._reply_timeout
            )
            self._locked = daemon if free else None

    def _on_wake(self, _connection: object, _pid: int, _channel: str, _payload: object) -> None:
        self._signals.wake()

    def _on_drop(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._drop({int(claim) for claim in str(payload).split(",") if claim})
        self._signals.cancel.set()
        self._signals.remove.set()


def _on_probe(heard: asyncio.Event, _connection: object, _pid: int, _channel: str, _payload: object) -> None:
    heard.set()
