"""Harness of whole daemons: a project (database, REST, Storage), daemon processes, and runs followed from insert to end."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from starlette.types import ASGIApp

from tests.support.daemons import Daemon, Supabase, daemon, supabase
from tests.support.postgres import connect, wait_until
from tests.support.runs import insert_runs, run_row

H = TypeVar("H", bound="DaemonHarness")


@dataclass(kw_only=True)
class DaemonHarness:
    """A project and the daemons that a test runs on it.

    Args:
        project: Database, REST and Storage.
        db: A connection as `postgres`.
        environment: Settings of every daemon.
        processor: `processor` of an inserted run where the test names none.
        metadata: `metadata` of every inserted run.
    """

    project: Supabase
    db: "asyncpg.Connection[asyncpg.Record]"
    environment: dict[str, str] = field(default_factory=dict[str, str])
    processor: str = "demo:painter"
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    daemons: list[Daemon] = field(default_factory=list[Daemon])
    """All that were started, the living and the dead."""

    @property
    def daemon(self) -> Daemon:
        """The daemon that was started first."""
        return self.daemons[0]

    @asynccontextmanager
    async def run_daemon(
        self, *, dsn: str | None = None, program: Sequence[str] = ("-m", "daemon"), **environment: str
    ) -> AsyncIterator[Daemon]:
        """Run a daemon process, which may not claim yet. `dsn` is another way to the same database."""
        project = replace(self.project, dsn=dsn) if dsn else self.project
        async with daemon(project, program=program, **{**self.environment, **environment}) as process:
            self.daemons.append(process)
            yield process

    async def insert_run(
        self, processor: str | None = None, *, prompt: dict[str, Any] | None = None, **metadata: Any
    ) -> str:
        """Insert a run with a workflow and a node of its own. Returns its id."""
        node, workflow = f"node-{uuid4()}", uuid4()
        await self.db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', '{}')",
            node,
            workflow,
        )
        (run,) = await self.insert_runs(1, processor, workflow=workflow, prompt=prompt, nodeId=node, **metadata)
        return run

    async def insert_runs(
        self,
        count: int,
        processor: str | None = None,
        *,
        workflow: UUID | None = None,
        prompt: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> list[str]:
        """Insert runs without nodes, in one statement and one workflow. Returns their ids."""
        return await insert_runs(
            self.db,
            count,
            processor=processor or self.processor,
            workflow=workflow or uuid4(),
            prompt=prompt,
            **{**self.metadata, **metadata},
        )

    async def wait_for_status(self, run: str, status: str, timeout: float = 30) -> asyncpg.Record:
        """Wait until the run has this status. Returns the row; fails with the run's events and the daemons' last lines."""

        async def reached() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["status"] == status else None

        try:
            return await wait_until(reached, timeout=timeout)
        except AssertionError:
            row = await run_row(self.db, run)
            names = await self.event_names(run)
            lines = "\n".join(line for each in self.daemons for line in each.raw[-20:])
            pytest.fail(f"{run} is {row['status']}, not {status}: {row['payload']} {names}\n{lines}")

    async def wait_until_parked(self, run: str, *, progress: int | None = None) -> asyncpg.Record:
        """Wait until the run's `provider_job_id` is saved and no daemon holds it (and shows `progress`). Returns the row."""

        async def parked() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            waiting = row["status"] == "running" and row["provider_job_id"] is not None and row["claimed_by"] is None
            return row if waiting and progress in (None, row["progress"]) else None

        return await wait_until(parked, timeout=20)

    async def wait_for_retry(self, run: str, times: int = 1) -> asyncpg.Record:
        """Wait until the run has been put off that many times. Returns the row, pending unless it is under way again."""

        async def retried() -> bool:
            return len(await self.events(run, "retry")) >= times

        await wait_until(retried, timeout=20)
        return await run_row(self.db, run)

    async def wait_for_event(self, run: str, name: str) -> list[dict[str, Any]]:
        """Wait until the run has events of this name. Returns them, as `events` does."""
        return await wait_until(lambda: self.events(run, name), timeout=20)

    async def make_due(self, run: str) -> None:
        """Unblock every provider and make a pending run due, as an operator may."""
        await self.db.execute("delete from image_jobs.provider_blocks; delete from image_jobs.provider_streaks")
        await self.db.execute("update runs set due_at = now() where id = $1 and status = 'pending'", run)

    async def cancel(self, run: str) -> None:
        """Cancel a run, as a client does."""
        await self.db.execute("update runs set status = 'cancelled' where id = $1", run)

    async def requeue(self, run: str) -> None:
        """Requeue a run by hand: a new ticket."""
        await self.db.execute("update runs set status = 'pending' where id = $1", run)

    async def undo_settlement(self, run: str) -> None:
        """Put a completed run back to where a take-over would, as if its daemon had died between upload and settlement."""
        async with self.db.transaction():
            await self.db.execute("select set_config('image_jobs.writer', 'daemon', true)")
            await self.db.execute(
                """update runs set status = 'pending', payload = null, finished_at = null, due_at = now(), rank = 0
                where id = $1""",
                run,
            )

    async def reset_limits(self) -> None:
        """Block, limit and pause no provider."""
        await self.db.execute("delete from image_jobs.provider_limits where model is not null")
        await self.db.execute("delete from image_jobs.provider_blocks; delete from image_jobs.provider_streaks")
        await self.db.execute("update image_jobs.provider_limits set per_minute = null, paused = false")

    async def seconds_until_due(self, run: str) -> float:
        """`due_at` of a run, in seconds from now."""
        return await self.db.fetchval("select extract(epoch from due_at - now())::float8 from runs where id = $1", run)

    async def events(self, run: str, name: str) -> list[dict[str, Any]]:
        """The payloads of a run's events of one name, each with its kind."""
        rows = await self.db.fetch(
            "select kind, payload from run_events where run_id = $1 and payload ->> 'event' = $2 order by seq",
            run,
            name,
        )
        return [{"kind": row["kind"], **row["payload"]} for row in rows]

    async def event_data(self, run: str, name: str) -> list[dict[str, Any]]:
        """The `data` of a run's events of one name."""
        return [event.get("data") or {} for event in await self.events(run, name)]

    async def event_names(self, run: str) -> list[str]:
        """The names of a run's events in order, without `progress`."""
        rows = await self.db.fetch(
            "select payload ->> 'event' as name from run_events where run_id = $1 order by seq", run
        )
        return [row["name"] for row in rows if row["name"] != "progress"]

    async def node_data(self, run: str) -> dict[str, Any]:
        """`node_data` of the run's node."""
        data: dict[str, Any] = await self.db.fetchval(
            "select n.node_data from runs r join workflow_nodes n on n.id = r.metadata ->> 'nodeId' where r.id = $1",
            run,
        )
        return data

    async def blocked(self) -> dict[tuple[str, str | None], float]:
        """The blocked providers and models, and for how many seconds."""
        rows = await self.db.fetch(
            """select provider, model, extract(epoch from until - now())::float8 as seconds
            from image_jobs.provider_blocks where until > now()"""
        )
        return {(row["provider"], row["model"]): row["seconds"] for row in rows}

    async def stored_images(self, run: str) -> int:
        """How many images of the run are in storage, without thumbnail and preview."""
        count: int = await self.db.fetchval(
            "select count(*) from storage.objects where name like '%/' || $1 || '.png'", run
        )
        return count

    async def assert_not_written(self, *secrets: str) -> None:
        """Assert that no log line has a secret, and no row but those that verify webhooks."""
        tables = await self.db.fetch(
            """select format('%I.%I', schemaname, tablename) as name from pg_tables
            where schemaname in ('public', 'image_jobs', 'storage') and tablename <> 'webhook_secrets'"""
        )
        written = [line for each in self.daemons for line in each.raw]
        for table in tables:
            rows = await self.db.fetch(f"select to_jsonb(t)::text as row from {table['name']} t")
            written += [json.dumps(row["row"]) for row in rows]
        for secret in secrets:
            assert not [line for line in written if secret in line]

    async def assert_no_secret(self) -> None:
        """Assert that no daemon has written down a key or a secret of its environment."""
        ours = [value for name, value in self.environment.items() if "KEY" in name or "SECRET" in name]
        await self.assert_not_written(self.project.keys.service_role_key, *ours)


@asynccontextmanager
async def open_harness(
    kind: type[H], dsn: str, *, behind: Callable[[ASGIApp], ASGIApp] = lambda app: app, **fields: Any
) -> AsyncIterator[H]:
    """A harness around a migrated database, without a daemon; `behind` stands before REST and Storage."""
    async with supabase(dsn, behind) as project:
        harness = kind(project=project, db=await connect(dsn), **fields)
        try:
            yield harness
        finally:
            await harness.db.close()


@asynccontextmanager
async def start_harness(kind: type[H], dsn: str, **fields: Any) -> AsyncIterator[H]:
    """A harness with a daemon that claims. At the end no secret may be written anywhere."""
    async with open_harness(kind, dsn, **fields) as harness, harness.run_daemon() as process:
        await process.started()
        yield harness
        await harness.assert_no_secret()


async def fetch(url: str) -> httpx.Response:
    """GET a public URL; an error status raises."""
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).raise_for_status()


def with_settings(**settings: str) -> pytest.MarkDecorator:
    """Give the fixture `harness` settings of this test alone, as `request.param`."""
    return pytest.mark.parametrize("harness", [settings], indirect=True, ids=[""])
