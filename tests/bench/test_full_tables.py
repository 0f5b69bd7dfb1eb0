"""Reads of clients and operators in full tables: milliseconds, through the stand-in's REST as a signed-in user."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import httpx
import pytest

from daemon.cli.list import RUNS
from daemon.dev.supabase.gateway import one_port
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest import rest_app
from tests.bench.conftest import DURABLE
from tests.bench.full_tables import fill, user, workflow_of
from tests.bench.report import percentile, table
from tests.support.postgres import DEFAULT, Cluster, connect
from tests.support.servers import served

Db = asyncpg.Connection

ROUNDS = 60
ENOUGH = 20.0
"""Seconds for one query, however slow it is."""

QUERIES = {
    "newest 20 runs": ("/runs?select=*&order=created_at.desc&limit=20", "subject_id"),
    "newest 20 of the view": ("/image_jobs?select=*&order=startedAt.desc&limit=20", "workflowId"),
    "newest 50 events": ("/run_events?select=*&order=seq.desc&limit=50", "workflow_id"),
    "count of runs": ("/runs?select=id&limit=1", "subject_id"),
    "nodes of a workflow": ("/workflow_nodes?select=*&limit=100", "workflow_id"),
}
VIEWS = (
    "queue_stats", "run_timings", "run_costs", "storage_stats", "storage_violations", "daemon_status",
)  # fmt: skip
LISTS = {
    "list": (None, None, None, 20),
    "list --status failed": ("failed", None, None, 20),
    "list --provider openai": (None, "openai", None, 20),
    "list --code refused": (None, None, "refused", 20),
    "list --code of none": (None, None, "none", 20),
}
# What adoption leaves in tables that had no row level security: rows of other kinds are open to whoever held grants.
OPEN = """
create policy "Rows of other kinds stay as open as they were" on runs
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
create policy "Events of other kinds stay as open as they were" on run_events
  using (not image_jobs.is_image_run(run_id)) with check (not image_jobs.is_image_run(run_id));
create policy "Members see events that are older than their workflow_id" on run_events for select to authenticated
  using (run_kind is null and image_jobs.can_access_run(run_id));
"""


@pytest.fixture(scope="module")
def large() -> Iterator[Cluster]:
    """A server with fsync on, whose autovacuum looks every second."""
    cluster = Cluster(DEFAULT, DURABLE | {"autovacuum_naptime": "1s", "max_wal_size": "4GB"})
    cluster.start()
    yield cluster
    cluster.stop()


@asynccontextmanager
async def signed_in_over_rest(cluster: Cluster, name: str, who: UUID) -> AsyncGenerator[httpx.AsyncClient]:
    """Serve the database over REST, and yield a client of a user's."""
    keys = Keys(
        "a secret that only this benchmark has", anon_key="sb_publishable_bench", service_role_key="sb_secret_bench"
    )
    token = keys.sign({"role": "authenticated", "sub": str(who), "exp": int(time.time()) + 3600})
    headers = {"apikey": keys.anon_key, "Authorization": f"Bearer {token}"}
    async with asyncpg.create_pool(cluster.server.dsn(name, user="authenticator"), min_size=1, max_size=2) as pool:
        app = one_port({"/rest/v1": rest_app(pool, keys)})
        async with (
            served(app) as url,
            httpx.AsyncClient(base_url=f"{url}/rest/v1", headers=headers, timeout=60) as http,
        ):
            yield http


async def measured(run: Callable[[], Awaitable[str]]) -> tuple[str, str, str]:
    """Repeat what returns a note. Returns p50 and p95, in milliseconds, and the note."""
    note, took = "", list[float]()
    started = time.perf_counter()
    while len(took) < ROUNDS + 3 and time.perf_counter() - started < ENOUGH:
        before = time.perf_counter()
        note = await run()
        took.append(1000 * (time.perf_counter() - before))
    warm = took[3:] or took[-1:]
    return f"{percentile(warm, 50):.1f}", f"{percentile(warm, 95):.1f}", note


async def read(http: httpx.AsyncClient, path: str) -> str:
    response = await http.get(path, headers={"Prefer": "count=exact"} if "select=id" in path else {})
    if response.is_error:
        return f"{response.status_code} {response.json()['code']}"
    counted = response.headers.get("Content-Range", "").partition("/")[2]
    return f"of {int(counted):,}" if counted.isdigit() else f"{len(response.json())} rows"


async def clients(cluster: Cluster, name: str, db: Db, title: str, *, unfiltered: bool) -> None:
    rows: list[tuple[str, ...]] = []
    for number, who in ((1, "member with 100 old runs"), (0, "owner of half of all")):
        workflow = await workflow_of(db, number)
        async with signed_in_over_rest(cluster, name, await db.fetchval(f"select {user(number)}")) as http:
            for query, (path, column) in QUERIES.items():
                # Where other kinds are open, a client says which it wants: see sql/README.md.
                kind = "&kind=eq.image_gen" if path.startswith("/runs") and not unfiltered else ""
                for filters in ("", f"&{column}=eq.{workflow}{kind}"):
                    if filters or (unfiltered and number == 1):
                        where = "in a workflow" if filters else "no filter"
                        rows.append(
                            (f"{who}: {query}, {where}", *await measured(lambda p=path + filters: read(http, p)))
                        )
    table(title, ("", "p50", "p95", ""), rows)


async def operators(db: Db) -> None:
    async def fetch(sql: str, *arguments: object) -> str:
        return f"{len(await db.fetch(sql, *arguments))} rows"

    rows = [(view, *await measured(lambda v=view: fetch(f"select * from image_jobs.{v}"))) for view in VIEWS]
    rows += [(name, *await measured(lambda a=arguments: fetch(RUNS, *a))) for name, arguments in LISTS.items()]
    table("Operators, 20,000 runs in the last 24 hours: milliseconds", ("", "p50", "p95", ""), rows)


async def measure(cluster: Cluster, dsn: str) -> None:
    name = dsn.rpartition("/")[2]
    db = await connect(dsn)
    await clients(cluster, name, db, "Clients: milliseconds", unfiltered=True)
    await operators(db)
    await db.execute(OPEN)
    await clients(
        cluster, name, db, "Clients of adopted tables whose other kinds are open: milliseconds", unfiltered=False
    )
    await db.close()


@pytest.mark.timeout(3000)
async def test_reads_of_full_tables(large: Cluster) -> None:
    async with large.database() as dsn:
        sudo = await connect(large.server.dsn(dsn.rpartition("/")[2]))
        await fill(sudo)
        await sudo.close()
        await measure(large, dsn)
