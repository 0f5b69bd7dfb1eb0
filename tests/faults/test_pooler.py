"""A pooler that says no, for as long as it likes: the daemon waits, and what it has paid for is kept."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes.openai_api import held
from tests.support.fault_harness import FaultHarness
from tests.support.pooler import SUPAVISOR, Pooler, Refusal, pooled
from tests.support.postgres import wait_until
from tests.support.runs import event_names

OUTAGE = float(os.environ.get("IMAGE_JOBS_TEST_OUTAGE", "6"))
"""Seconds; by hand a minute: IMAGE_JOBS_TEST_OUTAGE=60."""


@pytest.fixture
async def pooler(database: str) -> AsyncIterator[Pooler]:
    async with pooled(database) as it:
        yield it


@pytest.mark.timeout(60 + 2 * OUTAGE)
@pytest.mark.parametrize("lease", ["2", "30"])
async def test_calls_survive_a_pooler_that_refuses(harness: FaultHarness, pooler: Pooler, lease: str) -> None:
    go = asyncio.Event()
    harness.api.next(held(go), held(go))
    async with harness.run_daemon(dsn=pooler.dsn, IMAGE_JOBS_LEASE=lease) as it:
        await it.started()
        runs = await harness.insert_runs(2)
        await harness.wait_for_requests(2)
        async with pooler.refusing(*SUPAVISOR):
            await asyncio.sleep(OUTAGE / 2)
            go.set()
            await asyncio.sleep(OUTAGE / 2)
            assert it.process.returncode is None, "\n".join(it.raw[-5:])
        await harness.assert_all_end_once()
        for run in runs:
            row = await harness.wait_for_status(run, "completed")
            assert row["attempt"] == 1
            assert (await event_names(harness.db, run)).count("generated") == 1
    assert len(harness.api.requests) == 2
    # One line that says in the pooler's words what is in the way, and pauses that grow.
    assert any("max clients reached" in line for line in it.raw)
    if lease == "30":
        assert 4 <= len(pooler.refused) <= 10 + 4 * OUTAGE


async def test_a_start_waits_for_a_database_that_is_away(harness: FaultHarness, pooler: Pooler) -> None:
    (run,) = await harness.insert_runs(1)
    refusals = [Refusal(sqlstate) for sqlstate in ("XX000", "57P03", "53300", "08006", "42P01", "ZZ999")]
    async with pooler.refusing(*refusals), harness.run_daemon(dsn=pooler.dsn) as it:
        await wait_until(lambda: len(pooler.refused) >= 6 or it.process.returncode is not None, timeout=30)
        assert it.process.returncode is None, "\n".join(it.raw[-5:])
        waiting = it.logged("database.away")
        assert "pooler of these tests" in waiting[0]["error"]
        pooler.refuse_session = lambda: None
        await it.started()
        await harness.wait_for_status(run, "completed")


async def test_sigterm_ends_a_start_that_waits(harness: FaultHarness, pooler: Pooler) -> None:
    async with pooler.refusing(*SUPAVISOR), harness.run_daemon(dsn=pooler.dsn) as it:
        await wait_until(lambda: len(pooler.refused) >= 2 or it.process.returncode is not None, timeout=20)
        assert it.process.returncode is None, "\n".join(it.raw[-5:])
        it.signal(signal.SIGTERM)
        assert await it.ended(timeout=20) == 0


@pytest.mark.parametrize("sqlstate", ["28P01", "28000", "3D000"])
async def test_a_start_ends_where_waiting_has_no_use(harness: FaultHarness, pooler: Pooler, sqlstate: str) -> None:
    async with pooler.refusing(Refusal(sqlstate)), harness.run_daemon(dsn=pooler.dsn) as it:
        assert await it.ended() == 2
    assert any("DATABASE_URL" in line for line in it.raw)
    assert "Traceback" not in "\n".join(it.raw)


async def test_a_start_ends_where_our_schema_is_forbidden(harness: FaultHarness) -> None:
    await harness.db.execute("create role stranger login")
    dsn = harness.project.dsn.replace("//postgres@", "//stranger@")
    try:
        async with harness.run_daemon(dsn=dsn) as it:
            assert await it.ended() == 1
    finally:
        await harness.db.execute("drop role stranger")
    assert any("not allowed" in line for line in it.raw)
    assert "Traceback" not in "\n".join(it.raw)
