"""The database as the daemon sees it: one method per SQL function, and nothing else.

What the functions promise stands in `sql/schema`; a daemon in another language could be written against them alone.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

import asyncpg

from daemon.cleaning import clean

UNAVAILABLE: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
"""The database is not there, or not now: whatever was asked is asked again. Restarts, fail-overs, full disks, deadlocks;
also a pooler that does not know the tenant while the project restarts (facts: Supavisor, 57P01, 57P03, 25006)."""

REFUSED: tuple[type[BaseException], ...] = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
"""The database will not take this data, however often it is sent."""

TROUBLE: tuple[type[BaseException], ...] = (*UNAVAILABLE, asyncpg.PostgresError)
"""Whatever goes wrong with a call. For work in the background that comes round again: no row may end the daemon by it."""

BEAT_TIMEOUT = 5.0
"""Seconds for a sign of life: what takes longer is worth less than the next try."""

Webhook = Literal["awaited", "came"]
"""Of an order: a webhook is awaited until its next check, or it came and made the check due."""

Result = Literal["settled", "already", "lost", "busy", "recorded"]


@dataclass(frozen=True, slots=True)
class Claimed:
    """A run that this daemon holds. `claim` is the fence: every write-back names it."""

    daemon: UUID
    id: str
    claim: int
    ticket: int
    workflow_id: str
    processor: str
    """Who is to make it. A run that went on to a step of `metadata.fallback` still has `requested` as it was asked for."""
    requested: str
    metadata: Mapping[str, Any]
    attempt: int
    max_attempts: int
    provider_job_id: str | None
    webhook: Webhook | None
    submitted_ago: timedelta | None
    waited: timedelta
    made: Mapping[str, Any] | None = None
    """What an earlier attempt wrote down of the picture it had made (see `RunReporter.generated`)."""

    @classmethod
    def read(cls, daemon: UUID, run: Mapping[str, Any]) -> Self:
        """Reads what `private.claimed_run` wrote."""
        submitted = run["submitted_ago"]
        return cls(
            daemon=daemon,
            id=run["id"],
            claim=run["claim"],
            ticket=run["ticket"],
            workflow_id=run["subject_id"],
            processor=run["processor"],
            requested=run["requested"],
            metadata=run["metadata"],
            attempt=run["attempt"],
            max_attempts=run["max_attempts"],
            provider_job_id=run["provider_job_id"],
            webhook=run["webhook"],
            submitted_ago=None if submitted is None else timedelta(seconds=submitted),
            waited=timedelta(seconds=run["waited"]),
            made=run["made"],
        )


@dataclass(frozen=True, slots=True)
class Order:
    """An order at a provider, by the id that the provider gave it, and whose it is where that is known."""

    provider: str
    job_id: str
    run_id: str | None

    @classmethod
    def read(cls, text: str) -> Self:
        """Reads what the functions about orders write."""
        order = json.loads(text)
        return cls(order["provider"], order["provider_job_id"], order.get("run_id"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one settlement or progress entry."""

    id: str
    claim: int
    result: Result


@dataclass(frozen=True, slots=True)
class Turned:
    """What one turn brought."""

    claimed: Sequence[Claimed]
    answers: Sequence[Answer]
    lost: set[int]
    """Of the claims that were said to be held: those that are not, any more."""


