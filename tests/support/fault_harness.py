"""A database, a Storage that can fail, a provider that counts, and as many daemons as a test likes to break."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.daemons import Daemon, Supabase, daemon, supabase
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.postgres import connect, wait_until
from tests.runs import event_names, insert_runs, run_row

FLARE = "openai:gpt-image-2.5-flare"
TERMINAL = ("completed", "failed", "cancelled")


class Gate:
    """Stands before Storage. Open, it lets everything through."""

    def __init__(self) -> None:
        self.closed = False
        """Answers 503 to everything."""
        self.closed_for: str | None = None
        """Answers 503 to what has this in its path."""
        self.lets: Callable[[str, str], bool] = lambda method, path: True
        """Answers 503 where this says no to a method and a path."""
        self.cuts = 0
        """How many uploads still break off in the middle."""
        self.passing: dict[str, asyncio.Event] = {}
        """Requests of these methods wait for their event."""
        self.requests: list[tuple[str, str]] = []

    def before(self, app: ASGIApp) -> ASGIApp:
        """The app, behind this gate."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            method, path = scope["method"], scope["path"]
            self.requests.append((method, path))
            if event := self.passing.get(method):
                await event.wait()
            shut = self.closed or (self.closed_for is not None and self.closed_for in path)
            if shut or not self.lets(method, path):
                await PlainTextResponse("upstream is away", 503)(scope, receive, send)
            elif self.cuts and method in {"POST", "PUT"}:
                self.cuts -= 1
                await receive()
                headers = [(b"content-length", b"1000")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b"{", "more_body": False})
            else:
                await app(scope, receive, send)

        return gated

    def uploads(self, run: str) -> int:
        """How often a picture of the run was sent, without its thumbnail and preview."""
        return sum(method in {"POST", "PUT"} and f"/{run}.png" in path for method, path in self.requests)

    @property
    def looks(self) -> int:
        """How often somebody looked whether Storage answers."""
        return self.requests.count(("GET", "/storage/v1/bucket/images"))


@dataclass
class World:
    """What the daemons of a test have in common."""

    project: Supabase
    db: "asyncpg.Connection[asyncpg.Record]"
    api: OpenAIAPI
    gate: Gate

    def daemon(self, *, dsn: str | None = None, **environment: str) -> AbstractAsyncContextManager[Daemon]:
        """A daemon process; `dsn` leads it to the database by another way."""
        project = replace(self.project, dsn=dsn) if dsn else self.project
        return daemon(
            project, **{"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": self.api.url, "IMAGE_JOBS_LEASE": "2", **environment}
        )

    async def order(self, count: int = 1, processor: str = FLARE, **metadata: Any) -> list[str]:
        """Inserts runs, in a workflow of their own."""
        return await insert_runs(self.db, count, processor=processor, workflow=uuid4(), **metadata)

    async def until(self, run: str, status: str, timeout: float = 30) -> asyncpg.Record:
        """Waits for a status; answers the row."""

        async def reached() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["status"] == status else None

        try:
            return await wait_until(reached, timeout=timeout)
        except AssertionError:
            row = await run_row(self.db, run)
            names = await event_names(self.db, run)
            raise AssertionError(f"{run} is {row['status']}, not {status}: {row['payload']} {names}") from None

    async def called(self, times: int) -> None:
        """Waits until the provider has been called that often."""
        await wait_until(lambda: len(self.api.requests) == times, timeout=20)

    async def holder(self, run: str) -> UUID:
        """Who holds a run."""
        found: UUID = (await run_row(self.db, run))["claimed_by"]
        return found

    async def events(self, run: str, name: str) -> list[dict[str, Any]]:
        """The data of a run's events of one name."""
        rows = await self.db.fetch(
            """select payload -> 'data' as data from run_events
            where run_id = $1 and payload ->> 'event' = $2 order by seq""",
            run,
            name,
        )
        return [row["data"] or {} for row in rows]

    async def may_judge(self) -> None:
        """As if the beats of all daemons that live now had come unbroken for a day."""
        await self.db.execute("update private.daemons set fresh_since = fresh_since - interval '1 day'")

    async def reconnect(self) -> None:
        """To a database that was away."""
        self.db = await connect(self.project.dsn)

    async def fetched(self, url: str) -> bytes:
        """What lies at a URL."""
        async with httpx.AsyncClient() as client:
            return (await client.get(url)).raise_for_status().content

    async def all_ended_once(self, timeout: float = 30) -> None:
        """Waits for the end of every run, and makes sure that each ended once per ticket, with an image or a reason."""

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

    async def nothing_in_flight(self) -> None:
        """Waits until every daemon that lives says that it holds nothing."""

        async def free() -> bool:
            return await self.db.fetchval("select bool_and(in_flight = 0) from private.daemons where ended_at is null")

        await wait_until(free, timeout=20)


@asynccontextmanager
async def open_world(dsn: str) -> AsyncIterator[World]:
    """A world around a migrated database."""
    gate = Gate()
    async with OpenAIAPI() as api, supabase(dsn, gate.before) as project:
        world = World(project, await connect(dsn), api, gate)
        try:
            yield world
        finally:
            for event in gate.passing.values():
                event.set()
            await world.db.close()
