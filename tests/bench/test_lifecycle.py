"""Runs a second: the daemon beside a baseline, pgbench, which calls the same functions from C and does nothing else."""

import asyncio
import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from uuid import uuid4

import asyncpg

from daemon.queue.client import Queue
from tests.bench.idle_provider import idle_provider, insert_with_nodes, settlement
from tests.bench.report import table
from tests.support.postgres import Cluster, wait_until
from tests.support.runs import register

Db = asyncpg.Connection

RUNS = 2000
BATCH = 100
ROUNDS = 3

# Claim a batch and settle it, as a daemon's sync does, in one transaction as there.
LIFECYCLE = """
create schema bench;
create table bench.daemons (client integer primary key, id uuid not null);
create function bench.lifecycle(p_client integer, p_batch integer, p_done jsonb) returns void language plpgsql as $$
declare
  v_daemon uuid := (select id from bench.daemons where client = p_client);
  v_settlements jsonb;
begin
  select jsonb_agg(p_done || jsonb_build_object('id', t.run ->> 'id', 'claim', t.run -> 'claim')) into v_settlements
  from image_jobs.sync(v_daemon, p_batch, false, '[]', '[]', null, null) t where t.part = 'claimed';
  perform image_jobs.sync(v_daemon, 0, false, coalesce(v_settlements, '[]'), '[]', null, null);
end $$;
"""


async def test_lifecycles_a_second_beside_pgbench(durable: Cluster, database: str, db: Db) -> None:
    await db.execute(LIFECYCLE)
    async with Queue(database) as queue:
        for client in range(4):
            await db.execute("insert into bench.daemons values ($1, $2)", client, await register(queue))
    rates: dict[str, list[float]] = {"daemon": [], "pgbench, 1 client": [], "pgbench, 4 clients": []}
    for _ in range(ROUNDS):
        for name, measured in rates.items():
            await insert_with_nodes(db, RUNS, uuid4().hex)
            await db.execute("analyze")
            clients = re.findall(r"\d+", name)
            seconds = await (pgbench(durable, database, int(clients[0])) if clients else daemon(database))
            assert await db.fetchval("select count(*) from runs where status <> 'completed'") == 0
            measured.append(RUNS / seconds)
    ours = median(rates["daemon"])
    table(
        f"Whole lifecycles a second ({RUNS} runs with a node and 5 events each, batches of {BATCH})",
        ("", "runs/s", "daemon, ratio"),
        [(name, f"{median(found):.0f}", f"{ours / median(found):.2f} x") for name, found in rates.items()],
    )


async def daemon(dsn: str) -> float:
    """Complete all pending runs, with batches as large as pgbench's. Returns the seconds."""
    async with idle_provider(dsn, slots=BATCH, accepting=False) as it:
        started = time.perf_counter()
        it.dispatcher.accepting = True
        it.signals.wake()
        await wait_until(lambda: it.settled == RUNS, timeout=60)
        return time.perf_counter() - started


async def pgbench(cluster: Cluster, dsn: str, clients: int) -> float:
    """Complete all pending runs. Returns the seconds, without the time to connect."""
    transactions = RUNS // BATCH // clients
    with tempfile.TemporaryDirectory() as home:
        script = Path(home) / "lifecycle.sql"
        body = json.dumps(settlement()).replace("'", "''").replace(":", " :")
        script.write_text(f"select bench.lifecycle(:client_id, {BATCH}, '{body}');\n".replace('" :', '" : '))
        process = await asyncio.create_subprocess_exec(
            cluster.server.bin_dir / "pgbench", "-n", "-f", script, "-c", str(clients), "-j", "1",
            "-t", str(transactions), dsn,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    rate = re.search(r"tps = ([\d.]+)", out.decode())
    assert process.returncode == 0, err.decode()
    assert rate is not None
    return transactions * clients / float(rate[1])
