"""Start and shutdown of a daemon during a database outage: with a reason, and in bounded time."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.fakes.openai_api import hang, held
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import wait_until
from tests.support.proxies import Proxy, proxied


@pytest.fixture
async def network(database: str) -> AsyncIterator[Proxy]:
    """A proxy between the daemons and the database."""
    async with proxied(database) as it:
        yield it


async def test_daemon_without_a_database_waits_and_says_so(harness: FaultHarness, network: Proxy) -> None:
    run = await harness.insert_run()
    async with AsyncExitStack() as stack:
        async with network.refusing():
            it = await stack.enter_async_context(harness.run_daemon(dsn=network.dsn))
            (line,) = await wait_until(lambda: it.logged("database.away"), timeout=20)
            assert "There is no database at" in line["error"]
        await it.started()
        await harness.wait_for_status(run, "completed")
        assert "Traceback" not in "\n".join(it.raw)
    await harness.assert_all_end_once()
    assert len(harness.api.requests) == 1


async def test_drain_during_an_outage_settles_before_exit(harness: FaultHarness, network: Proxy) -> None:
    go = asyncio.Event()
    harness.api.next(held(go))
    async with harness.run_daemon(dsn=network.dsn) as it:
        await it.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with network.refusing():
            it.signal(signal.SIGTERM)
            go.set()
            await wait_until(lambda: it.logged("daemon.draining"))
            await wait_until(lambda: len(it.logged("sync.failed")) > 1, timeout=20)
        assert await it.ended() == 0
        assert not it.logged("daemon.left_silently")
    row = await harness.wait_for_status(run, "completed")
    assert row["attempt"] == 1
    assert len(harness.api.requests) == 1
    await harness.assert_all_end_once()


async def test_second_signal_exits_in_bounded_time_during_an_outage(harness: FaultHarness, network: Proxy) -> None:
    harness.api.next(hang())
    async with harness.run_daemon(dsn=network.dsn) as it:
        await it.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with network.swallowing():
            it.signal(signal.SIGTERM)
            await wait_until(lambda: it.logged("daemon.draining"))
            it.signal(signal.SIGTERM)
            assert await it.ended(timeout=25) == 0
        assert "Traceback" not in "\n".join(it.raw)
    async with harness.run_daemon() as other:
        await other.started()
        row = await harness.wait_for_status(run, "completed")
    assert row["attempt"] == 2
    assert len(harness.api.requests) == 2
    await harness.assert_all_end_once()
