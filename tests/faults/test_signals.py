"""Signals are obeyed, on the oldest Python too: amid notifications, and whatever hangs."""

import asyncio
import signal
from contextlib import AsyncExitStack

import pytest

from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness
from tests.support.postgres import connect, wait_until

AT_ONCE = 5
LIVES = 6
LONGEST = 300
"""Seconds that a loaded machine may take for five starts at once, or a stop. A daemon that does not obey takes for ever."""

STUBBORN = (
    "from daemon.providers import PROVIDERS; PROVIDERS['stubborn'] = 'tests.support.stubborn_provider'; "
    "from daemon.cli import main; main()"
)


async def notify(dsn: str) -> None:
    """As an inserting application does, every 10 ms."""
    db = await connect(dsn)
    try:
        while True:
            await db.execute("select pg_notify('image_jobs_wake', '')")
            await asyncio.sleep(0.01)
    finally:
        await db.close()


@pytest.mark.timeout(600)
async def test_sigterm_is_obeyed_amid_notifications(harness: FaultHarness) -> None:
    """Thirty times: five processes, each of which is a daemon six times, always with a run under way."""
    await harness.insert_runs(20 * AT_ONCE * LIVES, "demo:painter", prompt={"size": "64x64"}, demo={"slow": 0.6})
    notifying = asyncio.create_task(notify(harness.project.dsn))
    async with AsyncExitStack() as stack:
        environment = {"OPENAI_API_KEY": "", "IMAGE_JOBS_CONCURRENCY": "1", "LIVES": str(LIVES)}
        program = ("-m", "tests.support.many_lives")
        processes = [
            await stack.enter_async_context(harness.run_daemon(program=program, **environment)) for _ in range(AT_ONCE)
        ]
        await asyncio.gather(*(stop_again_and_again(each) for each in processes))
    notifying.cancel()
    await asyncio.gather(notifying, return_exceptions=True)
    rows = await harness.db.fetch("select status, attempt, count(*) from runs group by 1, 2")
    assert {(row["status"], row["attempt"]) for row in rows} == {("completed", 1), ("pending", 0)}


async def stop_again_and_again(process: Daemon) -> None:
    """Stop each daemon of a process shortly after it has begun to claim."""
    for life in range(1, LIVES + 1):
        await logged(process, "listener.connected", life)
        await asyncio.sleep(0.3)
        process.signal(signal.SIGTERM)
        await logged(process, "daemon.stopped", life)
    assert await process.ended(timeout=LONGEST) == 0


async def logged(process: Daemon, event: str, times: int) -> None:
    """Wait for an event for as long as the test may take: on a loaded machine five starts at once take their time."""

    def seen() -> bool:
        return len(process.logged(event)) >= times

    try:
        await wait_until(lambda: seen() or process.process.returncode is not None, timeout=LONGEST)
        await wait_until(seen)  # the last lines of one that has ended may still be on their way
    except AssertionError:
        raise AssertionError(f"no {event} in life {times}: {process.raw[-4:]}") from None


MODELS = ("deaf", "thread", "blocked", "aclose")
"""Of `tests/support/stubborn_provider.py`: the ways to hang."""


@pytest.mark.timeout(120)
async def test_a_daemon_ends_whatever_hangs(harness: FaultHarness) -> None:
    """Each model twice: half of the daemons are told twice, the others run out of time."""
    environment = {"OPENAI_API_KEY": "", "STUBBORN": "1", "IMAGE_JOBS_CONCURRENCY": "1"}
    async with AsyncExitStack() as stack:
        program = ("-c", STUBBORN)
        insisted, patient = [
            [
                await stack.enter_async_context(harness.run_daemon(program=program, **environment, **more))
                for _ in MODELS
            ]
            for more in ({}, {"IMAGE_JOBS_DRAIN_TIMEOUT": "1"})
        ]
        for each in (*insisted, *patient):
            await each.started()
        for model in 2 * MODELS:
            await harness.insert_runs(1, f"stubborn:{model}")
        await wait_until(lambda: all(hanging(each) for each in (*insisted, *patient)), timeout=20)
        await asyncio.sleep(0.5)  # the loop of one is blocked only then
        for each in (*insisted, *patient):
            each.signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        for each in insisted:
            each.signal(signal.SIGTERM)
        for each in (*insisted, *patient):
            assert await each.ended(timeout=22) == 1, hanging(each)
            assert each.logged("daemon.cut_off")


def hanging(process: Daemon) -> list[str]:
    """How it hangs."""
    return [line for line in process.raw if line.startswith("stubborn ")]


async def test_the_third_signal_ends_a_daemon_at_once(harness: FaultHarness) -> None:
    async with harness.run_daemon(program=("-c", STUBBORN), STUBBORN="1") as it:
        await it.started()
        (run,) = await harness.insert_runs(1, "stubborn:deaf")
        await harness.wait_for_status(run, "running")
        for _ in range(3):
            it.signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
        assert await it.ended(timeout=8) == 1
        assert it.logged("daemon.cut_off")
