"""A daemon that comes or goes while the database is away: it says why, takes its time, but not for ever."""

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes.openai_api import hang, held
from tests.faults.world import World
from tests.postgres import wait_until
from tests.proxies import Proxy, proxied


@pytest.fixture
async def network(database: str) -> AsyncIterator[Proxy]:
    """What is between the daemons and the database."""
    async with proxied(database) as it:
        yield it


async def test_a_daemon_that_finds_no_database_says_so_and_the_next_one_does_the_work(
    world: World, network: Proxy
) -> None:
    (run,) = await world.order()
    async with network.refusing(), world.daemon(dsn=network.dsn) as it:
        assert await it.ended() == 1
    assert "There is no database at" in "\n".join(it.raw)
    assert "Traceback" not in "\n".join(it.raw)
    async with world.daemon(dsn=network.dsn) as it:
        await it.started()
        await world.until(run, "completed")
    await world.all_ended_once()
    assert len(world.api.requests) == 1


async def test_a_daemon_that_is_told_to_leave_during_an_outage_settles_before_it_goes(
    world: World, network: Proxy
) -> None:
    go = asyncio.Event()
    world.api.next(held(go))
    async with world.daemon(dsn=network.dsn) as it:
        await it.started()
        (run,) = await world.order()
        await world.called(1)
        async with network.refusing():
            it.signal(signal.SIGTERM)
            go.set()
            await wait_until(lambda: it.logged("daemon.draining"))
            await wait_until(lambda: len(it.logged("turn.failed")) > 1, timeout=20)
        assert await it.ended() == 0
        assert not it.logged("daemon.left_silently")
    row = await world.until(run, "completed")
    assert row["attempt"] == 1
    assert len(world.api.requests) == 1
    await world.all_ended_once()


async def test_the_second_signal_is_obeyed_in_bounded_time_even_if_the_database_says_nothing(
    world: World, network: Proxy
) -> None:
    world.api.next(hang())
    async with world.daemon(dsn=network.dsn) as it:
        await it.started()
        (run,) = await world.order()
        await world.called(1)
        async with network.swallowing():
            it.signal(signal.SIGTERM)
            await wait_until(lambda: it.logged("daemon.draining"))
            it.signal(signal.SIGTERM)
            assert await it.ended(timeout=25) == 0
        assert "Traceback" not in "\n".join(it.raw)
    async with world.daemon() as other:
        await other.started()
        row = await world.until(run, "completed")
    assert row["attempt"] == 2
    assert len(world.api.requests) == 2
    await world.all_ended_once()
