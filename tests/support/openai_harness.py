"""A daemon that draws with the fake of OpenAI's API: what it takes to follow a run from its row to its picture."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.daemons import Daemon, Supabase, daemon, supabase
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.postgres import connect, wait_until
from tests.runs import insert_run, run_row

FLARE = "gpt-image-2.5-flare"


@dataclass
class Studio:
    """Everything that a run passes through."""

    project: Supabase
    db: "asyncpg.Connection[asyncpg.Record]"
    api: OpenAIAPI
    daemon: Daemon
    secrets: tuple[str, ...] = ()
    """What the daemon was told and must tell nobody."""

    async def order(self, model: str = FLARE, **prompt: Any) -> str:
        """Inserts a run with a node and a workflow of its own; answers its id."""
        node, workflow = f"node-{uuid4()}", uuid4()
        await self.db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', '{}')",
            node,
            workflow,
        )
        return await insert_run(self.db, processor=f"openai:{model}", workflow=workflow, prompt=prompt, nodeId=node)

    async def until(self, run: str, wanted: str) -> asyncpg.Record:
        """Waits for a status as it comes; answers the row."""

        async def reached() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["status"] == wanted else None

        try:
            return await wait_until(reached, timeout=20)
        except AssertionError:
            row = await run_row(self.db, run)
            pytest.fail(f"{run} is {row['status']}: {row['payload']} {await self.story(run)}\n{self.daemon.raw[-20:]}")

    async def parked(self, run: str) -> asyncpg.Record:
        """Waits until the run's order is written down and nobody holds it; answers the row."""

        async def waits() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["provider_job_id"] is not None and row["claimed_by"] is None else None

        return await wait_until(waits, timeout=20)

    async def due_in(self, run: str) -> float:
        """Seconds until the run is due."""
        seconds: float = await self.db.fetchval(
            "select extract(epoch from due_at - now())::float8 from runs where id = $1", run
        )
        return seconds

    async def put_off(self, run: str, times: int = 1) -> asyncpg.Record:
        """Waits until the run has been put off that many times; answers the row."""

        async def waits() -> bool:
            return len(await self.events(run, "retry")) == times

        await wait_until(waits, timeout=20)
        return await self.until(run, "pending")

    async def hurry(self, run: str) -> None:
        """Does what an operator may do: nothing is blocked any more, and the run is due now."""
        await self.db.execute("update provider_limits set blocked_until = null")
        await self.db.execute("update runs set due_at = now() where id = $1 and status = 'pending'", run)

    async def events(self, run: str, name: str) -> list[dict[str, Any]]:
        """The payloads of a run's events of one name, with their kind."""
        rows = await self.db.fetch(
            """select kind, payload from run_events where run_id = $1 and payload ->> 'event' = $2 order by seq""",
            run,
            name,
        )
        return [{"kind": row["kind"], **row["payload"]} for row in rows]

    async def story(self, run: str) -> list[str]:
        """The names of a run's events, in order, without those that only tell how far it is."""
        rows = await self.db.fetch(
            "select payload ->> 'event' as name from run_events where run_id = $1 order by seq", run
        )
        return [row["name"] for row in rows if row["name"] != "progress"]

    async def node(self, run: str) -> dict[str, Any]:
        """What the run's node shows."""
        data: dict[str, Any] = await self.db.fetchval(
            "select n.node_data from runs r join workflow_nodes n on n.id = r.metadata ->> 'nodeId' where r.id = $1",
            run,
        )
        return data

    async def blocked(self) -> dict[tuple[str, str | None], float]:
        """What is closed, and for how many seconds."""
        rows = await self.db.fetch(
            """select provider, model, extract(epoch from blocked_until - now())::float8 as seconds
            from provider_limits where blocked_until > now()"""
        )
        return {(row["provider"], row["model"]): row["seconds"] for row in rows}

    async def pictures(self, run: str) -> int:
        """How many pictures of the run are in storage, without its thumbnail and preview."""
        count: int = await self.db.fetchval(
            "select count(*) from storage.objects where name like '%/' || $1 || '.png'", run
        )
        return count

    async def assert_no_secret(self) -> None:
        """No key and no secret is in any log line, and in any row but those that are for the verifier of webhooks."""
        tables = await self.db.fetch(
            """select format('%I.%I', schemaname, tablename) as name from pg_tables
            where schemaname in ('public', 'private', 'storage') and tablename <> 'webhook_secrets'"""
        )
        everything = list(self.daemon.raw)
        for table in tables:
            rows = await self.db.fetch(f"select to_jsonb(t)::text as row from {table['name']} t")
            everything += [json.dumps(row["row"]) for row in rows]
        for secret in (KEY, self.project.keys.service_role_key, *self.secrets):
            assert not [line for line in everything if secret in line]


@asynccontextmanager
async def open_studio(dsn: str, api: OpenAIAPI, **environment: str) -> AsyncIterator[Studio]:
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": api.url, **environment}
    async with supabase(dsn) as project, daemon(project, **environment) as process:
        await process.started()
        db = await connect(dsn)
        try:
            secrets = tuple(value for name, value in environment.items() if "KEY" in name or "SECRET" in name)
            studio = Studio(project, db, api, process, secrets)
            yield studio
            await studio.assert_no_secret()
        finally:
            await db.close()
