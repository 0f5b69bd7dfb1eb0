"""A daemon is killed, at every point of a run: another one ends the run, once."""

import asyncio
import signal

import pytest

from tests.daemons import Daemon
from tests.fakes.openai_api import hang
from tests.faults.world import World
from tests.postgres import wait_until
from tests.runs import event_names, run_row


async def kill(it: Daemon) -> None:
    it.signal(signal.SIGKILL)
    await it.ended()


async def test_a_killed_daemon_is_taken_over_after_its_lease_and_the_call_is_counted(world: World) -> None:
    world.api.next(hang())
    async with world.daemon() as one:
        await one.started()
        (run,) = await world.order()
        await world.called(1)
        async with world.daemon() as two:
            await two.started()
            await world.may_judge()
            await kill(one)
            row = await world.until(run, "completed")
            await world.nothing_in_flight()
    assert row["attempt"] == 2
    assert len(world.api.requests) == 2
    (taken,) = await world.events(run, "taken_over")
    assert taken["possibleCost"] is not None
    await world.all_ended_once()


async def test_with_the_session_gone_nobody_waits_for_a_long_lease(world: World) -> None:
    world.api.next(hang())
    async with world.daemon(IMAGE_JOBS_LEASE="30") as one:
        await one.started()
        (run,) = await world.order()
        await world.called(1)
        async with world.daemon(IMAGE_JOBS_LEASE="30") as two:
            await two.started()

            async def vouched() -> bool:
                return await world.db.fetchval("select bool_and(session_lock) from private.daemons")

            await wait_until(vouched)
            await world.may_judge()
            loop = asyncio.get_running_loop()
            killed = loop.time()
            await kill(one)

            async def taken() -> bool:
                return "taken_over" in await event_names(world.db, run)

            await wait_until(taken, timeout=20)
            assert loop.time() - killed < 13  # 6 s of silence, and the beat that notices
            await world.until(run, "completed")
    assert len(world.api.requests) == 2
    await world.all_ended_once()


@pytest.mark.parametrize("thumbnail", [True, False])
async def test_a_picture_that_was_stored_before_the_kill_is_adopted_with_all_that_was_known_of_it(
    world: World, thumbnail: bool
) -> None:
    world.api.compatible = world.api.answer_with_url = True
    world.gate.closed_for = None if thumbnail else ".thumb.webp"
    world.gate.passing["GET"] = asyncio.Event()
    async with world.daemon() as one:
        await one.started()
        (run,) = await world.order()
        # It asks whether the URL answers: the picture is stored, the run is not settled.
        await wait_until(lambda: any(method == "GET" for method, _ in world.gate.requests), timeout=20)
        async with world.daemon() as two:
            await two.started()
            await world.may_judge()
            await kill(one)
            world.gate.closed_for = None
            world.gate.passing.pop("GET").set()
            row = await world.until(run, "completed")
    assert len(world.api.requests) == 1
    assert world.gate.uploads(run) == 1
    payload = row["payload"]
    assert payload["originalUrl"] == f"{world.api.url}/files/picture.png"
    assert payload["revisedPrompt"] == "As it was drawn"
    assert len(await world.fetched(payload["imageUrl"])) == payload["bytes"]
    assert (payload["thumbnailUrl"] is not None) == thumbnail
    assert (await event_names(world.db, run)).count("generated") == 1
    assert "adopted" in await event_names(world.db, run)
    assert await world.fetched(row["payload"]["imageUrl"])
    await world.all_ended_once()


async def test_an_order_that_the_provider_has_taken_is_asked_for_by_another_daemon_and_not_sent_again(
    world: World,
) -> None:
    async with world.daemon() as one:
        await one.started()
        runs = await world.order(5, "demo:painter", demo={"submit": 3}, promptSpec={"basePrompt": "a", "size": "64x64"})

        async def parked() -> bool:
            return await world.db.fetchval("select bool_and(provider_job_id is not null) from runs")

        await wait_until(parked, timeout=20)
        await kill(one)
    async with world.daemon(IMAGE_JOBS_POLL_INTERVAL="0.3") as two:
        await two.started()
        await world.all_ended_once()
    for run in runs:
        assert (await event_names(world.db, run)).count("submitted") == 1
        assert (await run_row(world.db, run))["status"] == "completed"


async def test_a_daemon_that_dies_alone_is_taken_over_by_its_successor(world: World) -> None:
    world.api.next(hang())
    async with world.daemon() as one:
        await one.started()
        (run,) = await world.order()
        await world.called(1)
        await kill(one)
    async with world.daemon() as two:
        await two.started()
        await world.until(run, "completed")
    assert len(world.api.requests) == 2
    await world.all_ended_once()


async def test_a_run_whose_every_holder_goes_silent_is_given_up_with_a_reason(world: World) -> None:
    world.api.next(hang(), hang(), hang())
    (run,) = await world.order()
    async with world.daemon() as judge:
        await judge.started()
        for attempt in (1, 2, 3):
            await world.called(attempt)
            holder = await world.holder(run)
            # As a death of its holder would be seen: silent for longer than its lease.
            await world.db.execute(
                "update private.daemons set ended_at = now(), ended = 'taken over' where id = $1", holder
            )
            await world.db.execute("update private.daemons set fresh_since = fresh_since - interval '1 day'")

            async def taken(attempt: int = attempt) -> bool:
                return len(await world.events(run, "taken_over")) == attempt

            await wait_until(taken)
            await world.db.execute("update runs set due_at = now() where status = 'pending'")
        row = await world.until(run, "failed")
        await world.nothing_in_flight()
    assert row["payload"]["code"] == "outcome_unknown"
    await world.all_ended_once()
