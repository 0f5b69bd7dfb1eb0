"""Database outages during a run: no daemon is fenced without need, no call is made twice, every image is kept."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.fakes.openai_api import hang, held
from tests.support.fault_harness import FaultHarness, fault_harness
from tests.support.postgres import DEFAULT, Cluster, wait_until
from tests.support.proxies import Proxy, proxied

LEASE = 2


@pytest.fixture
async def network(database: str) -> AsyncIterator[Proxy]:
    """A proxy between the daemons and the database."""
    async with proxied(database) as it:
        yield it


async def wait_for_silence(harness: FaultHarness, seconds: float) -> None:
    """Wait until the last heartbeat of every daemon is that old."""

    async def lapsed() -> bool:
        return await harness.db.fetchval(
            "select bool_and(clock_timestamp() - seen_at > make_interval(secs => $1)) from image_jobs.daemons", seconds
        )

    await wait_until(lapsed, timeout=20)


@pytest.mark.parametrize("outage", ["refused", "swallowed"])
async def test_runs_outlive_an_outage_longer_than_the_lease(harness: FaultHarness, network: Proxy, outage: str) -> None:
    go = asyncio.Event()
    harness.api.next(*(held(go) for _ in range(6)))
    one = harness.run_daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="3")
    two = harness.run_daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="3")
    async with one as first, two as second:
        await first.started()
        await second.started()
        runs = await harness.insert_runs(6)
        await harness.wait_for_requests(6)
        await harness.allow_take_over()
        async with network.refusing() if outage == "refused" else network.swallowing():
            await wait_for_silence(harness, LEASE)
            go.set()
            await wait_for_silence(harness, 2 * LEASE)
            # The images are there, but without a lease no daemon uploads.
            assert not any(harness.gate.uploads(run) for run in runs)
        await harness.assert_all_end_once()
        await harness.wait_until_idle()
        assert not first.logged("daemon.fenced") + second.logged("daemon.fenced")
    assert len(harness.api.requests) == 6
    assert await harness.db.fetchval("select bool_and(status = 'completed' and attempt = 1) from runs")
    for run in runs:
        assert (await harness.event_names(run)).count("generated") == 1
        assert harness.gate.uploads(run) == 1


async def test_cancellation_reaches_a_daemon_without_notify(harness: FaultHarness, network: Proxy) -> None:
    network.deaf = True
    harness.api.next(hang())
    async with harness.run_daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="1") as it:
        await it.started()
        assert it.logged("listener.deaf")
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        await harness.cancel(run)
        other = await harness.insert_run()
        await harness.wait_for_status(other, "completed", timeout=25)
        await harness.assert_all_end_once()
    assert await harness.event_data(run, "unknown_outcome")


async def test_partitioned_daemon_is_fenced_and_rejoins(harness: FaultHarness, network: Proxy) -> None:
    go = asyncio.Event()
    harness.api.next(held(go))
    async with harness.run_daemon(dsn=network.dsn) as lost:
        await lost.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with harness.run_daemon() as other:
            await other.started()
            await harness.allow_take_over()
            async with network.refusing():
                row = await harness.wait_for_status(run, "completed")
                go.set()
            await wait_until(lambda: lost.logged("daemon.rejoined"), timeout=20)
            await harness.wait_until_idle()
            await wait_until(lambda: lost.logged("run.finished"), timeout=20)
            await harness.assert_all_end_once()
    assert row["attempt"] == 2
    assert len(harness.api.requests) == 2
    assert harness.gate.uploads(run) == 1
    late = [*await harness.event_data(run, "late"), *await harness.event_data(run, "unknown_outcome")]
    assert len(late) == 1


@pytest.fixture(scope="module")
def own_server() -> Iterator[Cluster]:
    """A server that may be stopped; it keeps what it has committed, even if it is stopped by force."""
    cluster = Cluster(DEFAULT)
    cluster.server = type(cluster.server)(
        cluster.server.bin_dir, cluster.server.data_dir, cluster.server.port, {"fsync": "off", "max_connections": "300"}
    )
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("shutdown", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
async def test_runs_survive_a_database_restart(own_server: Cluster, shutdown: signal.Signals) -> None:
    go = asyncio.Event()
    async with own_server.database() as dsn, fault_harness(dsn) as harness:
        harness.api.next(*(held(go) for _ in range(4)))
        async with harness.run_daemon(IMAGE_JOBS_LEASE="30") as one, harness.run_daemon(IMAGE_JOBS_LEASE="30") as two:
            await one.started()
            await two.started()
            await harness.insert_runs(4)
            await harness.wait_for_requests(4)
            await harness.allow_take_over()
            await harness.db.close()
            server = own_server.server
            assert server.pid is not None
            os.kill(server.pid, shutdown)
            await wait_until(lambda: server.pid is None)
            go.set()
            await asyncio.to_thread(server.start)
            await harness.reconnect()
            await harness.insert_runs(4)
            await harness.assert_all_end_once()
            assert await harness.db.fetchval("select bool_and(status = 'completed' and attempt = 1) from runs")
            assert await harness.db.fetchval("select bool_and(ended_at is null) from image_jobs.daemons")
        assert len(harness.api.requests) == 8
