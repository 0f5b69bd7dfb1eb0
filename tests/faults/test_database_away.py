"""The database goes away in mid-run: nobody takes from the other, nothing is called twice, and what was made is kept."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.fakes.openai_api import hang, held
from tests.faults.world import World, open_world
from tests.postgres import DEFAULT, Cluster, wait_until
from tests.proxies import Proxy, proxied
from tests.runs import event_names

LEASE = 2


@pytest.fixture
async def network(database: str) -> AsyncIterator[Proxy]:
    """What is between the daemons and the database."""
    async with proxied(database) as it:
        yield it


async def silent_for(world: World, seconds: float) -> None:
    """Waits until no daemon has said a word for so long."""

    async def lapsed() -> bool:
        return await world.db.fetchval(
            "select bool_and(clock_timestamp() - seen_at > make_interval(secs => $1)) from private.daemons", seconds
        )

    await wait_until(lapsed, timeout=20)


@pytest.mark.parametrize("outage", ["refused", "swallowed"])
async def test_after_an_outage_longer_than_the_lease_every_daemon_still_has_its_runs(
    world: World, network: Proxy, outage: str
) -> None:
    go = asyncio.Event()
    world.api.next(*(held(go) for _ in range(6)))
    one = world.daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="3")
    two = world.daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="3")
    async with one as first, two as second:
        await first.started()
        await second.started()
        runs = await world.order(6)
        await world.called(6)
        await world.may_judge()
        async with network.refusing() if outage == "refused" else network.swallowing():
            await silent_for(world, LEASE)
            go.set()
            await silent_for(world, 2 * LEASE)
            # The pictures are there, but without a lease nobody uploads.
            assert not any(world.gate.uploads(run) for run in runs)
        await world.all_ended_once()
        await world.nothing_in_flight()
        assert not first.logged("daemon.fenced") + second.logged("daemon.fenced")
    assert len(world.api.requests) == 6
    assert await world.db.fetchval("select bool_and(status = 'completed' and attempt = 1) from runs")
    for run in runs:
        assert (await event_names(world.db, run)).count("generated") == 1
        assert world.gate.uploads(run) == 1


async def test_a_daemon_that_cannot_hear_learns_of_a_cancellation_all_the_same(world: World, network: Proxy) -> None:
    network.deaf = True
    world.api.next(hang())
    async with world.daemon(dsn=network.dsn, IMAGE_JOBS_CONCURRENCY="1") as it:
        await it.started()
        assert it.logged("listener.deaf")
        (run,) = await world.order()
        await world.called(1)
        await world.db.execute("update runs set status = 'cancelled' where id = $1", run)
        (other,) = await world.order()
        await world.until(other, "completed", timeout=25)
        await world.all_ended_once()
    assert await world.events(run, "unknown_outcome")


async def test_whoever_lost_the_network_alone_gives_way_and_comes_back(world: World, network: Proxy) -> None:
    go = asyncio.Event()
    world.api.next(held(go))
    async with world.daemon(dsn=network.dsn) as lost:
        await lost.started()
        (run,) = await world.order()
        await world.called(1)
        async with world.daemon() as other:
            await other.started()
            await world.may_judge()
            async with network.refusing():
                row = await world.until(run, "completed")
                go.set()
            await wait_until(lambda: lost.logged("daemon.rejoined"), timeout=20)
            await world.nothing_in_flight()
            await wait_until(lambda: lost.logged("run.finished"), timeout=20)
            await world.all_ended_once()
    assert row["attempt"] == 2
    assert len(world.api.requests) == 2
    assert world.gate.uploads(run) == 1
    late = [*await world.events(run, "late"), *await world.events(run, "unknown_outcome")]
    assert len(late) == 1


@pytest.fixture(scope="module")
def own_server() -> Iterator[Cluster]:
    """A server that may be stopped. It keeps what it has committed, also when it is stopped by force."""
    cluster = Cluster(DEFAULT)
    cluster.server = type(cluster.server)(
        cluster.server.bin_dir, cluster.server.data_dir, cluster.server.port, {"fsync": "off", "max_connections": "300"}
    )
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
async def test_a_restart_of_the_database_in_mid_run_is_survived(own_server: Cluster, order: signal.Signals) -> None:
    go = asyncio.Event()
    async with own_server.database() as dsn, open_world(dsn) as world:
        world.api.next(*(held(go) for _ in range(4)))
        async with world.daemon(IMAGE_JOBS_LEASE="30") as one, world.daemon(IMAGE_JOBS_LEASE="30") as two:
            await one.started()
            await two.started()
            await world.order(4)
            await world.called(4)
            await world.may_judge()
            await world.db.close()
            server = own_server.server
            assert server.pid is not None
            os.kill(server.pid, order)
            await wait_until(lambda: server.pid is None)
            go.set()
            await asyncio.to_thread(server.start)
            await world.reconnect()
            await world.order(4)
            await world.all_ended_once()
            assert await world.db.fetchval("select bool_and(status = 'completed' and attempt = 1) from runs")
            assert await world.db.fetchval("select bool_and(ended_at is null) from private.daemons")
        assert len(world.api.requests) == 8
