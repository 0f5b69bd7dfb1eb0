"""Clients, operators and daemons write the same 50 nodes at once: no client sees an error, and in the end every node shows its newest run."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from uuid import UUID

import asyncpg
import pytest

from tests.support.postgres import DEFAULT, Cluster, connect, signed_in
from tests.support.protocol import Daemon, new_daemon

pytestmark = pytest.mark.every_postgres

USER = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
WORKFLOWS = [UUID(int=number) for number in range(1, 6)]
NODES = {f"node-{number}": WORKFLOWS[number % 5] for number in range(50)}
# The load has to last to mean something: on one version, in CI. Elsewhere a few seconds will do.
SHORT, LONG = 5.0, 20.0
RETRIED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)

Act = Callable[[asyncpg.Connection, random.Random], Awaitable[object]]


async def some_runs(connection: asyncpg.Connection, status: str, count: int = 1) -> list[str]:
    rows = await connection.fetch("select id from runs where status = $1 order by random() limit $2", status, count)
    return [row["id"] for row in rows]


def prompt(node: str) -> dict[str, object]:
    return {"nodeId": node, "promptSpec": {"basePrompt": "a red fox"}}


async def insert(connection: asyncpg.Connection, chance: random.Random) -> None:
    node = chance.choice(list(NODES))
    async with signed_in(connection, USER):
        await connection.execute(
            "insert into runs (kind, subject_id, status, processor, metadata) "
            "values ('image_gen', $1, 'pending', 'demo:painter', $2)",
            NODES[node],
            prompt(node),
        )


async def drag(connection: asyncpg.Connection, chance: random.Random) -> None:
    async with signed_in(connection, USER):
        await connection.execute(
            "update workflow_nodes set node_data = $2 where id = $1",
            chance.choice(list(NODES)),
            {"label": chance.random(), "status": "forged"},
        )


async def save_the_canvas(connection: asyncpg.Connection, chance: random.Random) -> None:
    """Save several nodes in one statement, as React Flow's onSave does; sorted by id, as any client has to."""
    nodes = sorted(chance.sample(list(NODES), 8))
    async with signed_in(connection, USER):
        await connection.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) "
            "select n.id, n.workflow_id, 'image', $3 from unnest($1::varchar[], $2::uuid[]) n (id, workflow_id) "
            "on conflict (id) do update set node_data = excluded.node_data",
            nodes,
            [NODES[node] for node in nodes],
            {"x": chance.random()},
        )


async def replace_a_node(connection: asyncpg.Connection, chance: random.Random) -> None:
    node = chance.choice(list(NODES))
    async with signed_in(connection, USER):
        await connection.execute("delete from workflow_nodes where id = $1", node)
        await connection.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', '{}') "
            "on conflict (id) do nothing",
            node,
            NODES[node],
        )


async def cancel(connection: asyncpg.Connection, chance: random.Random) -> None:
    for run in await some_runs(connection, chance.choice(["pending", "running"])):
        async with signed_in(connection, USER):
            await connection.fetchval("select cancel_run($1)", run)


async def requeue(connection: asyncpg.Connection, chance: random.Random) -> None:
    for run in await some_runs(connection, chance.choice(["failed", "cancelled"])):
        try:
            async with signed_in(connection, USER):
                await connection.fetchval("select requeue_run($1)", run)
        except asyncpg.InvalidParameterValueError as error:
            # Somebody else was faster: it says so, and that is no accident.
            assert "cannot be requeued" in str(error)


async def operate(connection: asyncpg.Connection, chance: random.Random) -> None:
    """Requeue many runs at once, sorted by id: two operators who do not would deadlock in any database."""
    await connection.execute(
        "update runs r set status = 'pending' from ("
        "select id from runs where status in ('failed', 'cancelled') order by id limit 10 for update) chosen "
        "where r.id = chosen.id"
    )
    await connection.execute(
        "update image_jobs.provider_limits set per_minute = $1 where provider = 'demo'", chance.choice([None, 100_000])
    )


async def work(
    daemon: Daemon, held: dict[int, dict[str, object]], chance: random.Random, retried: Counter[str]
) -> None:
    """Sync once: settle the held runs and claim more, retrying as the real daemon does."""
    settlements = [
        {
            "id": run["id"],
            "claim": run["claim"],
            **chance.choice(
                [
                    {"outcome": "completed", "payload": {"imageUrl": f"https://example.com/{run['claim']}.png"}},
                    {"outcome": "failed", "payload": {"error": "It failed."}},
                    {"outcome": "retry", "payload": {"error": "Again."}, "due_in": 0},
                    {"outcome": "parked", "provider_job_id": "order", "due_in": 0},
                ]
            ),
        }
        for run in held.values()
    ]
    progress = [{"id": run["id"], "claim": run["claim"], "progress": 50} for run in list(held.values())[:5]]
    try:
        rows = await daemon.sync(20, full_scan=False, settlements=settlements, progress=progress, held=list(held))
    except RETRIED as error:
        retried[type(error).__name__] += 1
        return
    for row in rows:
        if row["part"] == "claimed":
            held[row["claim"]] = row
        elif row["part"] == "settled" and row["result"] != "busy":
            del held[row["claim"]]


@pytest.fixture
async def crowd(database: str):
    connections = [await connect(database) for _ in range(12)]
    yield connections
    for connection in connections:
        await connection.close()


@pytest.mark.timeout(120)
async def test_clients_and_daemons_write_the_same_nodes_at_once(postgres: Cluster, db, crowd):
    async with signed_in(db, USER):
        for node, workflow in NODES.items():
            await db.execute(
                "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', '{}')",
                node,
                workflow,
            )
    await db.execute("insert into image_jobs.provider_limits (provider) values ('demo')")
    is_long = os.environ.get("CI") == "true" and postgres.name == DEFAULT
    until = time.monotonic() + (LONG if is_long else SHORT)
    done: Counter[str] = Counter()
    retried: Counter[str] = Counter()

    async def act(number: int, connection: asyncpg.Connection, acts: list[Act]) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            chosen = chance.choice(acts)
            await chosen(connection, chance)
            done[chosen.__name__] += 1

    async def serve(number: int, connection: asyncpg.Connection) -> None:
        chance = random.Random(number)
        daemon = await new_daemon(connection, "demo")
        held: dict[int, dict[str, object]] = {}
        while time.monotonic() < until:
            await work(daemon, held, chance, retried)
            done["sync"] += 1

    clients: list[Act] = [insert, drag, save_the_canvas, replace_a_node, cancel, requeue]
    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(crowd):
            if number < 3:
                group.create_task(serve(number, connection))
            elif number == 3:
                group.create_task(act(number, connection, [operate]))
            else:
                group.create_task(act(number, connection, clients))

    assert set(done) == {"sync", "operate", *(each.__name__ for each in clients)}
    # A sync locks in one sequence and waits for limits alone: it has nothing to retry either.
    assert not retried, f"{retried} in {done}"

    await (await new_daemon(db, "demo")).sync()
    wrong = await db.fetch(
        """
        select n.id, n.node_data, newest.id, newest.status from workflow_nodes n
        left join lateral (
            select * from runs r where r.metadata ->> 'nodeId' = n.id order by r.ticket desc limit 1) newest on true
        where n.node_data ->> 'runId' is distinct from newest.id
            or n.node_data ->> 'status' is distinct from case newest.status when 'failed' then 'error' else newest.status end
        """
    )
    assert not wrong
    assert not await db.fetch("select * from image_jobs.stale_nodes")
