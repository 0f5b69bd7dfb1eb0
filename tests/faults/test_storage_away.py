"""Storage fails for a moment, or for good: an image that was paid for is not made again by itself."""

import asyncio

import pytest

from tests.faults.world import World
from tests.postgres import wait_until
from tests.runs import event_names, run_row


@pytest.mark.parametrize("fault", ["refuses", "hangs", "breaks off"])
async def test_storage_that_fails_for_a_moment_costs_no_second_image(world: World, fault: str) -> None:
    match fault:
        case "refuses":
            world.gate.closed = True
        case "hangs":
            world.gate.passing["POST"] = asyncio.Event()
        case _:
            world.gate.cuts = 2
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        await wait_until(lambda: world.gate.uploads(run), timeout=20)
        world.gate.closed = False
        if event := world.gate.passing.pop("POST", None):
            event.set()
        row = await world.until(run, "completed")
        await world.all_ended_once()
    assert len(world.api.requests) == 1
    assert (await event_names(world.db, run)).count("generated") == 1
    assert len(await world.fetched(row["payload"]["imageUrl"])) == row["payload"]["bytes"]


async def test_storage_that_is_away_for_longer_than_three_tries_gets_the_image_once_it_is_back(world: World) -> None:
    world.gate.closed = True
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        await wait_until(lambda: world.gate.looks > 2, timeout=30)
        assert world.gate.uploads(run) == 3
        row = await run_row(world.db, run)
        assert (row["status"], row["message"]) == (
            "running",
            "Storage does not answer. The image is kept until it does.",
        )
        world.gate.closed = False
        row = await world.until(run, "completed")
        await world.all_ended_once()
    assert world.gate.uploads(run) == 4
    assert len(world.api.requests) == 1
    assert row["payload"]["thumbnailUrl"]
    (stored,) = await world.events(run, "stored")
    assert stored["uploadTries"] == 4
    assert len(await world.fetched(row["payload"]["imageUrl"])) == row["payload"]["bytes"]


async def test_a_run_that_is_cancelled_while_storage_is_away_waits_no_longer(world: World) -> None:
    world.gate.closed = True
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        await wait_until(lambda: world.gate.looks > 1, timeout=30)
        await world.db.execute("update runs set status = 'cancelled' where id = $1", run)
        await world.nothing_in_flight()
        await world.all_ended_once()
    assert world.gate.uploads(run) == 3


async def test_storage_that_refuses_for_good_fails_the_run_after_three_tries_with_its_cost_and_requeueing_helps(
    world: World,
) -> None:
    world.gate.closed_for = ".png"
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        row = await world.until(run, "failed")
        assert row["payload"]["code"] == "storage_unavailable"
        assert "equeue" in row["payload"]["hint"]
        assert row["attempt"] == 1
        assert len(world.api.requests) == 1
        assert world.gate.uploads(run) == 3
        (generated,) = await world.events(run, "generated")
        assert generated["cost"] > 0
        await world.all_ended_once()

        world.gate.closed_for = None
        await world.db.execute("update runs set status = 'pending' where id = $1", run)
        await world.until(run, "completed")
        await world.all_ended_once()
        await world.nothing_in_flight()
    costs = await world.db.fetchrow("select images, cost from run_costs")
    assert costs is not None
    assert costs["images"] == len(world.api.requests)
    assert float(costs["cost"]) == pytest.approx(2 * generated["cost"])


async def test_a_picture_that_is_stored_is_not_thrown_away_for_want_of_a_thumbnail(world: World) -> None:
    world.gate.closed_for = ".thumb.webp"
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        row = await world.until(run, "completed")
        assert row["payload"]["thumbnailUrl"] is None
        assert len(await world.fetched(row["payload"]["imageUrl"])) == row["payload"]["bytes"]
        assert "no thumbnail" in str(
            await world.db.fetchval("select payload from run_events where payload ->> 'event' = 'warning'")
        )
        await world.all_ended_once()
