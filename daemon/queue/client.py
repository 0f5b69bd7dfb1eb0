"""The database as the daemon sees it: one method per SQL function, and nothing else.

The functions' contracts stand in `sql/schema`; a daemon in another language could be written against them alone.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

import asyncpg

from daemon.metrics import Gauge, Tally
from daemon.queue.connections import Connections
from daemon.queue.plain import plain_json
from daemon.queue.sanitize import Mask, Refuse, sanitize_charge, sanitize_progress, sanitize_settlement, sanitize_text
from daemon.run import ClaimedRun, Fate, ProviderJob

REFUSED: tuple[type[BaseException], ...] = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
"""The database will not take this data, however often it is sent. Says what is done next, and never who lives on."""

Sanitize = Callable[[Mapping[str, Any], Mask, Refuse], dict[str, Any]]
Result = Literal["settled", "already", "lost", "busy", "recorded", "set_aside"]


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The result of one settlement or progress entry; `fate` of a settlement that was written."""

    id: str
    claim: int
    result: Result
    fate: Fate | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """Read the JSON that `image_jobs.settle_runs` and `image_jobs.record_progress` write."""
        fate = entry.get("fate")
        return cls(entry["id"], entry["claim"], entry["result"], None if fate is None else Fate(**fate))


@dataclass(frozen=True, slots=True)
class SyncResult:
    """The result of one round trip."""

    claimed: Sequence[ClaimedRun]
    acknowledgements: Sequence[Acknowledgement]
    lost: set[int]
    """Of the claims that were passed as held: those that are not, any more."""


@dataclass(frozen=True, slots=True)
class FileRemoval:
    """The files of a run that is gone: keys by bucket."""

    workflow_id: str
    run_id: str
    files: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class SourceRemoval:
    """Some uploads of a user or a workflow that is forgotten: keys in the bucket of sources."""

    belongs_to: str
    id: str
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class RetentionStep:
    """The result of one step of retention: runs that were pruned, runs whose lost files were found, and why others were not."""

    pruned: int
    found: int
    more: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class AlertNotice:
    """News of an alert, in `state` open or closed; times in ISO 8601."""

    id: str
    state: Literal["open", "closed"]
    name: str
    subject: str
    severity: str
    since: str
    closed: str | None
    sentence: str
    cure: str


