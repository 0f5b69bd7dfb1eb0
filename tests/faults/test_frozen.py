"""A daemon frozen for longer than its lease (a zombie): its runs are taken over, and its late results are fenced off."""

import asyncio
import signal

import httpx
import pytest

from tests.fakes.openai_api import hang, held
from tests.fakes.server import picture
from tests.support.daemon_harness import fetch
from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import wait_until
from tests.support.runs import run_row


async def freeze_until_taken_over(harness: FaultHarness, frozen: Daemon, run: str) -> None:
    """Stop a daemon until its run has been taken over."""
    await harness.allow_take_over()
    frozen.signal(signal.SIGSTOP)
    await harness.wait_for_event(run, "taken_over")


async def wait_until_rejoined(harness: FaultHarness, process: Daemon) -> None:
    """Wait until the daemon has registered anew, and no daemon holds a run."""
    await wait_until(lambda: process.logged("daemon.rejoined"), timeout=20)
    await harness.wait_until_idle()


@pytest.mark.parametrize("returned", ["while it is frozen", "after it has thawed"])
async def test_late_result_of_a_zombie_is_counted_but_not_stored(harness: FaultHarness, returned: str) -> None:
    go = asyncio.Event()
    harness.api.next(held(go))
    async with harness.run_daemon() as zombie:
        await zombie.started()
        run = await harness.insert_run()
        await harness.wait_for_requests(1)
        async with harness.run_daemon() as other:
            await other.started()
            await freeze_until_taken_over(harness, zombie, run)
            row = await harness.wait_for_status(run, "completed")
            if returned == "while it is frozen":
                go.set()
            zombie.signal(signal.SIGCONT)
            await wait_until_rejoined(harness, zombie)
            go.set()
        # Alone now, it makes the next image.
        later = await harness.insert_run()
        await harness.wait_for_status(later, "completed")
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 3
    assert harness.gate.uploads(run) == 1
    late = [*await harness.event_data(run, "late"), *await harness.event_data(run, "unknown_outcome")]
    assert [bool(data.get("cost") or data.get("possibleCost")) for data in late] == [True]
    assert len((await fetch(row["payload"]["imageUrl"])).content) == row["payload"]["bytes"]


async def test_zombie_does_not_repeat_its_upload(harness: FaultHarness) -> None:
    async with harness.run_daemon() as zombie:
        await harness.ready(zombie)
        harness.gate.held["POST"] = asyncio.Event()
        run = await harness.insert_run()
        # The first upload returns 503 while the daemon is frozen: it would try again.
        await wait_until(lambda: harness.gate.uploads(run) == 1, timeout=20)
        async with harness.run_daemon() as other:
            await other.started()
            await freeze_until_taken_over(harness, zombie, run)
            harness.gate.closed = True
            harness.gate.held.pop("POST").set()
            await asyncio.sleep(0)
            harness.gate.closed = False
            await harness.wait_for_status(run, "completed")
            zombie.signal(signal.SIGCONT)
            await wait_until_rejoined(harness, zombie)
            await harness.assert_all_end_once()
    assert harness.gate.uploads(run) == 2
    assert len(harness.api.requests) == 2


async def seen(url: str) -> bytes | None:
    """Return what is at an address; None while it is being replaced."""
    try:
        return (await fetch(url)).content
    except httpx.HTTPStatusError:
        return None


@pytest.mark.parametrize("how", ["taken over", "requeued"])
async def test_late_overwrite_of_a_zombie_is_put_right(harness: FaultHarness, how: str) -> None:
    late = asyncio.Event()
    harness.api.picture = picture((64, 64))
    async with harness.run_daemon() as zombie:
        await harness.ready(zombie)
        harness.gate.kept_waiting.append(late)
        run = await harness.insert_run()
        await wait_until(lambda: harness.gate.uploads(run) == 1, timeout=20)
        harness.api.picture = picture((96, 96))
        async with harness.run_daemon() as other:
            await other.started()
            if how == "requeued":
                zombie.signal(signal.SIGSTOP)
                await harness.requeue(run)
            else:
                await freeze_until_taken_over(harness, zombie, run)
            row = await harness.wait_for_status(run, "completed")
            url = row["payload"]["imageUrl"]
            finished = (await fetch(url)).content
            assert len(finished) == row["payload"]["bytes"]
            # Storage completes the frozen daemon's upload only now.
            late.set()

            async def overwritten() -> bool:
                return await seen(url) not in (None, finished)

            await wait_until(overwritten)
            zombie.signal(signal.SIGCONT)

            async def put_right() -> bool:
                return await seen(url) == finished

            await wait_until(put_right, timeout=20)
            await harness.assert_all_end_once()
    assert (await run_row(harness.db, run))["payload"] == row["payload"]
    assert len(harness.api.requests) == 2


async def test_requeue_during_the_call_ends_with_the_last_image(
    harness: FaultHarness,
) -> None:
    harness.api.next(hang(), hang())
    async with harness.run_daemon() as it:
        await it.started()
        run = await harness.insert_run()
        for number in (1, 2):
            await harness.wait_for_requests(number)
            await harness.requeue(run)
        row = await harness.wait_for_status(run, "completed")
        await harness.wait_until_idle()
        await harness.assert_all_end_once()
    assert len(harness.api.requests) == 3
    assert row["attempt"] == 1
    assert harness.gate.uploads(run) == 1
    broken_off = await harness.event_data(run, "unknown_outcome")
    assert len(broken_off) == 2
    assert all(data["possibleCost"] for data in broken_off)
    assert not it.logged("run.crashed")
