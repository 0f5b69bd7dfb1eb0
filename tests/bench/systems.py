"""The systems that are measured side by side: the daemon, and pgqueuer with no work and with the same work by hand.

Each has a database of its own on one server, so that none pays for the tables of another.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from uuid import uuid4, uuid5

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.queries import Queries

from tests.bench.idle_provider import insert_with_nodes
from tests.support.postgres import Cluster
from tests.support.runs import WORKFLOW

Db = asyncpg.Connection

WORKFLOWS = 20
"""A load is spread over as many."""

# The tables of the specification, with the indexes that its queries need: what somebody has who does the work by hand.
TABLES = """
create table runs (id varchar primary key, kind varchar not null, subject_id uuid not null, status varchar not null,
  processor varchar, started_at timestamptz default now(), finished_at timestamptz, payload jsonb, metadata jsonb);
create index idx_runs_subject on runs (subject_id, kind);
create table run_events (id uuid primary key default gen_random_uuid(), run_id varchar references runs (id) on delete cascade,
  ts timestamptz default now(), kind varchar not null, payload jsonb);
create index idx_run_events on run_events (run_id, ts);
create table workflow_nodes (id varchar primary key, workflow_id uuid not null, node_type varchar not null,
  node_data jsonb not null, position jsonb, created_at timestamptz default now(), updated_at timestamptz default now());
create index idx_workflow_nodes on workflow_nodes (workflow_id);
"""


class System(ABC):
    """A queue with its database.

    Args:
        dsn: The database, which is prepared.
        db: A connection to it, for the load; without codecs, which pgqueuer does not expect.
    """

    name: str
    """In the tables that are printed."""
    key: str
    """For `worker_process.py`."""
    remaining: str
    """A query: whether work is left."""

    def __init__(self, dsn: str, db: Db) -> None:
        self.dsn = dsn
        self.db = db

    @classmethod
    @asynccontextmanager
    async def open(cls, cluster: Cluster) -> "AsyncIterator[System]":
        """Make the database, and drop it afterwards."""
        async with cls.database(cluster) as dsn:
            db = await asyncpg.connect(dsn)
            try:
                yield cls(dsn, db)
            finally:
                await db.close()

    @classmethod
    @abstractmethod
    def database(cls, cluster: Cluster) -> AbstractAsyncContextManager[str]:
        """Yield the DSN of a prepared database."""

    @abstractmethod
    async def insert(self, count: int) -> None:
        """Insert work. All of it can be seen at once, when this returns."""


class Daemon(System):
    """The daemon: a run with a node each."""

    name = "daemon, whole lifecycle"
    key = "daemon"
    remaining = "select exists (select from runs where status in ('pending', 'running'))"

    @classmethod
    @asynccontextmanager
    async def database(cls, cluster: Cluster) -> AsyncIterator[str]:
        async with cluster.database() as dsn:
            yield dsn

    async def insert(self, count: int) -> None:
        await insert_with_nodes(self.db, count, uuid4().hex, workflows=WORKFLOWS)


class Bare(System):
    """pgqueuer with a handler that does nothing."""

    name = "pgqueuer, bare"
    key = "bare"
    remaining = "select exists (select from pgqueuer)"

    @classmethod
    @asynccontextmanager
    async def database(cls, cluster: Cluster) -> AsyncIterator[str]:
        async with cluster.database("supabase") as dsn:
            db = await asyncpg.connect(dsn)
            await Queries(AsyncpgDriver(db)).install()
            await db.execute(TABLES)
            await db.close()
            yield dsn

    async def insert(self, count: int) -> None:
        await self.enqueue([f"run_{uuid4().hex}" for _ in range(count)])

    async def enqueue(self, ids: list[str]) -> None:
        """Insert jobs, whose payload is the id of a run."""
        payloads = [run.encode() for run in ids]
        await Queries(AsyncpgDriver(self.db)).enqueue(["work"] * len(ids), payloads, [0] * len(ids))


class Handwritten(Bare):
    """pgqueuer with a handler that does by hand what the daemon does."""

    name = "pgqueuer, same work by hand"
    key = "handwritten"

    async def insert(self, count: int) -> None:
        ids = [f"run_{uuid4().hex}" for _ in range(count)]
        workflows = [uuid5(WORKFLOW, str(number % WORKFLOWS)) for number in range(count)]
        async with self.db.transaction():
            await self.db.execute(
                """insert into workflow_nodes (id, workflow_id, node_type, node_data)
                select 'node_' || id, workflow, 'image_generation', '{"label": "a fox"}'
                from unnest($1::text[], $2::uuid[]) as u (id, workflow)""",
                ids,
                workflows,
            )
            await self.db.execute(
                """insert into runs (id, kind, subject_id, status, processor, metadata)
                select id, 'image_gen', workflow, 'pending', 'demo:painter', jsonb_build_object(
                  'nodeId', 'node_' || id, 'promptSpec', jsonb_build_object('basePrompt', 'a red fox'))
                from unnest($1::text[], $2::uuid[]) as u (id, workflow)""",
                ids,
                workflows,
            )
            await self.enqueue(ids)


SYSTEMS: tuple[type[System], ...] = (Daemon, Handwritten, Bare)
