"""Harness of tests that break things: Storage that fails, a provider that counts its calls, and daemons to kill."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import UUID

from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.daemons import Daemon
from tests.support.openai_harness import OPENAI
from tests.support.postgres import connect, wait_until
from tests.support.runs import run_row
from tests.support.storage_gate import StorageGate

TERMINAL = ("completed", "failed", "cancelled")


@dataclass(kw_only=True)
class FaultHarness(DaemonHarness):
    """A project whose Storage can fail, without a daemon yet."""

    api: OpenAIAPI
    gate: StorageGate

    async def ready(self, it: Daemon) -> Daemon:
        """Wait until a daemon has started and found Storage to work. Returns it."""
        await it.started()
        await wait_until(lambda: self.gate.looked_at, timeout=20)
        return it

    async def wait_for_requests(self, count: int) -> None:
        """Wait until the provider has had so many requests."""
        await wait_until(lambda: len(self.api.requests) == count, timeout=20)

    async def claimed_by(self, run: str) -> UUID:
        """The daemon that holds a run."""
        found: UUID = (await run_row(self.db, run))["claimed_by"]
        return found

    async def allow_take_over(self) -> None:
        """Let living daemons take over runs, as if their heartbeats had come unbroken for a day."""
        await self.db.execute("update image_jobs.daemons set fresh_since = fresh_since - interval '1 day'")

    async def reconnect(self) -> None:
        """Connect anew to a database that was away."""
        self.db = await connect(self.project.dsn)

    async def assert_all_end_once(self, timeout: float = 30) -> None:
        """Wait until every run has ended; assert that each ended once per ticket, with an image or a reason."""

        async def over() -> bool:
            return await self.db.fetchval("select bool_and(status in ('completed', 'failed', 'cancelled')) from runs")

        try:
            await wait_until(over, timeout=timeout)
        except AssertionError:
            rows = await self.db.fetch(
                "select id, status, claimed_by, due_at, attempt, provider_job_id, payload from runs where finished_at is null"
            )
            raise AssertionError(f"{len(rows)} runs do not end: {[dict(row) for row in rows[:3]]}") from None
        ends = await self.db.fetch(
            """with numbered as (
                select run_id, payload ->> 'event' as event, count(*) filter (
                    where payload ->> 'event' in ('created', 'requeued')) over (partition by run_id order by seq) as ticket
                from run_events)
            select run_id, ticket, ticket = max(ticket) over (partition by run_id) as last,
                coalesce(array_agg(event) filter (where event = any ($1)), '{}') as ends
            from numbered group by run_id, ticket""",
            TERMINAL,
        )
        wrong = [dict(row) for row in ends if len(row["ends"]) > 1 or (row["last"] and len(row["ends"]) != 1)]
        assert not wrong
        rows = await self.db.fetch("select * from runs")
        assert {row["run_id"] for row in ends} == {row["id"] for row in rows}
        stored = {urlsplit(row["name"]).path for row in await self.db.fetch("select name from storage.objects")}
        for row in rows:
            assert row["claimed_by"] is None
            if row["status"] == "completed":
                assert f"{row['subject_id']}/{row['id']}.png" in stored
            elif row["status"] == "failed":
                assert row["payload"]["error"]
                assert row["payload"]["hint"]

    async def wait_until_idle(self) -> None:
        """Wait until every living daemon reports that it holds no run."""

        async def free() -> bool:
            return await self.db.fetchval(
                "select bool_and(in_flight = 0) from image_jobs.daemons where ended_at is null"
            )

        await wait_until(free, timeout=20)


@asynccontextmanager
async def fault_harness(dsn: str) -> AsyncIterator[FaultHarness]:
    """A harness around a migrated database; its daemons have a short lease."""
    gate = StorageGate()
    async with OpenAIAPI() as api:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": api.url, "IMAGE_JOBS_LEASE": "2"}
        fields = {"environment": environment, "processor": OPENAI, "api": api, "gate": gate}
        async with open_harness(FaultHarness, dsn, behind=gate.before, **fields) as harness:
            try:
                yield harness
            finally:
                for event in gate.held.values():
                    event.set()


async def kill(process: Daemon) -> None:
    """Kill a daemon, and wait until it is gone."""
    process.signal(signal.SIGKILL)
    await process.ended()