class Queue:
    """Calls the SQL functions. Methods raise asyncpg's errors.

    Args:
        dsn: Direct connection or session pooler.
        timeout: Seconds after which a call is given up as `TimeoutError`.
        mask: Removes secrets from the words that are written: messages of providers may quote our keys.
    """

    def __init__(self, dsn: str, *, timeout: float = 20.0, mask: Callable[[str], str] = str) -> None:
        self._connections = Connections(dsn, timeout)
        self._mask = mask
        self.base64_refused = 0
        """How many texts were shortened since they hold files: of providers and users, on their way into the database."""
        # One at a time: a hundred runs that are throttled at once, or cancellations of runs that are locked, must not leave
        # the others without a connection.
        self._blocking = asyncio.Lock()
        self._finishing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._connections.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connections.__aexit__(kind, error, trace)

    def _written(self, entries: Sequence[Mapping[str, Any]], sanitize: Sanitize) -> str:
        """Return entries as a JSON array that the database can take."""
        texts = (
            plain_json(entry, self._mask) or json.dumps(sanitize(entry, self._mask, self._refuse_base64))
            for entry in entries
        )
        return f"[{','.join(texts)}]"

    def _refuse_base64(self) -> None:
        self.base64_refused += 1

    async def register_daemon(
        self,
        daemon: UUID,
        *,
        name: str,
        version: str,
        slots: int,
        lease: timedelta,
        providers: Sequence[str],
        unserved_grace: timedelta = timedelta(minutes=2),
    ) -> None:
        """Register this process as a daemon. It fails runs of a provider `unserved_grace` after the last daemon that served it."""
        # A fenced daemon is registered at once: the sync may be waiting for a network that has gone, those beside for a lock.
        connections = self._connections
        async with connections.beside() if connections.first.busy else connections.first.use() as connection:
            await connection.execute(
                "select image_jobs.register_daemon($1, $2, $3, $4, $5, $6, $7)",
                daemon,
                name,
                version,
                slots,
                lease,
                list(providers),
                unserved_grace,
            )

    async def report_daemon(self, daemon: UUID, *, storage_closed: bool, unreachable: Sequence[str]) -> None:
        """Say what keeps this daemon from claiming, and have the database tell what has changed for those who wait."""
        async with self._connections.beside() as connection:
            await connection.execute(
                "select image_jobs.report_daemon($1, $2, $3)", daemon, storage_closed, list(unreachable)
            )

    async def heartbeat(self, daemon: UUID, *, in_flight: int, session_lock: bool, draining: bool) -> None:
        """Renew the daemon's lease.

        Raises:
            DaemonFenced: If others have taken this daemon for dead.
        """
        async with self._connections.beats.use() as connection:
            await connection.execute(
                "select image_jobs.heartbeat($1, $2, $3, $4)", daemon, in_flight, session_lock, draining
            )

    async def take_over(self, daemon: UUID) -> int:
        """Take over the runs of silent daemons; return how many."""
        async with self._connections.beside() as connection:
            count: int = await connection.fetchval("select image_jobs.take_over($1)", daemon)
        return count

    async def leave(self, daemon: UUID) -> None:
        """End the daemon in good order."""
        async with self._connections.first.use() as connection:
            await connection.execute("select image_jobs.leave($1)", daemon)

    async def block_provider(self, provider: str, model: str | None, wait: timedelta, reason: str) -> None:
        """Close a provider, or the model of it that draws, for all daemons."""
        async with self._blocking, self._connections.beside() as connection:
            reason = sanitize_text(reason, self._mask)
            await connection.execute("select image_jobs.block_provider($1, $2, $3, $4)", provider, model, wait, reason)

    async def publish_models(self, provider: str, models: Sequence[Mapping[str, Any]]) -> None:
        """Replace the models of a provider in `image_models`."""
        async with self._connections.first.use() as connection:
            await connection.execute(
                "select image_jobs.publish_models($1, $2)", provider, json.dumps(models, default=str)
            )

    async def set_webhook_secrets(self, secrets: Mapping[str, Sequence[str]]) -> None:
        """Set the secrets that verify the webhooks of the given providers."""
        async with self._connections.first.use() as connection:
            await connection.execute("select image_jobs.set_webhook_secrets($1)", json.dumps(secrets))

    async def sweep_webhooks(self) -> None:
        """Match deliveries that arrived before their run had its provider job id."""
        async with self._connections.beside() as connection:
            await connection.execute("select image_jobs.sweep_webhooks()")

    async def sweep_calls(self, after: int | None) -> int | None:
        """Close a part of the open calls that nothing names, behind call `after`. Return the last one looked at."""
        async with self._connections.beside() as connection:
            last: int | None = await connection.fetchval("select image_jobs.sweep_calls($1)", after or 0)
        return last

    async def unmatched_deliveries(self, providers: Sequence[str], limit: int) -> list[ProviderJob]:
        """Return provider jobs of which a webhook came and that no run has, leased for a minute."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.unmatched_deliveries($1, $2)", list(providers), limit)
        return [ProviderJob.read(row[0]) for row in rows]

    async def attach_provider_job(self, job: ProviderJob, run_id: str | None, ticket: int | None) -> str:
        """Give a provider job to the run that it was submitted for; None for none of ours. Return what became of it."""
        async with self._connections.beside() as connection:
            result: str = await connection.fetchval(
                "select image_jobs.attach_provider_job($1, $2, $3, $4)", job.provider, job.id, run_id, ticket
            )
        return result

    async def take_cancellations(self, providers: Sequence[str], limit: int) -> list[ProviderJob]:
        """Return provider jobs that are to be cancelled, leased for a minute."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.take_cancellations($1, $2)", list(providers), limit)
        return [ProviderJob.read(row[0]) for row in rows]

    async def finish_cancellation(
        self, job: ProviderJob, reason: str | None, *, final: bool, charge: Mapping[str, Any] | None = None
    ) -> None:
        """Write down that a provider job is cancelled, or not for a `reason`.

        Args:
            job: The job.
            reason: None if it is cancelled.
            final: Whether it need not be tried again.
            charge: `state` and `cost` of its call; None where the provider said nothing about it.
        """
        reason = None if reason is None else sanitize_text(reason, self._mask)
        async with self._finishing, self._connections.beside() as connection:
            await connection.execute(
                "select image_jobs.finish_cancellation($1, $2, $3, $4, $5)",
                job.provider,
                job.id,
                reason,
                final,
                None if charge is None else json.dumps(sanitize_charge(charge)),
            )

    async def walk(self, buckets: Sequence[str], keep: timedelta | None, limit: int) -> RetentionStep:
        """Prune runs that ended longer than `keep` ago, and look for files whose run is gone: one step of at most `limit` rows."""
        async with self._connections.beside() as connection:
            row = await connection.fetchval("select image_jobs.walk($1, $2, $3)", list(buckets), keep, limit)
        return RetentionStep(**json.loads(row))

    async def take_file_removals(self, limit: int) -> list[FileRemoval]:
        """Lease removals for a minute: those of runs that are gone."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.take_file_removals($1)", limit)
        return [FileRemoval(**json.loads(text)) for (text,) in rows]

    async def finish_file_removal(self, removal: FileRemoval, *, done: bool) -> None:
        """End a removal, or put it off if it is not `done`."""
        async with self._connections.beside() as connection:
            await connection.execute(
                "select image_jobs.finish_file_removal($1, $2, $3)", UUID(removal.workflow_id), removal.run_id, done
            )

    async def take_alert_notices(self, limit: int) -> list[AlertNotice]:
        """Note which alerts have opened and closed, and lease notices for a minute: those that are to be sent."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.take_alert_notices($1)", limit)
        return [AlertNotice(**json.loads(text)) for (text,) in rows]

    async def finish_alert_notice(self, notice: AlertNotice, *, done: bool) -> None:
        """Write down that a notice was sent, or put it off if it is not `done`."""
        async with self._connections.beside() as connection:
            await connection.execute(
                "select image_jobs.finish_alert_notice($1, $2, $3)", UUID(notice.id), notice.state, done
            )

    async def take_source_removals(self, limit: int) -> list[SourceRemoval]:
        """Lease removals of uploads for a minute, of `limit` names at most each."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.take_source_removals($1)", limit)
        return [SourceRemoval(**json.loads(text)) for (text,) in rows]

    async def finish_source_removal(self, removal: SourceRemoval, *, done: bool) -> None:
        """Have it looked for more, or put it off if it is not `done`."""
        async with self._connections.beside() as connection:
            await connection.execute(
                "select image_jobs.finish_source_removal($1, $2, $3)", removal.belongs_to, UUID(removal.id), done
            )

    async def take_tallies(self, *, counts: bool) -> list[Tally]:
        """Take what is to be counted and logged, which nobody else gets; only what is to be logged unless it `counts`."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.take_tallies($1)", counts)
        return [Tally(**json.loads(text)) for (text,) in rows]

    async def gauges(self) -> list[Gauge]:
        """Return what waits, and what is closed."""
        async with self._connections.beside() as connection:
            rows = await connection.fetch("select image_jobs.gauges()")
        return [Gauge(**json.loads(text)) for (text,) in rows]

    async def reset_session(self) -> None:
        """Undo what triggers of the application have set for the session of the syncs. They would go on with it for days."""
        await self._connections.first.reset()

    async def ping(self) -> None:
        """Make a round trip that asks for nothing: whoever refuses it refuses everything."""
        async with self._connections.first.use() as connection:
            await connection.execute("select 1")

    async def wake_all(self) -> None:
        """Wake all daemons."""
        async with self._connections.first.use() as connection:
            await connection.execute("select image_jobs.wake_all()")

    async def newest_claim(self) -> int:
        """Return the newest claim of all. A list of the claims that are held is put together afterwards: it says nothing of
        newer ones, however late it arrives."""
        async with self._connections.first.use() as connection:
            newest: int = await connection.fetchval("select last_value from image_jobs.claims")
        return newest

    async def sync(
        self,
        daemon: UUID,
        *,
        slots: int,
        full_scan: bool = False,
        settlements: Sequence[Mapping[str, Any]] = (),
        progress: Sequence[Mapping[str, Any]] = (),
        held: Sequence[int] | None = None,
        awake: float | None = None,
        unreachable: Sequence[str] = (),
        newest: int | None = None,
    ) -> SyncResult:
        """Settle finished runs, record progress and fill free slots, in one round trip. Claims nothing of the providers that
        are `unreachable`. Claims that are not `held` are given back, up to the `newest`: see `newest_claim`.

        Raises:
            DaemonFenced: If slots were asked for and others have taken this daemon for dead.
        """
        async with self._connections.first.use() as connection:
            rows = await connection.fetch(
                "select part, run from image_jobs.sync($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                daemon,
                slots,
                full_scan,
                self._written(settlements, sanitize_settlement),
                self._written(progress, sanitize_progress),
                held,
                awake,
                list(unreachable),
                newest,
            )
        claimed: list[ClaimedRun] = []
        acknowledgements: list[Acknowledgement] = []
        lost: set[int] = set()
        for part, text in rows:
            run = json.loads(text)
            match part:
                case "claimed":
                    claimed.append(ClaimedRun.read(daemon, run))
                case "lost":
                    lost.add(run["claim"])
                case _:
                    acknowledgements.append(Acknowledgement.read(run))
        return SyncResult(claimed, acknowledgements, lost)