class Queue:
    """Calls the SQL functions over a small pool. Methods raise asyncpg's errors; see `UNAVAILABLE` and `REFUSED`.

    Args:
        dsn: Direct connection or session pooler.
        timeout: Seconds after which a call is given up as `TimeoutError`.
        mask: Takes secrets out of every text that is written: what providers say may quote our keys.
    """

    def __init__(self, dsn: str, *, timeout: float = 20.0, mask: Callable[[str], str] = str) -> None:
        self._dsn = dsn
        self._timeout = timeout
        self._mask = mask
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        # One at a time: a hundred runs that are throttled at once, or cancellations of runs that somebody has locked, must
        # not leave the heartbeat without a connection.
        self._blocking = asyncio.Lock()
        self._finishing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._pool = await asyncpg.create_pool(
            self._dsn,
            min_size=0,
            max_size=4,
            timeout=10,
            command_timeout=self._timeout,
            max_inactive_connection_lifetime=0,
            server_settings={"application_name": "image-jobs", "idle_in_transaction_session_timeout": "60000"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.terminate()

    @property
    def pool(self) -> "asyncpg.Pool[asyncpg.Record]":
        """The open pool."""
        if self._pool is None:
            raise RuntimeError("the queue is not open")
        return self._pool

    @asynccontextmanager
    async def _connected(
        self, timeout: float | None = None
    ) -> "AsyncGenerator[asyncpg.pool.PoolConnectionProxy[asyncpg.Record]]":
        """A connection for one call. One whose answer is not awaited any more is cut: asyncpg would wait on for its cancel
        request to arrive, which takes longest when the network is gone (measured: 25 s for a call with a timeout of 5)."""
        async with self.pool.acquire(timeout=timeout or self._timeout) as connection:
            try:
                yield connection
            except (TimeoutError, asyncio.CancelledError):
                connection.terminate()
                raise

    async def register(
        self, daemon: UUID, *, name: str, version: str, slots: int, lease: timedelta, providers: Sequence[str]
    ) -> None:
        """`private.register_daemon`: this process is a daemon from now on."""
        async with self._connected() as connection:
            await connection.execute(
                "select private.register_daemon($1, $2, $3, $4, $5, $6)",
                daemon,
                name,
                version,
                slots,
                lease,
                list(providers),
            )

    async def heartbeat(self, daemon: UUID, *, in_flight: int, session_lock: bool, draining: bool) -> None:
        """`private.heartbeat`: a sign of life.

        Raises:
            DaemonFenced: If others have taken this daemon for dead.
        """
        async with self._connected(BEAT_TIMEOUT) as connection:
            await connection.execute(
                "select private.heartbeat($1, $2, $3, $4)",
                daemon,
                in_flight,
                session_lock,
                draining,
                timeout=BEAT_TIMEOUT,
            )

    async def take_over(self, daemon: UUID) -> int:
        """`private.take_over`: takes the runs of silent daemons; answers how many."""
        async with self._connected() as connection:
            count: int = await connection.fetchval("select private.take_over($1)", daemon)
        return count

    async def leave(self, daemon: UUID) -> None:
        """`private.leave`: this daemon ends in good order."""
        async with self._connected() as connection:
            await connection.execute("select private.leave($1)", daemon)

    async def block(self, provider: str, model: str | None, wait: timedelta, reason: str) -> None:
        """`private.block_provider`: closes a provider, or one model of it, for all daemons."""
        async with self._blocking, self._connected() as connection:
            await connection.execute("select private.block_provider($1, $2, $3, $4)", provider, model, wait, reason)

    async def publish(self, provider: str, models: Sequence[Mapping[str, Any]]) -> None:
        """`private.publish_models`: what `image_models` shows of a provider."""
        async with self._connected() as connection:
            await connection.execute("select private.publish_models($1, $2)", provider, json.dumps(models, default=str))

    async def set_webhook_secrets(self, secrets: Mapping[str, Sequence[str]]) -> None:
        """`private.set_webhook_secrets`: what verifies the webhooks of the providers that are named."""
        async with self._connected() as connection:
            await connection.execute("select private.set_webhook_secrets($1)", json.dumps(secrets))

    async def sweep_webhooks(self) -> None:
        """`private.sweep_webhooks`: deliveries that crossed with their runs are given to them."""
        async with self._connected() as connection:
            await connection.execute("select private.sweep_webhooks()")

    async def unmatched_deliveries(self, providers: Sequence[str], limit: int) -> list[Order]:
        """`private.unmatched_deliveries`: orders of which a webhook came and that no run has, leased for a minute."""
        async with self._connected() as connection:
            rows = await connection.fetch("select private.unmatched_deliveries($1, $2)", list(providers), limit)
        return [Order.read(row[0]) for row in rows]

    async def attach_order(self, order: Order, run_id: str | None, ticket: int | None) -> str:
        """`private.attach_order`: the order was made for that run, or for none; answers what became of it."""
        async with self._connected() as connection:
            result: str = await connection.fetchval(
                "select private.attach_order($1, $2, $3, $4)", order.provider, order.job_id, run_id, ticket
            )
        return result

    async def take_cancellations(self, providers: Sequence[str], limit: int) -> list[Order]:
        """`private.take_cancellations`: orders that are to be cancelled, leased for a minute."""
        async with self._connected() as connection:
            rows = await connection.fetch("select private.take_cancellations($1, $2)", list(providers), limit)
        return [Order.read(row[0]) for row in rows]

    async def finish_cancellation(self, order: Order, reason: str | None, *, final: bool) -> None:
        """`private.finish_cancellation`: it is cancelled, or not for that reason; `final` if it need not be tried again."""
        reason = None if reason is None else str(clean(reason, self._mask))
        async with self._finishing, self._connected() as connection:
            await connection.execute(
                "select private.finish_cancellation($1, $2, $3, $4)", order.provider, order.job_id, reason, final
            )

    async def wake_all(self) -> None:
        """`private.wake_all`: look again, everybody."""
        async with self._connected() as connection:
            await connection.execute("select private.wake_all()")

    async def turn(
        self,
        daemon: UUID,
        *,
        slots: int,
        thorough: bool = False,
        settlements: Sequence[Mapping[str, Any]] = (),
        progress: Sequence[Mapping[str, Any]] = (),
        held: Sequence[int] | None = None,
        awake: float | None = None,
    ) -> Turned:
        """`private.turn`: settles what has finished, records progress and fills free slots, in one round trip.

        Raises:
            DaemonFenced: If slots were asked for and others have taken this daemon for dead.
        """
        async with self._connected() as connection:
            rows = await connection.fetch(
                "select part, run from private.turn($1, $2, $3, $4, $5, $6, $7)",
                daemon,
                slots,
                thorough,
                json.dumps(clean(settlements, self._mask)),
                json.dumps(clean(progress, self._mask)),
                held,
                awake,
            )
        claimed: list[Claimed] = []
        answers: list[Answer] = []
        lost: set[int] = set()
        for part, text in rows:
            run = json.loads(text)
            match part:
                case "claimed":
                    claimed.append(Claimed.read(daemon, run))
                case "lost":
                    lost.add(run["claim"])
                case _:
                    answers.append(Answer(**run))
        return Turned(claimed, answers, lost)
