"""A daemon that is frozen for longer than its lease: others take its runs, and when it thaws it does no harm."""

import asyncio
import signal

import pytest

from tests.daemons import Daemon
from tests.fakes.openai_api import hang, held
from tests.faults.world import World
from tests.postgres import wait_until
from tests.runs import event_names


async def freeze_until_taken_over(world: World, frozen: Daemon, run: str) -> None:
    await world.may_judge()
    frozen.signal(signal.SIGSTOP)

    async def taken() -> bool:
        return "taken_over" in await event_names(world.db, run)

    await wait_until(taken, timeout=20)


async def works(world: World, it: Daemon) -> None:
    """It has registered anew, holds nothing, and takes new runs."""
    await wait_until(lambda: it.logged("daemon.rejoined"), timeout=20)
    await world.nothing_in_flight()


@pytest.mark.parametrize("answered", ["while it is frozen", "after it has thawed"])
async def test_what_a_zombie_is_given_late_is_counted_and_never_stored(world: World, answered: str) -> None:
    go = asyncio.Event()
    world.api.next(held(go))
    async with world.daemon() as zombie:
        await zombie.started()
        (run,) = await world.order()
        await world.called(1)
        async with world.daemon() as other:
            await other.started()
            await freeze_until_taken_over(world, zombie, run)
            row = await world.until(run, "completed")
            if answered == "while it is frozen":
                go.set()
            zombie.signal(signal.SIGCONT)
            await works(world, zombie)
            go.set()
        # Alone now, it goes on to work.
        (later,) = await world.order()
        await world.until(later, "completed")
        await world.all_ended_once()
    assert len(world.api.requests) == 3
    assert world.gate.uploads(run) == 1
    late = [*await world.events(run, "late"), *await world.events(run, "unknown_outcome")]
    assert [bool(data.get("cost") or data.get("possibleCost")) for data in late] == [True]
    assert len(await world.fetched(row["payload"]["imageUrl"])) == row["payload"]["bytes"]


async def test_a_zombie_that_was_about_to_upload_does_not(world: World) -> None:
    world.gate.passing["POST"] = asyncio.Event()
    async with world.daemon() as zombie:
        await zombie.started()
        (run,) = await world.order()
        # The first upload is answered with 503 while it is frozen: it would try again.
        await wait_until(lambda: world.gate.uploads(run) == 1, timeout=20)
        async with world.daemon() as other:
            await other.started()
            await freeze_until_taken_over(world, zombie, run)
            world.gate.closed = True
            world.gate.passing.pop("POST").set()
            await asyncio.sleep(0)
            world.gate.closed = False
            await world.until(run, "completed")
            zombie.signal(signal.SIGCONT)
            await works(world, zombie)
            await world.all_ended_once()
    assert world.gate.uploads(run) == 2
    assert len(world.api.requests) == 2


async def test_a_run_that_is_requeued_and_taken_again_by_its_own_daemon_ends_with_the_later_picture(
    world: World,
) -> None:
    world.api.next(hang(), hang())
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order()
        for number in (1, 2):
            await world.called(number)
            await world.db.execute("update runs set status = 'pending' where id = $1", run)
        row = await world.until(run, "completed")
        await world.nothing_in_flight()
        await world.all_ended_once()
    assert len(world.api.requests) == 3
    assert row["attempt"] == 1
    assert world.gate.uploads(run) == 1
    broken_off = await world.events(run, "unknown_outcome")
    assert len(broken_off) == 2
    assert all(data["possibleCost"] for data in broken_off)
    assert not it.logged("run.crashed")
