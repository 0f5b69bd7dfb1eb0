"""Sizes: a row so large that no sync could write it is refused, and many rows are dealt with in slices."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in
from tests.support.protocol import Db
from tests.support.runs import WORKFLOW, insert_run, insert_runs, run_row

pytestmark = pytest.mark.one_postgres

REFUSED = asyncpg.InvalidParameterValueError
MIB = 2**20
URLS = "http://x "


async def insert_node(db: Db, size: int) -> None:
    async with signed_in(db):
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n', $1, 'image', $2)",
            uuid4(),
            {"text": ("x y " * size)[:size]},
        )


async def test_node_data_above_1_mib_is_refused(db: Db) -> None:
    with pytest.raises(REFUSED) as refused:
        await insert_node(db, MIB)
    assert str(refused.value).startswith("node_data is larger than 1 MiB.")
    await insert_node(db, MIB - 100)
    with pytest.raises(REFUSED):
        await db.execute(
            """update workflow_nodes set node_data = node_data || jsonb_build_object('more', repeat('y ', 1000))"""
        )


@pytest.mark.parametrize(("column", "most"), [("position", json.dumps(4095 * "x ")), ("node_type", 512 * "x ")])
async def test_other_columns_of_a_node_are_measured(db: Db, column: str, most: str) -> None:
    """A position of 24 MiB, which each write of the node checked again, took a claim ten seconds."""
    await insert_node(db, 10)
    write = f"update workflow_nodes set {column} = $1::text::{'jsonb' if column == 'position' else 'text'}"
    await db.execute(write, most)
    with pytest.raises(REFUSED, match=column):
        await db.execute(write, most.replace("x", "xx", 1))


async def test_an_old_node_above_1_mib_may_be_moved(db: Db) -> None:
    await insert_node(db, 10)
    await db.execute("alter table workflow_nodes disable trigger user")
    await db.execute("update workflow_nodes set node_data = jsonb_build_object('text', repeat('x y ', 300000))")
    await db.execute("alter table workflow_nodes enable trigger user")
    await db.execute("""update workflow_nodes set position = '{"x": 1}'""")
    assert await db.fetchval("select position from workflow_nodes") == {"x": 1}


async def seconds(db: Db, value: dict[str, Any]) -> float:
    """Return the least seconds of some looks at a value."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        await db.fetchval("select image_jobs.has_base64($1)", value)
        best = min(best, time.perf_counter() - began)
    return best


@pytest.mark.parametrize("text", [URLS, 59 * "a" + " ", "\n", "https://x/ " + 59 * "b" + " "], ids=repr)
async def test_no_text_costs_much_more_than_others_of_its_size(db: Db, text: str) -> None:
    plain = await seconds(db, {"x": ("word " * MIB)[:MIB]})
    assert await seconds(db, {"x": (text * MIB)[:MIB]}) < 6 * plain + 0.05


async def test_metadata_is_measured_before_it_is_read(db: Db) -> None:
    with pytest.raises(REFUSED, match="larger than 1 MiB"):
        await insert_run(db, note="data:image/png;base64," + "A" * MIB)


@pytest.fixture
async def counting(database: str) -> AsyncIterator[Db]:
    """Connect as one who may count the calls of functions."""
    connection = await connect(database.replace("postgres@", "supabase_admin@"))
    await connection.execute("set track_functions = 'all'")
    yield connection
    await connection.close()


CALLS = "select calls from pg_stat_xact_user_functions where funcname = 'project_changes'"


async def test_bulk_statements_are_projected_in_slices(db: Db, counting: Db) -> None:
    await db.execute("alter table runs disable trigger user")
    await insert_runs(db, 1)
    await db.execute(
        """insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt,
            max_attempts, claim, ticket, lane, rank, created_at, queue_state)
        select 'many-' || n, 'image_gen', $1, 'pending', 'demo:painter', '{}', 0, 0, now(), 0, 3, n, n, 'demo', n, now(),
            'pending'
        from generate_series(1, 2500) n""",
        WORKFLOW,
    )
    await db.execute("alter table runs enable trigger user")
    async with counting.transaction():
        await counting.execute("update runs set status = 'cancelled' where id like 'many-%'")
        assert await counting.fetchval(CALLS) == 3
    events = "select count(*) from run_events where payload ->> 'event' = 'cancelled'"
    assert await db.fetchval(events) == 2500
    assert (await run_row(db, "many-2500"))["status"] == "cancelled"


async def test_bulk_inserts_are_projected_in_slices(db: Db, counting: Db) -> None:
    async with counting.transaction():
        await insert_runs(counting, 1001)
        assert await counting.fetchval(CALLS) == 2
    assert await db.fetchval("select count(*) from run_events") == 1001
